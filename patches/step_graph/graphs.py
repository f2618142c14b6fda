"""The graphs around vLLM's forward graph, and what the host does for a step of them.

An eligible step is one copy to the device, three replays (prep graph, vLLM's forward
graph, sampler graph), and one copy back. Nothing is allocated in it on either side.
If `VARIABLE` says ``mono``, one graph has the work of all three, and a forward pass of
its own between them, which gives its hidden states to the head and to nobody else.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from vllm.compilation.cudagraph_pool import capture_pool
from vllm.config.compilation import CUDAGraphMode
from vllm.distributed.parallel_state import graph_capture
from vllm.forward_context import set_forward_context
from vllm.utils.gc_utils import freeze_gc_for_cudagraph_capture
from vllm.utils.torch_utils import current_stream
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.worker.gpu.async_utils import stream
from vllm.v1.worker.gpu.cudagraph_utils import (
    make_cudagraph_stats,
    prepare_inputs_to_capture,
)

from vllm_ext.kernels import decode_inputs
from vllm_ext.patches.fused_sampler.state import FILTERS, STALE, Seats
from vllm_ext.patches.step_graph import eligibility
from vllm_ext.patches.step_graph.buffers import make_buffers
from vllm_ext.patches.step_graph.eligibility import UNKNOWN, Plan

VARIABLE = "VEXT_STEP_GRAPH"
MONO = "mono"


def asked_for_mono() -> bool:
    """Whether `VARIABLE` says that one graph is to have all of a step."""
    return os.environ.get(VARIABLE, "").strip().lower() == MONO


def record(work: Callable[[], None], pool: Any, vllm_config: Any) -> Any:
    """A CUDA graph of ``work``, which has run before."""
    graph = torch.cuda.CUDAGraph()
    with (
        capture_pool(pool, vllm_config) as pool,
        torch.cuda.graph(graph, pool, stream=current_stream()),
    ):
        work()
    return graph


class Slot:
    """What one step in flight uses of the ring; see `StepGraph.claim`."""

    def __init__(self, graph: "StepGraph", number: int) -> None:
        ring, padded = graph.buffers.ring, graph.sizes
        words = {rows: decode_inputs.words(rows, graph.groups) for rows in padded}
        self.number = number
        self.packed_np = ring.packed_np[number]
        # Views by padded batch: target and source of the copy in front of a step,
        # and of the one behind it.
        self.front = {
            rows: (graph.buffers.staging[:size], ring.packed[number, :size])
            for rows, size in words.items()
        }
        self.back = {
            rows: (ring.host_tokens[number, :rows], ring.tokens[number, :rows])
            for rows in padded
        }
        self.host_tokens_np = ring.host_tokens_np[number]
        self.sampled = torch.cuda.Event()
        # Sleeps instead of polling, as vLLM's.
        self.copied = torch.cuda.Event(blocking=True)
        self.output: StepOutput | None = None


class StepOutput(AsyncModelRunnerOutput):
    """The tokens of a step, once they are here.

    The slot is used again by a later step, which lets this one `settle` before: at
    that time the engine has long asked for it, unless nobody wants it.
    """

    def __init__(self, output: ModelRunnerOutput, slot: Slot, rows: int) -> None:
        self._output = output
        self._slot: Slot | None = slot
        self._rows = rows
        self._tokens: list[list[int]] = []
        # Engine and worker may be in different threads.
        self._lock = threading.Lock()

    def settle(self) -> None:
        """Wait for the tokens and take them out of the slot; again: nothing."""
        with self._lock:
            slot = self._slot
            if slot is not None:
                slot.copied.synchronize()
                # sync: none, it is on the host, and its copy is over
                tokens = slot.host_tokens_np[: self._rows].tolist()
                self._tokens = [[token] for token in tokens]
                self._slot = slot.output = None

    def get_output(self) -> ModelRunnerOutput:
        self.settle()
        self._output.sampled_token_ids = self._tokens
        return self._output

    def get_kv_connector_output(self) -> Any:
        """None: there is no connector. vLLM 0.33 asks."""
        return self._output.kv_connector_output


class StepGraph:
    """The graphs of one engine, from one capture until its KV cache goes.

    Args:
        runner: A ``GPUModelRunner`` whose forward graphs have been captured, and of
            which `eligibility.reasons_of_engine` has nothing to say.
        seats: What its requests ask of the sampler.
        mono: Whether one graph is to have all of a step.
    """

    def __init__(self, runner: Any, seats: Seats, mono: bool = False) -> None:
        self.runner = runner
        self.seats = seats
        self.mono = mono
        self.manager = runner.cudagraph_manager
        self.by_rows = eligibility.forward_graphs(self.manager)
        self.sizes = sorted({each.num_tokens for each in self.by_rows if each})
        self.groups = runner.block_tables.num_kv_cache_groups
        self.buffers = make_buffers(runner, self.sizes[-1])
        self.aside = np.full(runner.max_num_reqs, UNKNOWN, dtype=np.uint8)
        slots = range(len(self.buffers.ring))
        self._slots = [Slot(self, number) for number in slots]
        self._head = _address_of_head(runner.model)
        self._turn = 0
        self.slot = self._slots[0]  # of the step that is being submitted
        self._prep: dict[int, Any] = {}
        # By rows, and whether one of them may have top-k or top-p: the sampler graph,
        # or in mono the graph of the step, which leaves the prep graph to the check.
        self._sampler: dict[tuple[int, bool], Any] = {}
        self._step: dict[tuple[int, bool], Any] = {}
        # Bytes of the graphs of each size, largest first.
        self.took: list[int] = []
        self._seconds = 0.0

    # -- capture -----------------------------------------------------------------------

    def capture(self) -> None:
        """Record the graphs of every size, largest first: they share memory.

        In a memory profile of as many sizes as vLLM captures of its own.
        """
        started = time.monotonic()
        runner, staging = self.runner, self.buffers.staging
        # No row is in use: nothing of a request is read or written.
        staging[: decode_inputs.HEADER].zero_()
        staging[decode_inputs.HEADER :].fill_(-1)
        sizes = self.sizes[::-1][: self.manager._max_full_descs_to_capture]
        every = [list(self._works(padded)) for padded in sizes]
        with graph_capture(device=runner.device), freeze_gc_for_cudagraph_capture():
            self._warm()
            # First all in which ranks wait for each other, so that one that cannot
            # record keeps none waiting.
            for works in every:
                for _, _, make in works:
                    make()()  # compiles what it launches
            torch.accelerator.empty_cache()  # as recording does, and not then
            for works in every:
                free = _free_memory()
                for graphs, key, make in works:
                    # As vLLM does: attention may change its metadata when it first
                    # sees them.
                    work = make()
                    graphs[key] = record(work, self.manager.pool, runner.vllm_config)
                self.took.append(free - _free_memory())
        self._seconds = time.monotonic() - started

    @property
    def cost(self) -> dict[str, float]:
        """Of `capture`: how many ``graphs``, and ``seconds`` and ``MiB`` for them."""
        return {
            "graphs": len(self._prep) + len(self._sampler) + len(self._step),
            "seconds": round(self._seconds, 2),
            "MiB": round(sum(self.took) / 2**20, 1),
        }

    def _works(
        self, padded: int
    ) -> Iterator[tuple[dict[Any, Any], Any, Callable[[], Callable[[], None]]]]:
        """Each graph of a size: where it is kept, and what makes its work."""
        yield self._prep, padded, partial(self._prepare, padded)
        graphs = self._step if self.mono else self._sampler
        make = self._all if self.mono else self._sample
        for filters in (False, True):
            yield graphs, (padded, filters), partial(make, padded, filters)

    def _warm(self) -> None:
        """Compile what steps may launch beside the graphs."""
        if not self.seats.warmed:
            self.seats.warm(
                self.runner.model.compute_logits(self.buffers.hidden_states[:1])
            )
        rows = decode_inputs.seats(self.buffers.staging, self.sizes[-1])
        self.seats.freshen(STALE, rows, np.empty(0, dtype=np.intp))

    def _inputs(self, padded: int) -> Any:
        """Metadata and slots of a size, in the memory that a forward graph reads."""
        runner = self.runner
        return prepare_inputs_to_capture(
            *(padded, padded, runner.model_state, runner.input_buffers),
            *(runner.block_tables, runner.attn_groups, runner.kv_cache_config),
            full_cudagraph=True,
            max_query_len=1,
        )

    def _prepare(self, padded: int) -> Callable[[], None]:
        """What the prep graph of a size does."""
        metadata, _ = self._inputs(padded)
        return lambda: self._make_inputs(padded, metadata)

    def _sample(self, padded: int, filters: bool) -> Callable[[], None]:
        """What a sampler graph does."""
        hidden_states = self.buffers.hidden_states[:padded]
        return lambda: self._draw(padded, filters, hidden_states)

    def _all(self, padded: int, filters: bool) -> Callable[[], None]:
        """What the graph of a whole step does; its forward pass is as vLLM's."""
        runner = self.runner
        inputs = runner.input_buffers
        metadata, slots = self._inputs(padded)
        given = {
            "input_ids": inputs.input_ids[:padded],
            "positions": inputs.positions[:padded],
            "intermediate_tensors": None,
            **runner.model_state.prepare_dummy_inputs(padded, padded),
        }

        def work() -> None:
            self._make_inputs(padded, metadata)
            with set_forward_context(
                metadata,
                runner.vllm_config,
                num_tokens=padded,
                cudagraph_runtime_mode=CUDAGraphMode.NONE,
                slot_mapping=slots,
                is_padding=inputs.is_padding[:padded],
            ):
                hidden_states = runner.model(**given)
            self._draw(padded, filters, hidden_states)

        return work

    def _make_inputs(self, padded: int, metadata: Any) -> None:
        buffers = self.buffers
        decode_inputs.prep(
            buffers.staging,
            padded,
            buffers.num_computed_tokens,
            buffers.last_sampled_tokens,
            buffers.groups,
            buffers.input_ids,
            buffers.positions,
            buffers.seq_lens,
            buffers.query_start_loc,
            buffers.is_padding,
        )
        # What attention makes of these, into memory that its forward graph reads.
        for groups in self.runner.attn_groups:
            for group in groups:
                group.update_draft_decode_metadata(metadata)

    def draw(
        self, padded: int, filters: bool, logits: torch.Tensor, tokens: torch.Tensor
    ) -> None:
        """Draw a token for each row of the step that runs, and take nothing down."""
        buffers = self.buffers
        # Row i of a step that only decodes has its logits in row i.
        self.seats.draw(
            logits,
            decode_inputs.num_rows(buffers.staging),
            decode_inputs.seats(buffers.staging, padded),
            buffers.positions,
            buffers.rows[:padded],
            tokens,
            filters=filters,
        )

    def _draw(self, padded: int, filters: bool, hidden_states: torch.Tensor) -> None:
        buffers = self.buffers
        logits = self.runner.model.compute_logits(hidden_states)
        self.draw(padded, filters, logits, buffers.tokens[:padded])
        decode_inputs.post(
            buffers.staging,
            padded,
            buffers.tokens[:padded],
            buffers.ring.tokens,
            buffers.last_sampled_tokens,
            buffers.all_token_ids,
            buffers.total_len,
            buffers.num_computed_tokens,
            buffers.output_bin_counts,
        )

    # -- requests ----------------------------------------------------------------------

    def add_requests(self, scheduled: SchedulerOutput) -> None:
        """Learn of the requests that vLLM has just been given."""
        seats = self.runner.req_states.req_id_to_index
        for new in scheduled.scheduled_new_reqs:
            self.aside[seats[new.req_id]] = eligibility.reason_of_request(new)

    # -- a step ------------------------------------------------------------------------

    @property
    def is_valid(self) -> bool:
        """Whether vLLM still has what these graphs were captured around.

        Its own forward graphs, and the head of the model where it was: stock computes
        logits outside of graphs, so nothing else keeps a reload from moving it.
        """
        manager = self.runner.cudagraph_manager
        return (
            manager is self.manager
            and bool(manager._graphs_captured)
            and _address_of_head(self.runner.model) == self._head
        )

    def plan(self, scheduled: SchedulerOutput) -> Plan | str:
        """See `eligibility.plan`."""
        return eligibility.plan(
            self.runner, scheduled, self.by_rows, self.seats, self.aside
        )

    def claim(self) -> Slot:
        """The slot of the next step, of which nobody wants anything any more.

        Its last step is over once its tokens have been copied back: what it read of
        the ring was read, what it wrote was written.
        """
        slot = self._slots[self._turn]
        self._turn = (self._turn + 1) % len(self._slots)
        output = slot.output  # which another thread may be settling
        if output is not None:
            output.settle()
        return slot

    def copy(self, plan: Plan) -> None:
        """Submit the copy to the device."""
        slot, padded = self.claim(), plan.padded
        self.slot = slot
        decode_inputs.pack(
            *(slot.packed_np, padded, self.groups, plan.seats),
            *(slot.number, plan.blocks),
        )
        target, source = slot.front[padded]
        target.copy_(source, non_blocking=True)
        # Launches only where stock has drawn tokens of requests with penalties.
        rows = decode_inputs.seats(self.buffers.staging, padded)
        self.seats.freshen(plan.asks, rows, plan.seats)

    def prepare(self, plan: Plan) -> None:
        """Submit the copy to the device and the prep graph."""
        self.copy(plan)
        self._prep[plan.padded].replay()

    def forward(self, plan: Plan) -> None:
        """Submit a step up to its hidden states, and do the host's part of it.

        In mono that is all of it but the copy of the tokens.
        """
        runner = self.runner
        states, tables = runner.req_states, runner.block_tables
        if self.mono:
            self.copy(plan)
            self.replay_step(plan)
        else:
            self.prepare(plan)
            self.manager.run_fullgraph(plan.described)
        # As update_requests does.
        states.num_computed_tokens_np[plan.seats] = plan.computed
        np.minimum(
            states.num_computed_tokens_np,
            states.prefill_len.np,
            out=states.num_computed_prefill_tokens,
        )
        for row, group, column, _ in plan.blocks:
            tables.num_blocks.np[group, plan.seats[row]] = column + 1
        if (dirty := getattr(tables, "_num_dirty_rows", None)) is not None:  # 0.33
            tables._num_dirty_rows = max(dirty, len(plan.requests))

    def sample(self, plan: Plan) -> StepOutput:
        """Submit the rest: the sampler graph, and the copy of the tokens."""
        if not self.mono:
            self.replay_sampler(plan)
        runner, slot = self.runner, self.slot
        target, source = slot.back[plan.padded]
        main, copying = runner.main_stream, runner.output_copy_stream
        slot.sampled.record(main)
        with stream(copying, main):
            copying.wait_event(slot.sampled)
            target.copy_(source, non_blocking=True)
            slot.copied.record(copying)
        rows, stats = len(plan.requests), None
        if runner.observability_config.cudagraph_metrics:
            stats = make_cudagraph_stats(plan.described, rows)
        output = ModelRunnerOutput(
            req_ids=plan.requests,
            req_id_to_index={name: row for row, name in enumerate(plan.requests)},
            cudagraph_stats=stats,
        )
        slot.output = StepOutput(output, slot, rows)
        return slot.output

    def replay_sampler(self, plan: Plan) -> None:
        self._sampler[plan.padded, bool(plan.asks & FILTERS)].replay()

    def replay_step(self, plan: Plan) -> None:
        self._step[plan.padded, bool(plan.asks & FILTERS)].replay()


def _free_memory() -> int:
    torch.accelerator.synchronize()
    return int(torch.accelerator.get_memory_info()[0])


def _address_of_head(model: Any) -> int | None:
    """Where the weights of ``lm_head`` are, if the model has it at its top."""
    weight = getattr(getattr(model, "lm_head", None), "weight", None)
    return None if weight is None else int(weight.data_ptr())
