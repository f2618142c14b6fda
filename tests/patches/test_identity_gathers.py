"""Sampling from views gives the sampler the rows that stock would gather."""

from pathlib import Path

import pytest

from vllm_ext_cpulane.engine import run_script
from vllm_ext_cpulane.environment import lane_environment

pytestmark = pytest.mark.vllm
SCRIPT = Path(__file__).parent / "in_engine" / "identity_gathers.py"


@pytest.fixture(scope="module")
def found():
    return run_script(SCRIPT, lane_environment("interpret") | {"VEXT": "0"})


def test_same_rows_as_stock_gathers(found):
    """Hidden states, positions and input ids of each step: values and layout."""
    assert found["differ"] == []
    assert found["same answers"]


def test_only_steps_of_one_token_each_use_views(found):
    assert found["views"] > 10
    assert found["gathers"] > 10
    assert found["view of a prompt"] == 0
    assert found["aside"] == {}


def test_nobody_writes_through_a_view(found):
    assert found["written"] == 0


def test_code_of_the_user_gets_copies(found):
    assert found["views beside a processor of the user"] == 0
    assert found["reasons"] == ["custom logits processor"]


def test_the_batch_gets_its_indices_back(found):
    assert found["not given back"] == 0
    assert found["failed"]
