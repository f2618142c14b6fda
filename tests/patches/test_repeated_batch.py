"""A repeated decode batch holds what stock would have prepared."""

from pathlib import Path

import pytest

from vllm_ext_cpulane.engine import run_script
from vllm_ext_cpulane.environment import lane_environment

pytestmark = pytest.mark.vllm
SCRIPT = Path(__file__).parent / "in_engine" / "repeated_batch.py"


@pytest.fixture(scope="module")
def found():
    return run_script(SCRIPT, lane_environment("interpret") | {"VEXT": "0"})


def test_each_batch_is_the_one_stock_prepares(found):
    """All fields and all input buffers, with dummy runs and preemptions between."""
    assert found["differ"] == []
    assert found["preempted"] > 0
    assert found["same answers"]


def test_steps_are_repeated_and_others_are_not(found):
    assert found["repeated"] > 10
    assert found["rebuilt"] > 10
    assert found["repeated a prefill"] == 0
    assert found["aside"] == {}


def test_steps_in_flight_share_no_host_arrays(found):
    assert found["shared"] == []
