"""One engine on the pretend device, feature by feature: the child of `audit`.

Real vLLM, with the model runner that ``VLLM_USE_V2_MODEL_RUNNER`` names. Each feature
gets requests of its own; the steps in which they only decode are watched apart from
those in which they arrive and leave. First everything is stock, then patches are
applied to the same engine.
"""

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from unittest import mock

from vllm_ext.children import serve
from vllm_ext.prove import engine
from vllm_ext.prove.pretend import PretendDevice
from vllm_ext.prove.syncs import Found, Wait, watch
from vllm_ext.testing import all_applied

REQUESTS = 2
WARM = 2  # tokens until all that is scheduled for a request is a decode
STEADY = 2  # rounds that are watched then
LENGTH = 8  # tokens of a request that is compared
JOINING = 3  # such requests that arrive in a step
PATIENCE = 120  # seconds, for a grammar to be compiled on a busy machine
MEMORY = ("device", "pinned")
BLOCK_SIZE = 64  # tokens; large, so that no step has to append a block
VOCABULARY = 512
GRAPH_SIZES = [REQUESTS, REQUESTS * 4]  # tokens; with three drafts each, and without

Watching = Callable[[PretendDevice | None], AbstractContextManager[Found]]

GREEDY: dict[str, Any] = {"temperature": 0.0}
DRAWN: dict[str, Any] = {"temperature": 0.9, "seed": 1}
STOPS = [9, 10, 11]
TEXT = {"type": "string", "minLength": 40}  # a JSON string that does not end by itself
THINKING = {"reasoning_start_str": "<think>", "reasoning_end_str": "</think>"}
ONE_TOKEN = {**GREEDY, "allowed_token_ids": [70]}  # so that every draft is accepted

MAIN: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "temperature": {"temperature": 0.9},
    "temperature, seed": DRAWN,
    "min-p": {**DRAWN, "min_p": 0.1},
    "top-k": {**DRAWN, "top_k": 20},
    "top-p": {**DRAWN, "top_p": 0.8},
    "top-k, top-p": {**DRAWN, "top_k": 20, "top_p": 0.8},
    "three penalties": {
        **{**GREEDY, "repetition_penalty": 1.2},
        **{"presence_penalty": 0.5, "frequency_penalty": 0.5},
    },
    "logit bias": {**GREEDY, "logit_bias": {7: 2.0, 8: -2.0}},
    "allowed ids": {**DRAWN, "allowed_token_ids": [70, 71, 72]},
    "bad words": {**GREEDY, "bad_words": ["a", "bc"]},
    "min_tokens, stop tokens": {
        **{**GREEDY, "min_tokens": 30, "stop_token_ids": STOPS}
    },
    "JSON schema": {**GREEDY, "json": TEXT},
    "min_tokens, stop tokens, JSON schema": {
        **{**GREEDY, "min_tokens": 30, "stop_token_ids": STOPS, "json": TEXT}
    },
    "logprobs": {**GREEDY, "logprobs": 3},
    "prompt logprobs": {**GREEDY, "prompt_logprobs": 2},
    "thinking budget": {**GREEDY, "thinking_token_budget": 2},
}
DRAFTS: dict[str, dict[str, Any]] = {
    "n-gram drafts": ONE_TOKEN,
    "n-gram drafts, logprobs": {**ONE_TOKEN, "logprobs": 3},
    "n-gram drafts, JSON schema": {**GREEDY, "json": TEXT},
    "n-gram drafts, thinking budget": {**ONE_TOKEN, "thinking_token_budget": 90},
}
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_max": 3,
    "prompt_lookup_min": 2,
}
STEPPED = {name: wanted for name, wanted in MAIN.items() if name != "thinking budget"}
# Features, and options of the engine. vLLM schedules n-gram drafts synchronously.
KINDS: dict[str, tuple[dict[str, dict[str, Any]], dict[str, Any]]] = {
    "asynchronous": (MAIN, {}),
    "from boot": (STEPPED, {"reasoning_config": None}),
    "drafts": (DRAFTS, {"async_scheduling": False, "speculative_config": NGRAM}),
}


def main() -> None:
    """Serve questions of one kind: boot, and audit some features."""
    serve({"audit": audit})


