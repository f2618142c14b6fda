"""Two batches of Model Runner V1, stock and patched, in step: the same logits.

The batches are vLLM's own, and so is the sampler; the runner around them is played,
with asynchronous scheduling: a token's copy to the host lands when somebody waits for
it, or when its step's output would have been handed out.
"""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch

from vllm_ext.patches.v1_last_token import PATCH
from vllm_ext.testing import applied

VOCAB = 24
ROWS = 6
STEPS = 40
NOT_LANDED = 3  # a token like any other: read too early, it is believed


class Copy:
    """An event, and the copy before it."""

    def __init__(self, tokens: torch.Tensor):
        self.host = torch.full_like(tokens, NOT_LANDED)
        self._tokens, self.waited = tokens, 0

    def land(self):
        self.host.copy_(self._tokens)
        self._tokens = self.host

    def query(self):
        return self._tokens is self.host

    def synchronize(self):
        if not self.query():
            self.waited += 1
            self.land()


class Twin:
    """One side: a batch, its requests, and what the sampler was given."""

    def __init__(self, asynchronous: bool):
        from vllm.v1.sample.logits_processor import LogitsProcessors
        from vllm.v1.sample.logits_processor.builtin import (
            LogitBiasLogitsProcessor,
            MinTokensLogitsProcessor,
        )
        from vllm.v1.sample.sampler import Sampler
        from vllm.v1.worker.gpu_input_batch import InputBatch

        place = torch.device("cpu")
        kinds = MinTokensLogitsProcessor, LogitBiasLogitsProcessor
        self.batch = InputBatch(
            max_num_reqs=ROWS,
            max_model_len=256,
            max_num_batched_tokens=256,
            device=place,
            vocab_size=VOCAB,
            block_sizes=[16],
            max_num_blocks_per_req=[16],
            logitsprocs=LogitsProcessors([kind(None, place, False) for kind in kinds]),
        )
        self.asynchronous = asynchronous
        self.requests: dict[str, object] = {}
        self.copies: list[Copy] = []
        sampler = Sampler()
        sampler.sample = self._sample
        nowhere = SimpleNamespace(pipeline_parallel_size=1, kv_transfer_config=None)
        self.runner = SimpleNamespace(
            input_batch=self.batch,
            sampler=sampler,
            speculative_config=None,
            parallel_config=nowhere,
            vllm_config=nowhere,
            use_async_scheduling=asynchronous,
        )
        self.processed = torch.empty(0)

    def _sample(self, logits, metadata):
        self.processed = logits.clone()
        return logits.nan_to_num(-1e9).argmax(-1), None

    def add(self, name, prompt, params, output=()):
        from vllm.v1.worker.gpu_input_batch import CachedRequestState

        self.requests[name] = state = CachedRequestState(
            req_id=name,
            prompt_token_ids=prompt,
            mm_features=[],
            sampling_params=params,
            generator=None,
            block_ids=([0],),
            num_computed_tokens=0,
            output_token_ids=list(output),
        )
        self.batch.add_request(state)

    def remove(self, name):
        self.batch.remove_request(name)

    def resume(self, name, output):
        state = self.requests[name]
        state.output_token_ids = list(output)
        self.batch.add_request(state)

    def restart(self, name):
        """What a streaming request does when more of its prompt arrives."""
        self.requests[name].output_token_ids.clear()
        self.batch.add_request(self.requests[name])

    def settle(self):
        self.batch.condense()
        self.batch.refresh_metadata()

    def step(self, logits_of, discarded):
        """Sample for every row; returns tokens by request."""
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner

        batch = self.batch
        self.settle()
        for copy in self.copies[:-1]:
            copy.land()  # its output was handed out
        del self.copies[:-1]
        logits = torch.stack([logits_of(name) for name in batch.req_ids])
        sampled = GPUModelRunner._sample(self.runner, logits, None).sampled_token_ids
        kept = [name for name in batch.req_ids if name not in discarded]
        rows = {name: row for row, name in enumerate(batch.req_ids)}
        if self.asynchronous:
            batch.prev_sampled_token_ids = sampled
            batch.prev_req_id_to_index = {name: rows[name] for name in kept}
        for name in kept:
            token = -1 if self.asynchronous else int(sampled[rows[name]])
            self.requests[name].output_token_ids.append(token)
        if self.asynchronous:
            copy = Copy(sampled)
            self.copies.append(copy)
            batch.set_async_sampled_token_ids(copy.host, copy)
        return {name: int(sampled[rows[name]]) for name in kept}


