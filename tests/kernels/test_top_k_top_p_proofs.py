"""What the kernels of ``top_k_top_p`` do to memory, how much of it, and to the host."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from filtering_batch import Filtered, asked, every_filter, run, scratch_for
from sampling_batch import WIDTH, logits_of

from vllm_ext.kernels import top_k_top_p as module
from vllm_ext.prove.sanitizer import Sanitizer
from vllm_ext.prove.trafficrun import bytes_moved
from vllm_ext_cpulane.engine import run_script
from vllm_ext_cpulane.environment import lane_environment

SCRIPT = Path(__file__).with_name("top_k_top_p_script.py")


@pytest.mark.parametrize("programs", [1, 10_000])
def test_touches_only_what_it_may_and_in_any_order(programs, interpreter, fenced):
    """Every third kind of request, rows of no request among them."""
    batch = every_filter(WIDTH)[programs % 3 :: 3]
    rows = len(batch) + 2
    seats = torch.tensor([*range(len(batch)), -1, 2**30], dtype=torch.int32)
    logits = logits_of("normal", rows, WIDTH + 3).bfloat16()[:, :WIDTH]
    with Sanitizer() as sanitizer:
        run(logits, batch, fenced, seats=seats, rows=rows - 1, programs=programs)
    sanitizer.check()
    launched = sanitizer.kernels["_sample_top_k_top_p_kernel"]
    assert launched.launches == 1
    assert launched.reordered == 1


@pytest.mark.parametrize("kind", ["normal", "nearly flat"])
def test_masking_touches_only_what_it_may(kind, interpreter):
    k = torch.tensor([5, 60, WIDTH, WIDTH], dtype=torch.int32)
    p = torch.tensor([0.9, 0.6, 0.3, 1.0])
    logits = logits_of(kind, 4, WIDTH + 3)[:, :WIDTH]
    with Sanitizer() as sanitizer:
        module.mask_top_k_top_p(logits, k, p, scratch_for(4, WIDTH, "cpu"))
    sanitizer.check()
    for name in ("_last_kept_kernel", "_mask_kernel"):
        assert sanitizer.kernels[name].launches == 1


HISTORY = {
    "repetition_penalty": 1.1,
    "prompt": range(0, 2000, 3),
    "output": range(5000, 5300),
}
# How many times the bytes of one read of the logits a row may move.
LIMITS = {
    "k": (1.25, Filtered(0.7, 1, top_k=20)),
    "k and p": (1.25, Filtered(0.6, 2, top_k=20, top_p=0.95)),
    "k of 64": (1.25, Filtered(1.0, 3, top_k=64, top_p=0.95)),
    "p": (1.25, Filtered(0.6, 4, top_p=0.9)),
    "k, p and penalties": (1.25, Filtered(0.7, 5, top_k=20, top_p=0.8, **HISTORY)),
    "neither": (1.05, Filtered(1.0, 6)),
}


@pytest.mark.parametrize("mode", LIMITS)
def test_bytes_of_a_row(mode, interpreter, fenced):
    """Of logits like a model's: a few tokens hold most of the probability."""
    most, request = LIMITS[mode]
    vocab_size = 151_936
    generator = torch.Generator().manual_seed(3)
    ranks = torch.randperm(vocab_size, generator=generator)
    logits = torch.randn(1, vocab_size, generator=generator) * 0.3
    logits = (logits - 1.7 * ranks.float().log1p()).bfloat16()
    sizes = {"tile": module.TILE, "group": module.GROUP}
    sizes["candidates"] = module.CANDIDATES
    with bytes_moved() as moved:
        run(logits, [request], fenced, programs=132, **sizes)
    ratio = moved.total() / (vocab_size * logits.itemsize)
    print(f"{mode}: {ratio:.3f} of one read, {dict(moved)}")
    assert ratio <= most
    assert moved["load"] >= vocab_size * logits.itemsize


@pytest.fixture(scope="module")
def on_the_pretend_device():
    return run_script(SCRIPT, lane_environment("interpret"))


def test_the_host_never_waits(on_the_pretend_device, interpreter):
    """And launches once; twice for a mask, after the test's own copy."""
    for name, launches in (
        ("sample", {"triton": 1}),
        ("mask", {"triton": 2, "launch": 1}),
    ):
        waits, counts = on_the_pretend_device[name]
        assert waits == []
        assert {kind: n for kind, n in counts.items() if n} == launches


def test_a_graph_replays_it_with_other_requests(on_the_pretend_device, interpreter):
    """Captured once; requests, rows, seats and logits are then changed in place."""
    for replayed, expected, same_mask in on_the_pretend_device["replays"]:
        assert replayed == expected
        assert same_mask
    assert on_the_pretend_device["differences"] == []
    assert len({str(r) for r, *_ in on_the_pretend_device["replays"]}) > 2


def test_warm_launches_every_variant_of_serving(device, variants_of):
    """Whatever the batch and its split: variants are types of logits."""
    kernels = ("_sample_top_k_top_p_kernel", "_last_kept_kernel", "_mask_kernel")
    variants = variants_of(module, *kernels)
    module.warm(8, 3000, device)
    warmed = variants()
    assert len(warmed) == 5
    requests = asked(
        [Filtered(1.0, 3, top_k=5, top_p=0.5), Filtered()] * 4, 3000, device
    )
    scratch = module.make_scratch(8, 3000, device)
    for rows in (1, 3, 8):
        each = torch.arange(rows, device=device)  # int64, as vLLM's indices
        number = torch.tensor([rows], dtype=torch.int32, device=device)
        for dtype in module.DTYPES:
            logits = torch.zeros(rows, 3000, dtype=dtype, device=device)
            given = (logits, number, requests, each, each, each, each)
            module.sample_top_k_top_p(*given, scratch)
        for k, p in ((each.int(), None), (None, each / 8), (each.int(), each / 8)):
            module.mask_top_k_top_p(logits.float(), k, p, scratch)
    assert variants() == warmed