def audit(kind: str, patches: list[str], patched: list[str]) -> dict[str, Any]:
    """Boot an engine of a kind and watch its features, stock and then patched.

    Args:
        kind: Of `KINDS`.
        patches: Names of the patches that are applied, all at once; ``from boot``
            before the engine is built, and stock is what it does without its graphs.
        patched: The features to watch again under them.

    Returns:
        ``runner``, its module; ``asynchronous``, how it schedules; ``stock`` and
        ``patched``, by feature what `observe` gives; ``patches``, by name how often
        its replacements were called, and ``aside``, how often they left a step to
        stock code for which reason; ``tokens``, how many `decode` gave, and
        ``stock_lags`` and ``patched_lags``, the features for which it gave others
        when the device lagged.
    """
    features, options = KINDS[kind]
    with ExitStack() as stack:
        device = stack.enter_context(PretendDevice())
        applied = all_applied(patches)
        outcomes = stack.enter_context(applied) if kind == "from boot" else None
        llm = stack.enter_context(_engine(device, **options))

        def watched(names: Iterable[str]) -> dict[str, Any]:
            return {
                name: observe(llm.llm_engine, device, features[name]) for name in names
            }

        runner = engine.model_runner(llm)
        scheduler = llm.llm_engine.vllm_config.scheduler_config
        # The graphs of step_graph; without them, steps are stock's.
        with mock.patch.object(runner, "step_graph", None, create=True):
            stock = watched(features)
            expected = decode(llm.llm_engine, device, features, lags=False)
            stock_lags = decode(llm.llm_engine, device, features, lags=True)
        if outcomes is None:
            outcomes = stack.enter_context(applied)
        patched_lags = decode(llm.llm_engine, device, features, lags=True)
        under_patches = watched(patched)
        return {
            "runner": type(runner).__mro__[1].__module__,
            "asynchronous": scheduler.async_scheduling,
            "stock": stock,
            "patched": under_patches,
            "tokens": sum(len(tokens) for tokens in expected.values()),
            "stock_lags": differing(expected, stock_lags),
            "patched_lags": differing(expected, patched_lags),
            "patches": {
                outcome.patch.name: {
                    "calls": sum(outcome.calls.values()),
                    "aside": dict(outcome.aside),
                }
                for outcome in outcomes
            },
        }


@contextmanager
def _engine(device: PretendDevice, **options: Any) -> Iterator[Any]:
    """An ``LLM`` with a model as small as vLLM takes it, its graphs captured."""
    from vllm.config.reasoning import ReasoningConfig
    from vllm.platforms.cpu import CpuPlatform

    from vllm_ext_cpulane.tinymodel import write_model

    engine.put_on_device()
    check = CpuPlatform.check_and_update_config

    def check_and_update_config(cls: type, config: Any) -> None:
        check(config)
        config.scheduler_config.async_scheduling = options.get("async_scheduling", True)
        config.compilation_config.cudagraph_capture_sizes = GRAPH_SIZES
        config.compilation_config.max_cudagraph_capture_size = GRAPH_SIZES[-1]

    with ExitStack() as stack:
        folder = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="vllm-ext-audit-")
        )
        stack.enter_context(
            mock.patch.object(
                CpuPlatform,
                "check_and_update_config",
                classmethod(check_and_update_config),
            )
        )
        model = write_model(
            *(folder, VOCABULARY), layers=1, tokenizer=True, weights=True
        )
        defaults = {
            "reasoning_config": ReasoningConfig(**THINKING),
            "structured_outputs_config": {"backend": "xgrammar"},
            "block_size": BLOCK_SIZE,
            "enable_prefix_caching": False,
        }
        llm = stack.enter_context(
            engine.booted(device, model=str(model), **(defaults | options))
        )
        yield llm


