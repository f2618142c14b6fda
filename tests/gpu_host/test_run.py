"""Stages on a pretend GPU host: limits, resumption, switches, and what is written."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from vllm_ext.microbench.gpu_host import bundle, checkout, run, stages, switches
from vllm_ext.microbench.gpu_host.host import Host, environment, link_checkout
from vllm_ext.microbench.gpu_host.run import Runner
from vllm_ext.microbench.gpu_host.stages import PYTHON, RESULT, STAGES, Stage, Task

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """A home beside a small checkout of its own."""
    root = tmp_path / "checkout"
    (root / "vllm_ext").mkdir(parents=True)
    (root / "vllm_ext" / "code.py").write_text("one = 1\n")
    (root / "cpulane" / "vllm_ext_cpulane").mkdir(parents=True)
    (root / "microbench" / "results").mkdir(parents=True)
    (root / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    return Host(tmp_path / "home", root)


def runner(host: Host, **options: Any) -> Runner:
    out = host.home.parent / "out"
    out.mkdir(exist_ok=True)
    return Runner(host, out, **options)


def task(name: str, code: str, *arguments: str, **options: Any) -> Task:
    """One that runs Python code; ``sys.argv[1]`` is the file for its result."""
    command = (PYTHON, "-c", dedent(code), RESULT, *arguments)
    return Task(name, command, **options)


def stage(*tasks: Task, limit_s: float = 30, **options: Any) -> Stage:
    return Stage("kernels", "pretend", limit_s, tasks=tasks, **options)


def written(host: Host, name: str = "kernels") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        (host.home.parent / "out" / f"{name}.json").read_text()
    )
    return found


def statuses(host: Host) -> list[tuple[str, str]]:
    lines = (host.home.parent / "out" / "status.jsonl").read_text().splitlines()
    return [(each["stage"], each["status"]) for each in map(json.loads, lines)]


GOOD = """
import json, sys
open(sys.argv[1], "w").write(json.dumps({"answer": 42}))
print("all is well")
"""
# Counts how often it ran, in the file that is its second argument.
COUNTED = """
import json, pathlib, sys
count = pathlib.Path(sys.argv[2])
count.write_text(count.read_text() + "x" if count.exists() else "x")
pathlib.Path(sys.argv[1]).write_text(json.dumps({"runs": len(count.read_text())}))
"""


# -- results and status ------------------------------------------------------------


def test_a_stage_leaves_its_results_and_a_line(host: Host):
    assert runner(host).run(stage(task("a", GOOD), task("b", GOOD))) == "complete"
    found = written(host)
    assert found["status"] == "complete"
    assert found["switches"]["name"] == "none"
    assert found["machine"]["cores"] >= 1
    assert {name: each["result"] for name, each in found["tasks"].items()} == {
        "a": {"answer": 42},
        "b": {"answer": 42},
    }
    assert found["tasks"]["a"]["said"] == "all is well"
    assert statuses(host) == [("kernels", "running"), ("kernels", "complete")]


def test_a_command_that_fails_does_not_stop_the_next(host: Host):
    bad = task("bad", "import sys; print('the card is on fire'); sys.exit(4)")
    assert runner(host).run(stage(bad, task("good", GOOD))) == "failed"
    found = written(host)["tasks"]
    assert found["bad"]["reason"] == "exit status 4: the card is on fire"
    assert "on fire" in found["bad"]["log"]
    assert found["good"]["status"] == "complete"


def test_one_that_crashes_says_how(host: Host):
    crash = task("crash", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    assert runner(host).run(stage(crash)) == "failed"
    assert written(host)["tasks"]["crash"]["reason"] == "ended by SIGSEGV"


def test_json_on_standard_output_is_read_past_what_is_said_beside(host: Host):
    talking = task(
        "talks",
        "import json, sys; print('chatter', file=sys.stderr); print(json.dumps([1]))",
        reads="stdout",
    )
    assert runner(host).run(stage(talking)) == "complete"
    assert written(host)["tasks"]["talks"]["result"] == [1]


def test_files_added_to_the_results_come_along(host: Host):
    (host.root / "microbench" / "results" / "old.json").write_text("{}")
    adds = task(
        "adds",
        """
        import pathlib, sys
        pathlib.Path(sys.argv[1]).write_text("[]")
        folder = pathlib.Path("microbench/results/nvidia-h200")
        folder.mkdir()
        (folder / "new_prove.json").write_text('{"patches": {}}')
        """,
        kept=True,
    )
    assert runner(host).run(stage(adds)) == "complete"
    files = written(host)["tasks"]["adds"]["files"]
    assert files == {"nvidia-h200/new_prove.json": {"patches": {}}}


def test_without_its_tool_a_command_is_not_run_and_said(host: Host):
    checks = task("checks", GOOD, tool="no-such-sanitizer")
    assert runner(host).run(stage(checks, task("good", GOOD))) == "complete"
    assert written(host)["tasks"]["checks"] == {
        "status": "not started",
        "reason": "there is no no-such-sanitizer on this machine",
    }


# -- limits ------------------------------------------------------------------------

SLOW = """
import json, pathlib, sys, time
done = pathlib.Path(sys.argv[1])
found = json.loads(done.read_text()) if done.exists() else []
while len(found) < 4:
    found.append(sys.argv[2])
    done.write_text(json.dumps(found))
    time.sleep(float(sys.argv[2]))
