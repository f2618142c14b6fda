"""The sync detector: every wait that was planted, with its line, and no other."""

import pytest
import torch

from vllm_ext.prove import crossings
from vllm_ext.prove.crossings import CLEAN, WAITS, Tensors, marked_line
from vllm_ext.prove.pretend import DEVICE, PretendDevice, data_of
from vllm_ext.prove.syncs import watch


@pytest.fixture(params=[False, True], ids=["plain", "inference"], autouse=True)
def mode(request):
    """vLLM's steps run in inference mode, where operations arrive in other pieces."""
    with torch.inference_mode(request.param):
        yield


def run(function, watching=True):
    """What it returns, as host data, and what was found."""
    with PretendDevice() as device:
        tensors = Tensors(DEVICE)
        if not watching:
            return data_of(function(tensors)), None
        with watch(device) as found:
            answer = function(tensors)
        return data_of(answer), found


def same(left, right):
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    return left == right


@pytest.mark.parametrize("name", WAITS)
def test_a_planted_wait_is_found_with_its_line(name):
    function = WAITS[name]
    _, found = run(function)
    [wait] = found.waits
    assert wait.where.file == crossings.__file__
    assert wait.where.line == marked_line(function)
    assert wait.where.function == name
    assert "# waits" in str(wait)
    assert not found.events


@pytest.mark.parametrize("name", CLEAN)
def test_a_clean_function_is_left_in_peace(name):
    _, found = run(CLEAN[name])
    assert found.waits == []
    assert sum(found.counts.values()) > 0


def test_an_event_is_told_apart():
    _, found = run(CLEAN["eager_copies"])
    [wait] = found.events
    assert "# an event" in wait.where.text


@pytest.mark.parametrize("name", [*WAITS, *CLEAN])
def test_watching_changes_nothing(name):
    function = (WAITS | CLEAN)[name]
    watched, _ = run(function)
    alone, _ = run(function, watching=False)
    assert same(watched, alone)


def test_the_answers_are_those_of_a_cpu():
    """The functions that need no pinned memory, on plain CPU tensors."""
    for name in ("mask_write", "masked_select", "one_hot", "in_place", "arithmetic"):
        function = (WAITS | CLEAN)[name]
        answer, _ = run(function)
        with PretendDevice():  # for `pin_memory`
            expected = function(Tensors("cpu"))
        assert same(answer, expected), name


def test_submissions_are_counted_by_kind_and_name():
    with PretendDevice() as device:
        floats = torch.ones(4, device=DEVICE)
        pinned = torch.zeros(4).pin_memory()
        with watch(device) as found:
            floats.copy_(pinned, non_blocking=True)
            doubled = floats * 2 + floats * 2
            doubled[1:3].view(2, 1)  # a view is nothing to submit
            torch.empty(4, device=DEVICE)  # nor is memory
            doubled.to("cpu", non_blocking=True)
        floats.sum().item()  # nobody watches
    kinds = ("launch", "triton", "graph", "h2d", "d2h")
    assert found.counts == dict(zip(kinds, (3, 0, 0, 1, 1), strict=True))
    assert found.submitted["launch", "mul"] == 2
    assert found.waits == []


@pytest.mark.parametrize("lags", [False, True])
def test_tensors_that_are_made_are_counted(lags):
    with PretendDevice(lags=lags) as device:
        floats = torch.ones(4, device=DEVICE)
        out = torch.zeros(4, device=DEVICE)
        with watch(device) as found:
            torch.empty(4, device=DEVICE)
            floats + 1
            torch.topk(floats, 2)  # two
            pinned = torch.zeros(4, pin_memory=True)
            pinned.to(DEVICE, non_blocking=True)
            floats.to("cpu", non_blocking=True)  # to memory that is pinned
            floats.new_ones(2)
        with watch(device) as nothing:
            floats[1:].view(3, 1)
            floats.mul_(2)
            torch.add(floats, 1, out=out)
            out.copy_(pinned, non_blocking=True)
            torch.zeros(4)  # the host's, and not pinned
    assert found.allocated == {"device": 6, "pinned": 2}
    assert nothing.allocated == {}


def test_two_may_watch_and_one_may_stop():
    with PretendDevice() as device:
        ids = torch.arange(4, device=DEVICE)
        with watch(device) as outer:
            with watch(device) as inner:
                ids.tolist()
            ids.tolist()
    assert (len(outer.waits), len(inner.waits)) == (2, 1)


def test_without_a_device_there_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="no CUDA GPU to watch"), watch():
        pass


# -- penalties before and after vLLM stopped indexing with masks --------------------


def penalize_with_masks(logits, seen, counts, repetition, frequency, presence):
    """Repetition, frequency and presence penalties, as one would write them first."""
    strength = torch.where(seen, repetition[:, None], 1.0)
    positive, others = logits > 0, logits <= 0
    logits[positive] = logits[positive] / strength[positive]
    logits[others] = logits[others] * strength[others]
    logits -= frequency[:, None] * counts
    logits -= presence[:, None] * (counts > 0)
    return logits


def penalize_with_where(logits, seen, counts, repetition, frequency, presence):
    """The same without a result whose size depends on data."""
    strength = torch.where(seen, repetition[:, None], 1.0)
    logits = torch.where(logits > 0, logits / strength, logits * strength)
    logits -= frequency[:, None] * counts
    logits -= presence[:, None] * (counts > 0)
    return logits


def penalize(function):
    generator = torch.Generator().manual_seed(0)
    with PretendDevice() as device:
        on_host = (
            torch.randn(4, 64, generator=generator),
            torch.rand(4, 64, generator=generator) < 0.3,
            torch.randint(0, 3, (4, 64), generator=generator),
            *torch.rand(3, 4, generator=generator) + 1,
        )
        arguments = [each.to(DEVICE) for each in on_host]
        with watch(device) as found:
            logits = function(*arguments)
        return data_of(logits), found


def test_penalties_with_masks_wait_six_times():
    logits, found = penalize(penalize_with_masks)
    texts = [wait.where.text for wait in found.waits]
    assert texts == [
        *["logits[positive] = logits[positive] / strength[positive]"] * 3,
        *["logits[others] = logits[others] * strength[others]"] * 3,
    ]
    assert [wait.op for wait in found.waits] == 2 * ["index", "index", "index_put_"]
    expected, _ = penalize(penalize_with_where)
    assert torch.equal(logits, expected)


def test_penalties_with_where_do_not_wait():
    _, found = penalize(penalize_with_where)
    assert found.waits == []
