"""Token counts: constant where stock computes that constant, computed elsewhere."""

from pathlib import Path

import pytest

from vllm_ext_cpulane.engine import run_script
from vllm_ext_cpulane.environment import lane_environment

pytestmark = pytest.mark.vllm
SCRIPT = Path(__file__).parent / "in_engine" / "decode_counts.py"


@pytest.fixture(scope="module")
def found():
    return run_script(SCRIPT, lane_environment("interpret") | {"VEXT": "0"})


def test_same_counts_as_stock(found):
    """In each step of a run in which prompts are computed in chunks."""
    assert found["differ"] == 0
    assert found["nothing sampled"] > 0


def test_decode_steps_share_the_constants(found):
    assert found["shared"] > 10
    assert found["copies of constants"] == found["shared"]


def test_other_steps_compute_and_copy(found):
    assert found["computed"] > 10
    assert found["shared with a prefill"] == 0
    assert found["shared with a dummy"] == 0
    assert found["copies"] > found["copies of constants"]
    assert found["other batch differs"] == 0


def test_the_constants_stay_what_they_are(found):
    assert (found["ones"], found["zeros"]) == ([1], [0])
