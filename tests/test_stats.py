"""The statistics behind every number that is printed as "faster"."""

import numpy as np
import pytest

from vllm_ext.stats import median, paired_ratio, quartiles


def test_median_and_quartiles_of_a_known_row():
    assert median([5.0, 1.0, 9.0]) == 5.0
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 4.0)


def test_an_exact_ratio_has_an_interval_of_no_width():
    before = [100.0, 130.0, 90.0, 110.0]
    ratio = paired_ratio(before, [0.8 * value for value in before])
    assert [ratio.value, ratio.low, ratio.high] == pytest.approx([0.8] * 3)


def test_a_drift_that_falls_on_both_sides_is_cancelled():
    drift = np.linspace(1.0, 3.0, 40)  # the machine becomes three times slower
    noise = np.random.default_rng(1).normal(1.0, 0.01, 40)
    ratio = paired_ratio((100 * drift).tolist(), (95 * drift * noise).tolist())
    assert 0.93 < ratio.low <= ratio.value <= ratio.high < 0.97


def test_one_wild_pair_does_not_move_the_middle():
    before, after = [100.0] * 21, [90.0] * 21
    after[7] = 9000.0
    assert paired_ratio(before, after).value == pytest.approx(0.9)


def test_the_same_seed_gives_the_same_interval():
    before = np.random.default_rng(2).normal(100, 5, 31).tolist()
    after = np.random.default_rng(3).normal(100, 5, 31).tolist()
    assert paired_ratio(before, after, seed=4) == paired_ratio(before, after, seed=4)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    """400 experiments with a known ratio of 0.9 and lognormal noise.

    A right 95 % interval misses 20 times, with a standard deviation of 4.4. The
    percentile bootstrap of a median is a little wide: fewer misses are no error.
    Beyond 36 (3.6 sigma, once in 6,000 sound runs; the seed is fixed anyway) the
    interval is too narrow; below 4 it says nothing.
    """
    random = np.random.default_rng(0)
    misses = 0
    for _ in range(400):
        machine = random.lognormal(5.0, 0.3, 25)
        before = machine * random.lognormal(0.0, 0.05, 25)
        after = 0.9 * machine * random.lognormal(0.0, 0.05, 25)
        ratio = paired_ratio(before.tolist(), after.tolist())
        misses += not ratio.low <= 0.9 <= ratio.high
    assert 4 <= misses <= 36


def test_twice_the_noise_makes_the_interval_wider():
    random = np.random.default_rng(6)
    noise = random.normal(0.0, 1.0, 60)
    width = []
    for scale in (0.02, 0.04):
        ratio = paired_ratio([1.0] * 60, np.exp(scale * noise).tolist())
        width.append(ratio.high - ratio.low)
    assert width[1] == pytest.approx(2 * width[0], rel=0.1)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ([], [], "finite numbers"),
        ([1.0], [1.0, 2.0], "1 timings cannot be paired with 2"),
        ([1.0, 0.0], [1.0, 1.0], "not above zero"),
        ([1.0], [float("nan")], "finite numbers"),
    ],
)
def test_what_cannot_be_paired_is_refused(before, after, message):
    with pytest.raises(ValueError, match=message):
        paired_ratio(before, after)
