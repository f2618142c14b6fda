"""Bugs that are planted in ``sample``, each found by a check that the kernel passes."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sampling_batch import (
    INF,
    TILE,
    WIDTH,
    Request,
    every_kind,
    logits_of,
    reference,
    run,
)

from vllm_ext.kernels import sample
from vllm_ext.prove.sanitizer import Sanitizer

pytestmark = pytest.mark.usefixtures("interpreter", "poisoned")


def parity(module: Any, fenced: Any) -> None:
    """Every kind of request."""
    batch = every_kind(WIDTH)
    for kind in ("normal", "ties"):
        logits = logits_of(kind, len(batch), WIDTH).bfloat16()
        tokens = run(logits, batch, fenced, module=module)
        assert tokens.tolist() == reference(logits, batch, fenced).tolist()


def long_rows(module: Any, fenced: Any) -> None:
    """Most of a row is skipped."""
    batch = [Request(0.8, seed, min_p=p) for seed in range(4) for p in (0, 0.05, 0.5)]
    logits = logits_of("normal", len(batch), 24 * TILE, 7)
    expected = reference(logits, batch, fenced).tolist()
    for programs in (1, 40):
        tokens = run(logits, batch, fenced, module=module, programs=programs)
        assert tokens.tolist() == expected


def far_tail(module: Any, fenced: Any) -> None:
    """A token wins by the largest noise of 10**8 draws."""
    token, position = 434, torch.tensor([34000])
    noise = sample.gumbel_reference(0, position, torch.tensor([0, token]))
    logits = torch.full((1, 10 * TILE), -50.0)
    logits[:, 0] = 30.0
    logits[:, token] = 30.0 + noise[0] - noise[1] + 0.001
    batch = [Request(1.0, 0)]
    tokens = run(logits, batch, fenced, module=module, positions=position, programs=1)
    assert tokens.tolist() == [token]


def equal_scores(module: Any, fenced: Any) -> None:
    logits = torch.zeros(3, WIDTH)
    logits[0, [70, 90, 300]] = 2.0
    logits[1, [5, 300]] = INF
    logits[2, 250] = 2.0
    batch = [Request(), Request(temperature=1.0), Request(logit_bias={100: 2.0})]
    tokens = run(logits, batch, fenced, module=module, programs=1000)
    assert tokens.tolist() == [70, 5, 100]


def not_a_number(module: Any, fenced: Any) -> None:
    logits = logits_of("normal", 2, WIDTH)
    logits[:, ::3] = float("nan")
    batch = [Request(), Request(0.8, 3)]
    tokens = run(logits, batch, fenced, module=module)
    assert tokens.tolist() == reference(logits, batch, fenced).tolist()


def overflow(module: Any, fenced: Any) -> None:
    """Logits that are infinite at their temperature are equal."""
    batch = [Request(1e-42, seed, min_p=0.5) for seed in range(4)]
    logits = logits_of("normal", 4, WIDTH, 3)
    tokens = run(logits, batch, fenced, module=module, programs=1)
    assert tokens.tolist() == reference(logits, batch, fenced).tolist()


def no_request(module: Any, fenced: Any) -> None:
    """Rows of no request are left alone, and nothing of theirs is read."""
    logits = logits_of("normal", 4, WIDTH)
    seats = torch.tensor([0, -1, 0, 0], dtype=torch.int32)
    with Sanitizer() as sanitizer:
        tokens = run(logits, [Request()], fenced, module=module, seats=seats, rows=3)
    sanitizer.check()
    assert tokens[[1, 3]].tolist() == [-77, -77]


def far_rows(module: Any, fenced: Any) -> None:
    """Offsets beyond 2**31; the memory between is only reserved."""
    stride = 2**30 + 24
    logits = torch.zeros(0, dtype=torch.bfloat16).new_empty(3 * stride)
    logits = logits.as_strided((3, 100), (stride, 1))
    logits.copy_(logits_of("normal", 3, 100))
    batch = [Request(1.0, seed) for seed in range(3)]
    with Sanitizer(reorder=0) as sanitizer:
        tokens = run(logits, batch, fenced, module=module)
    sanitizer.check()
    assert tokens.tolist() == reference(logits, batch, fenced).tolist()


def twice(module: Any, fenced: Any) -> None:
    """A second launch with the same scratch."""
    batch = every_kind(WIDTH)
    scratch = sample.make_scratch(len(batch), WIDTH, "cpu", tile=TILE, programs=80)
    for seed in range(2):
        logits = logits_of("normal", len(batch), WIDTH, seed)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "make_scratch", lambda *_, **__: scratch)
            tokens = run(logits, batch, fenced, module=module)
        assert tokens.tolist() == reference(logits, batch, fenced).tolist()


def any_order(module: Any, fenced: Any) -> None:
    """And races."""
    batch = [Request(0.9, 1, min_p=0.1), Request(logit_bias={3: 2.0})]
    logits = logits_of("normal", 2, WIDTH)
    with Sanitizer() as sanitizer:
        run(logits, batch, fenced, module=module, programs=10)
    sanitizer.check()


Check = Callable[[Any, Any], None]
CHECKS: tuple[Check, ...] = (
    *(parity, long_rows, far_tail, equal_scores, not_a_number, overflow),
    *(no_request, far_rows, twice, any_order),
)

# What is wrong: who finds it, the line of the kernel, the line in its place.
PLANTED: dict[str, tuple[Check, str, str]] = {
    "noise is reused at other positions": (
        *(parity, "(position & 0xFFFFFFFF)", "(position & 0)"),
    ),
    "noise is reused between seeds": (
        *(parity, "_begun(\n                _word(params_ptr, _SEED), "),
        "_begun(\n                _word(params_ptr, _FLAGS), ",
    ),
    "half of the seed is not used": (
        *(parity, "_word(params_ptr, _SEED + 1)", "_word(params_ptr, _SEED)"),
    ),
    "noise of the wrong tail": (
        *(parity, "tl.where(u < 0.25, -u * series, far))"),
        "tl.log(u))",
    ),
    "noise has 24 bits": (
        *(far_tail, "(low + 0.5) * 2.3283064365386963e-10", "2.98023223876953125e-08"),
    ),
    "a tile is skipped too early": (
        *(far_tail, "best - _MOST_NOISE - slack", "best - 16.0 - slack"),
    ),
    "a hash is skipped too early": (*(far_tail, " + 1.00000012", " + 1.0"),),
    "the bound is too low": (*(long_rows, "* _LOG2E - 0.01", "* _LOG2E + 1.5"),),
    "the bound has no temperature": (
        *(long_rows, "slope = _LOG2E / temperature", "slope = _LOG2E"),
    ),
    "min-p forgets the tiles in doubt": (
        *(long_rows, "while tile < RECORDS:", "while tile < 0:"),
    ),
    "min-p has the first maximum for the last": (
        *(long_rows, "peak = tl.max(maxima, axis=0)", "peak = peak"),
    ),
    "what holds others back need not count": (*(long_rows, "& (x <= value)", ""),),
    "min-p has no temperature": (
        *(long_rows, "tl.log(_float(params_ptr, _MIN_P)) * temperature"),
        "tl.log(_float(params_ptr, _MIN_P)) * 0.1",
    ),
    "min-p loses the token at its boundary": (
        parity,
        "threshold = _over(peak, temperature) +",
        "threshold = _over(peak, temperature) + 1e-5 +",
    ),
    "min-p counts different logits that overflow": (
        *(overflow, "(not ordinary) | (tl.abs(peak) > temperature * 1e38)", "False"),
    ),
    "the highest of equal tokens": (
        *(equal_scores, "winner = tl.min(tl.where(x == top, ids, _NOWHERE)"),
        "winner = tl.max(tl.where(x == top, ids, -1)",
    ),
    "the last of equal tiles": (
        equal_scores,
        "token = tl.min(tl.where(stands & (scores == best), tokens, _NOWHERE), axis=0)",
        "token = tl.max(tl.where(stands & (scores == best), tokens, -1), axis=0)",
    ),
    "the list before equal tokens": (
        *(equal_scores, "(score > best) | ((score == best) & (winner < token))"),
        "score > best",
    ),
    "the last tokens are left out": (
        *(parity, "    if start + BLOCK > whole:", "    if start > vocab_size:"),
    ),
    "the last tile is left out": (
        *(parity, "last = tl.minimum(first + tiles_each, tiles)"),
        "last = tl.minimum(first + tiles_each, tiles - 1)",
    ),
    "listed tokens count twice": (
        *(parity, "vocab_size, BLOCK), _NEVER, x)", "vocab_size, BLOCK), x, x)"),
    ),
    "stop tokens are masked one token longer": (
        *(parity, "position + 1 < _word", "position < _word"),
    ),
    "the repetition penalty forgets the prompt": (
        *(parity, "_penalized(x, prompt | (counts > 0),", "_penalized(x, counts > 0,"),
    ),
    "positive logits are multiplied": (
        *(parity, "tl.where(x > 0, 1.0 / scale, scale)", "scale"),
    ),
    "presence counts every time": (
        *(parity, "x -= presence * (counts > 0)", "x -= presence * counts"),
    ),
    "a row of no request is drawn": (
        *(no_request, "    if seat < 0:\n", "    if seat < -1:\n"),
    ),
    "rows that do not exist are drawn": (
        *(no_request, "row >= tl.load(num_rows_ptr)", "row > tl.load(num_rows_ptr)"),
    ),
    "offsets have 32 bits": (*(far_rows, "    row = row.to(tl.int64)\n", ""),),
    "counters stay as they are": (
        *(twice, "        tl.store(arrived_ptr + row, 0)\n", ""),
    ),
    "the last but one finishes": (*(any_order, "!= splits - 1", "!= splits - 2"),),
    "arrivals are in no order": (*(any_order, 'sem="acq_rel"', 'sem="relaxed"'),),
}


def load(source: str, folder: Path) -> Any:
    """A module of its own, from a file, which the interpreter reads again."""
    path = folder / "planted.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("planted", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:  # for dataclasses
        patch.setitem(__import__("sys").modules, "planted", module)
        spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_kernel_passes(check, fenced):
    check(sample, fenced)


@pytest.mark.parametrize("bug", PLANTED)
def test_is_found(bug, fenced, tmp_path):
    check, line, planted = PLANTED[bug]
    source = Path(sample.__file__).read_text()
    assert line in source
    module = load(source.replace(line, planted), tmp_path)
    with pytest.raises((AssertionError, RuntimeError)):
        check(module, fenced)
