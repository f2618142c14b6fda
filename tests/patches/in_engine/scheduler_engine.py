"""A real engine on the CPU: answers, reasons, and what its metrics said on the way."""

import random
import sys
import tempfile
from typing import Any

import vllm
from vllm import LLM, SamplingParams

from vllm_ext import plugin
from vllm_ext_cpulane.engine import report
from vllm_ext_cpulane.tinymodel import write_model

REQUESTS = 60
BETWEEN = 7  # steps between two looks at the metrics


def engine() -> LLM:
    folder = tempfile.mkdtemp(prefix="vllm-ext-scheduler-")
    return LLM(
        model=str(write_model(folder, 256, layers=1, max_length=256, weights=True)),
        served_model_name="tiny",
        skip_tokenizer_init=True,
        max_model_len=160,
        max_num_seqs=16,
        max_num_batched_tokens=64,
        block_size=32,
        num_gpu_blocks_override=14,  # too few for all, so that some are preempted
        kv_cache_memory_bytes=16 * 2**20,
        dtype="float32",
        enforce_eager=True,
        disable_log_stats=False,
        scheduling_policy="priority",
        seed=0,
    )


def metrics(llm: LLM) -> dict[str, Any]:
    """Every metric but the times; of those how many there are."""
    found: dict[str, Any] = {}
    for metric in llm.get_metrics():
        name = f"{metric.name} {sorted(metric.labels.items())}"
        if hasattr(metric, "value"):
            if "time" not in metric.name and "seconds" not in metric.name:
                found[name] = metric.value
        elif hasattr(metric, "buckets"):
            timed = "time" in metric.name or "seconds" in metric.name
            found[name] = metric.count if timed else [metric.sum, metric.buckets]
        else:
            found[name] = metric.values
    return found


def run(llm: LLM, seed: int) -> dict[str, Any]:
    choose = random.Random(seed)
    prefix = [choose.randrange(4, 250) for _ in range(40)]
    core = llm.llm_engine
    answers: dict[str, Any] = {}
    looks = []
    added = steps = 0
    while added < REQUESTS or core.has_unfinished_requests():
        for _ in range(3 if steps % 15 == 0 and added < REQUESTS else 0):
            prompt = [choose.randrange(4, 250) for _ in range(choose.randint(1, 90))]
            if choose.random() < 0.4:
                prompt = prefix + prompt[:20]
            core.add_request(
                str(added),
                {"prompt_token_ids": prompt},
                SamplingParams(
                    temperature=0.0,  # seeds and chunked prompts fail on stock's CPU
                    max_tokens=choose.choice((1, 9, 40, 64, 200)),
                    stop_token_ids=choose.sample(range(4, 250), 3),
                    logprobs=choose.choice((None, None, 2)),
                    ignore_eos=True,
                    detokenize=False,
                ),
                priority=choose.randrange(3),
            )
            added += 1
        if steps % 50 == 30:
            core.abort_request([str(added - 1)])
        for answer in core.step():
            [made] = answer.outputs
            answers[answer.request_id] = [
                list(made.token_ids),
                [
                    {token: one.logprob for token, one in at.items()}
                    for at in made.logprobs or ()
                ],
                made.finish_reason,
                made.stop_reason,
                answer.num_cached_tokens,
            ]
        steps += 1
        if steps % BETWEEN == 0:
            looks.append(metrics(llm))
    return {"answers": answers, "metrics": looks, "steps": steps}


if __name__ == "__main__":
    found = run(engine(), int(sys.argv[1]))
    states = plugin.engine.outcomes if plugin.engine else {}
    report(
        {
            **found,
            "vllm": vllm.__version__,
            "states": {name: each.state for name, each in states.items()},
            "calls": {
                name: dict(each.calls) for name, each in states.items() if each.calls
            },
        }
    )
