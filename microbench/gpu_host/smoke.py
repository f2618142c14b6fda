"""Does stock vLLM decode here? Boot one model, decode greedily twice, sample once.

``python -m vllm_ext.microbench.gpu_host.smoke --json FILE``; exit status 0 means that
it booted as it does by default and that two greedy runs gave the same tokens.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_ext import jsonfile, machine
from vllm_ext.bench import models

MODEL = "qwen2.5-0.5b"
TOKENS = 32
PROMPTS = 4


def main(argv: Sequence[str] | None = None) -> int:
    """Boot, decode, compare; the exit status."""
    parser = argparse.ArgumentParser(prog="smoke", description=__doc__)
    parser.add_argument("--model", choices=models.MODELS, default=MODEL)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args(argv)
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ["VEXT"] = "0"
    found: dict[str, Any] = {"machine": machine.describe(), "model": args.model}
    jsonfile.write(args.json, found)
    started = time.monotonic()
    engine = boot(args.model, max_model_len=64 + args.tokens, max_num_seqs=8)
    found |= describe(engine) | {"boot_s": round(time.monotonic() - started, 1)}
    jsonfile.write(args.json, found)
    once, twice = (decode(engine, args.tokens, temperature=0.0) for _ in range(2))
    filtered = {"temperature": 0.8, "top_p": 0.9, "top_k": 50}
    found |= {
        "greedy": once[0],
        "same_twice": once == twice,
        "sampled": decode(engine, args.tokens, **filtered)[0],
    }
    complete = all(len(each) == args.tokens for each in (*once, found["sampled"]))
    found["complete"] = complete
    jsonfile.write(args.json, found)
    sys.stdout.write(
        f"booted in {found['boot_s']:.0f} s: {found['runner'].rpartition('.')[2]}, "
        f"{', '.join(found['attention'])}, {found['cudagraph_mode']}; greedy tokens "
        f"{'the same twice' if found['same_twice'] else 'DIFFER between two runs'}\n"
    )
    return 0 if found["same_twice"] and complete else 1


def boot(model: str, **arguments: Any) -> Any:
    """An ``LLM`` on dummy weights, in this process, as stock vLLM makes it.

    Args:
        model: A name of `models.MODELS`.
        arguments: For ``vllm.LLM``, over those below.
    """
    from vllm import LLM

    with tempfile.TemporaryDirectory(prefix="vllm-ext-smoke-") as folder:
        options: dict[str, Any] = {
            "model": str(models.write(model, Path(folder))),
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "gpu_memory_utilization": 0.3,
            "enable_prefix_caching": False,
            "seed": 0,
        }
        return LLM(**options | arguments)


def describe(llm: Any) -> dict[str, Any]:
    """What vLLM chose by itself: runner, graphs, compilation, attention, sampler."""
    engine = llm.llm_engine
    config = engine.vllm_config
    compilation = config.compilation_config
    core = engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    layers = compilation.static_forward_context.values()
    return {
        "runner": f"{type(runner).__module__}.{type(runner).__name__}",
        "cudagraph_mode": str(compilation.cudagraph_mode),
        "compilation_mode": str(compilation.mode),
        "async_scheduling": bool(config.scheduler_config.async_scheduling),
        "attention": sorted(
            {type(getattr(layer, "impl", None)).__name__ for layer in layers}
        ),
        "flashinfer_sampler": getattr(
            getattr(runner, "sampler", None), "use_flashinfer", None
        ),
    }


def decode(llm: Any, tokens: int, **sampling: Any) -> list[list[int]]:
    """The tokens of `PROMPTS` requests."""
    from vllm import SamplingParams

    params = SamplingParams(
        max_tokens=tokens, ignore_eos=True, detokenize=False, **sampling
    )
    prompts = [
        {"prompt_token_ids": [3 + (7 * number + 11 * at) % 2000 for at in range(16)]}
        for number in range(PROMPTS)
    ]
    answers = llm.generate(prompts, params, use_tqdm=False)
    return [list(answer.outputs[0].token_ids) for answer in answers]


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # an engine's threads would hold the process
