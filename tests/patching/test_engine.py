"""The engine on a toy package: every form of edit, every way to step aside."""

from __future__ import annotations

import functools
import logging
import os
import sys

import pytest
from toypackage import Toy, patch_of

from vllm_ext.patching import engine as engine_module
from vllm_ext.patching.declare import Edit
from vllm_ext.patching.engine import PatchError, step_aside

SCALE = Edit("toy.ops:scale", by="ours.replacement:scale")
SHIFT = Edit("toy.ops:shift", by="ours.replacement:shift")
LOGGED = Edit("toy.ops:scale", by="ours.replacement:logged", how="wrap")
FAILS = Edit("toy.ops:scale", by="ours.replacement:fails")
OURS = Edit("toy.ops:Sampler", by="ours.subclass:Ours", how="subclass")
KERNEL = Edit("toy.kernels:add_kernel", by="ours.replacement:add", how="kernel")


@pytest.fixture(autouse=True)
def _log_everything(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, logger="vllm.vllm_ext")


# -- applying ------------------------------------------------------------------------


def test_waits_for_the_import_and_reaches_later_copies(toy: Toy):
    outcome = toy.engine(patch_of(SCALE)).offer(patch_of(SCALE))
    assert outcome.state == "waiting"
    assert "ours.replacement" not in sys.modules
    runner = toy.load("toy.runner")
    assert outcome.state == "applied"
    assert outcome.version == "1.2.0"
    assert runner.step(3) == 7
    assert outcome.state == "in use"
    assert runner.scale.__module__ == "ours.replacement"


def test_reaches_copies_made_before_it_came(toy: Toy):
    ops, runner = toy.load("toy.ops"), toy.load("toy.runner")
    outcome = toy.engine(patch_of(SCALE)).offer(patch_of(SCALE))
    assert outcome.state == "applied"
    assert outcome.copies == 1
    assert runner.scale is ops.scale
    assert runner.scale.__module__ == "ours.replacement"


def test_edits_in_two_modules_are_applied_when_the_second_is_imported(toy: Toy):
    patch = patch_of(SCALE, Edit("toy.runner:step", by="ours.replacement:shift"))
    outcome = toy.engine(patch).offer(patch)
    ops = toy.load("toy.ops")
    assert outcome.state == "waiting"
    assert ops.scale.__module__ == "toy.ops"
    toy.load("toy.runner")
    assert outcome.state == "applied"
    assert ops.scale.__module__ == "ours.replacement"


def test_a_module_whose_import_still_runs_is_waited_for(toy: Toy):
    """``toy.runner`` is in ``sys.modules``, and empty, while it imports ``toy.ops``."""
    patch = patch_of(SCALE, Edit("toy.runner:step", by="ours.replacement:shift"))
    outcome = toy.engine(patch).offer(patch)
    assert toy.load("toy.runner").step(3) == 4
    assert outcome.state == "in use"


def test_waits_for_a_module_that_names_the_process(toy: Toy):
    patch = patch_of(SCALE, after=("toy.runner",))
    ops = toy.load("toy.ops")
    outcome = toy.engine(patch).offer(patch)
    assert outcome.state == "waiting"
    assert ops.scale.__module__ == "toy.ops"
    assert toy.load("toy.runner").step(3) == 7
    assert outcome.state == "in use"


def test_a_wrapper_gets_the_original(toy: Toy):
    toy.engine(patch_of(LOGGED)).offer(patch_of(LOGGED))
    assert toy.load("toy.runner").step(3) == 7
    assert toy.load("ours.replacement").calls == [(3,)]


