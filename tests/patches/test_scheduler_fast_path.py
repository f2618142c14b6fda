"""The scheduler with a fast path does what stock's does, call by call.

Two real schedulers on the same random traffic, compared after every call; and bugs
planted in the fast path, each of which has to be found and made small. `vllm-ext soak`
runs more of it.
"""

from pathlib import Path

import pytest

from vllm_ext.soak.traffic import (
    MIXES,
    Arrival,
    Event,
    Setup,
    Traffic,
    random_traffic,
    smallest,
)
from vllm_ext_cpulane.engine import run_script

SCRIPTS = Path(__file__).parent / "in_engine"
SEEDS = 40


@pytest.fixture(scope="module")
def found(lane):
    script = SCRIPTS / "scheduler_twins.py"
    variables = {**lane, "VEXT": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    return run_script(script, variables, "0", str(SEEDS), "40")


@pytest.mark.vllm
def test_no_call_and_no_state_differs(found, lane):
    assert "PYTHONPATH" not in lane or found["vllm"] == "0.33.0"
    assert found["same"]["differs"] is None, found["same"]["differs"]


@pytest.mark.vllm
def test_the_traffic_was_worth_it(found):
    """Both kinds of step, every way to end, preemptions, prefix hits, all setups."""
    seen = found["same"]
    assert seen["fast"] > 0.2 * seen["scheduled"]
    assert seen["scheduled"] - seen["fast"] > 0.2 * seen["scheduled"]
    assert seen["fast_updates"] > 0.2 * seen["updated"]
    assert {"STOP", "LENGTH", "REPETITION"} <= set(seen["finished"])
    assert seen["preempted"] > 10
    assert seen["hits"] > 100
    assert seen["events"] > 100
    assert seen["shapes"] == 8


@pytest.mark.vllm
def test_planted_bugs_are_found_in_traffic_that_a_person_can_read(found):
    assert [name for name, look in found["planted"].items() if look is None] == []
    for name, look in found["planted"].items():
        assert look["requests"] <= 6, (name, look["traffic"])
        assert look["steps"] <= 60, (name, look["traffic"])


# -- traffic, without vLLM -------------------------------------------------------------


def test_traffic_follows_from_its_seed():
    assert random_traffic(7, 50) == random_traffic(7, 50)
    assert random_traffic(7, 50) != random_traffic(8, 50)


@pytest.mark.parametrize("mix", MIXES)
def test_every_mix_has_requests_that_fit(mix):
    for seed in range(20):
        traffic = random_traffic(seed, 100, mix)
        setup = traffic.setup
        assert setup.longest <= (setup.blocks - 1) * setup.block_size
        for arrival in traffic.arrivals:
            assert len(arrival.prompt()) == arrival.length < setup.longest


def test_requests_share_a_prefix_within_their_family():
    one, other = Arrival(1, 0, 20, shared=8), Arrival(2, 0, 20, shared=8)
    assert one.prompt()[:8] == other.prompt()[:8]
    assert one.prompt() != other.prompt()


def test_the_smallest_traffic_keeps_what_matters_and_nothing_else():
    whole = random_traffic(3, 200, "churn")
    culprit = whole.arrivals[len(whole.arrivals) // 2]

    def fails(traffic: Traffic) -> int | None:
        hit = [each for each in traffic.arrivals if each.name == culprit.name]
        resets = [event for event in traffic.events if event.kind == "reset"]
        if hit and resets and hit[0].max_tokens >= 2:
            return max(hit[0].step, resets[0].step)
        return None

    small = smallest(
        Traffic(whole.setup, 200, whole.arrivals, (Event(9, "reset"),)), fails
    )
    assert small == Traffic(
        Setup(), 1, (Arrival(culprit.name, 0, 1, 2),), (Event(0, "reset"),)
    )


def test_traffic_that_does_not_fail_is_refused():
    with pytest.raises(ValueError, match="does not fail"):
        smallest(random_traffic(0, 10), lambda traffic: None)


def test_a_traffic_is_said_by_what_is_unusual_of_it():
    text = str(Traffic(Setup(ahead=False), 3, (Arrival(4, 1, stops=(2,)),)))
    assert (
        text == "3 steps of Setup(ahead=False)\n  Arrival(name=4, step=1, stops=(2,))"
    )
