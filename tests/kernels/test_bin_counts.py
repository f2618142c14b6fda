"""Counts and planes of bits against their references and vLLM's own, bit by bit."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from decode_steps import loaded

from vllm_ext.kernels import bin_counts as module
from vllm_ext.kernels import sample
from vllm_ext.prove.sanitizer import KernelFault, Sanitizer

EDGES = [1, 31, 32, 33, 1000, module.BLOCK - 1, module.BLOCK, module.BLOCK + 33]
SEATS, LONGEST = 4, module.TOKENS + 70


def state_of(vocab_size, device, fenced=None):
    """Requests, nothing of which is zero: what was there before must not count."""
    made = sample.make_requests(SEATS, vocab_size, device, 300)
    rng = np.random.default_rng(vocab_size)
    fields = {}
    for field in dataclasses.fields(made):
        plane = getattr(made, field.name)
        if field.name in ("prompt_bits", "output_bits", "listed_bits"):
            plane.fill_(-1)
        if field.name == "output_counts":
            plane.copy_(torch.tensor(rng.integers(0, 2, plane.shape)))
        if fenced is not None and plane.dtype == torch.int32:
            memory = fenced(plane.numel(), torch.int32).view(plane.shape)
            plane = memory.copy_(plane)
        fields[field.name] = plane
    return sample.Requests(**fields)


def twins(state):
    """Another state with the same values."""
    names = [field.name for field in dataclasses.fields(state)]
    return sample.Requests(**{name: getattr(state, name).clone() for name in names})


def assert_same(found, expected):
    for field in dataclasses.fields(found):
        ours, theirs = getattr(found, field.name), getattr(expected, field.name)
        assert torch.equal(ours, theirs), field.name


def history(vocab_size, device):
    """Tokens by seat, some of them unknown; lengths of prompts and of all."""
    rng = np.random.default_rng(vocab_size)
    tokens = torch.tensor(rng.integers(0, vocab_size, (SEATS, LONGEST)))
    tokens[:, ::50] = vocab_size - 1  # often, and at the end of the planes
    tokens[1, 5], tokens[1, LONGEST - 60] = vocab_size, -1
    prompts = torch.tensor([LONGEST - 100, 3, module.TOKENS, 0])
    lengths = torch.tensor([LONGEST - 100, LONGEST, module.TOKENS + 1, 9])
    return tuple(each.int().to(device) for each in (tokens, prompts, lengths))


@pytest.mark.parametrize("vocab_size", EDGES)
def test_counts_tokens(vocab_size, device, fenced):
    """Of requests that join; nothing of the others, and nothing of who was there."""
    state = state_of(vocab_size, device, fenced)
    expected = twins(state)
    seats = torch.tensor([2, 0, 1], device=device)
    given = (seats, *history(vocab_size, device), LONGEST)
    module.count_tokens(*given, state, vocab_size)
    module.count_tokens_reference(*given, expected, vocab_size)
    assert_same(state, expected)
    assert state.output_bits[3].eq(-1).all()


def test_counts_what_stock_counts(device):
    """And leaves no bits where stock's counts are 0."""
    vocab_size = 500
    stock = importlib.import_module("vllm.v1.worker.gpu.sample.penalties")
    state = state_of(vocab_size, device)
    tokens, prompts, lengths = history(vocab_size, device)
    tokens.clamp_(0, vocab_size - 1)  # stock knows no others
    mask, counts = state.prompt_bits.clone(), state.output_counts.clone()
    seats = torch.tensor([1, 3, 2], device=device)
    stock.bincount(seats, tokens, prompts, lengths, mask, counts, LONGEST)
    module.count_tokens(seats, tokens, prompts, lengths, LONGEST, state, vocab_size)
    assert torch.equal(state.prompt_bits, mask)
    assert torch.equal(state.output_counts, counts)
    again = twins(state)
    penalties(again, 0.5)
    number = torch.tensor([3], dtype=torch.int32, device=device)
    module.bits_of_counts_reference(number, seats, again, vocab_size)
    assert torch.equal(state.output_bits, again.output_bits)


def test_nobody_joins(device):
    state = state_of(100, device)
    expected = twins(state)
    nobody = torch.zeros(0, dtype=torch.int64, device=device)
    module.count_tokens(nobody, *history(100, device), LONGEST, state, 100)
    module.bits_of_lists(nobody, state, 100)
    module.bits_of_counts(nobody.int(), nobody, state, 100)
    assert_same(state, expected)


def penalties(state, *presence):
    for seat, penalty in enumerate(presence):
        state.params[seat] = sample.pack(presence_penalty=penalty)


