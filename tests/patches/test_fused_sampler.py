"""The fused sampler in real engines: stock's tokens, whatever is asked for, and when.

One engine per case decodes the same workload as it is and with the patch, alone and
with the others: all features of sampling in one batch, requests that join, finish, are
aborted and preempted, steps that are stock's in the midst. In float32, where stock's
kernels compare logits as a GPU does; in bfloat16 the interpreter takes their bits for
numbers when it counts ranks, and equal logits come in any order.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_ext_cpulane.engine import run_script
from vllm_ext_cpulane.environment import lane_environment

pytestmark = pytest.mark.vllm
SCRIPT = Path(__file__).parent / "in_engine" / "fused_sampler.py"
NAME = "fused_sampler"
LOGPROBS = "logprobs alone: many, of given tokens, or no logprobs"


def found_in(case: str, lane: dict[str, str]) -> dict:
    return run_script(SCRIPT, {**lane, "VEXT": "0"}, case)


@pytest.fixture(scope="module")
def mixed(lane):
    return found_in("mixed", lane)


@pytest.fixture(scope="module")
def asynchronous():
    return found_in("asynchronous", lane_environment("interpret"))


@pytest.fixture(scope="module")
def drafts():
    return found_in("drafts", lane_environment("interpret"))


def assert_same(found: dict, stock: dict, ranks: bool = True) -> None:
    """Tokens, reasons, ids and ranks exactly; logprobs but for rounding."""
    assert found["answers"].keys() == stock["answers"].keys()
    for name, answer in stock["answers"].items():
        ours = found["answers"][name]
        assert ours["tokens"] == answer["tokens"], name
        assert ours["reason"] == answer["reason"], name
        for mine, theirs in zip(ours["logprobs"], answer["logprobs"], strict=True):
            assert len(mine) == len(theirs)
            for (token, value, rank), expected in zip(mine, theirs, strict=True):
                if value == expected[1] == float("-inf"):
                    continue  # masked, so that any of them will do
                assert abs(value - expected[1]) <= 2e-6 * (1 + abs(expected[1])), name
                assert not ranks or [token, rank] == [expected[0], expected[2]], name


def test_everything_mixed(mixed):
    """In one batch, scheduled synchronously, with preemptions."""
    assert_same(mixed["patched"], mixed["stock"])
    assert mixed["preempted"] > 0
    answers = mixed["stock"]["answers"]
    for name, likeliest in {"6": 0, "7": 5, "9": 20, "17": 25}.items():
        assert min(map(len, answers[name]["logprobs"])) >= max(1, likeliest)
    assert not mixed["async"]


def test_both_launches_were_at_work(mixed):
    draws = mixed["patched"]["draws"]
    assert draws["without filters"] > 10
    assert draws["with filters"] > 20
    assert mixed["stock"]["draws"]["rows"] == 0


def test_what_is_left_to_stock_is_counted(mixed):
    aside = mixed["patched"]["aside"][NAME]
    assert aside.keys() == {"bad words", "minimum of tokens with a grammar", LOGPROBS}
    assert aside["bad words"] == 5  # as many as the request has tokens


def test_asynchronously_with_all_patches(asynchronous):
    """As on CUDA: FULL graphs, bfloat16, prompts in chunks."""
    assert_same(asynchronous["patched"], asynchronous["stock"], ranks=False)
    assert asynchronous["async"]
    assert asynchronous["patched"]["draws"]["rows"] > 50


def test_beside_drafts(drafts):
    """All steps but those of prompts bring some; these are the rejection sampler's."""
    assert_same(drafts["patched"], drafts["stock"], ranks=False)
    assert drafts["patched"]["aside"][NAME].keys() == {"drafts to verify"}
    assert drafts["patched"]["aside"][NAME]["drafts to verify"] > 5
    assert drafts["patched"]["draws"]["rows"] > 0


def test_reverted_it_is_stock(mixed):
    telling = mixed["revealing"]
    assert_same(telling["patched"], telling["stock"])
    assert_same(telling["reverted"], telling["stock"])
    assert telling["preempted"] == 3  # one each
    assert telling["patched"]["draws"]["rows"] > 0
    assert telling["reverted"]["draws"]["rows"] == 0


def test_seats_are_made_at_the_first_call_at_the_latest(mixed):
    """As with sleep mode, where they must not lie where the model does."""
    assert mixed["made"] == [True, True]


def test_logits_that_do_not_fit_are_left_to_stock(mixed):
    """Already in the memory profile, where an error would end the engine."""
    vocabulary, type_ = "logits of another vocabulary", "logits of another type"
    assert mixed["unfit"] == [type_] * 2 + [vocabulary] * 4


def test_each_planted_bug_is_found(mixed):
    stock = mixed["revealing"]["stock"]["answers"]
    assert len(mixed["planted"]) == 10
    missed = [bug for bug, answers in mixed["planted"].items() if answers == stock]
    assert not missed
