"""Two ranks, a process each, decide how to go on with step graphs.

The group of ranks is vLLM's own, over gloo. Instead of a model there are collectives,
as a step of tensor parallelism has them: if one rank replays a graph and the other one
does not, they do not fit.
"""

import random
import tempfile
from multiprocessing import get_context
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from vllm.distributed import parallel_state
from vllm.v1.worker.gpu.model_runner import GPUModelRunner

from vllm_ext.patches.step_graph import check, eligibility, replacement
from vllm_ext.patches.step_graph.replacement import StepGraphModelRunner
from vllm_ext_cpulane.engine import report

RANKS = 2
STEPS = 60
GRAPH, STOCK = 1, 100


def meet(rank: int, place: str) -> None:
    torch.distributed.init_process_group(
        "gloo", f"file://{place}", world_size=RANKS, rank=rank
    )
    parallel_state._TP = parallel_state.GroupCoordinator(
        [[*range(RANKS)]], rank, "gloo", use_device_communicator=False
    )


def collective(what: int) -> int:
    """The sum over the ranks of what each of them is doing."""
    number = torch.tensor([what])
    group = parallel_state.get_tp_group().cpu_group
    torch.distributed.all_reduce(number, group=group)
    return int(number)


def runner_of(seats: Any) -> Any:
    """A runner with three requests that decode, and no model."""
    runner = object.__new__(StepGraphModelRunner)
    runner.req_states = SimpleNamespace(
        req_id_to_index={"a": 5, "b": 0, "c": 3},
        prefill_len=SimpleNamespace(np=np.full(8, 4)),
    )
    runner.block_tables = SimpleNamespace(
        redirect_writes_to_null_block=False,
        num_blocks=SimpleNamespace(np=np.zeros((2, 8), dtype=np.int32)),
        block_tables=[SimpleNamespace(gpu=np.zeros((8, 3)))] * 2,
    )
    runner.input_buffers = SimpleNamespace()
    runner.execute_model_state = SimpleNamespace(input_batch=None)
    runner.finish_requests = lambda scheduled: None
    runner._seats = lambda: seats
    runner._calendar = check.Calendar("3")
    return runner


def a_step(choose: random.Random) -> Any:
    """A step as the scheduler hands it to every rank; one in three is not eligible."""
    names = choose.sample("abc", choose.randint(1, 3))
    given = [([], [choose.randrange(9)]) if choose.random() < 0.3 else None]
    odd = choose.choice(["", "", "", "", "new", "grammar", "blocks"])
    return SimpleNamespace(
        scheduled_new_reqs=["d"] if odd == "new" else [],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=names,
            num_computed_tokens=[choose.randint(4, 40) for _ in names],
            new_block_ids=given + [None] * (len(names) - 1),
        ),
        num_scheduled_tokens=dict.fromkeys(names, 1),
        total_num_scheduled_tokens=len(names),
        scheduled_spec_decode_tokens={},
        has_structured_output_requests=odd == "grammar",
        new_block_ids_to_zero=[4] if odd == "blocks" else None,
        kv_cache_block_copies=None,
        scheduled_encoder_inputs={},
    )


def serve(rank: int, wrong: dict[int, int]) -> dict[str, Any]:
    """What each step was, if these ranks find problems from these steps on."""
    seats = SimpleNamespace(asks_of=lambda seats: 0, reason=lambda asks: None)
    runner = runner_of(seats)
    described = SimpleNamespace(num_tokens=4)
    aside = np.zeros(8, dtype=np.uint8)
    kinds: list[str] = []
    sums: list[int] = []
    said: list[str] = []

    def plan(scheduled: Any) -> Any:
        by_rows = [None, *[described] * 4]
        return eligibility.plan(runner, scheduled, by_rows, seats, aside)

    runner.step_graph = SimpleNamespace(
        is_valid=True,
        seats=seats,
        plan=plan,
        forward=lambda plan: sums.append(collective(GRAPH)),
        sample=lambda plan: kinds.append("graph"),
    )

    class Check:
        def __init__(self, graph: Any, plan: Any) -> None:
            kinds.append("checked")

        def draw(self, batch: Any) -> None:
            sums.append(collective(GRAPH))

        def problems(self) -> list[str]:
            return ["tokens"] if len(kinds) > wrong.get(rank, STEPS) else []

    def execute_model(self: Any, *_: Any) -> None:
        sums.append(collective(STOCK))
        if self._check is None:
            kinds.append("stock")

    choose = random.Random(7)
    with (
        mock.patch.object(replacement, "Check", Check),
        mock.patch.object(replacement, "step_aside"),
        mock.patch.object(replacement.log, "error", lambda *a: said.append(a[-1])),
        mock.patch.object(GPUModelRunner, "execute_model", execute_model),
        mock.patch.object(GPUModelRunner, "sample_tokens"),
    ):
        for _ in range(STEPS):
            runner.execute_model(a_step(choose))
            runner.sample_tokens(None)
    return {"kinds": kinds, "sums": sums, "said": said}


def capture(fails: bool) -> dict[str, Any]:
    """What is left of a capture."""
    runner = runner_of(SimpleNamespace(refused=None))
    runner.cudagraph_manager = SimpleNamespace(graphs=["one"])
    said: list[str] = []
    graph = mock.Mock()
    if fails:
        graph.return_value.capture.side_effect = RuntimeError("out of memory")
    with (
        mock.patch.object(replacement, "StepGraph", graph),
        mock.patch.object(replacement, "step_aside"),
        mock.patch.object(replacement.log, "error", lambda *a: said.append(a[-1])),
        mock.patch.object(eligibility, "reasons_of_engine", return_value=iter(())),
    ):
        runner.capture_step_graph()
    return {"on": runner.step_graph is not None, "said": said}


def whole_step(wrong: bool) -> dict[str, Any]:
    """Whether the check replays the graph of a whole step, which has collectives."""
    replayed: list[int] = []
    checked = object.__new__(check.Check)
    checked._plan = SimpleNamespace(padded=4)
    checked._graph = SimpleNamespace(
        buffers=SimpleNamespace(hidden_states=torch.zeros(4, 2)),
        replay_step=lambda plan: replayed.append(collective(GRAPH)),
    )
    with mock.patch.multiple(
        check.Check,
        _wrong_inputs=mock.Mock(return_value=iter(["slots"] * wrong)),
        _inputs_now=mock.Mock(return_value={}),
        _read_inputs=mock.Mock(return_value={}),
        _written=mock.Mock(return_value=[]),
    ):
        checked._replay_step()
    collective(STOCK)  # its own sampler
    return {"replayed": replayed}


def main(rank: int, place: str) -> dict[str, Any]:
    meet(rank, place)
    by_mask = range(2**RANKS)
    return {
        "world": parallel_state.get_tp_group().world_size,
        "agree": [check.agree(bool(mask >> rank & 1)) for mask in by_mask],
        "capture": [capture(bool(mask >> rank & 1)) for mask in by_mask],
        "whole": [whole_step(bool(mask >> rank & 1)) for mask in by_mask],
        "sound": serve(rank, {}),
        "wrong": [serve(rank, wrong) for wrong in ({0: 20}, {1: 20}, {0: 30, 1: 20})],
    }


if __name__ == "__main__":
    place = f"{tempfile.mkdtemp()}/place"
    with get_context("fork").Pool(RANKS) as pool:  # vLLM takes long to import
        report(pool.starmap(main, [(rank, place) for rank in range(RANKS)]))
