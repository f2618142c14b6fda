"""A script in a fork is a process like any other, which has not imported vLLM."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from vllm_ext_cpulane.engine import ScriptFailedError, run_script
from vllm_ext_cpulane.environment import lane_environment

LANE = lane_environment("interpret")
TELL = """
    import multiprocessing, os, random, sys, tempfile, threading
    import numpy
    from vllm_ext_cpulane.engine import report
    ours = ("vllm", "vllm_ext", "vllm_ext_cpulane")
    report({
        "pid": os.getpid(),
        "leads": os.getpgid(0) == os.getsid(0) == os.getpid(),
        "arguments": sys.argv,
        "path": sys.path,
        "environment": dict(os.environ),
        "folder": tempfile.gettempdir(),
        "threads": threading.active_count(),
        "imported": sorted({name.partition(".")[0] for name in sys.modules}),
        "main": [__name__, sys.modules["__main__"].__dict__ is globals()],
        "own": [
            random.random(),
            numpy.random.random(),
            multiprocessing.current_process().authkey.hex(),
        ],
        "name": multiprocessing.current_process().name,
    })
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Of code, and of a file of the same with another vLLM in front."""
    file = tmp_path_factory.mktemp("script") / "tell.py"
    file.write_text("\n".join(line[4:] for line in TELL.splitlines()))
    before = {"VEXT": "0", "PYTHONPATH": "/first:/second"}
    return [
        run_script(TELL, LANE, "one", "two"),
        run_script(file, LANE | before, "three"),
    ]


def test_a_fork_is_where_its_caller_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    told = []
    for folder in (tmp_path, tmp_path.parent):
        monkeypatch.chdir(folder)
        script = "import os; from vllm_ext_cpulane.engine import report; "
        told.append(run_script(script + "report(os.getcwd())", LANE))
    assert told == [str(tmp_path), str(tmp_path.parent)]


def test_what_vllm_stands_on_is_imported_and_nothing_of_vllm(found):
    for each in found:
        assert {"torch", "transformers", "sympy", "triton"} <= {*each["imported"]}
        assert not {"vllm", "vllm_ext"} & {*each["imported"]}
        assert each["threads"] == 1


def test_each_is_a_process_with_what_it_was_given(found):
    code, file = found
    assert code["pid"] != file["pid"]
    assert code["leads"]
    assert file["leads"]
    assert code["arguments"] == ["-c", "one", "two"]
    assert file["arguments"][1:] == ["three"]
    assert code["path"][0] == ""
    assert file["path"][0] == os.path.dirname(file["arguments"][0])
    assert file["path"][1:3] == ["/first", "/second"]
    assert file["path"][3:] == code["path"][1:]
    assert code["main"] == file["main"] == ["__main__", True]
    assert code["name"] == file["name"] == "MainProcess"
    for each in found:
        assert LANE.items() <= each["environment"].items()
        assert each["environment"]["PATH"] == os.environ["PATH"]
        assert each["folder"] == each["environment"]["TMPDIR"]
    assert code["environment"].get("VEXT") == os.environ.get("VEXT")
    assert file["environment"]["VEXT"] == "0"


def test_siblings_do_not_share_what_is_random(found):
    code, file = found
    for ours, theirs in zip(code["own"], file["own"], strict=True):
        assert ours != theirs


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("1 / 0", "(?s)exit status 1, no.*ZeroDivisionError"),
        ("import sys; sys.exit(3)", "exit status 3, no"),
        ("import sys; sys.exit('no vLLM')", "(?s)exit status 1, no.*no vLLM"),
        ("import os; os.kill(os.getpid(), 11)", f"exit status {-signal.SIGSEGV}, no"),
        ("print('done')", "(?s)exit status 0, no.*done"),
    ],
)
def test_how_it_ends_is_told(end: str, said: str):
    with pytest.raises(ScriptFailedError, match=said):
        run_script(end, LANE)


def test_what_waits_for_the_end_is_run(tmp_path):
    file = tmp_path / "written"
    run_script(
        f"""
        import atexit, pathlib, threading, time
        from vllm_ext_cpulane.engine import report
        file = pathlib.Path({str(file)!r})
        atexit.register(lambda: file.write_text(file.read_text() + "end"))
        late = lambda: (time.sleep(0.2), file.write_text("thread, "))
        threading.Thread(target=late).start()
        report(0)
        """,
        LANE,
    )
    assert file.read_text() == "thread, end"


def test_one_that_hangs_is_killed(tmp_path):
    file = tmp_path / "pid"
    script = f"""
        import os, pathlib, time
        pathlib.Path({str(file)!r}).write_text(str(os.getpid()))
        time.sleep(60)
    """
    with pytest.raises(subprocess.TimeoutExpired):
        run_script(script, LANE, timeout=2)
    with pytest.raises(ProcessLookupError):
        os.kill(int(file.read_text()), 0)
