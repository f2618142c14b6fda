"""The tolerances of the kernels' tests, all of them; tokens and indices have none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

FALSE_ALARM = 1e-6
"""How likely a test of a distribution fails though nothing is wrong."""

SMALLEST_BIN = 10
"""Expected draws; rarer outcomes are counted together."""


def assert_drawn_from(
    counts: Sequence[int], probabilities: Sequence[float], false_alarm=FALSE_ALARM
) -> None:
    """Draws follow ``probabilities``, by Pearson's chi-square.

    The threshold is Wilson and Hilferty's approximation of the quantile, which is
    within 1 % here; what cannot be drawn must not have been.
    """
    draws = sum(counts)
    bins, rest = [], [0, 0.0]
    for count, probability in zip(counts, probabilities, strict=True):
        assert probability > 0 or not count, "drew what has no probability"
        if probability * draws >= SMALLEST_BIN:
            bins.append((count, probability * draws))
        else:
            rest = [rest[0] + count, rest[1] + probability * draws]
    if rest[1] > 0:
        bins.append((rest[0], max(rest[1], 1.0)))
    statistic = sum((count - expected) ** 2 / expected for count, expected in bins)
    freedom = len(bins) - 1
    assert freedom > 0, "one outcome says nothing"
    scale = 2 / (9 * freedom)
    limit = freedom * (1 - scale + _normal_quantile(1 - false_alarm) * scale**0.5) ** 3
    assert statistic < limit, f"chi-square {statistic:.1f} of {limit:.1f} ({freedom})"


def _normal_quantile(probability: float) -> float:
    low, high = 0.0, 10.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        if math.erf(middle / 2**0.5) < 2 * probability - 1:
            low = middle
        else:
            high = middle
    return low


def assert_as_close_as_torch(found: Tensor, plain: Tensor, exact: Tensor) -> None:
    """At most twice the error of plain torch in the same type, plus one rounding.

    Args:
        found: What a kernel computed.
        plain: What torch computes in the same type.
        exact: The same in float64; what is not finite there has to be it here too.
    """
    import torch

    finite = exact.isfinite()
    torch.testing.assert_close(
        found[~finite].double(), exact[~finite], rtol=0, atol=0, equal_nan=True
    )
    if not finite.any():
        return
    exact = exact[finite]
    error, of_torch = ((each[finite] - exact).abs() for each in (found, plain))
    rounding = torch.finfo(found.dtype).eps / 2 * exact.abs().max()
    limit = 2 * of_torch.max() + rounding
    assert error.max() <= limit, f"off by {error.max():.2e}, {limit:.2e} is allowed"
