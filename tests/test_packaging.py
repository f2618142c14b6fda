"""Wheel, editable install and plain checkout: one import name, nothing beside it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from vllm_ext import __version__
from vllm_ext.patches import SERIES

ROOT = Path(__file__).resolve().parents[1]
UV = Path(sys.executable).with_name("uv")
FOLDERS = ("kernels", "patches", "microbench")

# Where everything comes from, and that the folders' own names mean nothing.
LOOK = """
import importlib, importlib.util, json, sys
import vllm_ext
parts = [importlib.import_module(f"vllm_ext.{name}") for name in
         ("kernels", "patches", "microbench", "patching.engine", "plugin", "cli")]
print(json.dumps({
    "version": vllm_ext.__version__,
    "files": [vllm_ext.__file__, *(part.__file__ for part in parts)],
    "series": [patch.name for patch in vllm_ext.patches.SERIES],
    "fingerprints": len(json.loads(vllm_ext.patches.FINGERPRINTS.read_text())),
    "leaks": [name for name in ("kernels", "patches", "microbench", "tests", "cpulane")
              if importlib.util.find_spec(name)],
}))
"""


def look(cwd: Path, *options: str, **environ: str) -> dict:
    done = subprocess.run(
        [sys.executable, *options, "-c", LOOK],
        env={**os.environ, **environ},
        cwd=cwd,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found: dict = json.loads(done.stdout)
    assert found["version"] == __version__
    assert found["series"] == [patch.name for patch in SERIES]
    assert found["fingerprints"] > 0
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, as an index would get it."""
    out = tmp_path_factory.mktemp("dist")
    source = out / "source"
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if names.returncode:  # an unpacked sdist
        shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".venv", "build"))
    for name in filter(None, names.stdout.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    done = subprocess.run(
        [UV, "build", "--no-build-isolation", "--offline", "-q", "-o", out, source],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_holds_one_package(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        tops = {name.partition("/")[0] for name in names}
        info = f"vllm_ext-{__version__}.dist-info"
        metadata = archive.read(f"{info}/METADATA").decode()
        entries = archive.read(f"{info}/entry_points.txt").decode()
    assert tops == {"vllm_ext", info}
    assert {
        f"vllm_ext/{name}"
        for name in ("py.typed", "patches/fingerprints.json", "kernels/__init__.py")
    } <= set(names)
    for patch in SERIES:
        assert f"vllm_ext/patches/{patch.name}/replacement.py" in names
        for form in (ROOT / "patches" / patch.name).glob("*.patch"):
            assert f"vllm_ext/patches/{patch.name}/{form.name}" in names
    assert {f"{info}/licenses/LICENSE", f"{info}/licenses/NOTICE"} <= set(names)
    assert "vllm_ext = vllm_ext.plugin:register" in entries
    required = [line for line in metadata.splitlines() if "Requires-Dist" in line]
    assert required
    assert all("extra ==" in line for line in required)


def test_a_wheel_works_where_it_is_installed(wheel: Path, tmp_path: Path):
    site = tmp_path / "site"
    subprocess.run(
        [UV, "pip", "install", "-q", "--no-deps", "--target", site, wheel], check=True
    )
    found = look(tmp_path, "-S", "-P", PYTHONPATH=str(site))
    assert all(Path(file).is_relative_to(site) for file in found["files"])
    assert found["leaks"] == []
    command = subprocess.run(
        [sys.executable, "-S", site / "bin" / "vllm-ext", "--version"],
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert command.stdout.strip() == __version__, command.stderr


def test_a_wheel_is_shadowed_whole_by_a_checkout(wheel: Path, tmp_path: Path):
    """In a checkout, ``python -m`` takes the checkout's parts and no others."""
    site = tmp_path / "site"
    subprocess.run(
        [UV, "pip", "install", "-q", "--no-deps", "--target", site, wheel], check=True
    )
    found = look(ROOT, "-S", PYTHONPATH=str(site))
    assert all(Path(file).is_relative_to(ROOT) for file in found["files"])


def test_a_checkout_works_on_pythonpath_alone(tmp_path: Path):
    found = look(tmp_path, "-S", "-P", PYTHONPATH=str(ROOT))
    assert all(Path(file).is_relative_to(ROOT) for file in found["files"])


def test_an_editable_install_leaks_no_folder(tmp_path: Path):
    site = sysconfig.get_paths()["purelib"]  # a checkout may hold an .egg-info
    (installed,) = importlib.metadata.distributions(name="vllm-ext", path=[site])
    origin = json.loads(installed.read_text("direct_url.json") or "{}")
    assert origin["dir_info"]["editable"] is True
    found = look(tmp_path, "-P")
    assert all(Path(file).is_relative_to(ROOT) for file in found["files"])
    assert found["leaks"] == []


def test_the_extras_are_the_promised_ones():
    metadata = importlib.metadata.metadata("vllm-ext")
    assert set(metadata.get_all("Provides-Extra") or []) == {
        *("vllm", "kernels", "bench", "dev")
    }
