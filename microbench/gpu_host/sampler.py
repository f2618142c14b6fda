"""FlashInfer's sampling kernels, compiled for one GPU on a machine that has none.

On a Hopper GPU vLLM takes FlashInfer's sampler for top-k and top-p by default, and
FlashInfer compiles it where it runs, with an nvcc that an offline host may lack. It
also takes a finished module where its ahead-of-time builds lie (`AOT`). That module is
built here, by FlashInfer's own build description, with NVIDIA's nvcc from wheels; a
C++ compiler is all that has to be there.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from vllm_ext.microbench.gpu_host.bundle import Say

AOT = Path("flashinfer/data/aot/sampling/sampling.so")

NVCC = (
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
    "nvidia-curand==10.4.0.35",
)
BESIDE = ("ninja", "filelock", "tabulate", "einops", "click", "tqdm", "requests")
TIMEOUT_S = 1800

BUILD = """
import shutil, sys
from flashinfer.jit.sampling import gen_sampling_module
module = gen_sampling_module()
module.build(verbose=False)
shutil.copy(module.get_library_path(), sys.argv[1])
"""


class CannotBuildError(Exception):
    """One line: what is missing or wrong, and what to do."""


def build(work: Path, flashinfer: str, tvm_ffi: str, arch: str, say: Say) -> Path:
    """Compile it, unless that was done before; where it lies.

    Args:
        work: A folder for about 1 GB of tools, which stays.
        flashinfer: Its version, as ``flashinfer-python`` has it.
        tvm_ffi: The version of ``apache-tvm-ffi`` that will load it.
        arch: FlashInfer's name of the GPU: ``9.0a``.

    Raises:
        CannotBuildError: There is no C++ compiler, no torch, or a step failed.
    """
    library = work / f"sampling-{flashinfer}-sm{arch}.so"
    if library.exists():
        return library
    compiler = next(filter(None, map(shutil.which, ("c++", "g++"))), None)
    if not compiler:
        raise CannotBuildError(
            "there is no C++ compiler: install g++, or pack with --no-flashinfer"
        )
    say("getting nvcc and FlashInfer's sources")
    tools, sources = work / "nvcc", work / "flashinfer"
    _pip_install(tools, NVCC)
    _pip_install(
        sources,
        (f"flashinfer-python=={flashinfer}", f"apache-tvm-ffi=={tvm_ffi}", *BESIDE),
    )
    cuda = tools / "nvidia" / "cu13"
    _complete(cuda, compiler)
    say("compiling FlashInfer's sampler (one core, some minutes)")
    scratch = library.with_suffix(".partial")
    _run(
        [sys.executable, "-c", BUILD, str(scratch)],
        "compiling FlashInfer's sampler (torch of any kind has to be installed)",
        CUDA_HOME=str(cuda),
        PATH=f"{sources / 'bin'}:{cuda / 'bin'}:{os.environ['PATH']}",
        PYTHONPATH=str(sources),
        FLASHINFER_CUDA_ARCH_LIST=arch,
        FLASHINFER_WORKSPACE_BASE=str(work / "objects"),
        MAX_JOBS="1",
    )
    scratch.rename(library)
    return library


def _complete(cuda: Path, compiler: str) -> None:
    """Add what a CUDA installation has and the wheels lack."""
    stubs = cuda / "lib64" / "stubs"
    stubs.mkdir(parents=True, exist_ok=True)
    runtime = cuda / "lib64" / "libcudart.so"
    if not runtime.exists():
        runtime.symlink_to("../lib/libcudart.so.13")
    # libcuda comes with a driver; to link against, an empty one of that name will do.
    _run(
        [
            *(compiler, "-x", "c++", os.devnull, "-shared", "-fPIC"),
            *("-Wl,-soname,libcuda.so.1", "-o", str(stubs / "libcuda.so")),
        ],
        "making a stand-in for libcuda",
    )


def _pip_install(target: Path, requirements: tuple[str, ...]) -> None:
    stamp = target / "complete"
    if stamp.exists() and stamp.read_text() == "\n".join(requirements):
        return
    shutil.rmtree(target, ignore_errors=True)
    command = (sys.executable, "-m", "pip", "install", "-q", "--no-deps")
    options = ("--disable-pip-version-check", "--only-binary=:all:", "--target")
    _run([*command, *options, str(target), *requirements], "pip install")
    stamp.write_text("\n".join(requirements))


def _run(command: list[str], what: str, **environment: str) -> None:
    try:
        done = subprocess.run(
            command,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise CannotBuildError(f"{what} took longer than {TIMEOUT_S} s") from None
    if done.returncode:
        said = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        raise CannotBuildError(f"{what} failed: {' | '.join(said[-3:])[-600:]}")
