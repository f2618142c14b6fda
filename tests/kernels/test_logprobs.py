"""``logprobs`` against its reference, float64 and vLLM's own: ids and ranks exact."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from closeness import assert_as_close_as_torch
from sampling_batch import KINDS, TILE, WIDTH, logits_of

from vllm_ext.kernels import logprobs as module
from vllm_ext.prove.sanitizer import Sanitizer
from vllm_ext.prove.trafficrun import bytes_moved

NAN = float("nan")
MOST = 20
EDGES = [1, 7, 8, 17, TILE - 1, TILE, TILE + 1, 3 * TILE - 8, WIDTH]
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


class Found:
    """What a call wrote: ids, logprobs and ranks; -77 is what was there before."""

    def __init__(self, rows, columns, fenced):
        self.ids = fenced(rows * columns).view(rows, columns)
        self.logprobs = fenced(rows * columns, torch.float32).view(rows, columns)
        self.ranks = fenced(rows)

    def __iter__(self):
        return iter((self.ids, self.logprobs, self.ranks))


def run(
    logits, wanted, sampled, fenced, *, seats=None, rows=None, module=module, **options
):
    device = logits.device
    number = len(logits) if rows is None else rows
    seats = torch.arange(len(logits)) if seats is None else seats
    found = Found(len(logits), 1 + MOST, fenced)
    arguments = (
        torch.tensor([number], dtype=torch.int32, device=device),
        torch.tensor(wanted, dtype=torch.int32, device=device),
        seats.to(device),
        sampled.to(device),
    )
    options = {"tile": TILE, "programs": 3 * len(logits), **options}
    scratch = module.make_scratch(len(logits), logits.shape[1], device, **options)
    module.logprobs(logits, *arguments, *found, scratch)
    return found, arguments


def check(logits, wanted, sampled, fenced, **options):
    found, arguments = run(logits, wanted, sampled, fenced, **options)
    plain = Found(len(logits), 1 + MOST, fenced)
    module.logprobs_reference(logits, *arguments, *plain)
    exact = Found(len(logits), 1 + MOST, fenced)
    exact.logprobs = exact.logprobs.double()
    number, wanted, seats, sampled = arguments
    for row in range(int(number)):
        if seats[row] < 0 or wanted[seats[row]] < 0:
            continue
        columns = 1 + min(int(wanted[seats[row]]), MOST)
        exact.logprobs[row, :columns] = float("-inf")
        there = int((~logits[row].isnan()).sum())
        kept = plain.ids[row, : min(columns, 1 + there)]
        values = logits[row].double().log_softmax(0)[kept]
        exact.logprobs[row, : len(kept)] = values
    assert found.ids.tolist() == plain.ids.tolist()
    assert found.ranks.tolist() == plain.ranks.tolist()
    assert_as_close_as_torch(found.logprobs, plain.logprobs, exact.logprobs)
    return found


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "largest"])
def test_matches_the_reference(kind, device, fenced, poisoned):
    wanted = [0, 1, 5, MOST, -1, 3]
    logits = logits_of(kind, len(wanted), WIDTH).to(device)
    sampled = torch.arange(len(wanted)) * 41
    check(logits, wanted, sampled, fenced)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPES.values())
@pytest.mark.parametrize("vocab_size", EDGES)
def test_at_the_edges_of_tiles(vocab_size, dtype, device, fenced):
    logits = logits_of("ties", 3, vocab_size, vocab_size).to(dtype).to(device)
    sampled = torch.tensor([0, vocab_size // 2, vocab_size - 1])
    found = check(logits, [MOST, 2, 7], sampled, fenced)
    if vocab_size < MOST:
        assert found.ids[0, 1 + vocab_size :].eq(0).all()


@pytest.mark.parametrize("kind", ["normal", "one stands out", "nearly flat"])
def test_says_what_stock_says(kind, device, fenced, stock):
    """In vLLM's own functions; of equal logits it leaves open which comes first."""
    logits = logits_of(kind, 4, 1024 + 300, 3).to(device)
    sampled = torch.tensor([3, 1023, 1024, 1300], device=device)
    found, _ = run(logits, [5] * 4, sampled, fenced, tile=module.TILE)
    tensors = stock.compute_topk_scores(logits, 5, sampled)
    assert found.ids[:, :6].tolist() == tensors.logprob_token_ids.tolist()
    assert found.ranks.tolist() == tensors.selected_token_ranks.tolist()
    exact = logits.double().log_softmax(1).gather(1, found.ids[:, :6])
    assert_as_close_as_torch(found.logprobs[:, :6], tensors.logprobs, exact)


