"""On what a result was produced: the block that every report and file carries.

Nothing here imports torch, Triton or vLLM, touches CUDA, or raises: what cannot be
found out is ``None``.
"""

import os
import platform
import subprocess
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

NO_GPU = "no GPU"
CHECKOUT = Path(__file__).resolve().parent.parent


def describe() -> dict[str, Any]:
    """Machine, software and, where there is one, GPU and checkout.

    Keys: ``cpu`` (its model), ``cores`` (this process may use), ``memory_gb``, ``os``,
    ``python``, ``torch``, ``triton``, ``vllm``, ``vllm_ext``, ``gpu`` (its name, or
    "no GPU"), ``gpu_memory_gb``, ``driver``, ``commit``, ``dirty`` (whether files
    under version control differ from it). A checkout that was copied without its
    history has them from ``VEXT_COMMIT``: a commit, with "+" where files differ.
    """
    return {
        "cpu": _try(_cpu_model) or platform.machine() or None,
        "cores": _try(lambda: len(os.sched_getaffinity(0))) or os.cpu_count(),
        "memory_gb": _try(_memory_gb),
        "os": _try(_system) or platform.system() or None,
        "python": platform.python_version(),
        **{
            name.replace("-", "_"): _version(name)
            for name in ("torch", "triton", "vllm", "vllm-ext")
        },
        **(_try(_gpu) or {"gpu": NO_GPU, "gpu_memory_gb": None, "driver": None}),
        **(_try(_checkout) or _told() or {"commit": None, "dirty": None}),
    }


def _try(probe: Callable[[], T]) -> T | None:
    try:
        return probe()
    except Exception:
        return None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu_model() -> str | None:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    return names[0] if names else None


def _memory_gb() -> float:
    pages: int = os.sysconf("SC_PHYS_PAGES")
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e9, 1)


def _system() -> str:
    name = platform.freedesktop_os_release()["PRETTY_NAME"]
    return f"{name}, {platform.system()} {platform.release()}"


def _gpu() -> dict[str, Any]:
    import pynvml

    pynvml.nvmlInit()
    try:
        device = visible_device(pynvml)
        total: int = pynvml.nvmlDeviceGetMemoryInfo(device).total
        return {
            "gpu": _text(pynvml.nvmlDeviceGetName(device)),
            "gpu_memory_gb": round(total / 1e9, 1),
            "driver": _text(pynvml.nvmlSystemGetDriverVersion()),
        }
    finally:
        pynvml.nvmlShutdown()


def visible_device(nvml: Any) -> Any:
    """NVML's handle of the GPU that CUDA shows this process first.

    Raises:
        LookupError: It shows none.
    """
    name = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    if name in ("", "-1"):
        raise LookupError("CUDA_VISIBLE_DEVICES hides all of them")
    if name.isdigit():
        return nvml.nvmlDeviceGetHandleByIndex(int(name))
    return nvml.nvmlDeviceGetHandleByUUID(name)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _told() -> dict[str, Any]:
    commit = os.environ.get("VEXT_COMMIT", "")
    if not commit:
        return {}
    return {"commit": commit.removesuffix("+"), "dirty": commit.endswith("+")}


def _checkout() -> dict[str, Any]:
    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(CHECKOUT), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()

    if Path(git("rev-parse", "--show-toplevel")).resolve() != CHECKOUT:
        return {}  # installed into somebody else's checkout
    return {
        "commit": git("rev-parse", "--short=12", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
    }
