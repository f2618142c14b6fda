"""A pretend CUDA device of compute capability 9.0: kernels compile, launches vanish.

What the host does for a launch in Triton 3.7.1 runs as it would beside an H100 or
H200: ``JITFunction.run``, its argument specialization and its cache, and at first use
the whole compiler down to ptxas, which Triton's own wheel brings. Only the last call,
into the CUDA driver, is left out: the launch is counted and dropped. Compiled kernels
land in Triton's usual cache (``TRITON_CACHE_DIR``).

Nothing is computed, so memory that only kernels write holds whatever was there. A
caller that must not see that for one kernel registers an effect in `EFFECTS`.
"""

import functools
from collections import Counter
from collections.abc import Callable
from time import thread_time
from typing import Any

from triton.backends import Backend, backends
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

# What the compiler and its checks ask of a device: an H200's answers.
PROPERTIES = {
    "max_shared_mem": 232448,
    "max_num_regs": 65536,
    "multiprocessor_count": 132,
    "warpSize": 32,
}
MAX_THREADS = 1024

LAUNCHES: Counter[str] = Counter()
"""Launches so far, by the name of the kernel."""

EFFECTS: dict[str, Callable[..., None]] = {}
"""Called with a launch's arguments, constants included, in place of the kernel."""


class OffClock:
    """CPU seconds of this thread that went into `EFFECTS`, not into launching."""

    seconds = 0.0


class _Utils:
    """The part of the CUDA driver that Triton calls outside a launch."""

    @staticmethod
    def get_device_properties(device: int) -> dict[str, int]:
        return PROPERTIES

    @staticmethod
    def load_binary(
        name: str, binary: bytes, shared: int, device: int
    ) -> tuple[int, int, int, int, int]:
        """Module, function, registers, spills, most threads: the first two opaque."""
        return 1, 1, 0, 0, MAX_THREADS


class _Launcher:
    """Stands where the C function that calls ``cuLaunchKernel`` would be."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.name: str = metadata.name

    def __call__(
        self,
        grid_x: int,
        grid_y: int,
        grid_z: int,
        stream: int,
        function: int,
        kernel_metadata: Any,
        launch_metadata: Any,
        enter_hook: Any,
        exit_hook: Any,
        *arguments: Any,
    ) -> None:
        LAUNCHES[self.name] += 1
        effect = EFFECTS.get(self.name)
        if effect is not None:
            started = thread_time()
            effect(*arguments)
            OffClock.seconds += thread_time() - started


class _Driver(DriverBase):
    def __init__(self) -> None:
        super().__init__()
        self.utils = _Utils
        self.launcher_cls = _Launcher

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, PROPERTIES["warpSize"])

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return 9, 0

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("discarded launches take no time to measure")


class _NoCompiler:
    """Triton asks every backend whether a target is its own: CUDA's is not."""

    @staticmethod
    def supports_target(target: GPUTarget) -> bool:
        return False


@functools.cache
def install() -> None:
    """Make vLLM find a Triton, and make Triton launch into nothing.

    Raises:
        RuntimeError: Triton was imported as an interpreter.
    """
    from triton import knobs
    from triton.runtime import driver

    if knobs.runtime.interpret:
        raise RuntimeError(
            "Triton was imported as an interpreter; start the process with "
            "vllm_ext_cpulane.environment.lane_environment"
        )
    # vLLM's CPU build turns Triton off unless it has a backend called "cpu".
    backends["cpu"] = Backend(compiler=_NoCompiler, driver=_Driver)
    driver.set_active(_Driver())