"""


class Clock:
    """Time, which can be put forward."""

    ahead = 0.0
    strftime, gmtime = staticmethod(time.strftime), staticmethod(time.gmtime)

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead


def test_one_stopped_at_its_limit_leaves_what_it_had_and_goes_on_later(
    host: Host, monkeypatch: pytest.MonkeyPatch
):
    clock, keep = Clock(), Runner._keep

    def late(self: Runner, which: Stage, found: Any) -> None:
        keep(self, which, found)
        if "result" in found["tasks"]["slow"]:
            clock.ahead = 25.0

    with monkeypatch.context() as patched:
        patched.setattr(run, "time", clock)
        patched.setattr(Runner, "_keep", late)
        slow = task("slow", SLOW, "60", resumes=True)
        assert runner(host)._tasks(stage(slow), clock.monotonic() + 20)[0] == "stopped"
    found = written(host)["tasks"]["slow"]
    assert found["result"] == ["60"]
    assert found["reason"].startswith("stopped at its limit of ")
    quick = task("slow", SLOW, "0", resumes=True)
    assert runner(host).run(stage(quick)) == "complete"
    assert written(host)["tasks"]["slow"]["result"] == ["60", "0", "0", "0"]


def test_results_are_there_while_a_command_still_runs(
    host: Host, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(run, "POLL_S", 0.05)
    seen: list[Any] = []
    keep = Runner._keep

    def look(self: Runner, which: Stage, found: Any) -> None:
        keep(self, which, found)
        seen.append(json.loads(json.dumps(found["tasks"]["slow"])))

    monkeypatch.setattr(Runner, "_keep", look)
    runner(host)._run(
        STAGES["kernels"], task("slow", SLOW, "0.2"), switches.NONE, 30, {}
    )
    while_running = [each for each in seen if each["status"] == "running"]
    assert any(0 < len(each.get("result", ())) < 4 for each in while_running)


def test_what_a_stopped_command_started_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Also what has a session of its own, as our engines have."""
    pids = tmp_path / "pids"
    code = f"""
import os, pathlib, signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
children = [subprocess.Popen(sleep, start_new_session=new) for new in (False, True)]
numbers = [os.getpid(), *(child.pid for child in children)]
pathlib.Path({str(pids)!r}).write_text(" ".join(map(str, [*numbers, "end"])))
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    while not (pids.exists() and pids.read_text().endswith("end")):
        time.sleep(0.02)
    monkeypatch.setattr(run, "GRACE_S", 0.1)
    assert run._end(process, run.Family(process.pid))
    for pid in pids.read_text().split()[:3]:
        status = Path(f"/proc/{pid}/stat")
        deadline = time.monotonic() + 10
        while status.exists() and status.read_text().split()[2] != "Z":
            assert time.monotonic() < deadline
    assert not run._end(process, run.Family(process.pid))


def test_an_engine_whose_parent_crashed_is_gone(host: Host, tmp_path: Path):
    number = tmp_path / "pid"
    crash = task(
        "crash",
        """
        import os, pathlib, signal, subprocess, sys, time
        sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
        child = subprocess.Popen(sleep, start_new_session=True)
        pathlib.Path(sys.argv[2]).write_text(str(child.pid))
        time.sleep(1.2)
        os.kill(os.getpid(), signal.SIGKILL)
        """,
        str(number),
    )
    assert runner(host).run(stage(crash)) == "failed"
    deadline = time.monotonic() + 10
    status = Path(f"/proc/{number.read_text()}/stat")
    while status.exists() and status.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline


@pytest.mark.parametrize(("code", "why"), [(0, "left no result"), (1, "no GPU")])
def test_without_a_result_nothing_is_complete(host: Host, code: int, why: str):
    """Exit status 1 of a benchmark: it found something bad, or it could not run."""
    says = task("bench", f"import sys; print('no GPU'); sys.exit({code})", fine=(0, 1))
    assert runner(host).run(stage(says)) == "failed"
    assert why in written(host)["tasks"]["bench"]["reason"]
    found = task("bench", GOOD + "\nsys.exit(1)", fine=(0, 1))
    assert runner(host).run(stage(found)) == "complete"


def test_the_commands_of_a_stage_share_its_limit(host: Host):
    sleeps = [task(name, "import time; time.sleep(60)") for name in "ab"]
    started = time.monotonic()
    assert runner(host).run(stage(*sleeps, task("c", GOOD), limit_s=1)) == "stopped"
    assert time.monotonic() - started < 5
    found = written(host)["tasks"]
    assert [found[name]["status"] for name in "abc"] == ["stopped"] * 3
    assert found["c"]["reason"] == "no time left"


def test_a_stage_is_not_started_with_too_little_of_the_call_left(host: Host):
    late = runner(host, seconds=run.RESERVE_S + 10)
    assert late.run(stage(task("a", GOOD), limit_s=60)) == "not started"
    assert statuses(host) == [("kernels", "not started")]
    assert not (host.home.parent / "out" / "kernels.json").exists()


def test_the_stages_fit_into_three_calls_of_ten_minutes():
    assert [name for call in stages.CALLS for name in call] == list(STAGES)
    for call in stages.CALLS:
        assert sum(STAGES[name].limit_s for name in call) <= run.CALL_S < 600, call
    assert sum(each.limit_s for each in STAGES.values()) < 30 * 60
    for each in STAGES.values():
        assert all((one.limit_s or 0) <= each.limit_s for one in each.tasks)
        if not any(one.resumes for one in each.tasks):
            assert sum(one.limit_s or 0 for one in each.tasks) <= each.limit_s


@pytest.mark.parametrize("kind", ["kernels", "engine", "linkedin"])
def test_a_benchmark_ends_by_itself_well_before_its_limit(kind: str):
    [each] = STAGES[kind].tasks
    module = importlib.import_module(f"vllm_ext.bench.{kind}")
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    words = each.command[each.command.index(kind) + 1 :]
    args = parser.parse_args(words)
    assert args.seconds <= STAGES[kind].limit_s - 40
    if kind != "kernels":
        assert args.boots == 1


def test_the_sanitizers_run_a_few_tests_of_each_kernel():
    """Those that are there: a name that was changed would select nothing."""
    words = (*stages.KERNEL_PARITY, "-k", stages.SANITIZED)
    for task in STAGES["sanitizer"].tasks:
        assert (*task.command[-len(words) :],) == words
    asked = ("-m", "pytest", "--collect-only", "-q", *words)
    done = subprocess.run(
        [sys.executable, *asked], cwd=ROOT, capture_output=True, text=True, check=True
    )
    chosen = [line for line in done.stdout.splitlines() if "::" in line]
    counts = Counter(line.split("::")[0] for line in chosen)
    assert counts.keys() == {*stages.KERNEL_PARITY}
    assert max(counts.values()) <= 6


def test_the_limit_of_the_call_holds_whatever_the_stages_say(host: Host):
    short = runner(host, seconds=run.RESERVE_S + 21)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(run, "LEAST_S", 0.0)
        short._ends = time.monotonic() + 1
        started = time.monotonic()
        sleeping = task("a", "import time; time.sleep(60)")
        assert short.run(stage(sleeping, limit_s=300)) == "stopped"
    assert time.monotonic() - started < 4


def test_a_background_job_hears_that_its_time_is_over(host: Host):
    """A shell lets those ignore Ctrl-C, and a child would inherit that."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        started = time.monotonic()
        sleeping = task("a", "import time; time.sleep(60)")
        assert runner(host).run(stage(sleeping, limit_s=1)) == "stopped"
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - started < run.GRACE_S


