"""Compilations after the warm-up are listed by kernel; none of them is missed."""

from pathlib import Path

import pytest

from vllm_ext.children import ChildError
from vllm_ext.patches import SERIES
from vllm_ext.prove import compiles
from vllm_ext.prove.audit import V2_PATCHES
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


@pytest.fixture
def engines(monkeypatch):
    """Engines that answer at once, or fail; by name."""

    def play(**answers):
        class Engine:
            def __init__(self, name):
                self.answers = iter(answers[name])

            def hear(self):
                answer = next(self.answers)
                if isinstance(answer, Exception):
                    raise answer
                return answer

        monkeypatch.setattr(
            compiles, "_start", lambda stack, number, name, settings: Engine(name)
        )

    return play


STOCK = [None, {"first": ["a"], "again": [], "steps": 4}, []]
ENDED = ChildError("patched engine ended; its last lines:\n  | a\n  | No: b")


@pytest.mark.parametrize("answers", [[ENDED], [None, ENDED]], ids=["boot", "sweep"])
def test_stock_is_judged_though_the_patched_engine_failed(engines, answers):
    engines(stock=STOCK, patched=answers)
    stock, patched = compiles.verdicts(lambda text: None)
    assert (stock.subject, stock.outcome) == ("stock", "proven on CPU")
    assert (patched.subject, patched.outcome) == ("all patches", "not proven")
    assert patched.fault
    assert patched.detail == "patched engine ended; its last lines: No: b"


@pytest.mark.vllm
def test_nothing_is_compiled_while_decoding():
    stock, *patches = compiles.verdicts(lambda text: None)
    assert (stock.subject, stock.outcome) == ("stock", "proven on CPU")
    assert [each.subject for each in patches] == [patch.name for patch in SERIES]
    proven = {each.subject for each in patches if each.outcome == "proven on CPU"}
    # The last is for V1; V2 passes its wrapper with tensors that are on the host.
    assert proven == {*V2_PATCHES, "v1_copy_back"}
    assert not any(each.fault for each in patches)
