"""One engine that decodes a workload stock, then with the fused sampler, as JSON.

Arguments: the case. Patches are applied to the engine as it runs and reverted again,
so that the same engine is compared with itself.
"""

import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any
from unittest import mock

import torch
import workload
from same_tokens import count_preemptions
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.sampler import Sampler

from vllm_ext import gpupath
from vllm_ext.patches import SERIES
from vllm_ext.patches.fused_sampler import state
from vllm_ext.testing import all_applied
from vllm_ext_cpulane.engine import report, tiny_engine

NAME = "fused_sampler"
TOGETHER = [patch.name for patch in SERIES if patch.default or patch.name == NAME]
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_max": 3,
    "prompt_lookup_min": 2,
}
CASES: dict[str, dict[str, Any]] = {
    # So few blocks that requests are preempted, and join again with their tokens.
    "mixed": {
        "dtype": "float32",
        "async_scheduling": False,
        "max_model_len": 128,
        "block_size": 32,
        "num_gpu_blocks_override": 10,
    },
    "asynchronous": {"dtype": "bfloat16", "max_num_batched_tokens": 40},
    "drafts": {"async_scheduling": False, "speculative_config": NGRAM},
}

SAMPLED = {"temperature": 0.9}
STOPS = list(range(4, 1924, 16))
FEW = [5, 77, 300, 301, 1024, 2047]
QWEN = {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.1}
EVERY_PENALTY = {
    "repetition_penalty": 1.4,
    "presence_penalty": 0.8,
    "frequency_penalty": 0.5,
}


def grammar() -> StructuredOutputsParams:
    return StructuredOutputsParams(json={"type": "string", "minLength": 12})


def requests() -> list[workload.Request]:
    """Everything that a request can ask for, coming and going in one batch."""
    wanted: list[tuple[int, dict[str, Any]]] = [
        (0, {"temperature": 0.0, "max_tokens": 24}),
        (0, {**EVERY_PENALTY, "temperature": 0.8, "seed": 1, "max_tokens": 26}),
        (0, {**QWEN, "seed": 2, "max_tokens": 26}),
        (0, {"temperature": 1.0}),
        (1, {**SAMPLED, "seed": 3, "top_k": 20}),
        (1, {**SAMPLED, "seed": 4, "top_p": 0.9}),
        (2, {**SAMPLED, "top_k": 40, "top_p": 0.8, "logprobs": 0}),
        (3, {**SAMPLED, "seed": 5, "min_p": 0.1, "logprobs": 5}),
        # From here to the end of this one, steps are stock's.
        (7, {"temperature": 0.0, "bad_words": ["a", "bc"], "max_tokens": 5}),
        (9, {"temperature": 0.0, "repetition_penalty": 1.3, "logprobs": 20}),
        (10, {**SAMPLED, "seed": 6, "logit_bias": {77: -9.0, 5: 6.0, 2047: 5.0}}),
        (12, {"temperature": 0.0, "logit_bias": {77: 7.0, 300: 7.0}}),
        (13, {**SAMPLED, "seed": 7, "allowed_token_ids": FEW}),
        (14, {**EVERY_PENALTY, "temperature": 0.0, "allowed_token_ids": FEW}),
        (15, {**SAMPLED, "seed": 8, "min_tokens": 6, "stop_token_ids": STOPS}),
        (16, {"temperature": 0.0, "structured_outputs": grammar()}),
        (17, {**SAMPLED, "seed": 9, "structured_outputs": grammar(), "logprobs": 2}),
        (18, {**QWEN, "seed": 10, "logprobs": 25}),
        (19, {**QWEN, "structured_outputs": grammar(), "seed": 11}),
        (20, {"temperature": 0.0, "logprob_token_ids": FEW, "logprobs": 6}),
        (22, {**SAMPLED, "seed": 12, "max_tokens": 30}),
        (24, {**EVERY_PENALTY, "temperature": 0.0, "min_p": 0.2}),
        (
            26,
            {
                **{"temperature": 0.0, "structured_outputs": grammar()},
                **{"min_tokens": 4, "stop_token_ids": STOPS, "max_tokens": 6},
            },
        ),
        (28, {**EVERY_PENALTY, **SAMPLED, "seed": 13, "logit_bias": {9: 4.0}}),
    ]
    made = []
    for number, (arrives, params) in enumerate(wanted):
        length = 3 + (number * 13) % 50
        prompt = [4 + (31 * number + 7 * i) % 1000 for i in range(length)]
        params = {"max_tokens": 12, "ignore_eos": True, **params}
        made.append(workload.Request(str(number), prompt, params, arrives))
    made[20].aborted = 30
    return made