# -- resumption --------------------------------------------------------------------


def test_what_is_complete_is_not_run_again(host: Host, tmp_path: Path):
    counted = stage(task("a", COUNTED, str(tmp_path / "count")))
    for _ in range(2):
        assert runner(host).run(counted) == "complete"
    assert written(host)["tasks"]["a"]["result"] == {"runs": 1}
    assert runner(host, again=True).run(counted) == "complete"
    assert written(host)["tasks"]["a"]["result"] == {"runs": 2}


def test_only_what_failed_is_run_again(host: Host, tmp_path: Path):
    good = task("good", COUNTED, str(tmp_path / "count"))
    runner(host).run(stage(good, task("bad", "raise SystemExit(1)")))
    assert runner(host).run(stage(good, task("bad", GOOD))) == "complete"
    assert written(host)["tasks"]["good"]["result"] == {"runs": 1}


@pytest.mark.parametrize(("stock", "runs"), [(False, 2), (True, 1)])
def test_results_of_other_code_do_not_count(
    host: Host, tmp_path: Path, stock: bool, runs: int
):
    counted = stage(task("a", COUNTED, str(tmp_path / "count")), stock=stock)
    assert runner(host).run(counted) == "complete"
    (host.root / "vllm_ext" / "code.py").write_text("two = 2\n")
    assert runner(host).run(counted) == "complete"
    assert written(host)["tasks"]["a"]["result"] == {"runs": runs}


