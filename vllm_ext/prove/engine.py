"""A real vLLM engine on the pretend device.

Everything is vLLM's own, scheduler, model runner, sampler and asynchronous outputs,
on a tiny model whose tensors lie on the device. Runs on the CPU lane, in a process of
its own (`vllm_ext_cpulane.environment.lane_environment("interpret")`), with the engine
core in that process:

    with PretendDevice() as device:
        llm = boot(device)
        llm.generate(...)

What differs from CUDA: the platform is still vLLM's CPU platform, so layers take
their PyTorch form (``forward_native``) and attention is Triton's; nothing is compiled
by torch; random numbers drawn by torch, as V1's sampler does, are the CPU's.
"""

import sys
import tempfile
import types
from typing import Any

from vllm_ext import gpupath

MAX_LENGTH = 128
SEATS = 8


def boot(device: Any, *, runner: int = 2, **options: Any) -> Any:
    """An ``LLM`` in this process whose model runner works on ``device``.

    Args:
        device: The `PretendDevice` in use; has to stay in use.
        runner: Model Runner 1 or 2.
        options: For ``LLM``, over the defaults below.
    """
    from vllm_ext.prove import pretend

    _accelerate(pretend)
    from vllm import LLM

    from vllm_ext_cpulane.tinymodel import write_model

    gpupath.enable([1, 2, 4, 8])
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
        return LLM(**(defaults | options))


def _accelerate(pretend: Any) -> None:
    """Give vLLM's code the answers that it gets on CUDA, and keep its CPU shims out."""
    import torch

    # vLLM's CPU worker puts its own no-ops in the place of torch's CUDA functions.
    sys.modules["vllm.v1.worker.cpu.shm"] = types.ModuleType("vllm.v1.worker.cpu.shm")
    from vllm.platforms import current_platform
    from vllm.utils import platform_utils, torch_utils
    from vllm.v1.worker import cpu_worker
    from vllm.v1.worker.gpu import buffer_utils

    place = torch.device(pretend.DEVICE, 0)
    platform = type(current_platform)
    platform.is_pin_memory_available = classmethod(lambda cls: True)
    platform.opaque_attention_op = classmethod(lambda cls: False)
    platform_utils.is_pin_memory_available.cache_clear()
    platform_utils.is_uva_available.cache_clear()
    for module in (torch_utils, buffer_utils):
        module.get_accelerator_view_from_cpu_tensor = pretend.uva_view
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("vllm.") and "PIN_MEMORY" in vars(
            module
        ):
            module.PIN_MEMORY = True  # type: ignore[attr-defined]

    from vllm.model_executor.layers import utils as layers

    def plain_linear(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    layers.dispatch_cpu_unquantized_gemm = plain_linear
    stock_init = cpu_worker.CPUWorker.init_device

    class OnDevice:
        """``torch``, but its ``device("cpu")`` is the pretend device."""

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

        @staticmethod
        def device(*args: Any) -> Any:
            return place if args == ("cpu",) else torch.device(*args)

    def init_device(self: Any) -> None:
        cpu_worker.torch = OnDevice()
        stock_init(self)
        runner = self.model_runner
        load_model = runner.load_model

        def load_and_move(*args: Any, **kwargs: Any) -> None:
            load_model(*args, **kwargs)
            _move(runner.model, pretend)

        runner.load_model = load_and_move

    cpu_worker.CPUWorker.init_device = init_device


def _move(model: Any, pretend: Any) -> None:
    """Put a model's weights, buffers and tensors on the device, from the host."""
    import torch

    for module in model.modules():
        for holder in (module._parameters, module._buffers, vars(module)):
            for name, tensor in holder.items():
                if not isinstance(tensor, torch.Tensor) or pretend.on_device(tensor):
                    continue
                moved = pretend.PretendTensor(tensor.detach())
                if isinstance(tensor, torch.nn.Parameter):
                    moved = torch.nn.Parameter(moved, requires_grad=False)
                holder[name] = moved
