"""Bugs that are planted in ``top_k_top_p``; each is found by a check that it passes."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filtering_batch import CANDIDATES, Filtered, reference, run, scratch_for
from sampling_batch import WIDTH, logits_of

from vllm_ext.kernels import top_k_top_p
from vllm_ext.prove.sanitizer import Sanitizer

pytestmark = pytest.mark.usefixtures("interpreter", "poisoned")


def draws(batch: list[Filtered], kind: str, module: Any, fenced: Any, **options: Any):
    logits = logits_of(kind, len(batch), WIDTH, 5)
    tokens = run(logits, batch, fenced, module=module, **options)
    assert tokens.tolist() == reference(logits, batch, fenced).tolist()


def few(module: Any, fenced: Any) -> None:
    """Rows whose candidates are compared with each other."""
    draws([Filtered(4.0, s, top_k=5) for s in range(3)], "normal", module, fenced)
    one = [Filtered(3.0, s, top_k=8, top_p=0.6) for s in range(3)]
    draws(one, "ties", module, fenced)
    batch = [Filtered(3.0, s, top_k=20, min_p=0.6) for s in range(4)]
    draws(batch, "normal", module, fenced)


def many(module: Any, fenced: Any) -> None:
    """Rows whose end is found byte by byte."""
    for kind in ("normal", "ties"):
        one = [Filtered(9.0, s, top_k=CANDIDATES + 20) for s in range(2)]
        draws(one, kind, module, fenced)
    one = [Filtered(9.0, 1, top_k=CANDIDATES + 20, top_p=0.5)]
    draws(one, "nearly flat", module, fenced)


def rounds(module: Any, fenced: Any) -> None:
    """Rows that draw until something kept is drawn."""
    for kind in ("normal", "nearly flat", "ties"):
        batch = [Filtered(2.0, s, top_p=0.2) for s in range(3)]
        draws(batch, kind, module, fenced)
    batch = [Filtered(3.0, s, min_p=0.5) for s in range(2)]
    draws(batch, "normal", module, fenced)


def at_the_end_of_p(module: Any, fenced: Any) -> None:
    """Four equal tokens and ``p`` of a half: two are kept, by either way."""
    logits = torch.full((4, WIDTH), -1e4)
    logits[:, [3, 90, 200, 310]] = 1.0
    seats = torch.arange(24) % 4
    batch = [
        *(Filtered(1.0, 1, top_p=0.5), Filtered(1.0, 2, top_k=4, top_p=0.5)),
        *(Filtered(1.0, 3, top_p=1e-9), Filtered(1.0, 4, top_k=2)),
    ]
    positions = torch.arange(24) * 7
    tokens = run(
        *(logits[seats], batch, fenced), module=module, seats=seats, positions=positions
    )
    drawn = [{*tokens[seats == seat].tolist()} for seat in range(4)]
    assert drawn == [{3, 90}, {3, 90}, {3}, {3, 90}]


def listed(module: Any, fenced: Any) -> None:
    """Tokens of the list among the others."""
    bias = {3: 6.0, 70: 5.5, 300: 5.0}
    most = {3: 14.0, 70: 13.5, 300: 13.0}
    batch = [
        Filtered(2.0, 1, top_k=3, logit_bias=bias),
        Filtered(2.0, 2, top_p=0.8, logit_bias=bias),
        Filtered(2.0, 5, top_p=0.2, logit_bias=bias),
        *(Filtered(2.0, s, top_p=0.8, logit_bias=most) for s in range(3)),
        Filtered(2.0, 4, min_p=0.3, logit_bias=bias),
        Filtered(2.0, 6, top_k=40, output=[5, 5, 7], frequency_penalty=2.0),
    ]
    for kind in ("normal", "nearly flat"):
        draws(batch, kind, module, fenced)


def not_a_number(module: Any, fenced: Any) -> None:
    batch = [Filtered(1.0, 1, top_k=9), Filtered(1.0, 2, top_p=0.5)]
    logits = logits_of("normal", 2, WIDTH)
    logits[:, ::3] = float("nan")
    tokens = run(logits, batch, fenced, module=module)
    assert tokens.tolist() == reference(logits, batch, fenced).tolist()


def masks(module: Any, fenced: Any) -> None:
    """All but what is kept."""
    k = torch.tensor([5, 60, WIDTH, WIDTH], dtype=torch.int32)
    p = torch.tensor([1.0, 0.6, 0.3, 0.9])
    for kind in ("ties", "nearly flat"):
        logits = logits_of(kind, 4, WIDTH, 3)
        expected = top_k_top_p.mask_top_k_top_p_reference(logits, k, p)
        scratch = scratch_for(4, WIDTH, "cpu", module)
        assert torch.equal(module.mask_top_k_top_p(logits, k, p, scratch), expected)


def twice(module: Any, fenced: Any) -> None:
    """A second launch with the same scratch."""
    scratch = scratch_for(2, WIDTH, "cpu")
    batch = [Filtered(1.0, 1, top_k=5), Filtered(1.0, 1, top_p=0.5)]
    for seed in range(2):
        logits = logits_of("normal", 2, WIDTH, seed)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "make_scratch", lambda *_, **__: scratch)
            tokens = run(logits, batch, fenced, module=module)
        assert tokens.tolist() == reference(logits, batch, fenced).tolist()


def no_request(module: Any, fenced: Any) -> None:
    logits = logits_of("normal", 4, WIDTH)
    seats = torch.tensor([0, -1, 0, 0], dtype=torch.int32)
    batch = [Filtered(1.0, 1, top_k=5)]
    with Sanitizer(reorder=0) as sanitizer:
        tokens = run(logits, batch, fenced, module=module, seats=seats, rows=3)
    sanitizer.check()
    assert tokens[[1, 3]].tolist() == [-77, -77]


def any_order(module: Any, fenced: Any) -> None:
    """And races."""
    batch = [Filtered(1.0, 1, top_k=5), Filtered(1.0, 1, top_p=0.5)]
    with Sanitizer() as sanitizer:
        draws(batch, "normal", module, fenced, programs=8)
    sanitizer.check()


Check = Callable[[Any, Any], None]
CHECKS: tuple[Check, ...] = (
    *(few, many, rounds, at_the_end_of_p, listed, not_a_number),
    *(masks, twice, no_request, any_order),
)

# What is wrong: who finds it, the line of the kernel, the line in its place.
PLANTED: dict[str, tuple[Check, str, str]] = {
    "one token more than k": (
        *(at_the_end_of_p, "kept &= rank < k", "kept &= rank <= k"),
    ),
    "one token less than k": (*(few, "kept &= rank < k", "kept &= rank < k - 1"),),
    "of equal logits the highest tokens": (
        *(few, "(ids ^ _LAST).to(tl.int64)", "ids.to(tl.int64)"),
    ),
    "the bound of groups is too high": (
        *(few, "            if above >= need:", "            if above > need - 2:"),
    ),
    "p ends one token late": (
        *(at_the_end_of_p, "kept &= (mass < p * of)", "kept &= (mass <= p * of)"),
    ),
    "p ends one token late in a round": (
        *(at_the_end_of_p, "(mass >= p * total) &", "(mass > p * total) &"),
    ),
    "p may keep nothing": (*(at_the_end_of_p, "| (rank == 0)", "& (rank != 0)"),),
    "p counts what k drops": (
        *(few, "tl.sum(tl.where(kept, weight, 0.0), axis=0)", "tl.sum(weight, axis=0)"),
    ),
    "min-p does not end the candidates": (
        *(
            few,
            "        bound = _upper(threshold) << _TOKEN_BITS",
            "        bound += 0",
        ),
    ),
    "a round passes over tokens equal to the one that was refused": (
        *(
            rounds,
            "bound = winner + 1\n    _give(",
            "bound = winner + 2**25\n    _give(",
        ),
    ),
    "the first draw stands": (
        *(rounds, "    searches = True", "    searches = False"),
    ),
    "a round has noise of its own": (
        *(
            rounds,
            "_raced(y, ids, begun, best)\n            if (score",
            "_raced(y, ids, begun + 1, best)\n            if (score",
        ),
    ),
    "noise is reused between rows": (
        *(few, "_word(params_ptr, _SEED), ", "_word(params_ptr, _K), "),
    ),
    "noise is reused at other positions": (
        *(
            few,
            "_word(params_ptr, _SEED + 1), position",
            "_word(params_ptr, _SEED + 1), seat",
        ),
    ),
    "noise of the wrong tail": (
        *(
            few,
            "_value(key) + _noise(_hash(begun, ids))",
            "_value(key) + _noise(_hash(begun, ids) ^ 0xFFFFFFFF)",
        ),
    ),
    "a hash is skipped too early": (*(rounds, "* _LOG2E - 0.01", "* _LOG2E + 1.5"),),
    "the mass of a group has no temperature": (
        *(
            rounds,
            "y = tl.reshape(_over(x, temperature), (TILE // GROUP, GROUP))",
            "y = tl.reshape(x, (TILE // GROUP, GROUP))",
        ),
    ),
    "the k-th token is sought from the least": (
        *(
            many,
            "tl.max(tl.where(from_here >= k, digits, -1)",
            "tl.min(tl.where(from_here >= k, digits, 255)",
        ),
    ),
    "tokens above a byte are not counted": (
        *(
            many,
            "left = k - tl.sum(tl.where(digits > digit, counts, 0), axis=0)",
            "left = k + 0 * digit",
        ),
    ),
    "the search stops at the logit": (
        *(
            many,
            "last = tl.where(left == here,",
            "last = tl.where((left == here) | (shift == 24),",
        ),
    ),
    "candidates that do not fit are forgotten": (
        *(many, "        if count <= MOST:", "        if count <= 2 * MOST:"),
    ),
    "the list has no mass": (
        *(
            listed,
            "                total += _mass(y, peak)\n",
            "                total += 0.0\n",
        ),
    ),
    "the list is not read again": (
        *(
            listed,
            "tl.cdiv(number, WIDE // GROUP) + blocks",
            "tl.cdiv(number, WIDE // GROUP)",
        ),
    ),
    "a group with NaN has none": (
        *(not_a_number, "tl.where(inside & (x == x), x, _NEVER)", "x"),
    ),
    "the mask has the k-th token too": (
        *(masks, "(_order(y, ids) >= bound)", "(_order(y, ids) > bound)"),
    ),
    "the mask does not know the mass that k keeps": (
        *(masks, "if has_k & (middle == bound - 1):", "if middle < 0:"),
    ),
    "counters stay as they are": (
        *(twice, "        tl.store(arrived_ptr + row, 0)\n", ""),
    ),
    "a row of no request is drawn": (
        *(no_request, "    if seat < 0:\n", "    if seat < -1:\n"),
    ),
    "rows that do not exist are drawn": (
        *(no_request, "row >= tl.load(num_rows_ptr)", "row > tl.load(num_rows_ptr)"),
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
        patch.setitem(sys.modules, "planted", module)
        spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_kernel_passes(check, fenced):
    check(top_k_top_p, fenced)


@pytest.mark.parametrize("bug", PLANTED)
def test_is_found(bug, fenced, tmp_path):
    check, line, planted = PLANTED[bug]
    source = Path(top_k_top_p.__file__).read_text()
    assert line in source
    module = load(source.replace(line, planted), tmp_path)
    with pytest.raises((AssertionError, RuntimeError)):
        check(module, fenced)
