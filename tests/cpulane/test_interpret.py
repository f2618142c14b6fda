"""The interpreter, changed by the lane, computes what compiled kernels compute."""

from pathlib import Path
from typing import Any

import pytest

from vllm_ext_cpulane.engine import run_script
from vllm_ext_cpulane.environment import lane_environment

SCRIPT = Path(__file__).with_name("interpret_script.py")


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return run_script(SCRIPT, lane_environment("interpret"))


def test_loops_count_and_divide_as_in_compiled_code(results):
    """-3 // 2 is -1 there, as in C; the loop over -3, -1, 1 gives -1, 0, 0."""
    assert results["loop"] == [-1, 0, 0, 0, 1, 2, 0, 1]


def test_a_loop_over_64_bits_counts_in_64_bits(results):
    assert results["wide"] == 2**31


def test_a_loop_over_32_bits_wraps_around(results):
    assert results["narrow"] == -(2**31)
