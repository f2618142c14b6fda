"""Step graphs of a model whose layers do not keep the same of a request.

Two groups of KV cache, one of which forgets what its window has left behind; see the
script.
"""

from pathlib import Path

import pytest

from vllm_ext_cpulane.engine import run_script

pytestmark = pytest.mark.vllm
SCRIPT = Path(__file__).parent / "in_engine" / "step_graph_groups.py"


@pytest.fixture(scope="module")
def found(lane):
    settings = {"VEXT": "1", "VEXT_STRICT": "1", "VEXT_PATCHES": "step_graph"}
    return run_script(SCRIPT, lane | settings)


def test_groups_differ_in_all_that_they_can(found):
    assert found["windows"] == [None, 6]
    assert found["block sizes"] == [32, 16]
    assert found["widths"] == [4, 8]
    # Of vLLM 0.33, which tells attention that blocks are gone.
    assert found["reaches"] == (None if found["vllm"] < "0.33" else [0, 5])


@pytest.mark.parametrize("how", ["bracketed", "mono"])
class TestSteps:
    def test_tokens_are_stock_s(self, found, how):
        steps = found[how]
        assert steps["answers"] == found["stock"]
        assert steps["on"]
        assert steps["async"]
        assert steps["eligible"] > 30
        assert steps["checked"] > 5
        assert steps["preempted"] > 0
        reasons = {answer["reason"] for answer in found["stock"].values()}
        assert reasons == {"aborted", "length", "stop"}

    def test_blocks_behind_a_window_are_used_again_and_not_read(self, found, how):
        tables = found[how]["tables"]
        assert tables["wrong"] == tables["slots"] == 0
        assert tables["left"] > 30
        assert tables["reused"] > 10
        nulls = 0 if found["reaches"] is None else tables["left"]
        assert tables["nulled"] == nulls

    def test_nothing_else_is_touched_and_nothing_is_allocated(self, found, how):
        steps = found[how]
        assert steps["canaries"] == steps["allocations"] == steps["waits"] == 0
        assert steps["unwritten"] == steps["moved"] == []


def test_the_check_finds_what_is_wrong_of_one_group(found):
    """And nothing where nothing is."""
    planted = dict(found["planted"])
    assert planted.pop("nothing") == []
    assert len(planted) == 14
    assert [name for name, said in planted.items() if not said] == []


def test_the_check_finds_what_is_wrong_in_the_graph_of_a_whole_step(found):
    assert found["in one graph"]
    assert all("input_block_tables[1]" in said for said in found["in one graph"])