def test_methods_of_every_kind(toy: Toy):
    patch = patch_of(
        Edit("toy.ops:Sampler.half", by="ours.replacement:half"),
        Edit("toy.ops:Sampler.make", by="ours.replacement:make", how="wrap"),
        Edit("toy.ops:Sampler.sample", by="ours.replacement:logged", how="wrap"),
    )
    engine = toy.engine(patch)
    ops = toy.load("toy.ops")
    before = dict(vars(ops.Sampler))
    engine.offer(patch)
    assert ops.Sampler.half(3) == 1.5
    assert ops.Sampler().half(3) == 1.5
    assert ops.Sampler.make(1).bias == 101
    assert ops.Sampler(5).sample(2) == 9
    engine.revert("demo")
    assert dict(vars(ops.Sampler)) == before


def test_a_subclass_takes_the_place_of_the_class(toy: Toy):
    engine = toy.engine(patch_of(OURS))
    outcome = engine.offer(patch_of(OURS))
    runner = toy.load("toy.runner")
    assert runner.Sampler.kind == "ours"
    assert outcome.state == "applied"
    assert runner.sample(3, bias=1) == 7
    assert outcome.state == "in use"
    stock = runner.Sampler.__mro__[1]
    engine.revert("demo")
    assert runner.Sampler is stock
    assert toy.load("toy.ops").Sampler is stock
    assert "__init__" not in vars(toy.load("ours.subclass").Ours)


def test_a_class_that_is_no_subclass_fails(toy: Toy):
    patch = patch_of(Edit(OURS.target, by="ours.subclass:Stranger", how="subclass"))
    outcome = toy.engine(patch).offer(patch)
    assert toy.load("toy.runner").sample(3) == 6
    assert outcome.state == "failed"
    assert "not a subclass" in outcome.reason


def test_a_kernel_goes_through_the_packages_dispatcher_and_comes_back(toy: Toy):
    launch, kernels = toy.load("toy.launch"), toy.load("toy.kernels")
    stock = kernels.add_kernel
    theirs = toy.load("foreign")  # the dispatcher moves everybody's copies
    theirs.add_kernel = stock
    engine = toy.engine(patch_of(KERNEL))
    outcome = engine.offer(patch_of(KERNEL))
    assert outcome.state == "applied"
    assert launch.launch("a", "b") == "ba"
    assert outcome.state == "in use"
    assert kernels.warm_up.kernel is kernels.add_kernel is not stock
    engine.revert("demo")
    assert launch.add_kernel is kernels.add_kernel is theirs.add_kernel is stock
    assert kernels.warm_up.kernel is stock
    assert "_kernel_arg_names" not in vars(kernels.warm_up)
    assert toy.load("toy.triton_utils.dispatcher")._registry == {}
    assert launch.launch("a", "b") == "ab"


def test_an_offer_made_twice_counts_once(toy: Toy):
    engine = toy.engine(patch_of(LOGGED))
    first = engine.offer(patch_of(LOGGED))
    toy.load("toy.runner")
    assert engine.offer(patch_of(LOGGED)) is first
    toy.load("toy.runner").step(1)
    assert len(toy.load("ours.replacement").calls) == 1


# -- witnessing ----------------------------------------------------------------------


def test_the_witness_of_the_first_call_removes_itself(toy: Toy, caplog):
    outcome = toy.engine(patch_of(SCALE)).offer(patch_of(SCALE))
    runner = toy.load("toy.runner")
    witness = runner.scale
    runner.step(1)
    assert runner.scale is not witness
    assert toy.load("toy.ops").scale is runner.scale
    settled = runner.scale
    runner.step(1)
    assert runner.scale is settled
    assert outcome.used == {"toy.ops:scale"}
    assert outcome.calls == {}
    assert [r.getMessage() for r in caplog.records].count("vllm-ext: demo in use") == 1


def test_calls_are_counted_where_asked_for(toy: Toy):
    seen = []
    engine = toy.engine(
        patch_of(SCALE), count=True, on_change=lambda o: seen.append(o.state)
    )
    outcome = engine.offer(patch_of(SCALE))
    runner = toy.load("toy.runner")
    for number in range(5):
        runner.step(number)
    assert outcome.calls == {"toy.ops:scale": 5}
    assert seen[0] == "applied"
    assert seen[-1] == "in use"


