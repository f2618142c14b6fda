"""The environment in which a process of the lane has to be started.

Triton reads ``TRITON_INTERPRET`` when its own library functions are decorated, and
OpenMP counts its threads when it is loaded: both are too early to be set by the
plugin, so they are given to the process from outside.
"""

from typing import Literal

Mode = Literal["interpret", "discard"]


def lane_environment(mode: Mode, *, in_process: bool = True) -> dict[str, str]:
    """Variables to add to ``os.environ`` for a new process.

    Args:
        mode: ``interpret`` runs kernels in Triton's interpreter; ``discard``
            compiles them and drops each launch.
        in_process: Keep the engine core and its worker in the process that makes
            the ``LLM``, which boots faster and lets a script look inside.
    """
    return {
        "VEXT_CPULANE": mode,
        "TRITON_INTERPRET": "1" if mode == "interpret" else "0",
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if in_process else "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; the default is most of the machine
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
        # A second thread spins for longer than a 64-wide matrix product takes.
        "OMP_NUM_THREADS": "1",
        # Importing vLLM takes a third of the time once it has been compiled.
        "PYTHONDONTWRITEBYTECODE": "",
        # vLLM compiles small CPU functions with C++: 15 s before the first token.
        "TORCHDYNAMO_DISABLE": "1",
    }