def observe(
    llm_engine: Any,
    device: PretendDevice | None,
    wanted: dict[str, Any],
    watching: Watching = watch,
) -> Any:
    """Let requests arrive, decode and leave.

    Args:
        llm_engine: In this process.
        device: What it decodes on; ``None`` for CUDA.
        wanted: Sampling parameters.
        watching: What looks on at each step.

    Returns:
        ``steps``, how many were steady; ``waits`` and ``events`` of those steps, and
        ``first``, the waits of all others, as `_sites` gives them; ``submitted``, per
        steady step, how often each kind of thing was submitted, and ``allocated``,
        how many tensors were made on the ``device`` and in ``pinned`` memory: a
        number, or the least and the most.

    Raises:
        ValueError: The requests do not decode for long enough.
    """
    ids = [str(index) for index in range(REQUESTS)]
    for index, name in enumerate(ids):
        prompt = {"prompt_token_ids": _prompt(index)}
        llm_engine.add_request(name, prompt, _parameters(wanted, index))
    before: list[Found] = []
    steady: list[Found] = []
    after: list[Found] = []
    given = dict.fromkeys(ids, 0)
    deadline = time.monotonic() + PATIENCE
    while llm_engine.has_unfinished_requests():
        if time.monotonic() > deadline:
            raise ValueError(f"no {WARM} tokens in {PATIENCE} s for {wanted}")
        with watching(device) as found:
            answers = llm_engine.step()
        if min(given.values()) < WARM:
            before.append(found)
        elif len(steady) < STEADY:
            steady.append(found)
        else:
            after.append(found)
        for answer in answers:
            given[answer.request_id] = len(answer.outputs[0].token_ids)
        if len(steady) == STEADY and not after:
            llm_engine.abort_request(ids)
    if len(steady) < STEADY:
        raise ValueError(f"done after {len(steady)} steady steps: {wanted}")
    return {
        "steps": STEADY,
        "waits": _sites(wait for found in steady for wait in found.waits),
        "events": _sites(wait for found in steady for wait in found.events),
        "first": _sites(wait for found in before + after for wait in found.waits),
        "submitted": _per_step([found.counts for found in steady]),
        "allocated": _per_step(
            [{kind: found.allocated[kind] for kind in MEMORY} for found in steady]
        ),
    }


def decode(
    llm_engine: Any,
    device: PretendDevice,
    features: dict[str, dict[str, Any]],
    *,
    lags: bool,
) -> dict[str, list[int]]:
    """Tokens of one request per feature, of which some join while others run.

    Args:
        lags: Let the device run nothing before the host waits for it: what the host
            overwrites too early, or reads too early, then gives other tokens.
    """
    waiting = [
        (name, wanted)
        for name, wanted in features.items()
        if wanted["temperature"] == 0 or "seed" in wanted  # the others never repeat
    ]
    tokens: dict[str, list[int]] = {name: [] for name, _ in waiting}
    device.finish()
    device.lags = lags
    try:
        index = 0
        # Requests whose tokens are never seen would go on for ever.
        deadline = time.monotonic() + PATIENCE
        while waiting or llm_engine.has_unfinished_requests():
            if time.monotonic() > deadline:
                llm_engine.abort_request(list(tokens))
                break
            for name, wanted in waiting[:JOINING]:
                prompt = {"prompt_token_ids": _prompt(index)}
                shorter = {**wanted, "max_tokens": LENGTH}
                if "min_tokens" in wanted:
                    shorter["min_tokens"] = LENGTH - 2
                llm_engine.add_request(name, prompt, _parameters(shorter, index))
                index += 1
            del waiting[:JOINING]
            for answer in llm_engine.step():
                tokens[answer.request_id] = list(answer.outputs[0].token_ids)
    finally:
        device.lags = False
        device.finish()
    return tokens


def differing(expected: dict[str, list[int]], found: dict[str, list[int]]) -> list[str]:
    """The features that got other tokens."""
    return [name for name in expected if expected[name] != found[name]]


def _prompt(index: int) -> list[int]:
    """Text that repeats itself, which begins by thinking."""
    thinks = [byte - ord("a") + 68 for byte in b"<think>"]  # the toy tokenizer's
    return [1, *thinks, *([70, 71 + index] * 4), 70, 70, 70]


def _parameters(wanted: dict[str, Any], index: int) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    params = {"max_tokens": 60, "ignore_eos": True, **wanted}
    if "seed" in params:
        params["seed"] += index
    schema = params.pop("json", None)
    if schema:
        params["structured_outputs"] = StructuredOutputsParams(json=schema)
    return SamplingParams(detokenize=False, **params)


def _sites(waits: Iterable[Wait]) -> list[dict[str, Any]]:
    """Waits by the line that is to blame, and how often."""
    counted = Counter(waits)
    return [
        {
            "file": wait.where.path,
            "line": wait.where.line,
            "function": wait.where.function,
            "text": wait.where.text,
            "why": f"{wait.op} {wait.why}",
            "times": times,
        }
        for wait, times in counted.items()
    ]


def _per_step(steps: list[dict[str, int]]) -> dict[str, Any]:
    return {
        kind: steps[0][kind]
        if len({step[kind] for step in steps}) == 1
        else [min(step[kind] for step in steps), max(step[kind] for step in steps)]
        for kind in steps[0]
    }


if __name__ == "__main__":
    main()
