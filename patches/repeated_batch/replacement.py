# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""`GPUModelRunner.prepare_inputs` for a decode step that repeats the one before.

What is kept on the device, and why it still holds what it should:

* ``query_start_loc`` and ``is_padding`` in the input buffers are written by
  `prepare_inputs` and for dummy batches only, once drafts and context parallelism are
  ruled out. Both forget the kept batch before they write.
* ``idx_mapping``, ``cu_num_logits`` and ``expanded_local_pos`` are tensors of their
  own that every consumer reads and none writes. A changed batch gets new ones; the
  old ones are not written over, so a step still in flight keeps what it was given.

A request that finishes leaves the batch, and one that is given a slot, be it new or
resumed, comes as a prefill: in each case stock builds the batch.

Carries two calls and the computation of the bounds from vLLM's method.
"""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.gpu import model_runner as upstream
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
from vllm.v1.worker.gpu.model_runner import BatchReqState, GPUModelRunner

from vllm_ext.patching.engine import step_aside

NAME = "repeated_batch"

# One per application of the patch: what was kept under one is not valid under the
# next, since stock may have run in between.
_mark = object()


class Kept(NamedTuple):
    """The last step's batch, as `prepare_inputs` made it."""

    mark: object
    batch: InputBatch
    batch_desc: BatchExecutionDescriptor


def repeat_inputs(original: Callable[..., InputBatch]) -> Callable[..., InputBatch]:
    """`GPUModelRunner.prepare_inputs`, which starts from the last batch if it can."""
    global _mark
    mark = _mark = object()

    def prepare_inputs(
        self: GPUModelRunner,
        scheduler_output: SchedulerOutput,
        batch_req_state: BatchReqState,
        batch_desc: BatchExecutionDescriptor,
        num_active_loras: int,
    ) -> InputBatch:
        buffers = self.input_buffers
        kept: Kept | None = getattr(buffers, "_vext_kept", None)
        decodes = _decodes_only(scheduler_output, batch_req_state)
        if (
            decodes
            and kept is not None
            and kept.mark is mark
            and kept.batch_desc == batch_desc
            # Slots rather than ids: what is kept depends on nothing else.
            and kept.batch.idx_mapping_np.tobytes()
            == batch_req_state.idx_mapping_np.tobytes()
        ):
            return _repeat_batch(self, kept.batch, scheduler_output, batch_req_state)

        buffers._vext_kept = None  # stock is about to write the buffers
        batch = original(
            self, scheduler_output, batch_req_state, batch_desc, num_active_loras
        )
        if decodes:
            reason = _reason_to_rebuild(self, batch)
            if reason is None:
                # A copy: the runner fills in fields of the batch it was given.
                buffers._vext_kept = Kept(mark, copy.copy(batch), batch_desc)
            else:
                step_aside(NAME, reason)
        return batch

    return prepare_inputs


def forget_before_dummy(original: Callable[..., InputBatch]) -> Callable[..., Any]:
    """`InputBatch.make_dummy`, which writes the input buffers."""

    def make_dummy(
        cls: type[InputBatch],
        num_reqs: int,
        num_tokens: int,
        input_buffers: InputBuffers,
        *args: Any,
        **kwargs: Any,
    ) -> InputBatch:
        input_buffers._vext_kept = None
        return original(cls, num_reqs, num_tokens, input_buffers, *args, **kwargs)

    return make_dummy


def _decodes_only(scheduler_output: SchedulerOutput, state: BatchReqState) -> bool:
    """Whether each request has one token, none of them a draft or of a prompt."""
    return (
        not state.has_prefill
        and state.num_tokens == len(state.req_ids)
        and not scheduler_output.scheduled_spec_decode_tokens
    )


def _reason_to_rebuild(runner: GPUModelRunner, batch: InputBatch) -> str | None:
    """Why ``batch`` does not tell what the next step's would be, if so."""
    if type(runner).__module__.partition(".")[0] != "vllm":
        return "model runner from elsewhere"
    if runner.num_speculative_steps:
        return "speculative decoding"
    if runner.model_state.num_new_sampled_tokens_per_step != 1:
        return "more or less than one token per step"
    if runner.pcp_manager is not None:
        return "prefill context parallelism"
    if runner.use_pp:
        return "pipeline parallelism"
    if batch.prompt_lens is not None:
        return "attention window that depends on the prompt"
    if batch.fast_prefill is not None:
        return "fast prefill"
    return None


def _repeat_batch(
    self: GPUModelRunner,
    kept: InputBatch,
    scheduler_output: SchedulerOutput,
    state: "BatchReqState",  # quoted, as upstream defines it further down
) -> InputBatch:
    """The batch of a step on the requests of ``kept``, one token further."""
    req_states, buffers = self.req_states, self.input_buffers
    batch = copy.copy(kept)

    upstream.prepare_pos_seq_lens(
        batch.idx_mapping,
        batch.query_start_loc,
        req_states.num_computed_tokens.gpu,
        buffers.positions,
        buffers.seq_lens,
    )
    batch.logits_indices = upstream.combine_sampled_and_draft_tokens(
        buffers.input_ids,
        batch.idx_mapping,
        req_states.last_sampled_tokens,
        batch.query_start_loc,
        batch.seq_lens,
        # Its buffers rotate when a request is added, so it is asked for anew.
        req_states.prefill_len.gpu,
        req_states.draft_tokens,
        batch.cu_num_logits,
        batch.num_reqs,
        1,
    )

    num_computed = req_states.num_computed_tokens_np[state.idx_mapping_np]
    bound = np.zeros(batch.num_reqs_after_padding, dtype=np.int32)
    np.add(num_computed, state.num_scheduled_tokens, out=bound[: batch.num_reqs])
    batch.num_computed_tokens_np = num_computed
    batch.seq_lens_cpu_upper_bound = torch.from_numpy(bound)

    # Equal to the kept ones, but this step's own, as the output holds on to them.
    batch.req_ids = state.req_ids
    batch.idx_mapping_np = state.idx_mapping_np
    batch.num_scheduled_tokens = state.num_scheduled_tokens
    batch.prefill_len_np = state.prefill_len_np
    batch.num_computed_prefill_tokens_np = state.num_computed_prefill_tokens_np
    batch.is_prefilling_np = state.is_prefilling_np
    batch.has_structured_output_reqs = scheduler_output.has_structured_output_requests
    return batch