def test_results_under_other_switches_do_not_count(host: Host, tmp_path: Path):
    counted = stage(task("a", COUNTED, str(tmp_path / "count")), needs="smoke")
    host.results.mkdir(parents=True)
    for runs, used in ((1, switches.NONE), (1, switches.NONE), (2, switches.SINGLE[0])):
        smoke = {"status": "complete", "switches": used.as_dict()}
        (host.results / "smoke.json").write_text(json.dumps(smoke))
        assert runner(host).run(counted) == "complete"
        found = written(host)
        assert found["tasks"]["a"]["result"] == {"runs": runs}
        assert found["switches"]["name"] == used.name


def test_an_earlier_machines_results_are_gone_on_from(host: Host, tmp_path: Path):
    counted = stage(task("a", COUNTED, str(tmp_path / "count")))
    assert runner(host).run(counted) == "complete"
    back = (host.home.parent / "out").rename(tmp_path / "came back")
    fresh = Host(tmp_path / "fresh", host.root)
    second = runner(fresh)
    second.take_over(back)
    assert second.run(counted) == "complete"
    assert written(fresh)["tasks"]["a"]["result"] == {"runs": 1}


def test_a_runner_that_was_killed_leaves_a_stage_to_finish(host: Host, tmp_path: Path):
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_run import SLOW, Host, runner, stage, task
host = Host(Path({str(host.home)!r}), Path({str(host.root)!r}))
runner(host).run(stage(task("slow", SLOW, "60", resumes=True)))
"""
    process = subprocess.Popen([sys.executable, "-c", script], start_new_session=True)
    file = host.home.parent / "out" / "kernels.json"
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if file.exists() and "result" in written(host)["tasks"]["slow"]:
            break
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert written(host)["status"] == "running"
    rest = task("slow", SLOW, "0", resumes=True)
    assert runner(host).run(stage(rest)) == "complete"
    assert written(host)["tasks"]["slow"]["result"] == ["60", "0", "0", "0"]


def test_a_call_that_is_ended_early_takes_its_commands_along(tmp_path: Path):
    pid = tmp_path / "pid"
    sleeps = f"""