def test_equal_logits_come_by_token(device, fenced):
    logits = torch.zeros(1, WIDTH, device=device)
    logits[0, [300, 70, 65]] = 2.0
    found = check(logits, [6], torch.tensor([300]), fenced)
    assert found.ids[0, :7].tolist() == [300, 65, 70, 300, 0, 1, 2]
    assert found.ranks.tolist() == [3]


def test_the_same_bits_in_any_batch(device, fenced):
    """However a row is split, and whatever rows are beside it."""
    logits = logits_of("normal", 6, WIDTH, 8).to(device)
    sampled = torch.arange(6)
    together, _ = run(logits, [5] * 6, sampled, fenced, programs=1)
    for programs in (7, 10_000):
        again, _ = run(logits, [5] * 6, sampled, fenced, programs=programs)
        assert again.logprobs.tolist() == together.logprobs.tolist()
    alone, _ = run(logits[3:4], [5], sampled[3:4], fenced)
    assert alone.logprobs.tolist() == together.logprobs[3:4].tolist()


def test_nan_is_not_among_the_likeliest(device, fenced):
    logits = logits_of("normal", 2, WIDTH).to(device)
    logits[:, ::2] = NAN
    logits[1] = NAN
    found = check(logits, [4, 4], torch.tensor([1, 1]), fenced)
    assert found.logprobs[0, :5].isnan().all()
    assert found.ids[1].tolist() == [1] + [0] * 4 + [-77] * (MOST - 4)


def test_rows_at_any_stride(device, fenced):
    storage = logits_of("normal", 3, WIDTH + 3).bfloat16().to(device)
    check(storage[:, :WIDTH], [5] * 3, torch.arange(3), fenced)
    check(storage[:1, :WIDTH].expand(3, WIDTH), [5] * 3, torch.arange(3), fenced)


@pytest.mark.parametrize("rows", [0, 1, 255])
def test_batches(rows, device, fenced):
    logits = logits_of("normal", rows, 40).to(device)
    check(logits, [2] * max(rows, 1), torch.arange(rows) % 40, fenced)


def test_rows_beyond_two_to_the_31(device, fenced):
    """The memory between the rows is reserved, and only what is touched exists."""
    stride = 2**30 + 24
    storage = torch.empty(3 * stride, dtype=torch.bfloat16, device=device)
    logits = storage.as_strided((3, 100), (stride, 1))
    logits.copy_(logits_of("normal", 3, 100))
    check(logits, [5] * 3, torch.arange(3), fenced)


def test_rows_of_no_request_are_left_alone(device, fenced):
    logits = logits_of("normal", 5, WIDTH).to(device)
    seats = torch.tensor([1, -1, 0, 2, 2**30], dtype=torch.int32)
    sampled = torch.tensor([4, 2**40, 5, 2**40, 2**40])
    found, _ = run(logits, [3, 2, -1], sampled, fenced, seats=seats, rows=4)
    for written in found:
        assert written[[1, 3, 4]].eq(-77).all()
    assert found.ids[[0, 2], 0].tolist() == [4, 5]


@pytest.mark.parametrize("programs", [1, 20, 10_000])
def test_touches_only_what_it_may_and_in_any_order(programs, interpreter, fenced):
    logits = logits_of("ties", 4, WIDTH + 3).bfloat16()[:, :WIDTH]
    seats = torch.tensor([1, -1, 0, 2**30], dtype=torch.int32)
    with Sanitizer() as sanitizer:
        run(
            *(logits, [3, MOST], torch.tensor([4, 0, WIDTH - 1, 0]), fenced),
            **{"seats": seats, "rows": 3, "programs": programs},
        )
    sanitizer.check()
    assert sanitizer.kernels["_logprobs_kernel"].launches == 1