def parameters(choose, kinds):
    from vllm import SamplingParams

    wanted = {}
    kind = choose.choice(kinds)
    if kind in ("penalties", "both"):
        wanted = {
            "repetition_penalty": choose.choice([0.01, 0.7, 1.0, 1.3, 10.0]),
            "frequency_penalty": choose.choice([-2.0, 0.0, 0.3, 2.0]),
            "presence_penalty": choose.choice([-2.0, 0.0, 0.5, 2.0]),
        }
    if choose.random() < 0.3:
        wanted["logit_bias"] = {choose.randrange(VOCAB): choose.choice([-3.0, 3.0])}
    if choose.random() < 0.3:
        wanted |= {"min_tokens": 3, "stop_token_ids": [choose.randrange(VOCAB)]}
    params = SamplingParams(temperature=0.0, **wanted)
    if kind in ("words", "both"):
        # Few tokens, so that prefixes are met; up to four tokens long.
        params._bad_words_token_ids = [
            [choose.randrange(VOCAB) for _ in range(choose.choice([1, 2, 2, 2, 3, 4]))]
            for _ in range(choose.randint(1, 12))
        ]
    return params


def traffic(seed, kinds, asynchronous=True):
    """Random requests come, stall, go and come back: each step's logits and tokens.

    Returns them, and how often the host waited for a copy.
    """
    choose, side, number = random.Random(seed), Twin(asynchronous), 0
    alive: dict[str, list[int]] = {}  # outputs, as a scheduler knows them
    away: dict[str, int] = {}  # preempted, since when
    chunked: dict[str, int] = {}  # until when its prompt is not through
    seen, waited = [], 0

    def logits_of(name):
        generator = torch.Generator().manual_seed(hash((seed, step, int(name))))
        # Coarse, so that ties and repeated winners occur.
        logits = torch.randn(VOCAB, generator=generator).mul(2).round() / 2
        logits[int(name) % VOCAB] = [float("-inf"), 0.0, -0.0, 4.0][step % 4]
        return logits

    for step in range(STEPS):
        cleared = []
        for name in [name for name in alive if name not in away]:
            fate = choose.random()
            if fate < 0.1:
                side.batch.remove_request(name)
            if fate < 0.04:
                del alive[name]
            elif fate < 0.08:
                away[name] = step
            elif fate < 0.1:
                cleared.append(name)
        for name in cleared:
            side.restart(name)
            alive[name] = []
        for name, since in list(away.items()):
            if since < step and choose.random() < 0.5:
                del away[name]
                side.resume(name, alive[name])
        while len(alive) < ROWS and choose.random() < 0.6:
            name, number = str(number), number + 1
            prompt = [choose.randrange(VOCAB) for _ in range(choose.randint(1, 9))]
            side.add(name, prompt, parameters(choose, kinds))
            alive[name], chunked[name] = [], step + choose.choice([0, 0, 2])
        here = len(alive) - len(away)
        if here > 1 and choose.random() < 0.2:
            side.batch.condense()  # as runners do that put decodes before prefills
            side.batch.swap_states(*choose.sample(range(here), 2))
        if not here:
            side.settle()
            continue
        copies = list(side.copies)
        tokens = side.step(logits_of, {name for name in alive if chunked[name] > step})
        waited += sum(copy.waited for copy in copies)
        for name, token in tokens.items():
            alive[name].append(token)
        seen.append((side.processed, tokens))
    return seen, waited


def assert_same(actual, expected):
    assert len(actual) == len(expected) > STEPS / 2
    for (ours, tokens), (theirs, its_tokens) in zip(actual, expected, strict=True):
        assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32))
        assert tokens == its_tokens


KINDS = {
    "penalties": ("penalties",),
    "bad words": ("words",),
    "a mixture": ("penalties", "words", "both", "none", "none"),
}


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_same_logits_and_no_wait(kinds, seed):
    expected, waits = traffic(seed, KINDS[kinds])
    with applied(PATCH) as outcome:
        actual, ours = traffic(seed, KINDS[kinds])
    assert_same(actual, expected)
    assert waits > 5  # stock, in nearly every step
    assert ours == 0
    assert not outcome.aside
    assert len(outcome.calls) == 3  # all three wrappers


@pytest.mark.parametrize("seed", range(3))
def test_same_logits_when_scheduled_synchronously(seed):
    expected, _ = traffic(seed, KINDS["a mixture"], asynchronous=False)
    with applied(PATCH):
        actual, _ = traffic(seed, KINDS["a mixture"], asynchronous=False)
    assert_same(actual, expected)


def greedy(**wanted):
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, **wanted)


def forbidding(*words):
    params = greedy()
    params._bad_words_token_ids = [list(word) for word in words]
    return params


def logits_towards(*tokens):
    """Logits that rank these, best first."""
    logits = torch.zeros(VOCAB)
    for rank, token in enumerate(tokens):
        logits[token] = 10.0 - rank
    return logits


@pytest.mark.parametrize("patched", [False, True])
def test_a_bad_word_that_hangs_on_the_last_token(patched):
    """The words meet every length of prefix; what is drawn is what they leave."""

    def outputs():
        side = Twin(asynchronous=True)
        words = [(5,), (6, 7), (1, 6, 8), (9, 9, 9, 9), (6, 6)]
        side.add("0", [1, 6], forbidding(*words))
        side.add("1", [1, 6], greedy())  # a neighbour that nothing is forbidden
        wanted = [(5, 1), (5, 6), (7, 8, 9), (9,), (9,), (9, 2), (6,), (6, 7, 3)]
        return [
            list(side.step(lambda name, it=it: logits_towards(*it), ()).values())
            for it in wanted
        ]

    if patched:
        with applied(PATCH):
            found = outputs()
    else:
        found = outputs()
    assert [row[0] for row in found] == [1, 6, 9, 9, 9, 2, 6, 3]
    assert [row[1] for row in found] == [5, 5, 7, 9, 9, 9, 6, 6]