import os, pathlib, time
pathlib.Path({str(pid)!r}).write_text(str(os.getpid()))
time.sleep(60)
"""
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_run import STAGES, run, stage, task
STAGES["kernels"] = stage(task("sleeps", {sleeps!r}))
sys.exit(run.main(["kernels", "--home", "home", "--out", "out"]))
"""
    process = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path)
    deadline = time.monotonic() + 30
    while not (pid.exists() and pid.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.terminate()
    assert process.wait(30) == 143
    status = Path(f"/proc/{pid.read_text()}/stat")
    assert not status.exists() or status.read_text().split()[2] == "Z"


def test_a_stage_waits_for_the_one_it_needs(host: Host):
    assert runner(host).run(STAGES["kernels"]) == "not started"
    lines = (host.home.parent / "out" / "status.jsonl").read_text()
    assert "smoke has to be complete first" in lines


# -- switches ----------------------------------------------------------------------

# Passes under some switches; writes down which it was tried with.
SMOKE = """
import json, os, pathlib, sys, time
passes, log = sys.argv[2], pathlib.Path(sys.argv[3])
time.sleep(float(sys.argv[4]))
arguments = json.loads(os.environ["GPU_HOST_ENGINE_ARGUMENTS"])
has = {**arguments, **{n: v for n, v in os.environ.items() if n.startswith("VLLM_")}}
log.write_text((log.read_text() if log.exists() else "") + json.dumps(has) + "\\n")
open(sys.argv[1], "w").write(json.dumps({"booted": True}))
print("booted")
sys.exit(0 if all(name in has for name in passes.split()) else 3)
"""


def smoking(host: Host, tmp_path: Path, passes: str, sleep: float = 0.0) -> Runner:
    host.results.mkdir(parents=True, exist_ok=True)
    complete = {"status": "complete", "tasks": {}}
    (host.results / "environment.json").write_text(json.dumps(complete))
    arguments = (passes, str(tmp_path / "tried"), str(sleep))
    return runner(host, smoke=(PYTHON, "-c", SMOKE, RESULT, *arguments))


def tried(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "tried").read_text().splitlines()]


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("VLLM_")]:
        monkeypatch.delenv(name)


def test_without_trouble_nothing_is_switched_off(host: Host, tmp_path: Path):
    assert smoking(host, tmp_path, "").run(STAGES["smoke"]) == "complete"
    assert written(host, "smoke")["switches"] == switches.NONE.as_dict()
    assert len(tried(tmp_path)) == 1


def test_switches_are_tried_in_order_and_the_first_that_works_is_used(
    host: Host, tmp_path: Path
):
    attempt = smoking(host, tmp_path, "attention_config")
    assert attempt.run(STAGES["smoke"]) == "complete"
    found = written(host, "smoke")
    assert list(found["tasks"]) == [
        *("none", "no FlashInfer autotune", "no FlashInfer sampler", "Triton attention")
    ]
    assert found["switches"]["name"] == "Triton attention"
    assert tried(tmp_path)[2]["VLLM_USE_FLASHINFER_SAMPLER"] == "0"
    last = tried(tmp_path)[3]
    assert last["attention_config"] == {"backend": "TRITON_ATTN"}
    assert "enable_flashinfer_autotune" not in last  # each alone
    # A later stage, in a later call, runs under them.
    shows = task(
        "shows",
        "import os, sys; open(sys.argv[1], 'w')"
        ".write(os.environ['GPU_HOST_ENGINE_ARGUMENTS'])",
    )
    after = stage(shows, needs="smoke")
    assert runner(host).run(after) == "complete"
    found = written(host)
    assert found["switches"]["name"] == "Triton attention"
    assert found["tasks"]["shows"]["result"] == {
        "attention_config": {"backend": "TRITON_ATTN"}
    }


