"""Steps by one graph each: what the graph is captured of, and what it takes.

That they decode stock's tokens is for test_step_graph.py to show. Here vLLM's capture
is what ours is compared with, so that a vLLM that captures otherwise is noticed.
"""

from pathlib import Path

import pytest

from vllm_ext_cpulane.engine import run_script

pytestmark = pytest.mark.vllm
SCRIPT = Path(__file__).parent / "in_engine" / "step_graph_mono.py"
ON = {"VEXT": "1", "VEXT_STRICT": "1", "VEXT_PATCHES": "step_graph"}
SIZES = ("1", "2", "4", "8")


@pytest.fixture(scope="module")
def found(lane):
    return run_script(SCRIPT, lane | ON)


def test_the_model_is_captured_as_vllm_captures_it(found):
    """Inputs, metadata and context: the same memory, the same numbers."""
    stock, mono = found["forward"]["stock"], found["forward"]["mono"]
    assert set(stock) == set(SIZES)
    assert mono == stock
    for [text] in mono.values():
        assert "slot_mapping" in text
        assert "input_ids" in text


SAMPLERS = ["", ", FlashInfer"]  # which draws other numbers


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_check_is_quiet_where_nothing_is_wrong(found, sampler):
    assert found["check"][f"sound{sampler}"] == {"same": True, "said": []}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_check_finds_a_forward_pass_that_is_wrong(found, sampler):
    wrong = found["check"][f"wrong{sampler}"]
    assert wrong["same"]
    assert len(wrong["said"]) == 2  # steps
    assert all("sampled tokens" in said for said in wrong["said"])


def test_flashinfer_draws_where_no_request_is_greedy_or_has_a_seed(found):
    assert found["check"]["by FlashInfer"] == [True] + [False] * 7


def test_the_check_finds_a_graph_that_writes_no_keys_and_values(found):
    """Although stock has just written those of the step that is checked."""
    nowhere = found["check"]["nowhere"]
    assert nowhere["same"]
    assert len(nowhere["said"]) == 2
    assert all("values of 1 layers are not written" in s for s in nowhere["said"])


def test_no_rank_replays_a_step_if_another_one_has_other_inputs(found):
    """Its forward pass would wait for the other rank, which does not come."""
    another = found["check"]["another rank"]
    assert another["asked"]
    assert all(another["asked"])
    assert another["replayed"] == 0
    assert another["same"]
    assert another["said"] == []  # which is the other one's to say


def test_nothing_waits_for_another_rank_once_graphs_are_recorded(found):
    """Which a rank that is out of memory, say, stops doing."""
    forward = ["forward"] * 2 * len(SIZES)
    assert found["order"] == [*forward, *["record"] * 3 * len(SIZES)]


@pytest.mark.parametrize("form", ["bracketed", "mono"])
def test_a_profile_says_what_the_graphs_will_take(found, form):
    """Of a device whose graphs take memory for each node, and for rows in a pool."""
    profile = found["profile"][form]
    assert profile["mono"] == (form == "mono")
    assert profile["sizes"] == ([1, 2] if form == "bracketed" else [1, 2, 4, 8])
    assert not profile["left"]
    assert (profile["took"][-1] > 3 << 20) == (form == "mono")  # vLLM's floor
    assert abs(profile["said"] - profile["taken"]) < 0.05 * profile["taken"]