def revealing(greedy: list[int]) -> list[workload.Request]:
    """Few requests, whose tokens tell if one of the planes is wrong.

    ``greedy``: what the first of `requests` is given.
    """
    likely = list(dict.fromkeys(greedy))
    first = requests()[0].prompt
    # After this, one token would follow again and again.
    long = ([205, 30, 40] * 21)[:56]
    strong = {"presence_penalty": 2.0, "repetition_penalty": 2.0, "max_tokens": 16}
    forbidding = {"repetition_penalty": 50.0}  # of what was in the prompt
    wanted: list[tuple[int, list[int], dict[str, Any]]] = [
        (0, first, {"temperature": 0.9, "seed": 1, "logit_bias": {70: 14.0}}),
        (0, [8, 9], {"temperature": 0.8, "seed": 2}),
        *((0, [n], {"temperature": 1.0, "seed": n}) for n in (10, 11)),
        (0, first, {"temperature": 0.0, "bad_words": ["a"], "max_tokens": 2}),
        # Both need another block in the same step, and there is one.
        *((0, [n, *long], {**strong, "temperature": 0.0}) for n in (7, 9)),
        (9, first, {"temperature": 0.0, "logit_bias": dict.fromkeys(likely, -60.0)}),
        (9, first, {"temperature": 0.0, "min_tokens": 6, "stop_token_ids": likely}),
        (9, first, {**forbidding, "temperature": 0.0, "logit_bias": {first[1]: 25.0}}),
    ]
    return [
        workload.Request(str(i), prompt, {"max_tokens": 10, **params}, arrives)
        for i, (arrives, prompt, params) in enumerate(wanted)
    ]


def drafted() -> list[workload.Request]:
    """Texts that repeat themselves, which are drafted, and some that do not."""
    made = []
    for number in range(4):
        params: dict[str, Any] = {"temperature": 0.0, "max_tokens": 12}
        prompt = [4 + number, 9, 30 + number, 70] * 9
        if number % 2:
            params |= {**EVERY_PENALTY, "temperature": 1.1, "seed": number}
            params["max_tokens"] = 16
            prompt = list(range(40 * number, 40 * number + 9))
        made.append(workload.Request(str(number), prompt, params, 2 * number))
    return made


@contextmanager
def counted_draws():
    """How often there was a draw, without and with filters."""
    draws = {"without filters": 0, "with filters": 0, "rows": 0}
    stock = state.Seats.draw

    def draw(self, logits, *args, filters):
        if logits.shape[0]:
            draws["with filters" if filters else "without filters"] += 1
            draws["rows"] += len(logits)
        return stock(self, logits, *args, filters=filters)

    with mock.patch.object(state.Seats, "draw", draw):
        yield draws


class Engine:
    """An engine, and what workloads get from it."""

    def __init__(self, case: str) -> None:
        if case == "asynchronous":
            gpupath.enable([1, 2, 4, 8])
        options = {"enable_prefix_caching": False} | CASES[case]
        self.llm = tiny_engine(**options)
        if case == "asynchronous":
            gpupath.graphs_that_replay(workload.model_runner(self.llm))
        core = self.llm.llm_engine.engine_core.engine_core
        # In another thread, a request would join whenever its grammar is ready.
        core.structured_output_manager._use_async_grammar_compilation = False

    def made_at_the_first_call(self) -> list[bool]:
        """Whether a sampler without seats gets them in a memory profile, and warm."""
        runner = workload.model_runner(self.llm)
        with all_applied([NAME]):
            before = state.seats_of(runner.sampler)
            runner._dummy_sampler_run(runner.model.embed_input_ids(torch.arange(3)))
            seats = state.seats_of(runner.sampler)
            return [before is None, seats is not None and seats.warmed]

    def of_logits_that_do_not_fit(self) -> list[str]:
        """Why samplers leave such logits to stock, from the first call on."""
        runner = workload.model_runner(self.llm)
        states, rows = runner.req_states, 3
        vocabulary = states.vocab_size
        batch = InputBatch.make_dummy(rows, rows, runner.input_buffers)
        config, device = self.llm.llm_engine.vllm_config, states.device
        with all_applied([NAME]) as outcomes:
            for logits in (
                torch.zeros(rows, vocabulary + 64),
                torch.zeros(rows, vocabulary - 64),
                torch.zeros(rows, vocabulary, dtype=torch.float64),
            ):
                logits[:, 7] = 1.0
                sampler = Sampler(config, rows, vocabulary, device, states)
                for _ in range(2):
                    tokens = sampler(logits, batch).sampled_token_ids
                    assert tokens.tolist() == [[7]] * rows
            return sorted(outcomes[0].aside.elements())

    def run(
        self, wanted: list[workload.Request], patches: list[str] | None = None
    ) -> dict[str, Any]:
        with ExitStack() as stack:
            outcomes = stack.enter_context(all_applied(patches)) if patches else []
            draws = stack.enter_context(counted_draws())
            if outcomes:  # the sampler has been there before the patch
                draws_of_first = workload.run(self.llm, warming())
                assert all(answer.tokens for answer in draws_of_first.values())
                draws.update(dict.fromkeys(draws, 0))
            for outcome in outcomes:
                outcome.aside.clear()
            answers = workload.run(self.llm, wanted)
            return {
                "answers": {name: asdict(each) for name, each in answers.items()},
                "draws": dict(draws),
                "aside": {
                    outcome.patch.name: dict(outcome.aside)
                    for outcome in outcomes
                    if outcome.aside
                },
            }


