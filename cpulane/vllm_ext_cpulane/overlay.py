"""A vLLM that has no CPU build yet, on the compiled parts of the one that has.

An early warning, not a supported combination: the Python files of a CUDA wheel and
the CPU extensions of the installed vLLM, in a folder to be put on ``PYTHONPATH``.
"""

import fcntl
import functools
import hashlib
import importlib.util
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

STAMP = "overlay-of"
# Built for a GPU, and the server in Rust: nearly all of the wheel's size.
LEFT_OUT = (".so", ".cubin", ".cu", ".cuh", ".h", "/vllm-rs")


def newest_wheel() -> Path:
    """The vLLM wheel that the project's set-up script downloaded to be read.

    Raises:
        FileNotFoundError: There is none.
    """
    folder = Path(sys.prefix) / "wheels"
    wheels = sorted(folder.glob("vllm-*.whl"), key=_version)
    if not wheels:
        raise FileNotFoundError(f"no vllm-*.whl in {folder}; run `make setup`")
    return wheels[-1]


def _version(wheel: Path) -> tuple[int, ...]:
    return tuple(int(part) for part in wheel.name.split("-")[1].split("."))


@functools.cache
def make_overlay(wheel: Path) -> Path:
    """Build the folder for ``wheel`` unless it is there, and return it.

    Kept in the virtual environment, under the wheel's version; built again when the
    wheel or the installed extensions are other ones.
    """
    folder = Path(sys.prefix) / "overlays" / wheel.name.split("-")[1]
    stamp = folder / STAMP
    wanted = _fingerprint([wheel, *_extensions().values()])
    folder.parent.mkdir(exist_ok=True)
    with (folder.parent / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run in several processes
        if not stamp.exists() or stamp.read_text() != wanted:
            with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
                _fill(Path(unfinished), wheel)
                (Path(unfinished) / STAMP).write_text(wanted)
                shutil.rmtree(folder, ignore_errors=True)
                shutil.copytree(unfinished, folder, symlinks=True)
    return folder


def _fill(folder: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(
            folder,
            [
                name
                for name in archive.namelist()
                if name.startswith("vllm/") and not name.endswith(LEFT_OUT)
            ],
        )
    for inside, extension in _extensions().items():
        (folder / "vllm" / inside).symlink_to(extension)  # 0.4 GB not copied


def _extensions() -> dict[Path, Path]:
    """The installed vLLM's compiled parts, by their place in the package."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("no vLLM is installed; run `make setup`")
    package = Path(spec.submodule_search_locations[0])
    return {path.relative_to(package): path for path in sorted(package.rglob("*.so"))}


def _fingerprint(files: list[Path]) -> str:
    """Names, sizes and times: reading a third of a gigabyte takes longer."""
    lines = [
        f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
