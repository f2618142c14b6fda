"""What ``sample`` does to memory, how much of it, and what it asks of the host."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sampling_batch import WIDTH, Request, every_kind, logits_of, ours, run

from vllm_ext.kernels import logprobs
from vllm_ext.kernels import sample as module
from vllm_ext.prove.sanitizer import Sanitizer
from vllm_ext.prove.trafficrun import bytes_moved
from vllm_ext_cpulane.engine import run_script
from vllm_ext_cpulane.environment import lane_environment

SCRIPT = Path(__file__).with_name("sample_script.py")


@pytest.mark.parametrize("programs", [1, 60, 10_000])
def test_touches_only_what_it_may_and_in_any_order(programs, interpreter, fenced):
    """Every kind of request, rows of no request among them."""
    batch = every_kind(WIDTH)
    rows = len(batch) + 2
    seats = torch.tensor([*range(len(batch)), -1, 2**30], dtype=torch.int32)
    logits = logits_of("normal", rows, WIDTH + 3).bfloat16()[:, :WIDTH]
    with Sanitizer() as sanitizer:
        run(logits, batch, fenced, seats=seats, rows=rows - 1, programs=programs)
    sanitizer.check()
    assert sanitizer.kernels["_sample_kernel"].launches == 1
    if programs > rows:
        assert sanitizer.kernels["_sample_kernel"].reordered == 1


PENALIZED = {
    "repetition_penalty": 1.1,
    "prompt": range(0, 2000, 3),
    "output": range(5000, 5300),
}
# How many times the bytes of one read of the logits a row may move.
FLOORS = {
    "greedy": (1.05, Request()),
    "temperature": (1.05, Request(0.7, 1)),
    "min-p": (1.05, Request(1.0, 2, min_p=0.1)),
    "penalties": (1.25, Request(**PENALIZED)),
    "penalties, temperature": (1.25, Request(0.7, 3, **PENALIZED)),
    "bias": (1.25, Request(logit_bias=dict.fromkeys(range(40), 2.0))),
    "allowed": (0.05, Request(1.0, 4, allowed_token_ids=range(40))),
}


@pytest.mark.parametrize("mode", FLOORS)
@pytest.mark.parametrize("programs", [1, 10_000], ids=["one program", "all"])
def test_bytes_of_a_row(mode, programs, interpreter, fenced):
    """On random logits, where min-p has more to look at twice than on a model's."""
    most, request = FLOORS[mode]
    vocab_size = 32_000
    logits = logits_of("normal", 1, vocab_size).bfloat16()
    with bytes_moved() as moved:
        run(logits, [request], fenced, tile=module.TILE, programs=programs)
    ratio = moved.total() / (vocab_size * logits.itemsize)
    print(f"{mode}, {programs} programs: {ratio:.3f} of one read, {dict(moved)}")
    assert ratio <= most
    if mode != "allowed":
        assert moved["load"] >= vocab_size * logits.itemsize


@pytest.fixture(scope="module")
def on_the_pretend_device():
    return run_script(SCRIPT, lane_environment("interpret"))


def test_the_host_never_waits_and_launches_once_for_each(
    on_the_pretend_device, interpreter
):
    found = on_the_pretend_device
    assert found["waits"] == []
    assert {name: n for name, n in found["counts"].items() if n} == {"triton": 2}


def test_a_graph_replays_it_with_other_requests(on_the_pretend_device, interpreter):
    """Captured once; requests, rows, seats and logits are then changed in place.

    With ``logprobs`` of what it drew, in the same graph.
    """
    for replayed, expected in on_the_pretend_device["replays"]:
        assert replayed == expected
    assert on_the_pretend_device["differences"] == []
    assert len({str(r) for r, _ in on_the_pretend_device["replays"]}) > 2


@pytest.mark.parametrize("kernel", ["sample", "logprobs"])
def test_warm_launches_every_variant_of_serving(kernel, device, variants_of):
    """Whatever the batch, its split and its strides: variants are types of logits."""
    of_kernel = module if kernel == "sample" else logprobs
    variants = variants_of(of_kernel, f"_{kernel}_kernel")
    of_kernel.warm(8, 3000, device)
    warmed = variants()
    assert len(warmed) == 3
    batch = [Request(1.0, 3, min_p=0.1), Request(logit_bias={3: 1.0})] * 4
    requests = ours(module, batch, 3000, device)
    scratch = of_kernel.make_scratch(8, 3000, device)
    for rows in (1, 3, 8):
        each = torch.arange(rows, device=device)  # int64, as vLLM's indices
        number = torch.tensor([rows], dtype=torch.int32, device=device)
        for dtype in module.DTYPES:
            logits = torch.zeros(rows, 3000, dtype=dtype, device=device)
            if kernel == "sample":
                arguments = (number, requests, each, each, each, each)
            else:
                scores = torch.zeros(rows, 6, device=device)
                wanted = torch.zeros(8, dtype=torch.int32, device=device)
                arguments = (number, wanted, each, each, scores.long(), scores, each)
            getattr(of_kernel, kernel)(logits, *arguments, scratch)
    assert variants() == warmed
