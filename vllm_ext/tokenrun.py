"""One engine that decodes a fixed set of requests: the child of ``vllm-ext demo``.

Real vLLM with Model Runner V2 and a tiny model, its Triton kernels interpreted. The
decode path is a GPU's: asynchronous scheduling, and a graph for every batch size.
"""

import tempfile
import time
from typing import Any

from vllm_ext import gpupath
from vllm_ext.children import serve

SEATS = 8  # requests that run at once; the others wait
MAX_LENGTH = 128
ROUNDS = 200  # at most; a run takes about 45

# Parameters, and the round in which the request arrives: some join while others run,
# and leave while others go on. One is aborted.
MANY = [139, 478, *range(4, 2048, 20)]  # tokens to stop at, two of them likely
SAMPLED: dict[str, Any] = {"temperature": 0.9}
REQUESTS: dict[str, tuple[int, dict[str, Any]]] = {
    "greedy": (0, {"temperature": 0.0, "max_tokens": 24}),
    "greedy, short": (0, {"temperature": 0.0, "max_tokens": 5}),
    "temperature": (0, {**SAMPLED, "seed": 1, "max_tokens": 20}),
    "hot": (0, {"temperature": 1.7, "seed": 2, "max_tokens": 12}),
    "logprobs, greedy": (0, {"temperature": 0.0, "logprobs": 3, "max_tokens": 16}),
    "logprobs, sampled": (3, {**SAMPLED, "seed": 3, "logprobs": 2, "max_tokens": 14}),
    "top-k": (4, {**SAMPLED, "seed": 4, "top_k": 20, "max_tokens": 8}),
    "top-p": (5, {**SAMPLED, "seed": 5, "top_p": 0.8, "max_tokens": 8}),
    "top-k and top-p": (6, {**SAMPLED, "seed": 6, "top_k": 40, "top_p": 0.9}),
    "min-p": (8, {**SAMPLED, "seed": 7, "min_p": 0.05, "max_tokens": 10}),
    "repetition": (9, {"temperature": 0.0, "repetition_penalty": 1.3}),
    "penalties": (
        10,
        {**SAMPLED, "seed": 8, "presence_penalty": 0.6, "frequency_penalty": 0.4},
    ),
    "bias": (12, {"temperature": 0.0, "logit_bias": {77: 6.0, 78: 5.0}}),
    "minimum": (13, {**SAMPLED, "seed": 9, "min_tokens": 6, "stop_token_ids": MANY}),
    "stopped": (14, {**SAMPLED, "seed": 10, "stop_token_ids": MANY}),
    "greedy, late": (20, {"temperature": 0.0, "max_tokens": 20}),
    "temperature, late": (22, {**SAMPLED, "seed": 11, "max_tokens": 16}),
    "aborted": (2, {**SAMPLED, "seed": 12, "max_tokens": 60}),
}
ABORTED = {"aborted": 15}  # round
DEFAULT_TOKENS = 10


def main() -> None:
    """Serve one question: decode everything."""
    serve({"decode": decode})


def decode() -> dict[str, Any]:
    """Boot an engine, run `REQUESTS`, and return what each was given.

    Returns:
        ``requests``: by name, its ``tokens``, ``logprobs`` (by position, pairs of
        token and value) and ``reason`` to finish; ``steps`` that made tokens, how
        many of them ``replays`` of a graph, ``seconds`` to boot and to run.
    """
    started = time.monotonic()
    gpupath.enable([1, 2, 4, 8])
    engine = _build_engine()
    core = engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    graphs = gpupath.graphs_that_replay(runner)
    booted = time.monotonic()
    answers, rounds = run(engine)
    return {
        "requests": answers,
        "steps": rounds,
        "replays": graphs["replays"],
        "seconds": [booted - started, time.monotonic() - booted],
    }


def _build_engine() -> Any:
    from vllm import LLM

    from vllm_ext_cpulane.tinymodel import write_model

    with tempfile.TemporaryDirectory(prefix="vllm-ext-demo-") as folder:
        return LLM(
            model=str(write_model(folder, weights=True)),
            skip_tokenizer_init=True,
            max_model_len=MAX_LENGTH,
            max_num_seqs=SEATS,
            block_size=gpupath.BLOCK_SIZE,
            kv_cache_memory_bytes=16 * 2**20,
            enforce_eager=True,  # nothing is compiled; `gpupath` makes the graphs
            disable_log_stats=True,
            seed=0,
        ).llm_engine


def run(engine: Any) -> tuple[dict[str, Any], int]:
    from vllm import SamplingParams

    answers: dict[str, Any] = {}
    for number in range(ROUNDS):
        for index, (name, (arrives, wanted)) in enumerate(REQUESTS.items()):
            if arrives != number:
                continue
            params = {"max_tokens": DEFAULT_TOKENS, "ignore_eos": True, **wanted}
            prompt = [4 + (31 * index + 7 * i) % 1000 for i in range(3 + index)]
            engine.add_request(
                name,
                {"prompt_token_ids": prompt},
                SamplingParams(detokenize=False, **params),
            )
        for name in [name for name, when in ABORTED.items() if when == number]:
            engine.abort_request([name])
        for answer in engine.step():
            [completion] = answer.outputs
            answers[answer.request_id] = {
                "tokens": list(completion.token_ids),
                "logprobs": [
                    [[token, entry.logprob] for token, entry in position.items()]
                    for position in completion.logprobs or ()
                ],
                "reason": completion.finish_reason,
            }
        arrived = all(arrives <= number for arrives, _ in REQUESTS.values())
        if arrived and not engine.has_unfinished_requests():
            return answers, number + 1
    raise RuntimeError(f"requests still run after {ROUNDS} rounds")


if __name__ == "__main__":
    main()