def test_a_forked_child_counts_its_own_calls(toy: Toy):
    outcome = toy.engine(patch_of(SCALE), count=True).offer(patch_of(SCALE))
    runner = toy.load("toy.runner")
    runner.step(1)
    child = os.fork()
    if child == 0:
        fresh = not outcome.calls and outcome.state == "applied"
        runner.step(1)
        os._exit(0 if fresh and outcome.calls["toy.ops:scale"] == 1 else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert outcome.calls == {"toy.ops:scale": 1}


def test_steps_left_to_stock_are_counted_by_reason(toy: Toy, caplog):
    outcome = toy.engine(patch_of(SCALE)).offer(patch_of(SCALE))
    step_aside("demo", "LoRA")
    step_aside("demo", "LoRA")
    step_aside("no such patch", "LoRA")
    assert outcome.aside == {"LoRA": 2}
    said = [record.getMessage() for record in caplog.records]
    assert said == ["vllm-ext: demo leaves steps to stock code: LoRA"]


@pytest.mark.parametrize("count", [False, True])
def test_an_error_inside_names_the_patch_and_the_way_out(toy: Toy, count: bool):
    toy.engine(patch_of(FAILS), count=count).offer(patch_of(FAILS))
    runner = toy.load("toy.runner")
    for _ in range(2):  # with the witness, and after it
        with pytest.raises(RuntimeError, match="a fault of ours") as caught:
            runner.step(1)
        (note,) = caught.value.__notes__
        assert "`demo`" in note
        assert "VEXT_PATCHES=-demo" in note


def test_an_error_inside_a_subclass_names_the_patch(toy: Toy):
    toy.engine(patch_of(OURS)).offer(patch_of(OURS))
    with pytest.raises(RuntimeError) as caught:
        toy.load("toy.runner").sample(None)
    assert "VEXT_PATCHES=-demo" in caught.value.__notes__[0]


# -- stepping aside ------------------------------------------------------------------


def assert_stock(toy: Toy):
    runner, ops = toy.load("toy.runner"), toy.load("toy.ops")
    assert runner.scale is ops.scale
    assert ops.scale.__module__ == "toy.ops"
    assert runner.step(3) == 7


def test_a_changed_target_is_left_alone(toy: Toy, caplog):
    patch = patch_of(SHIFT, SCALE)
    known = toy.known(patch)
    toy.edit("toy/ops.py", "return 2 * x", "return 4 * x // 2")
    engine = toy.engine()
    engine.known = known
    outcome = engine.offer(patch)
    assert_stock(toy)
    assert toy.load("toy.ops").shift.__module__ == "toy.ops"  # all or nothing
    assert outcome.state == "skipped"
    assert "toy.ops:scale changed" in outcome.reason
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert "toy.ops:scale changed" in record.getMessage()
    assert "running stock code" in record.getMessage()


def test_a_changed_neighbour_it_relies_on_stops_it(toy: Toy):
    patch = patch_of(SCALE, relies_on=("toy.runner:step",))
    known = toy.known(patch)
    toy.edit("toy/runner.py", "shift(scale(x))", "scale(x) + 1")
    engine = toy.engine()
    engine.known = known
    outcome = engine.offer(patch)
    assert_stock(toy)
    assert outcome.reason.startswith("toy.runner:step changed")


def test_a_target_that_is_gone_stops_it(toy: Toy):
    patch = patch_of(SCALE, relies_on=("toy.ops:sample_all",))
    known = {**toy.known(patch), "toy.ops:sample_all": {"1.1.0": "0" * 12}}
    engine = toy.engine()
    engine.known = known
    outcome = engine.offer(patch)
    assert_stock(toy)
    assert outcome.reason == "toy.ops:sample_all is gone"


def test_another_plugin_that_was_first_is_respected(toy: Toy):
    ops = toy.load("toy.ops")
    theirs = toy.load("foreign").patch(ops, "scale")
    patch = patch_of(SHIFT, SCALE)
    outcome = toy.engine(patch).offer(patch)
    assert ops.scale is theirs
    assert ops.shift.__module__ == "toy.ops"
    assert outcome.state == "skipped"
    assert "foreign.py" in outcome.reason


def test_a_replacement_by_the_package_itself_is_respected(toy: Toy):
    """As platforms do: the function that stands there is not the one on record."""
    toy.write(
        "toy/platform.py",
        """
        from toy import ops

        def scale(x):
            return x << 1

        ops.scale = scale
        """,
    )
    theirs = toy.load("toy.platform").scale
    outcome = toy.engine(patch_of(SCALE)).offer(patch_of(SCALE))
    assert toy.load("toy.ops").scale is theirs
    assert outcome.state == "skipped"
    assert "platform.py" in outcome.reason


def test_a_neighbour_that_somebody_replaced_stops_it(toy: Toy):
    """What the replacement relies on has to be what was compared, too."""
    patch = patch_of(SCALE, relies_on=("toy.runner:step",))
    runner = toy.load("toy.runner")
    toy.load("foreign").patch(runner, "step")
    outcome = toy.engine(patch).offer(patch)
    assert outcome.state == "skipped"
    assert outcome.reason.startswith("toy.runner:step was already replaced")
    assert toy.load("toy.ops").scale.__module__ == "toy.ops"


def test_a_neighbour_whose_import_still_runs_is_no_obstacle(toy: Toy):
    patch = patch_of(SCALE, relies_on=("toy.runner:step",))
    outcome = toy.engine(patch).offer(patch)
    toy.load("toy.runner")  # imports toy.ops, and defines step after that
    assert outcome.state == "applied"


class Callable:
    def __call__(self, x):
        return 2 * x


def executed():
    space: dict = {}
    exec("def scale(x):\n    return 2 * x", space)
    return space["scale"]


@pytest.mark.parametrize(
    "theirs", [functools.partial(int), Callable(), executed(), len, Callable]
)
def test_what_is_no_function_of_that_file_is_respected(toy: Toy, theirs):
    ops = toy.load("toy.ops")
    ops.scale = theirs
    outcome = toy.engine(patch_of(SCALE)).offer(patch_of(SCALE))
    assert ops.scale is theirs
    assert outcome.state == "skipped"
    assert "already replaced" in outcome.reason


def test_what_was_read_is_dropped_when_all_is_settled(toy: Toy):
    engine = toy.engine(patch_of(SCALE))
    toy.load("toy.ops")
    engine.offer(patch_of(SCALE))
    assert engine.source._trees == {}
    assert engine.source._texts == {}


def test_another_plugins_method_in_a_class_is_respected(toy: Toy):
    ops = toy.load("toy.ops")
    toy.load("foreign").patch(ops.Sampler, "sample")
    outcome = toy.engine(patch_of(OURS)).offer(patch_of(OURS))
    assert ops.Sampler.kind == "stock"
    assert "foreign.py" in outcome.reason


def test_a_second_replacement_of_ours_gives_way_to_the_first(toy: Toy):
    one, two = patch_of(SCALE, name="one"), patch_of(FAILS, name="two")
    engine = toy.engine(one)
    first, second = engine.offer(one), engine.offer(two)
    assert toy.load("toy.runner").step(3) == 7
    assert first.state == "in use"
    assert second.state == "skipped"
    assert "already replaced by one" in second.reason


def test_wrappers_of_ours_stack_and_come_off_in_order(toy: Toy):
    one, two = patch_of(SCALE, name="one"), patch_of(LOGGED, name="two")
    engine = toy.engine(one)
    engine.offer(one)
    engine.offer(two)
    runner = toy.load("toy.runner")
    assert runner.step(3) == 7
    with pytest.raises(PatchError, match="replaced again after one"):
        engine.revert("one")
    engine.revert("two")
    engine.revert("one")
    assert_stock(toy)


@pytest.mark.parametrize(
    ("by", "reason"),
    [
        ("ours.raises:anything", "no such luck"),
        ("ours.replacement:nothing", "nothing"),
        ("ours.missing:anything", "ours.missing"),
    ],
)
def test_a_replacement_that_cannot_be_had_leaves_stock(toy: Toy, by, reason, caplog):
    patch = patch_of(SHIFT, Edit("toy.ops:scale", by=by))
    outcome = toy.engine(patch).offer(patch)
    assert_stock(toy)
    assert toy.load("toy.ops").shift.__module__ == "toy.ops"
    assert toy.load("toy.runner").shift is toy.load("toy.ops").shift
    assert outcome.state == "failed"
    assert reason in outcome.reason
    assert any(record.levelno == logging.ERROR for record in caplog.records)


def test_strict_raises_where_the_module_is_imported(toy: Toy):
    patch = patch_of(Edit("toy.ops:scale", by="ours.raises:anything"))
    toy.engine(patch, strict=True).offer(patch)
    with pytest.raises(PatchError, match="VEXT_STRICT=0"):
        toy.load("toy.ops")


def test_a_version_that_holds_it_already_needs_no_patch(toy: Toy):
    engine = toy.engine(patch_of(SCALE))
    later = engine.offer(patch_of(SCALE, name="later", merged_in="1.10.0"))
    merged = engine.offer(patch_of(SCALE, name="merged", merged_in="1.2"))
    assert_stock_of = toy.load("toy.ops").scale
    assert merged.state == "upstream"
    assert later.state == "applied"
    assert assert_stock_of.__module__ == "ours.replacement"


# -- reverting -----------------------------------------------------------------------


@pytest.mark.parametrize("called", [False, True])
def test_reverting_gives_back_the_very_objects(toy: Toy, called: bool):
    ops, patch = toy.load("toy.ops"), patch_of(SCALE, SHIFT)
    before = dict(vars(ops))
    engine = toy.engine(patch)
    engine.offer(patch)
    runner = toy.load("toy.runner")  # copies ours
    if called:
        runner.step(1)
    engine.revert("demo")
    assert all(vars(ops)[name] is value for name, value in before.items())
    assert runner.scale is before["scale"]
    assert runner.shift is before["shift"]
    assert engine.outcomes["demo"].state == "off"


def test_reverting_refuses_to_lose_somebody_elses_patch(toy: Toy):
    engine = toy.engine(patch_of(SCALE))
    engine.offer(patch_of(SCALE))
    theirs = toy.load("foreign").patch(toy.load("toy.ops"), "scale")
    with pytest.raises(PatchError, match="replaced again"):
        engine.revert("demo")
    assert toy.load("toy.ops").scale is theirs


def test_withheld_before_and_after_the_import(toy: Toy):
    patch = patch_of(SCALE)
    engine = toy.engine(patch)
    engine.offer(patch)
    engine.withhold(patch, "VEXT=0")
    assert_stock(toy)
    engine.offer(patch)
    assert toy.load("toy.ops").scale.__module__ == "ours.replacement"
    outcome = engine.withhold(patch, "VEXT=0")
    assert_stock(toy)
    assert (outcome.state, outcome.reason) == ("off", "VEXT=0")


def test_what_upstream_decorates_is_still_upstreams(toy: Toy):
    toy.write(
        "toy/decorated.py",
        """
        import contextlib

        @contextlib.contextmanager
        def managed():
            yield 1

        def plain():
            return 1
        """,
    )
    patch = patch_of(
        Edit("toy.decorated:managed", by="ours.replacement:logged", how="wrap")
    )
    outcome = toy.engine(patch).offer(patch)
    toy.load("toy.decorated")
    assert outcome.state == "applied"
    assert engine_module._decorator_homes()