def test_two_things_broken_take_all_switches(host: Host, tmp_path: Path):
    needs = "enforce_eager VLLM_USE_AOT_COMPILE"
    assert smoking(host, tmp_path, needs).run(STAGES["smoke"]) == "complete"
    assert written(host, "smoke")["switches"]["name"] == "all of them"
    assert len(tried(tmp_path)) == len(switches.ORDER)


def test_what_no_switch_helps_says_what_to_do_next(host: Host, tmp_path: Path):
    assert smoking(host, tmp_path, "no_such_thing").run(STAGES["smoke"]) == "failed"
    assert "pack with --no-trim" in written(host, "smoke")["reason"]
    assert len(tried(tmp_path)) == len(switches.ORDER)
    assert runner(host).run(stage(task("a", GOOD), needs="smoke")) == "not started"


def test_a_call_that_ran_out_of_time_goes_on_with_the_next_switch(
    host: Host, tmp_path: Path
):
    """Of two attempts, the first takes so long that the second has to wait."""
    first = smoking(host, tmp_path, "attention_config", sleep=1.5)
    short = Stage("smoke", "", run.LEAST_S + 1, "environment", stock=True)
    assert first.run(short) == "stopped"
    assert written(host, "smoke")["reason"].startswith("no time left to try")
    assert len(tried(tmp_path)) == 1
    rest = smoking(host, tmp_path, "attention_config")
    assert rest.run(STAGES["smoke"]) == "complete"
    assert len(tried(tmp_path)) == 4
    assert list(written(host, "smoke")["tasks"])[0] == "none"


