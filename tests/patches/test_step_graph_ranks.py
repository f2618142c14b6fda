"""Two processes, ranks of one engine, go on with step graphs in the same way."""

from pathlib import Path

import pytest

from vllm_ext_cpulane.engine import run_script

SCRIPT = Path(__file__).parent / "in_engine" / "step_graph_ranks.py"
RANKS = 2
RIGHT = [False, False, False, True]  # by the ranks that are, as bits


@pytest.fixture(scope="module")
def ranks(lane):
    return run_script(SCRIPT, lane, timeout=120)  # ranks that differ would wait


def test_one_that_is_wrong_is_enough(ranks):
    assert [rank["world"] for rank in ranks] == [RANKS] * RANKS
    assert [rank["agree"] for rank in ranks] == [RIGHT] * RANKS


def test_a_capture_that_fails_on_one_is_none(ranks):
    for number, rank in enumerate(ranks):
        on = [each["on"] for each in rank["capture"]]
        assert on == [True, False, False, False]
        for mask, each in enumerate(rank["capture"]):
            own = "out of memory" in str(each["said"])
            assert own == bool(mask >> number & 1)
            assert len(each["said"]) == (mask > 0)


def test_steps_are_of_the_same_kind(ranks):
    sound = ranks[0]["sound"]
    assert sound == ranks[1]["sound"]
    assert {"graph", "checked", "stock"} == set(sound["kinds"])
    assert sound["said"] == []
    assert set(sound["sums"]) == {2, 200}  # nobody was alone in what it did


@pytest.mark.parametrize("case", range(3))
def test_one_that_differs_turns_it_off_for_both_at_once(ranks, case):
    first, second = (rank["wrong"][case] for rank in ranks)
    kinds = first["kinds"]
    assert kinds == second["kinds"]
    assert set(first["sums"]) == set(second["sums"]) == {2, 200}
    last = max(at for at, kind in enumerate(kinds) if kind != "stock")
    assert kinds[last] == "checked"
    assert kinds[:20] == ranks[0]["sound"]["kinds"][:20]
    assert 20 <= last < len(kinds) - 10
    assert [len(each["said"]) for each in (first, second)] == [1, 1]
    said = [each["said"][0] for each in (first, second)]
    assert sum("another rank" in each for each in said) == 1


def test_a_whole_step_is_replayed_by_all_or_by_none(ranks):
    """Its collectives wait for those of the other ranks."""
    for rank in ranks:
        replayed = [each["replayed"] for each in rank["whole"]]
        assert replayed == [[2], [], [], []]
