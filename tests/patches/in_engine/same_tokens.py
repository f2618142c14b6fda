"""Answers to one workload under the settings of one case, as JSON: stock or patched.

Arguments: the case, and the seed of its workload.
"""

import json
import sys
import tempfile
from pathlib import Path

import vllm
import workload

from vllm_ext import gpupath
from vllm_ext_cpulane.engine import report, tiny_engine

CASES = {
    "plain": ({"async_scheduling": False}, {}),
    "async scheduling": ({"dtype": "float32"}, {}),
    "preemption": (
        {"max_model_len": 128, "block_size": 32, "num_gpu_blocks_override": 10},
        {"longest": 60},
    ),
    "prefix caching": (
        {"enable_prefix_caching": True, "block_size": 32},
        {"shared_prefixes": True},
    ),
    "chunked prefill": (
        {"max_num_batched_tokens": 24, "dtype": "float16"},
        {"longest": 90},
    ),
    "n-gram drafts": (
        {
            "speculative_config": {
                "method": "ngram",
                "num_speculative_tokens": 3,
                "prompt_lookup_max": 3,
                "prompt_lookup_min": 2,
            }
        },
        {"repetitive": True},
    ),
    "lora": ({"enable_lora": True, "max_lora_rank": 8}, {"lora": True}),
}


# Decoded as on CUDA: asynchronous scheduling, and FULL graphs, whose replay runs the
# captured forward pass again. vLLM's CPU platform has neither.
ON_GPU_PATH = ("async scheduling", "prefix caching")


def adapter():
    """A LoRA of random weights, strong enough to change tokens."""
    import torch
    from safetensors.torch import save_file
    from vllm.lora.request import LoRARequest

    torch.manual_seed(0)
    folder = Path(tempfile.mkdtemp(prefix="vllm-ext-lora-"))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 8,
        "lora_alpha": 32,
        "target_modules": ["o_proj"],
        "bias": "none",
        "lora_dropout": 0.0,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    weights = {}
    for layer in range(2):
        name = f"base_model.model.model.layers.{layer}.self_attn.o_proj"
        weights[f"{name}.lora_A.weight"] = torch.randn(8, 64)
        weights[f"{name}.lora_B.weight"] = torch.randn(64, 8)
    save_file(weights, folder / "adapter_model.safetensors")
    return LoRARequest("random", 1, str(folder))


def count_preemptions(llm):
    """A list that gets the id of each request that is preempted from now on."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    stock, seen = scheduler._preempt_request, []

    def preempt(request, *args, **kwargs):
        seen.append(request.request_id)
        return stock(request, *args, **kwargs)

    scheduler._preempt_request = preempt
    return seen


def main() -> None:
    case, seed = sys.argv[1], int(sys.argv[2])
    options, kind = CASES[case]
    if case in ON_GPU_PATH:
        gpupath.enable([1, 2, 4, 8])
    llm = tiny_engine(**({"enable_prefix_caching": False} | options))
    graphs = {"replays": 0}
    if case in ON_GPU_PATH:
        graphs = gpupath.graphs_that_replay(workload.model_runner(llm))
    preempted = count_preemptions(llm)
    answers = workload.run(
        llm,
        workload.requests(seed, 24, **kind),
        adapter=adapter() if kind.get("lora") else None,
    )
    config = llm.llm_engine.vllm_config.scheduler_config
    report(
        {
            **workload.findings(answers),
            "vllm": vllm.__version__,
            "preempted": len(preempted),
            "async": config.async_scheduling,
            **graphs,
        }
    )


if __name__ == "__main__":
    main()
