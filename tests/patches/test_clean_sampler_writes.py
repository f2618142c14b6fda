"""Sampling parameters reach the device when they change, and only then."""

from pathlib import Path

import pytest

from vllm_ext_cpulane.engine import run_script
from vllm_ext_cpulane.environment import lane_environment

pytestmark = pytest.mark.vllm
SCRIPT = Path(__file__).parent / "in_engine" / "clean_sampler_writes.py"


@pytest.fixture(scope="module")
def found():
    return run_script(SCRIPT, lane_environment("interpret") | {"VEXT": "0"})


def test_the_device_has_what_the_host_has(found):
    """After each call of a run with joins, finishes, aborts and reused slots."""
    assert found["checked"] == 15
    assert found["wrong"] == []


def test_steps_without_a_new_request_copy_nothing(found):
    """A step in which requests join copies once, however many join."""
    assert found["copied"] == found["to copy"] < found["calls"]
    assert found["skipped when clean"]


def test_a_processor_of_the_user_is_called_every_step(found):
    assert found["own processor"] == 3
    assert found["aside"] == {"custom logits processor": 3}


def test_a_sampler_derived_from_vllms_flushes_every_step(found):
    """It may write parameters of its own; what is checked is in ``wrong`` above."""
    assert found["derived aside"] == {"sampler of the model's own": 3}