def warming() -> list[workload.Request]:
    """What the first call of the patched sampler is spent on."""
    return [workload.Request("warming", [5, 6], {"max_tokens": 3}, 0)]


# -- planted bugs ----------------------------------------------------------------------


def _after(name: str, then: Any) -> Any:
    """A method of `Seats`, after which something is done to the seats."""
    stock = getattr(state.Seats, name)

    def method(self: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        then(self)

    return mock.patch.object(state.Seats, name, method)


def _instead(name: str) -> Any:
    return mock.patch.object(state.Seats, name, return_value=None)


def _other_positions() -> Any:
    stock = state.Seats.draw

    def draw(self, logits, rows, mapping, positions, indices, out, *, filters):
        stock(
            *(self, logits, rows, mapping, positions + 1, indices, out), filters=filters
        )

    return mock.patch.object(state.Seats, "draw", draw)


def _other_seats() -> Any:
    stock = state.Seats.draw

    def draw(self, logits, rows, mapping, positions, indices, out, *, filters):
        stock(
            *(self, logits, rows, mapping.roll(1), positions, indices, out),
            filters=filters,
        )

    return mock.patch.object(state.Seats, "draw", draw)


def planted() -> dict[str, Any]:
    """By what is wrong."""
    return {
        "bits of lists are not set": _after(
            "write", lambda seats: seats.requests.listed_bits.zero_()
        ),
        "biases are not written": _after(
            "write", lambda seats: seats.requests.bias.zero_()
        ),
        "stop tokens are allowed": _after(
            "write", lambda seats: seats.requests.params[:, 9].zero_()
        ),
        "the prompt is not counted": _after(
            "write", lambda seats: seats.requests.prompt_bits.zero_()
        ),
        "tokens before a preemption are forgotten": _after(
            "count", lambda seats: seats.requests.output_bits.zero_()
        ),
        "what stock drew is forgotten": _instead("freshen"),
        "what was drawn is forgotten": _after(
            "draw", lambda seats: seats.requests.output_bits.zero_()
        ),
        "a seat keeps what was asked for before": mock.patch.object(
            *(state.Seats, "write"), _write_the_first_only
        ),
        "noise of the next position": _other_positions(),
        "parameters of another row": _other_seats(),
    }


def _write_the_first_only(self: Any) -> None:
    for seat in list(self._joined):
        if self.requests.params[seat].any():
            del self._joined[seat]
    _WRITE(self)


_WRITE = state.Seats.write


def main() -> None:
    case = sys.argv[1]
    engine = Engine(case)
    wanted = drafted() if case == "drafts" else requests()
    if case == "asynchronous":
        wanted = wanted[1::2]  # a replay is slow here
    started = time.process_time()
    preempted = count_preemptions(engine.llm)
    found: dict[str, Any] = {"stock": engine.run(wanted)}
    found["preempted"] = len(preempted)
    if case == "mixed":
        found["patched"] = engine.run(wanted, [NAME])
        telling = revealing(found["stock"]["answers"]["0"]["tokens"])
        preempted.clear()
        found["revealing"] = {
            "stock": engine.run(telling),
            "patched": engine.run(telling, [NAME]),
            "reverted": engine.run(telling),
        }
        found["revealing"]["preempted"] = len(preempted)
        found["made"] = engine.made_at_the_first_call()
        found["unfit"] = engine.of_logits_that_do_not_fit()
        found["planted"] = {}
        for bug, plant in planted().items():
            with plant:
                found["planted"][bug] = engine.run(telling, [NAME])["answers"]
    else:
        found["patched"] = engine.run(wanted, TOGETHER)
    config = engine.llm.llm_engine.vllm_config.scheduler_config
    found["seconds"] = time.process_time() - started
    report(found | {"async": config.async_scheduling})


if __name__ == "__main__":
    main()
