"""Attempts to break the patch step_graph: what it must refuse, survive and leave."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from vllm_ext_cpulane.engine import run_script

SCRIPT = Path(__file__).parent / "in_engine" / "step_graph_adversarial.py"
SEATS = {"a": 5, "b": 0, "c": 3}


@pytest.fixture(scope="module")
def modules():
    from vllm_ext.patches.step_graph import eligibility, graphs

    return SimpleNamespace(eligibility=eligibility, graphs=graphs)


# -- which steps are eligible ----------------------------------------------------------


def a_runner():
    return SimpleNamespace(
        req_states=SimpleNamespace(
            req_id_to_index=dict(SEATS),
            prefill_len=SimpleNamespace(np=np.array([9, 0, 0, 20, 0, 4, 0, 0])),
        ),
        block_tables=SimpleNamespace(
            redirect_writes_to_null_block=False,
            num_blocks=SimpleNamespace(np=np.array([[1, 0, 0, 2, 0, 1, 0, 0]] * 2)),
            block_tables=[SimpleNamespace(gpu=np.zeros((8, 3)))] * 2,
        ),
    )


def a_step():
    """Three requests, of which one gets a block in the second group."""
    return SimpleNamespace(
        scheduled_new_reqs=[],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=["a", "b", "c"],
            num_computed_tokens=[16, 9, 31],
            new_block_ids=[([], [77]), None, ([], [])],
        ),
        num_scheduled_tokens={"a": 1, "b": 1, "c": 1},
        total_num_scheduled_tokens=3,
        scheduled_spec_decode_tokens={},
        has_structured_output_requests=False,
        new_block_ids_to_zero=None,
        kv_cache_block_copies=None,
        scheduled_encoder_inputs={},
    )


def planned(modules, runner=None, step=None, asks=0, aside=(), graphs=8):
    described = SimpleNamespace(num_tokens=4)
    by_rows = [None, *[described] * graphs]
    seats = SimpleNamespace(
        asks_of=lambda seats: asks, reason=lambda asks: "bad words" if asks else None
    )
    given = np.zeros(8, dtype=np.uint8)
    given[list(aside)] = 2
    return modules.eligibility.plan(
        *(runner or a_runner(), step or a_step(), by_rows, seats, given)
    )


def test_an_eligible_step_is_planned_and_nothing_is_changed(modules):
    runner, step = a_runner(), a_step()
    before = copy.deepcopy((runner, step))
    plan = planned(modules, runner, step)
    assert plan.seats.tolist() == [5, 0, 3]
    assert list(plan.computed) == [16, 9, 31]
    assert list(plan.blocks) == [(0, 1, 1, 77)]
    assert plan.padded == 4
    assert str((runner, step)) == str(before)


def changed(cached=(), **changes):
    """A step with these fields, and with these of its requests."""

    def change(step):
        vars(step).update(changes)
        vars(step.scheduled_cached_reqs).update(cached)

    return change


REFUSED = {
    "a new request": changed(scheduled_new_reqs=["d"]),
    "two tokens for one": changed(total_num_scheduled_tokens=4),
    "rows in another order": changed(num_scheduled_tokens={"b": 1, "a": 1, "c": 1}),
    "a request that is not cached": changed(
        cached={"req_ids": ["a", "b"]}, total_num_scheduled_tokens=3
    ),
    "drafts": changed(scheduled_spec_decode_tokens={"a": [1]}),
    "a grammar": changed(has_structured_output_requests=True),
    "blocks to zero": changed(new_block_ids_to_zero=[4]),
    "blocks to copy": changed(kv_cache_block_copies=[(1, 2)]),
    "an image": changed(scheduled_encoder_inputs={"a": [0]}),
    "an image again": changed(encoder_input_updates={"a": [0]}),
    "two new blocks": changed(
        cached={"new_block_ids": [([], [77, 78]), None, None]},
    ),
    "a prompt of which the last token is missing": changed(
        cached={"num_computed_tokens": [16, 9, 19]}
    ),
}


@pytest.mark.parametrize("step", REFUSED.values(), ids=REFUSED)
def test_what_is_no_plain_decode_is_refused(modules, step):
    runner, scheduled = a_runner(), a_step()
    step(scheduled)
    before = copy.deepcopy((runner, scheduled))
    assert isinstance(planned(modules, runner, scheduled), str)
    assert str((runner, scheduled)) == str(before)


def test_requests_and_engines_that_ask_for_more_are_refused(modules):
    assert planned(modules, asks=1) == "bad words"
    assert isinstance(planned(modules, aside=[3]), str)
    assert not isinstance(planned(modules, aside=[4]), str)  # nobody's of this step
    assert isinstance(planned(modules, graphs=2), str)
    runner = a_runner()
    runner.block_tables.redirect_writes_to_null_block = True
    assert isinstance(planned(modules, runner), str)
    runner = a_runner()
    runner.block_tables.num_blocks.np[:, 5] = 3
    assert isinstance(planned(modules, runner), str)


# -- what a step leaves behind ---------------------------------------------------------


def a_graph(modules, tables):
    """A `StepGraph` that submits nothing."""
    graph = object.__new__(modules.graphs.StepGraph)
    graph.mono = False
    states = SimpleNamespace(
        num_computed_tokens_np=np.zeros(8, dtype=np.int32),
        num_computed_prefill_tokens=np.zeros(8, dtype=np.int32),
        prefill_len=SimpleNamespace(np=np.full(8, 4, dtype=np.int32)),
    )
    graph.runner = SimpleNamespace(req_states=states, block_tables=tables)
    graph.manager = SimpleNamespace(run_fullgraph=lambda described: None)
    graph.prepare = lambda plan: None
    return graph, states


def a_plan(modules):
    return modules.eligibility.Plan(
        requests=["a", "b", "c"],
        seats=np.array([5, 0, 3]),
        computed=np.array([16, 9, 3], dtype=np.int32),
        asks=0,
        blocks=[(0, 1, 1, 77)],
        described=SimpleNamespace(num_tokens=4),
    )


def test_the_host_knows_what_vllm_would_know(modules):
    blocks = np.zeros((2, 8), dtype=np.int32)
    tables = SimpleNamespace(num_blocks=SimpleNamespace(np=blocks))
    graph, states = a_graph(modules, tables)
    graph.forward(a_plan(modules))
    assert states.num_computed_tokens_np.tolist() == [9, 0, 0, 3, 0, 16, 0, 0]
    assert states.num_computed_prefill_tokens.tolist() == [4, 0, 0, 3, 0, 4, 0, 0]
    assert blocks.nonzero()[0].tolist() == [1]
    assert blocks[1, 5] == 2
    assert not hasattr(tables, "_num_dirty_rows")  # vLLM 0.32


@pytest.mark.parametrize(("before", "after"), [(0, 3), (2, 3), (7, 7)])
def test_the_next_step_of_stock_clears_its_rows(modules, before, after):
    """In 0.33, whose gather clears as many rows as somebody has written."""
    tables = SimpleNamespace(
        num_blocks=SimpleNamespace(np=np.zeros((2, 8), dtype=np.int32)),
        _num_dirty_rows=before,
    )
    graph, _ = a_graph(modules, tables)
    graph.forward(a_plan(modules))
    assert tables._num_dirty_rows == after


def test_a_slot_is_taken_while_its_tokens_are_read_by_another_thread(modules):
    settled = []

    class Settled:
        """What another thread settles as soon as this one has looked at it."""

        number = 0
        looks = 0

        @property
        def output(self):
            self.looks += 1
            output = SimpleNamespace(settle=lambda: settled.append(self))
            return output if self.looks == 1 else None

    graph = object.__new__(modules.graphs.StepGraph)
    graph.mono = False
    graph._slots, graph._turn = [Settled()], 0
    assert graph.claim() is graph._slots[0]
    assert settled == graph._slots


# -- engines that have no graph for it -------------------------------------------------


@pytest.mark.parametrize(
    "described",
    [
        {"uniform_token_count": None},  # any mix of requests: cudagraph_mode=FULL
        {"num_reqs": 256, "num_tokens": 256},  # no smaller one is captured
        {"num_reqs": 4},
        {"cg_mode": "PIECEWISE"},
    ],
    ids=lambda described: ", ".join(described),
)
def test_graphs_of_another_kind_are_not_taken(modules, described):
    full = modules.eligibility.CUDAGraphMode.FULL
    given = {"cg_mode": full, "uniform_token_count": 1, "num_reqs": 8, "num_tokens": 8}

    def found(**changes):
        graph = SimpleNamespace(**{**given, **changes})
        manager = SimpleNamespace(graphs=[graph], dispatch=lambda *_, **__: graph)
        return any(modules.eligibility.forward_graphs(manager))

    assert found()
    assert not found(**described)


@pytest.mark.parametrize("gone", ["manager", "graphs", "seats", "head"])
def test_what_was_captured_around_something_that_is_gone_is_dropped(modules, gone):
    from vllm_ext.patches.step_graph import replacement

    runner = object.__new__(replacement.StepGraphModelRunner)
    manager = SimpleNamespace(_graphs_captured=True)
    graph = object.__new__(modules.graphs.StepGraph)
    graph.mono = False
    graph.runner, graph.manager, graph.seats = runner, manager, "seats"
    graph.plan = lambda scheduled: "a plan"
    runner.cudagraph_manager, runner.step_graph = manager, graph
    runner._seats = lambda: graph.seats
    weight = SimpleNamespace(data_ptr=lambda: graph._head)
    runner.model = SimpleNamespace(lm_head=SimpleNamespace(weight=weight))
    graph._head = 64
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(replacement, "step_aside", lambda *_: None)
        runner._plan(graph, None)
        assert runner.step_graph is graph
        if gone == "manager":
            runner.cudagraph_manager = SimpleNamespace(_graphs_captured=True)
        elif gone == "graphs":
            manager._graphs_captured = False
        elif gone == "head":
            weight.data_ptr = lambda: 128
        else:
            runner._seats = lambda: "others"
        assert runner._plan(graph, None) is None
    assert runner.step_graph is None


# -- in the engine ---------------------------------------------------------------------


@pytest.mark.parametrize("sleeps", [False, True])
def test_seats_are_not_made_where_sleeping_empties_memory(monkeypatch, sleeps):
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    from vllm_ext.patches.step_graph import replacement

    made = SimpleNamespace(refused="made")
    monkeypatch.setattr(replacement, "Seats", lambda sampler: made)
    monkeypatch.setattr(GPUModelRunner, "load_model", lambda self: None)
    monkeypatch.setattr(
        replacement.eligibility, "reasons_of_engine", lambda _: iter(())
    )
    aside = []
    monkeypatch.setattr(replacement, "step_aside", lambda _, why: aside.append(why))
    runner = object.__new__(replacement.StepGraphModelRunner)
    runner.sampler = SimpleNamespace()
    runner.cudagraph_manager = SimpleNamespace(graphs={8: None})
    config = SimpleNamespace(enable_cumem_allocator=sleeps)
    runner.vllm_config = SimpleNamespace(model_config=config)

    runner.load_model()
    runner.capture_step_graph()

    assert runner._own_seats is (None if sleeps else made)
    assert aside == ["sleep mode without fused_sampler" if sleeps else "made"]
    assert runner.step_graph is None


@pytest.fixture(scope="module")
def in_engine(lane):
    def run(case, patches):
        settings = {"VEXT": "1", "VEXT_STRICT": "1", "VEXT_PATCHES": patches}
        return run_script(SCRIPT, lane | settings, case)

    return {
        "groups": run("groups", "step_graph"),
        "everything": run("everything", "+step_graph,+fused_sampler"),
    }


BEFORE = "request from before the capture"


def aside_of(found):
    return found["patches"]["step_graph"][2]


@pytest.mark.vllm
@pytest.mark.parametrize("case", ["groups", "everything"])
class TestInTheEngine:
    def test_answers_are_stocks(self, in_engine, case):
        """With logprobs and grammars, and through a second capture."""
        assert in_engine[case]["different"] == {}
        assert in_engine[case]["eligible"] > 5

    def test_it_is_not_turned_off_and_the_others_are_counted(self, in_engine, case):
        state, _, aside = in_engine[case]["patches"]["step_graph"]
        assert state == "in use"
        assert "turned off" not in aside
        assert aside["a request is new or resumed"] > 3
        assert ("structured output" in aside) == (case == "everything")
        assert in_engine[case]["allocations"] == 0

    def test_it_is_about_what_it_says(self, in_engine, case):
        assert in_engine["groups"]["groups"] == 2
        used = in_engine["everything"]["patches"]
        assert used["fused_sampler"][0] == used["scheduler_fast_path"][0] == "in use"
        [later] = {case for case in in_engine if BEFORE in aside_of(in_engine[case])}
        assert later == "groups"
