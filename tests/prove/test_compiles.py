"""Compilations after the warm-up are listed by kernel; none of them is missed."""

from pathlib import Path

import pytest

from vllm_ext.prove.compiles import judge
from vllm_ext_cpulane.engine import run_script
from vllm_ext_cpulane.environment import lane_environment

SCRIPT = Path(__file__).parent / "compiles_planted.py"
KERNEL = "_scale_kernel"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    cache = tmp_path_factory.mktemp("triton")
    return run_script(
        SCRIPT, lane_environment("discard") | {"TRITON_CACHE_DIR": str(cache)}
    )


def test_steps_that_differ_in_nothing_that_is_compiled_are_clean(found):
    assert found["clean"] == []


@pytest.mark.parametrize(
    ("planted", "times"),
    [
        ("a constant that counts", 3),
        ("an integer that becomes divisible by 16", 1),
        ("another dtype", 2),
    ],
)
def test_a_compilation_is_named(found, planted, times):
    assert [name.rpartition(".")[2] for name in found[planted]] == [KERNEL] * times


def test_the_hook_that_was_there_hears_all_the_same_and_comes_back(found):
    assert found["hook restored"]
    assert found["the hook before heard too"] >= 8  # warm-ups, and what came after


def test_a_compilation_in_the_second_round_is_no_proof():
    swept = {"first": ["a", "b"], "again": ["_late_kernel", "_late_kernel"]}
    verdict = judge("stock", {**swept, "steps": 400})
    assert verdict.outcome == "not proven"
    assert verdict.detail.endswith(": _late_kernel")
    assert judge("stock", {**swept, "again": [], "steps": 4}).outcome == "proven on CPU"
