"""Comparing two sets of timings without believing in either clock or machine.

A pair is one measurement of each side, taken next to each other, so that a slow
moment of the machine falls on both. What is reported is the middle of the pairs'
ratios, and how far it could have been elsewhere had other moments been measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 4000
CONFIDENCE = 0.95


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
    first, second = _filled(before), _filled(after)
    if first.shape != second.shape:
        raise ValueError(f"{len(first)} timings cannot be paired with {len(second)}")
    if first.min() <= 0 or second.min() <= 0:
        raise ValueError("a timing is not above zero")
    ratios = second / first
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


def _filled(samples: Sequence[float]) -> NDArray[np.float64]:
    values: NDArray[np.float64] = np.asarray(samples, dtype=np.float64)
    if values.ndim != 1 or not values.size or not np.isfinite(values).all():
        raise ValueError(f"needs one row of finite numbers, got {samples!r}")
    return values
