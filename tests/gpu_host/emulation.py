"""Parts of a GPU host, pretended, so that the real bundle can be tried without one.

``python emulation.py MODE MODULE [ARGUMENT ...]`` runs a module with them:

``cpu``   vLLM's CUDA wheel decodes on the CPU: its Model Runner V2 through the CPU
          subclass, eager, Triton's interpreter in place of kernels.
``h200``  every query says that there is one H200; nothing can run. For what vLLM
          chooses there: `chosen`.

In both the CUDA libraries need a ``libcuda.so.1`` to load: `write_libcuda`.
"""

import collections
import importlib.metadata
import importlib.util
import json
import os
import runpy
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

CUDA_CALLS = (
    *("cuInit", "cuCtxGetCurrent", "cuCtxSetCurrent", "cuDeviceGetAttribute"),
    *("cuDevicePrimaryCtxRetain", "cuDriverGetVersion", "cuGetErrorString"),
    *("cuGetProcAddress", "cuGetProcAddress_v2", "cuMemAddressFree", "cuMemCreate"),
    *("cuMemAddressReserve", "cuMemGetAllocationGranularity", "cuMemMap"),
    *("cuMemRelease", "cuMemSetAccess", "cuMemUnmap", "cuPointerGetAttribute"),
    "cuTensorMapEncodeTiled",
)
NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
GIB = 1 << 30


def write_libcuda(folder: Path) -> Path:
    """A driver library whose every call says that there is no device."""
    code = "".join(f"int {name}(void){{return {NO_DEVICE};}}\n" for name in CUDA_CALLS)
    library = folder / "libcuda.so.1"
    command = ["cc", "-x", "c", "-", "-shared", "-fPIC", "-o", str(library)]
    subprocess.run(command, input=code, text=True, check=True)
    return library


# -- vLLM's CUDA wheel on the CPU --------------------------------------------------


