"""Logprobs and accepted drafts read back: stock's answer, with one wait."""

from __future__ import annotations

import pytest
import torch

from vllm_ext.patches.v1_copy_back import PATCH
from vllm_ext.prove.pretend import DEVICE, PretendDevice
from vllm_ext.prove.syncs import watch
from vllm_ext.testing import applied

VOCAB = 40


@pytest.fixture
def device():
    with PretendDevice() as device:
        yield device


def logprobs(rows, place, seed=0):
    """Logprobs with ties, infinities and NaN, as tensors on ``place``."""
    from vllm.v1.outputs import LogprobsTensors

    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, 4, generator=generator).round()
    if rows:
        values[0] = torch.tensor([float("nan"), float("-inf"), float("inf"), -0.0])
    ids = torch.randint(VOCAB, (rows, 4), generator=generator, dtype=torch.int32)
    ranks = torch.randint(VOCAB, (rows,), generator=generator)
    return LogprobsTensors(*(it.to(place) for it in (ids, values, ranks)))


def assert_lists_equal(actual, expected):
    for ours, theirs in zip(actual[:3], expected[:3], strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.tobytes() == theirs.tobytes()
    assert actual[3] == expected[3]


@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("boundaries", [None, [0, 1, 7]])
def test_lists_of_logprobs(device, rows, boundaries):
    tensors = logprobs(rows, DEVICE)
    with watch(device) as stock:
        expected = tensors.tolists(boundaries)
    with applied(PATCH), watch(device) as ours:
        actual = tensors.tolists(boundaries)
    assert_lists_equal(actual, expected)
    assert (len(stock.waits), len(stock.events)) == (3, 0)
    assert (len(ours.waits), len(ours.events)) == (0, 1)


def drafts(accepted, place):
    """Tokens as the rejection sampler leaves them: -1 behind the last accepted."""
    most = max(accepted, default=1)
    tokens = torch.full((len(accepted), most), -1, dtype=torch.int32)
    for row, (line, number) in enumerate(zip(tokens, accepted, strict=True)):
        line[:number] = torch.arange(number) + row
    return tokens.to(place)


CASES = {
    "some accepted": ([1, 3, 2, 3], ()),
    "all accepted": ([3, 3], ()),
    "none accepted": ([0, 0, 0], ()),
    "one row": ([2], ()),
    "no row": ([], ()),
    "rows discarded": ([1, 3, 2, 3], [0, 3]),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("with_logprobs", [False, True])
def test_accepted_drafts(device, case, with_logprobs):
    from vllm.v1.sample.rejection_sampler import RejectionSampler

    accepted, discarded = CASES[case]
    tokens = drafts(accepted, DEVICE)
    if case == "some accepted":
        tokens[1, 1] = VOCAB  # not of the vocabulary: left out
    wanted = logprobs(tokens.numel(), DEVICE) if with_logprobs else None

    def parse():
        # As vLLM calls it.
        return RejectionSampler.parse_output(
            tokens, VOCAB, discarded, logprobs_tensors=wanted
        )

    with watch(device) as stock:
        expected = parse()
    with applied(PATCH), watch(device) as ours:
        actual = parse()
    assert actual[0] == expected[0]
    if with_logprobs:
        assert_lists_equal(actual[1], expected[1])
    else:
        assert actual[1] is expected[1] is None
    assert len(stock.waits) == (10 if with_logprobs else 1)
    assert (len(ours.waits), len(ours.events)) == (0, 1)


def test_a_device_that_lags_has_its_copies_read_in_time(device):
    """The wait is behind the copies: nothing is read before they are over."""
    from vllm.v1.sample.rejection_sampler import RejectionSampler

    tokens, wanted = drafts([1, 3, 2], DEVICE), logprobs(9, DEVICE)
    expected = RejectionSampler.parse_output(tokens, VOCAB, (), wanted)
    listed = wanted.tolists()
    with applied(PATCH):
        device.lags = True
        late = tokens + 0, wanted._replace(logprobs=wanted.logprobs + 0.0)
        actual = RejectionSampler.parse_output(late[0], VOCAB, (), late[1])
        again = wanted._replace(logprobs=wanted.logprobs + 0.0).tolists()
        device.lags = False
        device.finish()
    assert actual[0] == expected[0]
    assert (actual[1].logprobs[1:] == expected[1].logprobs[1:]).all()
    assert (again.logprobs[1:] == listed.logprobs[1:]).all()


def test_tensors_of_the_host_are_read_as_they_are(device):
    """With asynchronous scheduling the copies were made before."""
    from vllm.v1.sample.rejection_sampler import RejectionSampler

    with applied(PATCH), watch(device) as found:
        logprobs(3, "cpu").tolists()
        RejectionSampler.parse_output(drafts([1, 2], "cpu"), VOCAB)
    assert not found.waits
    assert not found.events