@pytest.mark.parametrize("vocab_size", EDGES)
def test_bits_of_counts(vocab_size, device, fenced):
    """A row of nobody, one without penalties and one that is not there stay."""
    state = state_of(vocab_size, device, fenced)
    penalties(state, 0.5, 0.0, 0.5, 0.5)
    expected = twins(state)
    seats = torch.tensor([2, -1, 1, 0, 3], device=device)
    number = torch.tensor([4], dtype=torch.int32, device=device)
    module.bits_of_counts(number, seats, state, vocab_size)
    module.bits_of_counts_reference(number, seats, expected, vocab_size)
    changed = (state.output_bits != -1).any(1).tolist()
    assert changed[1] is changed[3] is False
    # Beyond the vocabulary nobody looks.
    whole = vocab_size // 32
    for plane in (state.output_bits, expected.output_bits):
        plane[:, whole:] &= (1 << vocab_size % 32) - 1
    assert_same(state, expected)


@pytest.mark.parametrize("vocab_size", EDGES)
def test_bits_of_lists(vocab_size, device, fenced):
    """Entries of stops, tokens at both ends; a list that has become empty."""
    state = state_of(vocab_size, device, fenced)
    tokens = list(dict.fromkeys([0, vocab_size - 1, vocab_size // 2]))
    ids, _ = sample.entries({}, tokens[:1], tokens[:1])
    state.listed[0, : len(ids)] = ids
    many = torch.arange(0, vocab_size, 1 + vocab_size // 290)
    for seat, listed in ((1, many), (2, torch.tensor(tokens))):
        state.listed[seat, : len(listed)] = listed
        state.params[seat] = sample.pack(listed=len(listed))
    state.params[0] = sample.pack(listed=1, only_listed=True)
    expected = twins(state)
    seats = torch.tensor([2, 0, 3, 1], device=device)
    module.bits_of_lists(seats, state, vocab_size)
    module.bits_of_lists_reference(seats, expected, vocab_size)
    assert state.listed_bits[3].eq(0).all()
    assert_same(state, expected)


PLANTED = {
    "_clear_kernel": [
        ("mask=ids < vocab_size", "mask=ids < vocab_size - 1"),
        ("words * 32 < vocab_size", "words * 32 + 31 < vocab_size"),
        ("output_bits_ptr + seat * bits_stride + words", "output_bits_ptr + words"),
    ],
    "_set": [("1, tl.int32) << (ids & 31)", "1, tl.int32) << (ids & 15)")],
    "_count_kernel": [
        ("known & (at < prompt_length)", "known & (at <= prompt_length)"),
        ("known & (at >= prompt_length)", "known"),
        ("(ids >= 0) & (ids < vocab_size)", "ids >= 0"),
        ("_set(output_bits_ptr + seat * bits_stride, ids, inside)", "pass"),
        ("if start + TOKENS > prompt_length:", "if start >= prompt_length:"),
    ],
    "_bits_of_counts_kernel": [
        ("counts > 0", "counts > 1"),
        ("if seat < 0:", "if seat < -1:"),
        ("if row >= tl.load(num_rows_ptr):", "if row > tl.load(num_rows_ptr):"),
        ("& _HAS_PENALTIES) == 0", "& _HAS_PENALTIES) == 1"),
    ],
    "_bits_of_lists_kernel": [
        ("entries & (_STOP - 1)", "entries"),
        ("start + at < listed", "start + at < listed - 1"),
        ("(start + at) * 32 <", "(start + at) * 32 + 31 <"),
    ],
}


@pytest.mark.parametrize(
    ("kernel", "right", "wrong"),
    [(kernel, *bug) for kernel, bugs in PLANTED.items() for bug in bugs],
)
def test_a_planted_bug_is_found(
    kernel, right, wrong, interpreter, fenced, monkeypatch, tmp_path
):
    source = Path(module.__file__).read_text()
    before, head, rest = source.partition(f"def {kernel}(")
    body, decorator, after = rest.partition("\n@triton.jit")
    assert right in body, "the bug has nowhere to go"
    planted = tmp_path / "planted.py"
    planted.write_text(before + head + body.replace(right, wrong) + decorator + after)
    broken = loaded("planted", planted)
    for launcher in ("count_tokens", "bits_of_counts", "bits_of_lists"):
        monkeypatch.setattr(module, launcher, getattr(broken, launcher))
    with pytest.raises((AssertionError, KernelFault)):
        everything(torch.device("cpu"), reorder=0, raises=True)


def test_programs_come_in_any_order(device, interpreter):
    sanitizer = everything(device)
    sanitizer.check()
    assert len(sanitizer.kernels) == 4


def everything(device, **options):
    """All launches, watched."""
    with Sanitizer(**options) as sanitizer:
        for vocab_size in (33, 1000):
            test_counts_tokens(vocab_size, device, None)
            test_bits_of_counts(vocab_size, device, None)
            test_bits_of_lists(vocab_size, device, None)
    return sanitizer
