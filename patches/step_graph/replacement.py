"""A model runner that decodes eligible steps by the replay of graphs."""

from collections.abc import Callable
from typing import Any

import torch
from vllm.distributed.parallel_state import get_tp_group
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.worker.gpu.model_runner import GPUModelRunner

from vllm_ext.patches.fused_sampler.state import STALE, Seats, seats_of
from vllm_ext.patches.step_graph import eligibility
from vllm_ext.patches.step_graph.check import Calendar, Check, agree
from vllm_ext.patches.step_graph.eligibility import Plan
from vllm_ext.patches.step_graph.graphs import StepGraph, asked_for_mono
from vllm_ext.patching.engine import log, step_aside

NAME = "step_graph"
# The least that vLLM takes for a graph that shares its memory with a larger one.
BYTES_OF_A_GRAPH = 1 << 20
GRAPHS_OF_A_SIZE = 3


class StepGraphModelRunner(GPUModelRunner):
    """vLLM's, which runs every step that is not eligible, and all but the steps.

    ``step_graph`` lives from the end of ``capture_model`` until the KV cache goes.
    What requests ask of the sampler is kept by the patch fused_sampler where it is
    applied, and otherwise here.
    """

    # Other patches ask whose runner it is.
    __module__ = GPUModelRunner.__module__

    step_graph: StepGraph | None = None
    _own_seats: Seats | None = None
    _calendar: Calendar
    _pending: Plan | None = None
    _check: Check | None = None

    # -- life cycle --------------------------------------------------------------------

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        # With sleep mode, models are loaded into memory that sleeping empties.
        if (
            self.sampler is not None
            and seats_of(self.sampler) is None
            and not self.vllm_config.model_config.enable_cumem_allocator
        ):
            self._own_seats = Seats(self.sampler)

    def initialize_kv_cache(self, *args: Any, **kwargs: Any) -> None:
        self.step_graph = None  # block tables and graphs are about to be others
        super().initialize_kv_cache(*args, **kwargs)

    @torch.inference_mode()
    def capture_model(self, *, profile_only: bool = False) -> int:
        self.step_graph = None
        size = super().capture_model(profile_only=profile_only)
        free = torch.accelerator.get_memory_info()[0]
        self.capture_step_graph()
        size += free - torch.accelerator.get_memory_info()[0]
        if profile_only:
            size += self._missing_of_profile()
            self.step_graph = None
        elif self.step_graph is not None:
            log.info("vllm-ext: %s captured: %s", NAME, self.step_graph.cost)
        return size

    def _missing_of_profile(self) -> int:
        """Bytes of the sizes that a profile leaves out, as many as its last one took.

        vLLM's profile does the same: the first one pays for what all of them share.
        """
        graph = self.step_graph
        if graph is None:
            return 0
        left_out = len(graph.sizes) - len(graph.took)
        return left_out * max(graph.took[-1], GRAPHS_OF_A_SIZE * BYTES_OF_A_GRAPH)

    def capture_step_graph(self) -> None:
        """Capture ``step_graph`` around vLLM's graphs, if this engine can use one."""
        if not self.cudagraph_manager.graphs:
            return
        reason = next(eligibility.reasons_of_engine(self), None)
        seats = self._seats()
        if reason is None:
            reason = "sleep mode without fused_sampler"
            if seats is not None:
                reason = seats.refused
        if reason is not None:
            log.info("vllm-ext: %s leaves this engine to stock code: %s", NAME, reason)
            step_aside(NAME, reason)
            return
        why = ""
        try:
            graph = StepGraph(self, seats, asked_for_mono())
            graph.capture()
        except Exception as error:  # stock code is complete without
            why = f"its graphs could not be captured: {error}"
        if agree(not why):
            self.step_graph = graph
            self._calendar = Calendar()
        else:
            self.turn_off(why or "another rank could not capture its graphs")

    def _seats(self) -> Any:
        """Who keeps what requests ask of the sampler."""
        return seats_of(self.sampler) or self._own_seats

    def shutdown(self) -> None:
        self.step_graph = None
        super().shutdown()

    # -- steps -------------------------------------------------------------------------

    def add_requests(self, scheduler_output: SchedulerOutput) -> None:
        super().add_requests(scheduler_output)
        if not scheduler_output.scheduled_new_reqs:
            return
        own, seats = self._own_seats, self.req_states.req_id_to_index
        if own is not None and own.refused is None:
            for new in scheduler_output.scheduled_new_reqs:
                own.join(seats[new.req_id], new.sampling_params)
            own.write()
        if self.step_graph is not None:
            self.step_graph.add_requests(scheduler_output)

    def execute_model(
        self,
        scheduler_output: SchedulerOutput,
        intermediate_tensors: Any = None,
        dummy_run: bool = False,
        **kwargs: Any,
    ) -> Any:
        self._pending = self._check = None
        graph = self.step_graph
        tokens = scheduler_output.total_num_scheduled_tokens
        if graph is not None and not dummy_run and tokens:
            plan = self._plan(graph, scheduler_output)
            if plan is not None and not self._calendar.due(plan):
                self.finish_requests(scheduler_output)
                # What repeated_batch keeps is of the buffers that are written now.
                self.input_buffers._vext_kept = None
                graph.forward(plan)
                self._pending = plan
                return None  # the engine asks for the tokens next
            if plan is not None:
                self._check = self._tried(Check, graph, plan)
        output = super().execute_model(
            scheduler_output, intermediate_tensors, dummy_run, **kwargs
        )
        if (own := self._own_seats) is not None and graph is not None:
            # Stock counts the tokens that it draws; bits are made of the counts.
            own.asks[self.sampler.penalties_state.use_penalty] |= STALE
        return output

    def _plan(self, graph: StepGraph, scheduled: SchedulerOutput) -> Plan | None:
        """What the step is, if it is eligible; otherwise it is counted."""
        if not graph.is_valid or graph.seats is not self._seats():
            self.step_graph = None
            plan: Plan | str = "what the graphs were captured around is gone"
        else:
            plan = graph.plan(scheduled)
        if isinstance(plan, str):
            step_aside(NAME, plan)
            return None
        return plan

    def sample_tokens(self, grammar_output: GrammarOutput | None) -> Any:
        plan, self._pending = self._pending, None
        if plan is not None:
            assert self.step_graph is not None
            return self.step_graph.sample(plan)
        check, self._check = self._check, None
        if check is None or self.execute_model_state is None:
            return super().sample_tokens(grammar_output)
        self._tried(check.draw, self.execute_model_state.input_batch)
        output = super().sample_tokens(grammar_output)
        problems = self._tried(check.problems) if self.step_graph else None
        if problems is not None and not agree(not problems):
            self.turn_off(
                "it differs from stock code: "
                + ("; ".join(problems) or "another rank has found that")
            )
        return output

    def _tried(self, work: Callable[..., Any], *of: Any) -> Any:
        """What a part of a check returns; None if it failed, as for want of memory.

        The step is stock's all the same. Of several ranks the others wait for this one,
        which raises as stock does where it fails.
        """
        try:
            return work(*of)
        except Exception as error:
            if get_tp_group().world_size > 1:
                raise
            self.turn_off(f"it could not be checked: {error}")
            return None

    def turn_off(self, why: str) -> None:
        """Leave all further steps to stock code, and say so once."""
        self.step_graph = None
        step_aside(NAME, "turned off")
        log.error("vllm-ext: %s is off, stock code runs: %s", NAME, why)
