"""What ``/metrics`` says of the patches: this server's living processes, no others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from typing import Any

import pytest

from vllm_ext import metrics
from vllm_ext.patching.report import server

pytestmark = pytest.mark.vllm  # prometheus_client comes with it


def state(pid: int = 1, **other: Any) -> dict[str, Any]:
    """A state file's content; pid 1 lives always."""
    patch = {"name": "a", "state": "in use", "aside": {"drafts": 3}}
    return {"pid": pid, "process": "P", "server": server(), "patches": [patch], **other}


@pytest.fixture
def shown(tmp_path):
    """Put states into a folder, and hear what a scrape of it says."""
    from prometheus_client import CollectorRegistry, generate_latest

    collector = metrics.PatchCollector()
    collector.folder = tmp_path
    registry = CollectorRegistry(auto_describe=True)
    registry.register(collector)

    def shown(*states: Any) -> list[str]:
        for number, each in enumerate(states):
            text = each if isinstance(each, str) else json.dumps(each)
            (tmp_path / f"{number}.json").write_text(text)
        lines = generate_latest(registry).decode().splitlines()
        return sorted(line for line in lines if line[0] != "#")

    return shown


def info(pid: int, process: str = "P") -> str:
    labels = f'patch="a",pid="{pid}",process="{process}",state="in use"'
    return f"vext_patch_info{{{labels}}} 1.0"


def left(count: int, reason: str = "drafts") -> str:
    labels = f'patch="a",reason="{reason}"'
    return f"vext_steps_left_to_stock_total{{{labels}}} {count}.0"


def test_states_are_per_process_and_counts_are_summed(shown):
    other = [{"name": "a", "state": "in use", "aside": {"drafts": 4, "LoRA": 1}}]
    found = shown(state(), state(os.getpid(), process="Q", patches=other))
    assert found == sorted([info(1), info(os.getpid(), "Q"), left(7), left(1, "LoRA")])


def test_a_count_is_as_new_as_the_file(shown):
    assert left(3) in shown(state())
    grown = [{"name": "a", "state": "in use", "aside": {"drafts": 9}}]
    assert shown(state(patches=grown)) == [info(1), left(9)]


def test_dead_processes_and_other_servers_are_left_out(shown):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    older = state()
    del older["server"]  # a file of an earlier version
    assert shown(state(ended.pid), state(server="another"), older) == []


def test_children_are_of_the_same_server_and_nobody_else_is():
    code = "from vllm_ext.patching.report import server; print(server())"
    started = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert started.strip() != server()
    child = (
        "import multiprocessing as m\n"
        "from vllm_ext.patching.report import server\n"
        "if __name__ == '__main__':\n"
        "    for how in ('spawn', 'fork'):\n"
        "        with m.get_context(how).Pool(1) as pool:\n"
        "            assert pool.apply(server) == server(), how\n"
    )
    subprocess.run([sys.executable, "-c", child], check=True)


BROKEN = {
    "cut short": "{",
    "another shape": "[]",
    "another's": '{"name": "package"}',
    "half of a patch": state(patches=[{"name": "b"}]),
    "a text as count": state(patches=[*state()["patches"], {"aside": {"b": "c"}}]),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_file_is_said_once_and_the_rest_is_shown(broken, shown, caplog):
    for _ in range(2):
        assert shown(BROKEN[broken], state()) == [info(1), left(3)]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "0.json left out of /metrics" in caplog.text


def test_without_a_folder_nothing_is_shown(shown, tmp_path):
    collector = metrics.PatchCollector()
    assert list(collector.collect()) == []
    tmp_path.rmdir()
    assert shown() == []


ROUTE = """
    import json, os, sys
    from pathlib import Path
    several, folder = sys.argv[1] == "several", Path(sys.argv[2])
    from vllm_ext import plugin
    plugin.register()
    early = [n for n in sys.modules if n.startswith("prometheus_client")]
    assert not early, early
    if several:
        from vllm.v1.metrics.prometheus import setup_multiprocess_prometheus
        setup_multiprocess_prometheus()
    from fastapi import FastAPI
    from fastapi.testclient import TestClient
    from vllm.entrypoints.serve.instrumentator.metrics import attach_router
    app = FastAPI()
    attach_router(app)
    path = folder / f"{os.getpid()}.json"
    state = json.loads(path.read_text())
    state["patches"][0]["aside"] = {"drafts": 5}
    path.write_text(json.dumps(state))
    (folder / "0.json").write_text("{")
    answer = TestClient(app).get("/metrics")
    assert answer.status_code == 200
    print(answer.text)
"""


@pytest.mark.parametrize("servers", ["one", "several"])
def test_vllms_own_route_shows_them(servers, tmp_path):
    """With one API server and in Prometheus's mode for several of them."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(ROUTE))
    folder = tmp_path / "states"
    done = subprocess.run(
        [sys.executable, str(script), servers, str(folder)],
        env={**os.environ, "VEXT": "1", "VEXT_STATE_DIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    counted = "vext_steps_left_to_stock_total{"
    (line,) = [line for line in done.stdout.splitlines() if line.startswith(counted)]
    assert line.endswith('reason="drafts"} 5.0')
    assert done.stdout.count("# TYPE vext_patch_info gauge") == 1
    assert ("process_cpu" in done.stdout) == (servers == "one")  # the mode was on


def test_what_goes_wrong_does_not_reach_vllm(monkeypatch, caplog):
    from prometheus_client.multiprocess import MultiProcessCollector

    monkeypatch.delattr(MultiProcessCollector, "collect")
    metrics._join(sys)
    assert "/metrics says nothing of patches" in caplog.text