def test_a_first_boot_that_takes_long_is_no_reason_for_a_switch(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It may take longer than an attempt with a switch."""
    monkeypatch.setattr(run, "ATTEMPT_S", 0.5)
    first = smoking(host, tmp_path, "", sleep=1.5)
    assert first.run(STAGES["smoke"]) == "complete"
    assert written(host, "smoke")["switches"] == switches.NONE.as_dict()


@pytest.mark.parametrize("later", [0.0, 60.0])
def test_stock_that_took_too_long_is_tried_again_before_any_switch(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, later: float
):
    """The caches are warm then; if that does not help, the switches are next."""
    monkeypatch.setattr(run, "ATTEMPT_S", 0.5)
    short = Stage("smoke", "", 1.0, "environment", stock=True)
    assert smoking(host, tmp_path, "", sleep=60).run(short) == "stopped"
    found = written(host, "smoke")
    assert found["reason"] == "'none' took over 1 s: run it again"
    assert list(found["tasks"]) == ["none"]
    again = smoking(host, tmp_path, "", sleep=later)
    if not later:
        assert again.run(STAGES["smoke"]) == "complete"
        assert written(host, "smoke")["switches"] == switches.NONE.as_dict()
        return
    assert again.run(short) == "stopped"
    assert written(host, "smoke")["tasks"]["none"]["status"] == "failed"
    assert smoking(host, tmp_path, "").run(STAGES["smoke"]) == "complete"
    assert written(host, "smoke")["switches"] == switches.SINGLE[0].as_dict()


def test_an_attempt_that_the_end_of_the_call_cut_short_is_none(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(run, "LEAST_S", 0.5)
    short = Stage("smoke", "", 1.0, "environment", stock=True)
    for _ in range(3):
        assert smoking(host, tmp_path, "", sleep=60).run(short) == "stopped"
        assert written(host, "smoke")["tasks"]["none"]["status"] == "stopped"


def test_the_order_is_the_documented_one():
    assert [each.name for each in switches.ORDER] == [
        "none",
        "no FlashInfer autotune",
        "no FlashInfer sampler",
        "Triton attention",
        "no AOT compilation",
        "no compile cache",
        "no JIT warm-up",
        "eager",
        "all of them",
    ]
    every = switches.ORDER[-1]
    for each in switches.SINGLE:
        assert each.variables.items() <= every.variables.items()
        assert each.arguments.items() <= every.arguments.items()
    assert switches.read(json.loads(json.dumps(every.as_dict()))) == every


# -- the environment ---------------------------------------------------------------


def test_the_checkout_is_there_as_if_installed_and_nothing_beside_it(tmp_path: Path):
    """With the engine arguments of the switches, in every process."""
    real = Host(tmp_path / "home")
    link_checkout(real)
    fake = real.site / "vllm" / "engine"
    fake.mkdir(parents=True)
    (fake.parent / "__init__.py").touch()
    (fake / "__init__.py").touch()
    (fake / "arg_utils.py").write_text(
        dedent("""
        import dataclasses
        @dataclasses.dataclass
        class EngineArgs:
            enforce_eager: bool = False
            def __post_init__(self):
                self.seen = self.enforce_eager
        """)
    )
    look = """
import importlib.util, json
from importlib.metadata import entry_points, version
import vllm_ext.microbench.gpu_host.stages, vllm_ext_cpulane.tinymodel
from vllm.engine.arg_utils import EngineArgs
points = entry_points(group="vllm.general_plugins")
print(json.dumps({
    "version": version("vllm-ext"),
    "plugin": [point.load().__module__ for point in points if point.name == "vllm_ext"],
    "leaks": [name for name in ("kernels", "patches", "microbench", "tests")
              if importlib.util.find_spec(name)],
    "eager": EngineArgs().seen,
}))
"""
    done = subprocess.run(
        [sys.executable, "-S", "-c", look],
        env=environment(real, {}, '{"enforce_eager": true}'),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["plugin"] == ["vllm_ext.plugin"]
    assert found["leaks"] == []
    assert found["eager"] is False  # -S: no sitecustomize
    done = subprocess.run(
        [sys.executable, "-c", look],
        env=environment(real, {}, '{"enforce_eager": true}'),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert json.loads(done.stdout)["eager"] is True, done.stderr


def test_without_flashinfer_its_sampler_is_off(host: Host):
    assert environment(host, {}, "{}")["VLLM_USE_FLASHINFER_SAMPLER"] == "0"
    aot = host.site / "flashinfer/data/aot/sampling/sampling.so"
    aot.parent.mkdir(parents=True)
    aot.touch()
    assert "VLLM_USE_FLASHINFER_SAMPLER" not in environment(host, {}, "{}")
    assert environment(host, {"A": "1"}, "{}")["A"] == "1"


def test_the_code_is_known_where_there_is_no_history(host: Host, tmp_path: Path):
    note = {
        "commit": "0123456789ab",
        "dirty": False,
        "digest": checkout.digest(host.root),
    }
    file = tmp_path / checkout.FILE
    file.write_text(json.dumps(note))
    assert checkout.told(host.root, file) == "0123456789ab"
    (host.root / "vllm_ext" / "code.py").write_text("two = 2\n")
    assert checkout.told(host.root, file) == "0123456789ab+"
    runner(host, bundles=[tmp_path]).run(stage(task("a", GOOD)))
    found = written(host)["machine"]
    assert (found["commit"], found["dirty"]) == ("0123456789ab", True)
    file.write_text("{")
    assert checkout.told(host.root, file) == ""


# -- the command -------------------------------------------------------------------


def test_unpacking_waits_for_all_parts_and_skips_what_is_there(
    host: Host, tmp_path: Path
):
    tree = tmp_path / "tree"
    (tree / "site").mkdir(parents=True)
    (tree / "site" / "noise").write_bytes(os.urandom(3000))
    bundle.write(tree, tmp_path / "b", {}, part_bytes=2000, window_bytes=1 << 20)
    first, second = tmp_path / "b" / "p0", tmp_path / "b" / "p1"
    unpack = STAGES["unpack"]
    assert runner(host, bundles=[second]).run(unpack) == "stopped"
    assert "carry p0" in written(host, "unpack")["reason"]
    assert runner(host, bundles=[first]).run(unpack) == "complete"
    assert (host.site / "noise").exists()
    assert (host.plugin / "vllm_ext").is_symlink()
    before = (host.site / "noise").stat().st_ino
    assert runner(host).run(unpack) == "complete"
    assert runner(host, bundles=[first]).run(unpack) == "complete"
    assert (host.site / "noise").stat().st_ino == before
    (host.tree / "manifest.json").write_text("{")  # unpacked, and spoilt since
    assert runner(host, bundles=[first]).run(unpack) == "complete"
    assert (host.site / "noise").stat().st_ino != before
    (tree / "site" / "noise").write_bytes(os.urandom(1000))
    bundle.write(tree, tmp_path / "c", {}, part_bytes=9000, window_bytes=1 << 20)
    assert runner(host, bundles=[tmp_path / "c" / "p0"]).run(unpack) == "complete"
    assert (host.site / "noise").stat().st_size == 1000


def test_a_damaged_part_fails_the_stage_in_one_line(host: Host, tmp_path: Path):
    tree = tmp_path / "tree" / "site"
    tree.mkdir(parents=True)
    (tree / "file").write_text("text")
    bundle.write(tree.parent, tmp_path / "b", {}, part_bytes=9999, window_bytes=1 << 20)
    (tmp_path / "b" / "p0" / "part-00").write_bytes(b"no")
    assert (
        runner(host, bundles=[tmp_path / "b" / "p0"]).run(STAGES["unpack"]) == "failed"
    )
    assert "carry p0 again" in written(host, "unpack")["reason"]


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    places = ["--home", str(tmp_path / "home"), "--out", str(tmp_path / "out")]
    nothing = ["--bundle", str(tmp_path / "none")]
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert run.main(["unpack", "smoke", *places, *nothing]) == 1
    finally:
        signal.signal(signal.SIGTERM, before)
    said = capsys.readouterr().out
    assert "name a folder of a bundle" in said
    assert "environment has to be complete first" in said
    (tmp_path / "b" / "p0").mkdir(parents=True)
    (tmp_path / "b" / "p0" / "manifest.json").touch()
    for folder in (tmp_path / "b", tmp_path / "b" / "p0"):
        assert run._bundle_folders(folder) == [tmp_path / "b" / "p0"]
    assert run.main(["--list"]) == 0
    assert set(STAGES) <= set(capsys.readouterr().out.split())
    for wrong in (["nonsense", *places], [], ["smoke"]):
        with pytest.raises(SystemExit) as stopped:
            run.main(wrong)
        assert stopped.value.code == 2


def test_only_the_standard_library_is_needed_before_the_bundle_is_unpacked(
    tmp_path: Path,
):
    command = (
        *(sys.executable, "-I", "-S", "-c"),
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); "
        "from vllm_ext.microbench.gpu_host import run; sys.exit(run.main(['--list']))",
    )
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert stages.chosen(["smoke", "unpack"])[0].name == "unpack"


def test_a_junit_report_becomes_counts_and_failures():
    found = run.junit(
        """<testsuites><testsuite>
        <testcase classname="tests.gpu" name="a" time="1"/>
        <testcase classname="tests.gpu" name="b"><failure message="3 != 4">x</failure>
        </testcase>
        <testcase classname="tests.gpu" name="c"><skipped message="no lane"/></testcase>
        </testsuite></testsuites>"""
    )
    assert found == {
        **{"passed": 1, "failed": 1, "not run": 1},
        "failures": [{"test": "tests.gpu::b", "message": "3 != 4"}],
        "reasons": {"no lane": 1},
    }


def test_the_page_tells_of_every_stage_and_switch():
    page = (ROOT / "docs" / "gpu-host.md").read_text()
    for each in STAGES.values():
        assert f"| `{each.name}` | {each.limit_s:.0f} s |" in page
    for call in stages.CALLS:
        assert f"$RUN {' '.join(call)} " in page
    for number, each in enumerate(switches.SINGLE, 1):
        assert f"{number}. {each.name}: " in page