@pytest.mark.parametrize("wanted", [0, 5, MOST])
@pytest.mark.parametrize("programs", [1, 10_000], ids=["one program", "all"])
def test_bytes_of_a_row(wanted, programs, interpreter, fenced):
    """One read of the logits, and a group of them again for each of the likeliest."""
    vocab_size = 32_000
    logits = logits_of("normal", 1, vocab_size).bfloat16()
    sampled = torch.tensor([7])
    with bytes_moved() as moved:
        run(*(logits, [wanted], sampled, fenced), tile=module.TILE, programs=programs)
    once = vocab_size * logits.itemsize
    print(f"{wanted} likeliest, {programs} programs: {moved.total() / once:.3f} reads")
    assert moved["load"] >= once
    assert moved.total() <= 1.05 * once + wanted * 600


def test_refuses_what_does_not_fit(device, fenced):
    with pytest.raises(ValueError, match=r"logits must be .* torch.int32"):
        run(torch.zeros(1, 9, dtype=torch.int32), [0], torch.zeros(1).long(), fenced)
    scratch = module.make_scratch(1, 50, device)
    with pytest.raises(ValueError, match=r"the scratch is for \[<= 1, 50\]"):
        module.logprobs(torch.zeros(2, 40), *[None] * 7, scratch)


def edges(module, fenced):
    logits = logits_of("ties", 3, WIDTH, 4)
    check(logits, [MOST, 2, 7], torch.tensor([0, 77, WIDTH - 1]), fenced, module=module)


def masked(module, fenced):
    logits = logits_of("all but a few masked", 2, WIDTH)
    check(logits, [MOST, 5], torch.tensor([0, 5]), fenced, module=module)


def counted(module, fenced):
    with Sanitizer() as sanitizer:
        run(
            logits_of("normal", 2, WIDTH),
            [2, 2],
            torch.arange(2),
            fenced,
            module=module,
        )
    sanitizer.check()


PLANTED = {
    "the rank is of greater logits": (edges, "x >= value", "x > value"),
    "what lies beyond the vocabulary has a rank": (
        *(masked, "(x >= value) & inside", "x >= value"),
    ),
    "the last tokens are left out": (
        *(edges, "if (tile + 1) * TILE > whole", "if tile * TILE > vocab_size"),
    ),
    "of equal logits the last one": (
        *(edges, "tl.min(tl.where(left & (keys == top), tokens, _NOWHERE)"),
        "tl.max(tl.where(left & (keys == top), tokens, -1)",
    ),
    "a token comes twice": (edges, "left & (tokens != picked)", "left"),
    "what came before is forgotten": (
        *(edges, "(keys < behind) | ((keys == behind) & (tokens > behind_id))"),
        "keys <= behind",
    ),
    "sums are not brought to one maximum": (
        *(edges, "sums * tl.exp(tops - largest)", "sums"),
    ),
    "tokens without probability are none": (
        *(masked, "tl.maximum(x, _LOWEST), _NEVER)", "x, _NEVER)"),
    ),
    "one more than wanted": (edges, "columns - 1) + 1", "columns - 1) + 2"),
    "arrivals are in no order": (counted, 'sem="acq_rel"', 'sem="relaxed"'),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_found(bug, interpreter, fenced, poisoned, tmp_path):
    finder, line, planted = PLANTED[bug]
    source = Path(module.__file__).read_text()
    assert line in source
    path = tmp_path / "planted_logprobs.py"
    path.write_text(source.replace(line, planted))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec
    assert spec.loader
    worse = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, path.stem, worse)  # for dataclasses
        spec.loader.exec_module(worse)
    finder(module, fenced)
    with pytest.raises((AssertionError, RuntimeError)):
        finder(worse, fenced)
