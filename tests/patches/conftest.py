"""The vLLM versions that tests of the patches run on.

What runs on the newest one in `make early-warning` is what two minutes allow. All of
tests/patches runs there with ``PYTHONPATH=.venv/overlays/0.33.0``, and has to before
that version goes into a ``tested_with``.
"""

import pytest

from vllm_ext_cpulane.environment import lane_environment
from vllm_ext_cpulane.overlay import make_overlay, newest_wheel


@pytest.fixture(
    scope="module",
    params=["installed", pytest.param("newest", marks=pytest.mark.early_warning)],
)
def lane(request: pytest.FixtureRequest) -> dict[str, str]:
    """Variables for a script: the CPU lane, and the vLLM that it imports."""
    variables = lane_environment("interpret")
    if request.param == "newest":
        variables["PYTHONPATH"] = str(make_overlay(newest_wheel()))
    return variables
