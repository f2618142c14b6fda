"""What the entry point does for each value of ``VEXT_CPULANE``, vLLM not needed."""

import subprocess
import time
from pathlib import Path

import pytest

from vllm_ext_cpulane.engine import ScriptFailedError, run_script

SCRIPT = """
    import logging
    import sys

    {before}
    from vllm_ext_cpulane.engine import report
    from vllm_ext_cpulane.hook import platform_hook

    messages = []
    handler = logging.Handler()
    handler.emit = lambda told: messages.append([told.levelname, told.getMessage()])
    logging.getLogger().addHandler(handler)
    answer = platform_hook()
    names = ("interpret", "discard")
    report({{
        "answer": answer,
        "messages": messages,
        "imported": [n for n in names if "vllm_ext_cpulane." + n in sys.modules],
        "triton": "triton" in sys.modules,
    }})
"""


def run_hook(value: str, before: str = "", interpret: str = "1"):
    environment = {"VEXT_CPULANE": value, "TRITON_INTERPRET": interpret}
    return run_script(SCRIPT.format(before=before), environment)


def test_unset_it_imports_and_says_nothing():
    found = run_hook("")
    assert found == {"answer": None, "messages": [], "imported": [], "triton": False}


def test_an_unknown_value_is_one_warning():
    found = run_hook("interpreted")
    assert found["answer"] is None
    [[level, message]] = found["messages"]
    assert level == "WARNING"
    for part in ("VEXT_CPULANE=interpreted", "interpret", "discard"):
        assert part in message.split()
    assert found["imported"] == []
    assert not found["triton"]


def test_interpret_installs_quietly():
    found = run_hook("interpret")
    assert found["answer"] is None
    assert found["messages"] == []
    assert found["imported"] == ["interpret"]


def test_a_triton_that_came_first_is_one_warning():
    found = run_hook("interpret", before="import triton", interpret="0")
    assert found["answer"] is None
    [[level, message]] = found["messages"]
    assert level == "WARNING"
    assert "TRITON_INTERPRET=1" in message


def test_a_script_that_fails_shows_its_output():
    with pytest.raises(ScriptFailedError, match="ZeroDivisionError"):
        run_script("1 / 0", {})


def test_a_script_that_reports_nothing_fails():
    with pytest.raises(ScriptFailedError, match="no report"):
        run_script("print('done')", {})


def test_a_script_that_hangs_is_killed_with_its_children(tmp_path):
    pid_file = tmp_path / "pid"
    script = f"""
        import pathlib, subprocess, sys

        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        pathlib.Path({str(pid_file)!r}).write_text(str(child.pid))
        child.wait()
    """
    with pytest.raises(subprocess.TimeoutExpired):
        run_script(script, {}, timeout=2)
    assert ends_within(5, Path(f"/proc/{pid_file.read_text()}/stat"))


def ends_within(seconds: float, status: Path) -> bool:
    """Whether a process ends; a zombie that nobody has waited for has ended."""
    give_up = time.monotonic() + seconds
    while time.monotonic() < give_up:
        if not status.exists() or status.read_text().split()[2] == "Z":
            return True
        time.sleep(0.02)
    return False
