"""Comparing two sets of timings without believing in either clock or machine.

A pair is one measurement of each side, taken next to each other, so that a slow
moment of the machine falls on both. What is reported is the middle of the pairs'
ratios, and how far it could have been elsewhere had other moments been measured.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 4000
MOST_COUNTED = 100  # samples of both sides, in a rank-sum test without approximation
CONFIDENCE = 0.95
LEAST_TOLERANCE = 0.03  # a difference that nobody would act on

Verdict = Literal["REGRESSED", "IMPROVED", "SAME", "UNDECIDED", "INVALID"]


@dataclass(frozen=True)
class Ratio:
    """A ratio of two timings and the interval that holds it at `CONFIDENCE`."""

    value: float
    low: float
    high: float


def median(samples: Sequence[float]) -> float:
    """The middle of ``samples``, in their unit."""
    return float(np.median(_filled(samples)))


def quartiles(samples: Sequence[float]) -> tuple[float, float]:
    """Between which two values the middle half of ``samples`` lies, in their unit."""
    values = _filled(samples)
    return float(np.percentile(values, 25)), float(np.percentile(values, 75))


def paired_ratio(
    before: Sequence[float], after: Sequence[float], seed: int = 0
) -> Ratio:
    """The median of ``after[i] / before[i]``, with a bootstrap interval over pairs.

    The interval is the percentile one: medians of as many pairs, drawn with
    replacement. It knows nothing of what differs between runs of the whole program.

    Args:
        before: Timings of one side, all above zero.
        after: Timings of the other, taken beside them, in the same unit.
        seed: Of the generator that draws; the same seed gives the same interval.

    Raises:
        ValueError: The sides differ in length, are empty, or hold a value that is
            not above zero.
    """
    ratios = _ratios(before, after)
    draws = np.random.default_rng(seed).integers(
        len(ratios), size=(RESAMPLES, len(ratios))
    )
    medians = np.median(ratios[draws], axis=1)
    tail = 100 * (1 - CONFIDENCE) / 2
    return Ratio(
        float(np.median(ratios)),
        float(np.percentile(medians, tail)),
        float(np.percentile(medians, 100 - tail)),
    )


def tolerance(control: Ratio | None) -> float:
    """What counts as no difference: 3 %, or twice what stock against stock leaves open.

    Args:
        control: Stock against a second stock engine, if there was one.
    """
    if control is None:
        return LEAST_TOLERANCE
    return max(LEAST_TOLERANCE, control.high - control.low)


@dataclass(frozen=True)
class Case:
    """What was found in one case, before it is looked at beside the others.

    Attributes:
        ratio: Of the costs, with its interval.
        chance: The p-value of a two-sided test: no cost beyond the tolerance.
        tolerance: What is no difference, as a share: 0.03 for 3 %.
        enough: Whether there are samples enough to say anything.
    """

    ratio: Ratio
    chance: float
    tolerance: float
    enough: bool


def paired(
    before: Sequence[float], after: Sequence[float], tolerance: float = 0.0
) -> Case:
    """Two sides that took turns: `paired_ratio`, and a sign test of the pairs.

    The sign test is exact for any distribution of the noise, as long as the pairs are
    independent of each other.

    Raises:
        ValueError: As `paired_ratio`.
    """
    ratios = _ratios(before, after)
    above = int((ratios > 1 + tolerance).sum())
    below = int((ratios < 1 / (1 + tolerance)).sum())
    return Case(
        paired_ratio(before, after),
        min(1.0, 2 * _at_least(max(above, below), len(ratios))),
        tolerance,
        len(ratios) >= pairs_needed(1),
    )


def unpaired(
    before: Sequence[float], after: Sequence[float], tolerance: float = 0.0
) -> Case:
    """Two sets from different runs: the ratio of the medians, and a rank-sum test.

    The test is the permutation one, one-sided each way at the edge of the tolerance. Up
    to `MOST_COUNTED` samples all permutations are counted, so that a p-value can be as
    small as a table of a thousand cases asks for; more are taken for normal.

    Raises:
        ValueError: A set is empty or holds a value that is not above zero.
    """
    first, second = _positive(before), _positive(after)
    random = np.random.default_rng(0)
    medians = [
        np.median(side[random.integers(len(side), size=(RESAMPLES, len(side)))], axis=1)
        for side in (first, second)
    ]
    tail = 100 * (1 - CONFIDENCE) / 2
    drawn = medians[1] / medians[0]
    chances = (
        _higher(first * (1 + tolerance), second),
        _higher(second * (1 + tolerance), first),
    )
    return Case(
        Ratio(
            float(np.median(second) / np.median(first)),
            float(np.percentile(drawn, tail)),
            float(np.percentile(drawn, 100 - tail)),
        ),
        min(1.0, 2 * min(chances)),
        tolerance,
        min(len(first), len(second)) >= pairs_needed(1),
    )


def verdicts(cases: Sequence[Case]) -> list[Verdict]:
    """What may be said of each case, when all of them are looked at together.

    ``REGRESSED`` and ``IMPROVED`` need an interval of the ratio that lies wholly beyond
    the tolerance, and a test that says the same after Holm's correction for the number
    of cases: where nothing differs by more than the tolerance, at most one set of cases
    in twenty contains any such verdict. That takes a number of pairs, `pairs_needed`.
    ``SAME`` needs an interval wholly within `LEAST_TOLERANCE`, however wide the
    tolerance is: noise makes a difference harder to see, and not smaller. The rest is
    ``UNDECIDED``.

    Source: S. Holm, A simple sequentially rejective multiple test procedure, 1979.
    """
    found: list[Verdict] = []
    surprising = holm([case.chance for case in cases])
    for case, is_surprising in zip(cases, surprising, strict=True):
        above, below = 1 + case.tolerance, 1 / (1 + case.tolerance)
        same = 1 + min(case.tolerance, LEAST_TOLERANCE)
        if not case.enough:
            found.append("UNDECIDED")
        elif case.ratio.low > above and is_surprising:
            found.append("REGRESSED")
        elif case.ratio.high < below and is_surprising:
            found.append("IMPROVED")
        elif 1 / same < case.ratio.low and case.ratio.high < same:
            found.append("SAME")
        else:
            found.append("UNDECIDED")
    return found


def pairs_needed(cases: int) -> int:
    """How many pairs each of ``cases`` needs before any of them can be decided."""
    return math.ceil(math.log2(2 * cases / (1 - CONFIDENCE)))


def holm(chances: Sequence[float]) -> list[bool]:
    """Which of several tests are significant together, in the order given.

    Args:
        chances: Their p-values.
    """
    order = sorted(range(len(chances)), key=lambda each: chances[each])
    found = [False] * len(chances)
    for rank, each in enumerate(order):
        if chances[each] > (1 - CONFIDENCE) / (len(chances) - rank):
            break
        found[each] = True
    return found


def _at_least(heads: int, throws: int) -> float:
    """How often as many heads or more come up in ``throws`` of a coin."""
    ways = sum(math.comb(throws, each) for each in range(heads, throws + 1))
    return float(ways / 2**throws)


def _higher(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """How often chance alone ranks ``second`` as far above ``first``."""
    both = np.concatenate([first, second])
    order = np.sort(both)
    # Equal values share their middle rank; doubled, so that it is whole.
    ranks = np.searchsorted(order, both) + np.searchsorted(order, both, side="right")
    reached = int(ranks[len(first) :].sum())
    if len(both) > MOST_COUNTED:
        variance = len(first) * len(second) / (len(both) - 1) * float(ranks.var())
        above = reached - 1 - len(second) * float(ranks.mean())
        return math.erfc(above / math.sqrt(2 * variance)) / 2 if variance else 1.0
    # In how many of all choices of ranks, by their number, each sum comes up.
    ways = np.zeros((len(second) + 1, int(ranks.sum()) + 1))
    ways[0, 0] = 1.0
    for rank in ranks:
        ways[1:, rank:] += ways[:-1, : ways.shape[1] - rank].copy()
    return float(ways[-1, reached:].sum() / ways[-1].sum())


def _ratios(before: Sequence[float], after: Sequence[float]) -> NDArray[np.float64]:
    first, second = _positive(before), _positive(after)
    if first.shape != second.shape:
        raise ValueError(f"{len(first)} timings cannot be paired with {len(second)}")
    return second / first


def _positive(samples: Sequence[float]) -> NDArray[np.float64]:
    values = _filled(samples)
    if values.min() <= 0:
        raise ValueError("a timing is not above zero")
    return values


def _filled(samples: Sequence[float]) -> NDArray[np.float64]:
    values: NDArray[np.float64] = np.asarray(samples, dtype=np.float64)
    if values.ndim != 1 or not values.size or not np.isfinite(values).all():
        raise ValueError(f"needs one row of finite numbers, got {samples!r}")
    return values
