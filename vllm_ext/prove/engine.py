"""A real vLLM engine on the pretend device.

Everything is vLLM's own, scheduler, model runner, sampler and asynchronous outputs,
on a tiny model whose tensors lie on the device. Runs on the CPU lane, in a process of
its own (`lane_environment("interpret")`), with the engine core in that process:

    with PretendDevice() as device, booted(device) as llm:
        llm.generate(...)

Which model runner works is said by ``VLLM_USE_V2_MODEL_RUNNER``, as always.

What differs from CUDA: the platform is still vLLM's CPU platform, so layers take
their PyTorch form (``forward_native``) and attention is Triton's; torch compiles
nothing; what torch draws at random, as V1's sampler does, it draws as on a CPU.
"""

import sys
import tempfile
import types
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from vllm_ext import gpupath
from vllm_ext.prove import pretend

MAX_LENGTH = 128
SEATS = 8
GRAPH_SIZES = (1, 2, 4, 8)


@contextmanager
def booted(device: pretend.PretendDevice, **options: Any) -> Iterator[Any]:
    """An ``LLM`` in this process whose model runner works on ``device``.

    Args:
        device: In use, and in use until this ends.
        options: For ``LLM``, over the defaults below.
    """
    put_on_device()
    device.stream = pretend.Stream()  # as on CUDA: graphs want one that is not default
    import torch
    from vllm import LLM
    from vllm.v1.worker.workspace import init_workspace_manager

    from vllm_ext_cpulane.tinymodel import write_model

    with tempfile.TemporaryDirectory(prefix="vllm-ext-pretend-") as folder:
        defaults: dict[str, Any] = {
            "model": str(write_model(folder, tokenizer=True, weights=True)),
            "max_model_len": MAX_LENGTH,
            "max_num_seqs": SEATS,
            "block_size": gpupath.BLOCK_SIZE,
            "max_logprobs": -1,
            "kv_cache_memory_bytes": 16 * 2**20,
            "enforce_eager": True,
            "disable_log_stats": True,
            "seed": 0,
        }
        llm = LLM(**(defaults | options))
        init_workspace_manager(torch.device(pretend.DEVICE, 0))
        model_runner(llm).capture_model()
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()


def model_runner(llm: Any) -> Any:
    """The model runner of an ``LLM`` in this process."""
    core = llm.llm_engine.engine_core.engine_core
    return core.model_executor.driver_worker.worker.model_runner


@cache
def put_on_device() -> None:
    """Let engines that are built from now on work on the pretend device."""
    from vllm.plugins import load_general_plugins

    load_general_plugins()  # a patch may put another class in the place of a runner's
    # vLLM's CPU worker puts its own no-ops in the place of torch's CUDA functions.
    name = "vllm.v1.worker.cpu.shm"
    sys.modules[name] = types.ModuleType(name)
    gpupath.enable(GRAPH_SIZES)
    _answer_as_cuda()
    _build_runners_on_device()


def _answer_as_cuda() -> None:
    """What vLLM's code asks of its platform is answered as on CUDA."""
    import torch
    from vllm.model_executor.layers import utils as layers
    from vllm.platforms import current_platform
    from vllm.utils import platform_utils, torch_utils
    from vllm.v1.sample import sampler
    from vllm.v1.sample.ops import topk_topp_sampler
    from vllm.v1.worker.gpu import buffer_utils

    platform: Any = type(current_platform)
    platform.is_pin_memory_available = classmethod(lambda cls: True)
    platform.opaque_attention_op = classmethod(lambda cls: False)
    platform_utils.is_pin_memory_available.cache_clear()
    platform_utils.is_uva_available.cache_clear()
    torch_utils._current_stream_tls = _CurrentStream()
    torch_utils.weak_ref_tensor = lambda tensor: tensor  # the CPU build has none
    for module in (torch_utils, buffer_utils):
        module.get_accelerator_view_from_cpu_tensor = pretend.uva_view
    for name, module in list(sys.modules.items()):  # 0.33 asks when it is imported
        if name.startswith("vllm.") and "PIN_MEMORY" in vars(module):
            setattr(module, "PIN_MEMORY", True)  # noqa: B010

    def plain_linear(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    layers.dispatch_cpu_unquantized_gemm = plain_linear  # stock packs for CPU kernels
    for module in (sampler, topk_topp_sampler):
        setattr(module, "current_platform", _Accelerator(current_platform))  # noqa: B010


class _Accelerator:
    """A platform that is not a CPU, in the eyes of one module."""

    def __init__(self, platform: Any) -> None:
        self._platform = platform

    def is_cpu(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._platform, name)


class _CurrentStream:
    """Where vLLM remembers the current stream: the device knows."""

    @property
    def value(self) -> pretend.Stream:
        return pretend.current().stream

    @value.setter
    def value(self, stream: pretend.Stream) -> None:
        pass


def _build_runners_on_device() -> None:
    """Give the CPU worker the GPU's model runners, and the pretend device."""
    import torch
    from vllm.v1.worker import cpu_worker
    from vllm.v1.worker.cpu import model_runner as cpu_v2
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as V2
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as V1

    place = torch.device(pretend.DEVICE, 0)

    def on_device(stock: Any) -> Any:
        class OnDevice(stock):  # type: ignore[misc]
            def __init__(self, config: Any, device: Any) -> None:
                super().__init__(config, place)

            def load_model(self, *args: Any, **kwargs: Any) -> None:
                super().load_model(*args, **kwargs)
                _move(self.model)

            def warming_up_model(self) -> None:
                """The worker of the CPU asks for it; eager engines have no need."""

        OnDevice.__module__ = stock.__module__  # patches ask whose runner it is
        return OnDevice

    cpu_worker.CPUModelRunner = on_device(V1)
    cpu_v2.CPUModelRunner = on_device(V2)


def _move(model: Any) -> None:
    """Put a model's weights, buffers and tensors on the device, from the host."""
    import torch

    for module in model.modules():
        for holder in (module._parameters, module._buffers, vars(module)):
            for name, tensor in holder.items():
                if not isinstance(tensor, torch.Tensor) or name.endswith("_cpu"):
                    continue
                moved: Any = pretend.PretendTensor(tensor.detach())
                if isinstance(tensor, torch.nn.Parameter):
                    moved = torch.nn.Parameter(moved, requires_grad=False)
                holder[name] = moved
