"""The folder that stands in for a CPU build of the newest vLLM."""

import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vllm_ext_cpulane import overlay


@pytest.fixture
def wheel(tmp_path, monkeypatch) -> Path:
    """A wheel of three files beside an installed vLLM with one extension."""
    installed = tmp_path / "site-packages" / "vllm"
    installed.mkdir(parents=True)
    (installed / "__init__.py").touch()
    (installed / "_C.so").write_text("for the CPU")
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(sys, "path", [str(installed.parent), *sys.path])
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    (tmp_path / "wheels").mkdir()
    path = tmp_path / "wheels" / "vllm-0.33.0-cp38-abi3-linux_x86_64.whl"
    write_wheel(path, "VERSION = 1")
    overlay.make_overlay.cache_clear()
    yield path
    overlay.make_overlay.cache_clear()


def write_wheel(path: Path, source: str) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("vllm/new.py", source)
        archive.writestr("vllm/_C.so", "for CUDA")
        archive.writestr("vllm-0.33.0.dist-info/METADATA", "Name: vllm")


def test_python_is_the_wheels_and_extensions_are_the_installed(wheel):
    folder = overlay.make_overlay(wheel)
    assert (folder / "vllm/new.py").read_text() == "VERSION = 1"
    assert (folder / "vllm/_C.so").read_text() == "for the CPU"
    assert not list(folder.glob("*.dist-info"))


def test_of_several_processes_one_builds_it(wheel, monkeypatch):
    filled, fill = [], overlay._fill

    def slow(folder, wheel):
        filled.append(folder)
        time.sleep(0.2)
        fill(folder, wheel)

    monkeypatch.setattr(overlay, "_fill", slow)
    with ThreadPoolExecutor(3) as several:  # a lock of a file holds between them too
        made = several.map(overlay.make_overlay.__wrapped__, [wheel] * 3)
        assert len({*made}) == 1
    assert len(filled) == 1


def test_it_is_built_again_only_for_another_wheel(wheel):
    folder = overlay.make_overlay(wheel)
    (folder / "mark").touch()
    overlay.make_overlay.cache_clear()
    assert overlay.make_overlay(wheel) == folder
    assert (folder / "mark").exists()

    write_wheel(wheel, "VERSION = 22")
    overlay.make_overlay.cache_clear()
    assert (overlay.make_overlay(wheel) / "vllm/new.py").read_text() == "VERSION = 22"
    assert not (folder / "mark").exists()


def test_the_newest_wheel_is_the_one_with_the_highest_version(wheel):
    newest = wheel.with_name("vllm-0.100.0-cp38-abi3-linux_x86_64.whl")
    newest.touch()
    assert overlay.newest_wheel() == newest


def test_no_wheel_says_what_to_do(wheel):
    wheel.unlink()
    with pytest.raises(FileNotFoundError, match="make setup"):
        overlay.newest_wheel()
