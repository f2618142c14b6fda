"""Run in a process of the lane: one answer of a tiny engine per sampling feature.

Reports what the engine answered and leaves the judging to ``test_sampling.py``.
Arguments are the names of the features to ask for; without any, it asks for all.
"""

import statistics
import sys
import time
from typing import Any

import vllm
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from vllm.triton_utils import HAS_TRITON

from vllm_ext_cpulane.engine import PROMPT, report, tiny_engine

SCHEMA = {
    "type": "object",
    "properties": {
        "number": {"type": "integer", "minimum": 0, "maximum": 9},
        "letter": {"enum": ["x", "y"]},
    },
    "required": ["number", "letter"],
    "additionalProperties": False,
}

ALL_LOGPROBS = -1
A, B = 68, 69  # the toy tokenizer's tokens for "a" and "b"

# Drawn at random, each with every raw logprob so that a choice can be checked.
DRAWN = {
    "drawn": {},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.5},
    "top_k_top_p": {"top_k": 20, "top_p": 0.8},
    "min_p": {"min_p": 0.2},
}

FEATURES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "seed_7": {"temperature": 0.8, "seed": 7},
    "seed_7_again": {"temperature": 0.8, "seed": 7},
    "seed_8": {"temperature": 0.8, "seed": 8},
    "two_samples": {"temperature": 0.9, "seed": 7, "top_k": 20, "n": 2},
    "greedy_long": {"temperature": 0, "max_tokens": 12},
    "presence_frequency": {
        "temperature": 0,
        "max_tokens": 12,
        "presence_penalty": 1.5,
        "frequency_penalty": 0.5,
        "logprobs": ALL_LOGPROBS,
    },
    "repetition": {"temperature": 0, "max_tokens": 12, "repetition_penalty": 2.0},
    "logit_bias": {"temperature": 0, "logit_bias": {77: 100.0}},
    "allowed_token_ids": {"seed": 1, "allowed_token_ids": [5, 6, 7]},
    "bad_words_off": {"temperature": 0, "logit_bias": {A: 100.0, B: 50.0}},
    "bad_words": {
        "temperature": 0,
        "logit_bias": {A: 100.0, B: 50.0},
        "bad_words": ["a"],
    },
    "bad_word_of_two": {
        "temperature": 0,
        "logit_bias": {A: 100.0, B: 50.0},
        "bad_words": ["aa"],
    },
    "stop_token": {
        "temperature": 0,
        "logit_bias": {9: 100.0},
        "stop_token_ids": [9],
        "ignore_eos": False,
    },
    "min_tokens": {
        "temperature": 0,
        "logit_bias": {9: 100.0},
        "stop_token_ids": [9],
        "min_tokens": 3,
        "ignore_eos": False,
    },
    "logprobs": {"temperature": 0, "logprobs": 3},
    "all_logprobs": {"temperature": 0, "logprobs": ALL_LOGPROBS},
    "prompt_logprobs": {"temperature": 0, "prompt_logprobs": 2},
    "json": {
        "temperature": 0,
        "max_tokens": 40,
        "ignore_eos": False,
        "structured_outputs": StructuredOutputsParams(json=SCHEMA),
    },
    "choice": {
        "temperature": 0,
        "max_tokens": 12,
        "ignore_eos": False,
        "structured_outputs": StructuredOutputsParams(choice=["yes", "no"]),
    },
} | {
    name: {"seed": 7, "logprobs": ALL_LOGPROBS, "max_tokens": 10} | params
    for name, params in DRAWN.items()
}


def parameters(name: str) -> SamplingParams:
    return SamplingParams(**({"max_tokens": 6, "ignore_eos": True} | FEATURES[name]))


def logprobs(step: dict[int, Any] | None) -> dict[str, float] | None:
    return step and {str(token): found.logprob for token, found in step.items()}


def answer(request: Any) -> dict[str, Any]:
    """What a test needs of a ``RequestOutput``, in JSON's types."""
    return {
        "outputs": [
            {
                "tokens": list(output.token_ids),
                "text": output.text,
                "finish_reason": output.finish_reason,
                "logprobs": [logprobs(step) for step in output.logprobs or []],
            }
            for output in request.outputs
        ],
        "prompt_logprobs": [logprobs(step) for step in request.prompt_logprobs or []],
    }


def step_milliseconds(llm: Any, steps: int = 20) -> float:
    """Median time of a decode step of four requests."""
    for index in range(4):
        params = SamplingParams(
            temperature=0.8, seed=index, max_tokens=steps + 1, ignore_eos=True
        )
        llm.llm_engine.add_request(str(index), PROMPT, params)
    llm.llm_engine.step()  # prefill
    times = []
    while llm.llm_engine.has_unfinished_requests():
        started = time.thread_time()
        llm.llm_engine.step()
        times.append(time.thread_time() - started)
    return 1e3 * statistics.median(times)


def main() -> None:
    llm = tiny_engine(
        structured_outputs_config={
            "backend": "xgrammar",
            "disable_any_whitespace": True,  # a random model writes nothing else
        }
    )
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner

    def generate(*names: str) -> list[dict[str, Any]]:
        params = [parameters(name) for name in names]
        requests = llm.generate([PROMPT] * len(names), params, use_tqdm=False)
        return [answer(request) for request in requests]

    names = sys.argv[1:] or list(FEATURES)
    alone = {name: generate(name)[0] for name in names}
    rounds = [step_milliseconds(llm)]
    # Eight run at a time, so requests also join and leave a running batch.
    together = dict(zip(names, generate(*names), strict=True))
    rounds += [step_milliseconds(llm) for _ in range(3)]
    report(
        {
            "vllm": vllm.__file__,
            "runner": [kind.__module__ for kind in type(runner).__mro__],
            "has_triton": HAS_TRITON,
            "lane_installed": "vllm_ext_cpulane.interpret" in sys.modules,
            "alone": alone,
            "together": together,
            "step_milliseconds": rounds,
        }
    )


main()