def test_a_request_that_starts_again_has_no_last_token():
    """Its row sampled one in the last step, which is no longer its own."""
    side = Twin(asynchronous=True)
    side.add("0", [1], forbidding((6, 7)))
    with applied(PATCH):
        side.step(lambda name: logits_towards(6), ())
        side.batch.remove_request("0")
        side.restart("0")
        assert side.step(lambda name: logits_towards(7, 8), ()) == {"0": 7}
        assert side.step(lambda name: logits_towards(6), ()) == {"0": 6}
        assert side.step(lambda name: logits_towards(7, 8), ()) == {"0": 8}


def run_aside(change, then_back=False):
    """Steps in which ``change`` holds from the third on; logits of all of them."""
    side = Twin(asynchronous=True)
    side.add("0", [1, 2], greedy(frequency_penalty=1.5))
    side.add("1", [3], forbidding((4, 4), (5, 4)))
    seen = []
    for step in range(8):
        if step == 3:
            change(side)
        if step == 6 and then_back:
            change(side, back=True)
        side.step(lambda name: logits_towards(4, 5, 6), ())
        seen.append((side.processed, step))
    return seen


def custom_processor(side, back=False):
    side.batch.logitsprocs_need_output_token_ids = not back


def transfer(side, back=False):
    config = SimpleNamespace(kv_transfer_config=None if back else object())
    side.runner.vllm_config = config


def stages(side, back=False):
    side.runner.parallel_config = SimpleNamespace(pipeline_parallel_size=2 - back)


def budget(side, back=False):
    tracking = SimpleNamespace(
        has_tracked_requests=lambda: True,
        update_state=lambda *_, **__: None,
        apply_to_logits=lambda logits, *_: logits,
    )
    holder = None if back else tracking
    side.batch.thinking_budget_state_holder = None
    side.batch.sampling_metadata.thinking_budget_state_holder = holder


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (custom_processor, "custom logits processor"),
        (transfer, "KV transfer"),
        (stages, "pipeline parallelism"),
        (budget, "thinking budget"),
    ],
)
def test_leaves_to_stock_what_needs_the_tokens_and_comes_back(change, reason):
    """Nothing is lost on the way to stock code, nor on the way back."""
    expected = run_aside(change, then_back=True)
    with applied(PATCH) as outcome:
        actual = run_aside(change, then_back=True)
    for (ours, _), (theirs, _) in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs)
    assert outcome.aside == {reason: 3}


def test_leaves_drafts_to_stock():
    """Neither the lists nor the event are touched."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    side = Twin(asynchronous=True)
    side.add("0", [1, 2], greedy(frequency_penalty=1.5))
    side.runner.speculative_config = object()
    with applied(PATCH) as outcome:
        side.step(lambda name: logits_towards(4), ())
        pending = side.batch.sampled_token_ids_cpu
        GPUModelRunner._sample(side.runner, logits_towards(4)[None], None)
    assert pending is not None
    assert side.copies[0].waited == 1
    assert outcome.aside == {"speculation": 2}


def test_counts_of_a_steady_batch_cost_one_token():
    """Neither the output nor the prompt is sent or counted again."""
    side = Twin(asynchronous=True)
    side.add("0", [1, 2], greedy(frequency_penalty=1.5))
    side.add("1", [3], greedy(presence_penalty=1.5))
    seen = []
    with applied(PATCH):
        for _ in range(4):
            side.step(lambda name: logits_towards(4, 5), ())
            outputs = side.batch._vext_outputs
            seen.append((outputs._counts.data_ptr(), outputs._in_prompt.data_ptr()))
        assert len(set(seen)) == 1
        assert outputs._counts.dtype == torch.int32
        side.add("2", [3], greedy(presence_penalty=1.5))
        side.step(lambda name: logits_towards(4, 5), ())
        assert outputs._counts.shape == (3, VOCAB + 1)


def test_padding_is_not_a_token():
    """A row without a token in this step counts nothing, though others do."""
    from vllm_ext.patches.v1_last_token.replacement import Outputs

    outputs = Outputs()
    rows = [[4, 4], [], [-1]]
    metadata = SimpleNamespace(
        output_token_ids=rows,
        prompt_token_ids=torch.tensor([[1, 1], [VOCAB, VOCAB], [2, VOCAB]]),
    )
    outputs.last, outputs.sources = torch.tensor([[9], [8], [7]]), [None, None, 1]
    counts, in_prompt = outputs.counts(metadata, torch.zeros(3, VOCAB))
    assert counts.nonzero().tolist() == [[0, 4], [2, 8]]
    assert counts[0, 4] == 2
    assert in_prompt.nonzero().tolist() == [[0, 1], [2, 2]]
