"""The set-up script: quick the second time, and one line when it cannot."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "cpulane" / "make_venv.py"


@pytest.fixture
def setup(tmp_path, monkeypatch):
    """The script as a module, with nothing installed yet."""
    spec = importlib.util.spec_from_file_location("make_venv", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    venv = tmp_path / ".venv"
    monkeypatch.setattr(module, "VENV", venv)
    monkeypatch.setattr(module, "PYTHON", venv / "bin" / "python")
    monkeypatch.setattr(module, "STAMP", venv / "stamp")
    monkeypatch.setattr(module, "WHEELS", venv / "wheels")
    return module


def fails(setup, capsys) -> str:
    assert setup.main() == 1
    err = capsys.readouterr().err
    assert err.startswith("setup: ")
    assert err.count("\n") == 1
    return err


def test_the_second_time_is_quick():
    started = time.monotonic()
    done = subprocess.run(
        [shutil.which("python3.11") or sys.executable, SCRIPT], capture_output=True
    )
    assert done.returncode == 0
    assert done.stdout == b""
    assert time.monotonic() - started < 5


def test_another_python_is_refused(setup, capsys, monkeypatch):
    monkeypatch.setattr(setup.sys, "version_info", (3, 12, 1))
    assert "needs Python 3.11" in fails(setup, capsys)


def test_a_full_disk_is_said_before_it_starts(setup, capsys, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(setup.shutil, "disk_usage", lambda path: usage(9, 9, 10**9))
    assert "needs 6 GB of disk, 1.0 GB left" in fails(setup, capsys)
    assert not setup.VENV.exists()


def test_a_disk_that_fills_up_meanwhile_is_named(setup, capsys, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(setup, "check_machine", lambda: None)
    monkeypatch.setattr(setup.shutil, "disk_usage", lambda path: usage(9, 9, 10**7))
    monkeypatch.setattr(setup, "sys", _python_that_fails(setup.sys))
    assert "the disk is full" in fails(setup, capsys)


def test_a_package_that_cannot_be_had_is_one_line(setup, capsys, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    message = fails(setup, capsys)
    assert "installing uv failed" in message
    assert "make setup" in message


def test_an_interrupted_installation_is_done_again(setup, monkeypatch):
    done = []
    setup.VENV.mkdir()
    (setup.VENV / "bin").mkdir()
    setup.PYTHON.write_text("")
    monkeypatch.setattr(setup, "install_packages", lambda: done.append("packages"))
    monkeypatch.setattr(setup, "install_project", lambda: done.append("project"))
    assert setup.main() == 0
    assert done == ["packages", "project"]
    assert setup.main() == 0
    assert done == ["packages", "project"]
    setup.STAMP.write_text("{")
    assert setup.main() == 0
    assert done == ["packages", "project"] * 2
    monkeypatch.setattr(setup, "ROOT", _changed_project(setup.VENV.parent))
    assert setup.main() == 0
    assert done[4:] == ["project"]  # vLLM stays as it is


def test_the_folder_of_local_wheels_comes_from_pip(setup, monkeypatch):
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_FIND_LINKS", "/some/wheels /other/wheels")
    assert setup.find_links() == ["/some/wheels", "/other/wheels"]
    assert not setup.has_cpu_torch(setup.find_links())


def test_no_path_of_a_machine_is_written_down():
    text = SCRIPT.read_text()
    assert "/opt" not in text
    assert "http" not in text


def _python_that_fails(real):
    """``sys`` with a Python that cannot make an environment."""
    return type(
        "sys",
        (),
        {"executable": "/bin/false", "version": real.version, "stderr": real.stderr},
    )


def _changed_project(folder: Path) -> Path:
    for name in ("pyproject.toml", "setup.py", "cpulane/pyproject.toml"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text((ROOT / name).read_text() + "\n# changed\n")
    return folder
