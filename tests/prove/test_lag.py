"""Bugs of an asynchronous engine show on a device that lags, and only there."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vllm_ext.children import ChildError
from vllm_ext.demo import difference
from vllm_ext.patches import SERIES
from vllm_ext.prove import lag
from vllm_ext.prove.audit import V2_PATCHES
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


class Engine:
    def __init__(self, answer):
        self.answer = answer

    def hear(self):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def ask(self, what):
        assert what == "patches"
        return [{"name": patch.name, "state": "in use"} for patch in SERIES]


def played(monkeypatch, *answers):
    """Verdicts on engines that answer at once, in the order in which they start."""
    left = iter(answers)
    monkeypatch.setattr(lag, "_start", lambda *_, **__: Engine(next(left)))
    return lag.verdicts(lambda text: None)


ANSWER = {"greedy": {"tokens": [5], "logprobs": [], "reason": "length"}}
OTHER = {"greedy": {"tokens": [6], "logprobs": [], "reason": "length"}}
ENDED = ChildError("engine ended; its last lines:\n  | a\n  | No: b")


def test_a_patched_engine_that_fails_is_a_fault_of_all_patches(monkeypatch):
    [verdict] = played(monkeypatch, ANSWER, ENDED)
    assert (verdict.subject, verdict.outcome) == ("all patches", "not proven")
    assert verdict.fault
    assert verdict.detail == "engine ended; its last lines: No: b"


def test_patches_are_judged_though_stock_fails_on_a_device_that_lags(monkeypatch):
    stock, *patches = played(monkeypatch, ANSWER, OTHER, ENDED)
    assert (stock.subject, stock.fault) == ("stock", True)
    assert stock.detail == "engine ended; its last lines: No: b"
    assert [each.subject for each in patches] == [patch.name for patch in SERIES]
    assert all("1 of 1 tokens differ" in each.detail for each in patches)


@pytest.mark.vllm
def test_the_patches_do_not_mind_the_lag():
    verdicts = lag.verdicts(lambda text: None)
    # The last is for V1; V2 passes its wrapper with tensors that are on the host.
    assert {each.subject for each in verdicts} == {*V2_PATCHES, "v1_copy_back"}
    assert {each.outcome for each in verdicts} == {"proven on CPU"}
