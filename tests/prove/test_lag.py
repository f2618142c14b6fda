"""Bugs of an asynchronous engine show on a device that lags, and only there."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vllm_ext.demo import difference
from vllm_ext.prove.lag import judge
from vllm_ext_cpulane.engine import run_script
from vllm_ext_cpulane.environment import lane_environment

SCRIPT = Path(__file__).parent / "lag_planted.py"
PLANTED = ["no wait for the output", "a copy that starts early", "one staging buffer"]


@pytest.fixture(scope="module")
def found():
    lane = lane_environment("interpret") | {"VEXT": "0"}
    with ThreadPoolExecutor() as both:
        prompt, lagging = both.map(
            lambda how: run_script(SCRIPT, lane, how), ("keeps up", "lags")
        )
    return {"keeps up": prompt, "lags": lagging}


@pytest.mark.vllm
def test_a_sound_engine_does_not_mind_the_lag(found):
    assert found["lags"]["sound"] == found["keeps up"]["sound"]


@pytest.mark.vllm
@pytest.mark.parametrize("bug", PLANTED)
def test_a_bug_shows_when_the_device_lags(found, bug):
    assert found["lags"][bug] != found["lags"]["sound"]


@pytest.mark.vllm
@pytest.mark.parametrize("bug", PLANTED)
def test_and_only_then(found, bug):
    assert found["keeps up"][bug] == found["keeps up"]["sound"]


def test_the_first_token_that_differs_is_named():
    def answers(*tokens):
        return {"greedy": {"tokens": [*tokens], "logprobs": [], "reason": "length"}}

    verdict = judge("late", difference(answers(5, 6, 7), answers(5, 9, 7)))
    assert (verdict.fault, verdict.outcome) == (True, "not proven")
    assert "1 of 3 tokens" in verdict.detail
    assert "request `greedy`, position 1, token: 6, on the one that lags 9" in (
        verdict.detail
    )
    same = judge("late", difference(answers(5), answers(5)))
    assert (same.fault, same.outcome) == (False, "proven on CPU")
