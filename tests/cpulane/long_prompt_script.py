"""Run in a process of the lane: one long prompt, greedily, on one kind of engine.

``chunked``: 16 tokens a step, a cached prefix at the second try, two LoRA adapters.
``speculative``: the prompt at once, n-gram drafts, the engine in its own processes.
Both compute in float32, where they have to agree on every token.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

from vllm_ext_cpulane.engine import report, tiny_engine

# Ends as it began, so that n-grams have something to find.
PROMPT = {"prompt_token_ids": [*range(5, 85), *range(5, 25)]}
FORCED = 77
RANK = 8
STEP_TOKENS = 16


def write_adapter(scale: float) -> str:
    """A LoRA adapter on the tiny model's output projections; returns its folder."""
    folder = Path(tempfile.mkdtemp(prefix="vllm-ext-adapter-"))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": ["o_proj"],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    random = np.random.default_rng(0)
    tensors = {}
    for layer in range(2):
        name = f"base_model.model.model.layers.{layer}.self_attn.o_proj"
        down, up = random.normal(0, scale, (2, RANK, 64)).astype(np.float32)
        tensors[f"{name}.lora_A.weight"] = down
        tensors[f"{name}.lora_B.weight"] = np.ascontiguousarray(up.T)
    save_file(tensors, folder / "adapter_model.safetensors")
    return str(folder)


def generate(llm: LLM, adapter: LoRARequest | None = None, **params: Any) -> Any:
    params = {"temperature": 0, "max_tokens": 12, "ignore_eos": True} | params
    [request] = llm.generate(
        [PROMPT], SamplingParams(**params), use_tqdm=False, lora_request=adapter
    )
    return request


def tokens(request: Any) -> list[int]:
    return list(request.outputs[0].token_ids)


def chunked() -> dict[str, Any]:
    llm = tiny_engine(
        dtype="float32",
        max_num_batched_tokens=STEP_TOKENS,
        block_size=32,  # only whole blocks are cached; the CPU's own size is 128
        enable_lora=True,
        max_lora_rank=RANK,
    )
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    step_sizes: list[int] = []
    execute = runner.execute_model

    def noting_size(scheduled: Any, *arguments: Any, **options: Any) -> Any:
        step_sizes.append(scheduled.total_num_scheduled_tokens)
        return execute(scheduled, *arguments, **options)

    runner.execute_model = noting_size
    first = generate(llm)
    runner.execute_model = execute
    second = generate(llm)
    return {
        "step_sizes": step_sizes,
        "cached_tokens": [first.num_cached_tokens, second.num_cached_tokens],
        "tokens": tokens(first),
        "tokens_from_cache": tokens(second),
        "tokens_of_empty_adapter": tokens(
            generate(llm, LoRARequest("empty", 1, write_adapter(0.0)))
        ),
        "tokens_of_adapter": tokens(
            generate(llm, LoRARequest("random", 2, write_adapter(0.5)))
        ),
    }


def speculative() -> dict[str, Any]:
    llm = tiny_engine(
        dtype="float32",
        speculative_config={
            "method": "ngram",
            "num_speculative_tokens": 3,
            "prompt_lookup_max": 3,
            "prompt_lookup_min": 1,
        },
        disable_log_stats=False,
    )

    def count(what: str) -> int:
        name = f"vllm:spec_decode_num_{what}_tokens"
        return sum(metric.value for metric in llm.get_metrics() if metric.name == name)

    free = tokens(generate(llm))
    rejected = count("draft") - count("accepted")
    before = count("accepted")
    forced = tokens(generate(llm, allowed_token_ids=[FORCED]))
    return {
        "tokens": free,
        "rejected": rejected,
        "tokens_of_forced": forced,
        "accepted_of_forced": count("accepted") - before,
    }


if __name__ == "__main__":
    report({"chunked": chunked, "speculative": speculative}[sys.argv[1]]())
