"""What the GPU host is: machine, versions, tools, and which parts of vLLM load.

``python -m vllm_ext.microbench.gpu_host.environment --json FILE`` is the stage of that
name. It says no more than was found out; only a missing GPU, or a vLLM that cannot be
imported, is an error.
"""

import argparse
import importlib
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Any

from vllm_ext import jsonfile, machine

PACKAGES = (
    *("vllm", "torch", "triton", "transformers", "tokenizers", "numpy"),
    *("flashinfer-python", "apache-tvm-ffi", "xgrammar", "pydantic", "nvidia-ml-py"),
    *("pytest", "pytest-benchmark", "cuda-bindings", "sonic-sampler", "vllm-ext"),
)
LIBRARIES = (
    *("vllm._C_stable_libtorch", "vllm.vllm_flash_attn._vllm_fa3_C"),
    *("vllm.cumem_allocator", "vllm.spinloop"),
)
TOOLS = {
    "nvcc": "--version",
    "compute-sanitizer": "--version",
    "ncu": "--version",
    "cuobjdump": "--version",
    "cc": "--version",
}
CUDA_BIN = Path("/usr/local/cuda/bin")


def main(argv: Sequence[str] | None = None) -> int:
    """Look, write, and say the main line; 1 if nothing can be run here."""
    parser = argparse.ArgumentParser(prog="environment", description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args(argv)
    found: dict[str, Any] = {
        "machine": machine.describe(),
        "libc": " ".join(platform.libc_ver()),
        "packages": {name: _version(name) for name in PACKAGES},
        "shadowed": shadowed(),
        "tools": {name: _tool(name, asked) for name, asked in TOOLS.items()},
        "nvidia_smi": _said("nvidia-smi"),
        "disk_free_gb": round(shutil.disk_usage(Path.home()).free / 1e9, 1),
    }
    jsonfile.write(args.json, found)
    started = time.monotonic()
    found["vllm"] = _import("vllm.engine.arg_utils")
    found["import_s"] = round(time.monotonic() - started, 1)
    found["libraries"] = {name: _import(name) for name in LIBRARIES}
    found["cuda"] = _cuda()
    jsonfile.write(args.json, found)
    problems = []
    if found["cuda"] is None:
        problems.append("torch sees no GPU")
    if found["vllm"] is not True:
        problems.append(f"vLLM cannot be imported: {found['vllm']}")
    sys.stdout.write(
        f"{'; '.join(problems) or found['machine']['gpu']}; vllm "
        f"{found['packages']['vllm']}, torch {found['packages']['torch']}\n"
    )
    return 1 if problems else 0


def find_tool(name: str) -> str | None:
    """The path of a tool of CUDA's, on ``PATH`` or where CUDA puts it."""
    return shutil.which(name) or shutil.which(name, path=str(CUDA_BIN))


def shadowed() -> dict[str, list[str]]:
    """Packages that are here twice, with their versions; the first is the one used."""
    found: dict[str, list[str]] = {}
    for each in distributions():
        name = (each.metadata["Name"] or "").lower().replace("_", "-")
        found.setdefault(name, []).append(each.version)
    return {name: list(all_) for name, all_ in found.items() if len(all_) > 1}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _tool(name: str, asked: str) -> dict[str, Any] | None:
    path = find_tool(name)
    return {"path": path, "says": _said(path, asked)} if path else None


def _said(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (done.stdout or done.stderr).strip()[-2000:]


def _import(name: str) -> bool | str:
    """Whether it can be, or why not."""
    try:
        importlib.import_module(name)
        return True
    except Exception as error:  # an ImportError, an OSError of the loader, ...
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _cuda() -> dict[str, Any] | None:
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": list(torch.cuda.get_device_capability(0)),
        "multiprocessors": properties.multi_processor_count,
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "l2_mb": round(properties.L2_cache_size / 1e6, 1),
        "torch_cuda": torch.version.cuda,
    }


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # some libraries do not like to be unloaded
