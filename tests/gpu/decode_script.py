"""Answers to workloads on a GPU, with vLLM's own checks armed: stock or patched.

Graphs are captured as vLLM does by default, so decode steps are FULL replays. A wait
of the host for the device inside a step is an error, as is a kernel compiled in one.
There is a graph for each number of requests: a step graph computes the logits of as
many rows as its graph has, and a product may differ in its last bits with that number.
Arguments: the seeds of the workloads.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "patches" / "in_engine"))

import workload
from vllm import LLM

from vllm_ext_cpulane.engine import report
from vllm_ext_cpulane.tinymodel import write_model

SEATS = 16


def main() -> None:
    model = write_model(
        tempfile.mkdtemp(prefix="vllm-ext-gpu-"),
        *(workload.VOCAB,),
        hidden_size=512,
        layers=4,
        heads=8,
        kv_heads=2,
        head_dim=64,
        tokenizer=True,
        weights=True,
    )
    llm = LLM(
        model=str(model),
        max_model_len=512,
        max_num_seqs=SEATS,
        max_logprobs=-1,
        enable_prefix_caching=False,
        gpu_memory_utilization=0.3,
        jit_monitor_mode="error",
        compilation_config={"cudagraph_capture_sizes": [*range(1, SEATS + 1)]},
    )
    answers = {}
    for seed in sys.argv[1:]:
        # Few arrivals and long answers, so that most steps only decode.
        requests = workload.requests(int(seed), 48, last_arrival=160)
        for number, request in enumerate(requests):
            request.name = f"{seed}-{request.name}"
            if number % 4:  # logprobs make a step stock's
                request.params.pop("logprobs", None)
            request.params["max_tokens"] += 20
        answers |= workload.run(llm, requests)
    runner = workload.model_runner(llm)
    report({**workload.findings(answers), "step_graph": of_step_graph(runner)})


def of_step_graph(runner: Any) -> dict[str, Any] | None:
    """What became of the runner's step graph, if it has one in the end."""
    graph = getattr(runner, "step_graph", None)
    if graph is None:
        return None
    return {
        "mono": graph.mono,
        "eligible": runner._calendar._steps,
        "checked": sum(runner._calendar._seen.values()),
        "moved": graph.buffers.moved(runner),
        "cost": graph.cost,
    }


if __name__ == "__main__":
    main()