def decode_on_the_cpu() -> None:
    """Before vLLM is imported: make it take the CPU platform, and that work."""
    os.environ |= {
        "TRITON_INTERPRET": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    version = importlib.metadata.version
    # vLLM takes "cpu" in its own version as the platform.
    importlib.metadata.version = lambda name: (
        version(name) + ("+cpu" if name == "vllm" else "")
    )
    _let_triton_have_a_cpu()
    import torch
    import vllm
    import vllm._C_stable_libtorch  # the schemas of CUDA's operators
    from vllm.model_executor.custom_op import CustomOp
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.sample.ops import topk_topp_sampler

    operators = types.ModuleType("vllm._C")
    sys.modules["vllm._C"] = vllm._C = operators
    library = torch.library.Library("_C", "FRAGMENT")
    library.define("init_cpu_memory_env(int[] ids) -> ()")
    library.impl("init_cpu_memory_env", lambda ids: None, "CompositeExplicitAutograd")
    vllm._emulation = library  # as long as it lives, so do the operators
    triton_attention = AttentionBackendEnum.TRITON_ATTN.get_path()
    CpuPlatform.import_kernels = classmethod(lambda cls: None)
    CpuPlatform.get_attn_backend_cls = classmethod(
        lambda cls, *a, **k: triton_attention
    )
    CpuPlatform.num_compute_units = classmethod(lambda cls, device=0: 8)
    CustomOp.dispatch_forward = lambda self, *a, **k: self.forward_native
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.get_device_properties = lambda device=None: types.SimpleNamespace(
        **{"multi_processor_count": 8, "major": 9, "minor": 0, "name": "emulated"},
        total_memory=16 * GIB,
    )
    # Triton 3.6's interpreter does not know all that this kernel does.
    filtered = topk_topp_sampler.apply_top_k_top_p_pytorch
    topk_topp_sampler.apply_top_k_top_p_triton = lambda logits, k, p, **_: filtered(
        logits, k, p
    )
    # The interpreter is no place for a model of real size, nor the CPU for a GPU's
    # share of memory.
    from vllm.engine import arg_utils

    stock = arg_utils.EngineArgs.__post_init__

    def smaller(self: Any) -> None:
        self.enforce_eager, self.block_size = True, 32
        self.kernel_config = {"enable_jit_warmup": False}
        stock(self)

    arg_utils.EngineArgs.__post_init__ = smaller


def _let_triton_have_a_cpu() -> None:
    import triton.runtime.interpreter as interpreter
    from triton.backends import Backend, backends

    class Driver:
        @staticmethod
        def is_active() -> bool:
            return True

    class Compiler:
        @staticmethod
        def supports_target(target: Any) -> bool:
            return False

    backends["cpu"] = Backend(compiler=Compiler, driver=Driver)
    # Triton 3.6 calls int() on arrays of one element, which numpy 2.4 refuses.
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


# -- an H200 that answers questions ------------------------------------------------


def answer_as_an_h200() -> None:
    """Before vLLM is imported: one H200, as far as one may ask."""
    import torch
    from triton.backends import backends

    properties = types.SimpleNamespace(
        **{"name": "NVIDIA H200", "major": 9, "minor": 0, "uuid": "made-up"},
        **{"multi_processor_count": 132, "total_memory": 140 * GIB, "warp_size": 32},
        **{"shared_memory_per_block_optin": 232448, "L2_cache_size": 60 << 20},
        **{"regs_per_multiprocessor": 65536, "max_threads_per_multi_processor": 2048},
        **{"is_integrated": False, "gcnArchName": ""},
    )
    cuda, accelerator = torch.cuda, torch.accelerator
    cuda.is_available = accelerator.is_available = lambda: True
    cuda.device_count = accelerator.device_count = lambda: 1
    cuda.current_device = accelerator.current_device_index = lambda: 0
    cuda.get_device_capability = lambda device=None: (9, 0)
    cuda.get_device_properties = lambda device=None: properties
    cuda.get_device_name = lambda device=None: properties.name
    cuda.get_arch_list = lambda: ["sm_90"]
    cuda.mem_get_info = lambda device=None: (139 * GIB, 140 * GIB)
    for name, backend in backends.items():
        if backend.driver:
            backend.driver.is_active = staticmethod(lambda name=name: name == "nvidia")
    from vllm.third_party import pynvml

    memory = collections.namedtuple("Memory", "total free used")
    answers = {
        **{"nvmlInit": None, "nvmlShutdown": None, "nvmlDeviceGetCount": 1},
        **{"nvmlDeviceGetHandleByIndex": 0, "nvmlDeviceGetHandleByUUID": 0},
        **{"nvmlDeviceGetIndex": 0, "nvmlDeviceGetCudaComputeCapability": (9, 0)},
        **{"nvmlDeviceGetName": properties.name, "nvmlDeviceGetUUID": "GPU-made-up"},
        "nvmlDeviceGetMemoryInfo": memory(140 * GIB, 139 * GIB, GIB),
        "nvmlDeviceGetP2PStatus": 1,
    }
    for name, answer in answers.items():
        setattr(pynvml, name, lambda *a, answer=answer, **k: answer)


def chosen(model: str) -> dict[str, Any]:
    """What stock vLLM would take on that H200 for a config-only model."""
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends import fa_utils
    from vllm.v1.sample.ops.topk_topp_sampler import flashinfer_sampler_supported

    config = EngineArgs(
        model=model, load_format="dummy", skip_tokenizer_init=True, max_model_len=2048
    ).create_engine_config()
    with set_current_vllm_config(config):
        flash_attention = fa_utils.get_flash_attn_version(head_size=64)
    sampler: Any = None
    if importlib.util.find_spec("flashinfer"):
        from flashinfer.jit.sampling import gen_sampling_module

        module = gen_sampling_module()
        functions = ("top_p_sampling_from_probs", "top_k_mask_logits", "softmax")
        loaded = module.build_and_load()
        sampler = module.is_aot and all(hasattr(loaded, name) for name in functions)
    return {
        "platform": type(current_platform).__name__,
        "v2": config.use_v2_model_runner,
        "cudagraph_mode": str(config.compilation_config.cudagraph_mode),
        "compilation_mode": str(config.compilation_config.mode),
        "async_scheduling": bool(config.scheduler_config.async_scheduling),
        "attention_backend": str(config.attention_config.backend),
        "enforce_eager": config.model_config.enforce_eager,
        "jit_warmup": config.kernel_config.enable_jit_warmup,
        "flashinfer_autotune": config.kernel_config.enable_flashinfer_autotune,
        "flash_attention": flash_attention,
        "flashinfer_supported": flashinfer_sampler_supported(),
        "flashinfer_module": sampler,
    }


def main() -> None:
    mode, module, *arguments = sys.argv[1:]
    if mode == "h200":
        answer_as_an_h200()
        print(json.dumps(chosen(module)))
    else:
        decode_on_the_cpu()
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
