"""Which engines and which steps a step graph is for; all others run stock code.

Everything here is decided on the host, from what the host has anyway, and nothing is
changed: a step that turns out not to be eligible has lost nothing. With several ranks
all of them come to the same verdict, because scheduler output and host state are the
same on each.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from vllm.config.compilation import CUDAGraphMode
from vllm.model_executor.offloader import get_offloader
from vllm.model_executor.offloader.base import NoopOffloader
from vllm.platforms import current_platform
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.kv_connector import NO_OP_KV_CONNECTOR
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from vllm_ext.patches.fused_sampler.state import Seats

MOST_ROWS = 128  # beyond, logits get large and the host is not what a step waits for
BACKENDS = ("TRITON_ATTN", "FLASH_ATTN")


def reasons_of_engine(runner: Any) -> Iterator[str]:
    """Why no step of this ``GPUModelRunner`` can be eligible; nothing if some can."""
    model_state = runner.model_state
    if current_platform.is_rocm() or current_platform.is_xpu():
        yield "not an NVIDIA GPU"
    if runner.use_pp:
        yield "pipeline parallelism"
    if runner.dp_size > 1:
        yield "data parallelism"
    if runner.use_dcp or runner.pcp_manager is not None:
        yield "context parallelism"
    if runner.batch_sharder is not None:
        yield "batch-sharded sampling"
    if runner.ubatch_runner is not None:
        yield "microbatches"
    if runner.lora_config is not None:
        yield "LoRA"
    if runner.speculative_config is not None or runner.num_speculative_steps:
        yield "speculative decoding"
    elif runner.decode_query_len != 1:
        yield "more than one token per step"
    if runner.is_pooling_model or runner.is_encoder_decoder:
        yield "not a decoder that generates text"
    if runner.fast_prefill is not None:
        yield "fast prefill"
    if runner.check_ep_fault:
        yield "faults of expert parallelism are looked for"
    if runner.uses_inputs_embeds:
        yield "inputs that are no token ids"
    if type(model_state) is not DefaultModelState:
        yield "model with a state of its own"
    elif model_state.rope_state is not None:
        yield "positions of several dimensions"
    if runner.model_config.rswa_window is not None:
        yield "attention window that depends on the prompt"
    if runner.kv_connector is not NO_OP_KV_CONNECTOR:
        yield "KV connector"
    if runner.aux_output_connector is not None:
        yield "auxiliary outputs"
    if runner.eplb.state is not None:
        yield "expert load balancing"
    if type(get_offloader()) is not NoopOffloader:
        yield "offloaded weights"
    if runner.sampler.thinking_budget_state.enabled:
        yield "thinking budget"
    if runner.parallel_config.enable_elastic_ep:
        yield "elastic expert parallelism"
    yield from _reasons_of_attention(runner)
    if not any(forward_graphs(runner.cudagraph_manager)):
        yield f"no forward graph of decode steps for up to {MOST_ROWS} requests"


def _reasons_of_attention(runner: Any) -> Iterator[str]:
    tables = runner.block_tables
    if not all(tables._slot_mapping_enabled):
        yield "state that is not in blocks"
    if list(runner.kernel_block_sizes) != list(tables.block_sizes):
        yield "blocks that attention divides"
    layers = runner.compilation_config.static_forward_context
    for group in (group for groups in runner.attn_groups for group in groups):
        name = group.backend.get_name()
        if name not in BACKENDS:
            yield f"attention backend {name}"
        elif not group.supports_draft_decode_metadata_update:
            yield f"metadata of {name} that the host makes"
        elif name == "FLASH_ATTN":
            # Not the builder's aot_schedule: where windows differ, 3 has none.
            impl = layers[group.layer_names[0]].impl
            if getattr(impl, "vllm_flash_attn_version", None) != 3:
                yield "FlashAttention other than 3"


def forward_graphs(manager: Any) -> list[BatchExecutionDescriptor | None]:
    """For each number of requests the graph that vLLM would replay, if any."""
    found: list[BatchExecutionDescriptor | None] = [None]
    for rows in range(1, MOST_ROWS + 1):
        described = manager.dispatch(rows, rows, 1, 0, max_query_len=1)
        fits = (
            described.cg_mode == CUDAGraphMode.FULL
            and described.uniform_token_count == 1
            and described.num_reqs == described.num_tokens <= MOST_ROWS
        )
        found.append(described if fits else None)
    return found


# What `reason_of_request` says, by its number.
REQUESTS = (
    *("", "structured output", "logprobs", "prompt logprobs"),
    "request from before the capture",
)
UNKNOWN = len(REQUESTS) - 1


def reason_of_request(new: NewRequestData) -> int:
    """Why no step with this request is eligible, as a number; 0 if some are.

    `Seats` knows of more reasons.
    """
    params: Any = new.sampling_params
    if params.structured_outputs is not None:
        return 1
    if params.logprobs is not None or params.logprob_token_ids is not None:
        return 2
    of_prompt = ("prompt_logprobs", "prompt_logprob_token_ids")  # 0.32 has both
    return (
        3 if any(getattr(params, name, None) is not None for name in of_prompt) else 0
    )


@dataclass(frozen=True)
class Plan:
    """An eligible step.

    Attributes:
        requests: Ids of its requests, in the order of its rows.
        seats: ``[n]``, where the runner keeps them.
        computed: ``[n]``, tokens that each of them has behind it.
        asks: What they ask of the sampler; see `Seats.asks_of`.
        blocks: Row, group, column and number of each block that was given.
        described: The forward graph.
    """

    requests: list[str]
    seats: np.ndarray
    computed: np.ndarray
    asks: int
    blocks: Sequence[tuple[int, int, int, int]]
    described: BatchExecutionDescriptor

    @property
    def padded(self) -> int:
        """Rows of its graphs."""
        return self.described.num_tokens


def plan(
    runner: Any,
    scheduled: SchedulerOutput,
    by_rows: Sequence[BatchExecutionDescriptor | None],
    seats_of_sampler: Seats,
    aside: np.ndarray,
) -> Plan | str:
    """What a step is, or why it is not eligible.

    Args:
        runner: The ``GPUModelRunner``, with the state of the step before.
        scheduled: The step.
        by_rows: For each number of requests the forward graph that takes them.
        seats_of_sampler: What requests ask of it.
        aside: ``[N]``, by seat: `reason_of_request`.
    """
    cached = scheduled.scheduled_cached_reqs
    requests = list(scheduled.num_scheduled_tokens)
    rows = len(requests)
    if scheduled.scheduled_new_reqs:
        return "a request is new or resumed"
    if scheduled.total_num_scheduled_tokens != rows:
        return "a request has more than one token"
    if requests != cached.req_ids:
        return "requests in another order"
    if scheduled.scheduled_spec_decode_tokens:
        return "draft tokens"
    if scheduled.has_structured_output_requests:
        return "structured output"
    if scheduled.new_block_ids_to_zero or scheduled.kv_cache_block_copies:
        return "blocks to be zeroed or copied"
    # vLLM 0.32 has no updates.
    updates = getattr(scheduled, "encoder_input_updates", None)
    if scheduled.scheduled_encoder_inputs or updates:
        return "encoder inputs"
    described = by_rows[rows] if rows < len(by_rows) else None
    if described is None:
        return "more requests than a step graph has rows"
    if runner.block_tables.redirect_writes_to_null_block:
        return "writes are redirected"

    states, tables = runner.req_states, runner.block_tables
    seats = np.fromiter(
        map(states.req_id_to_index.__getitem__, requests), dtype=np.intp, count=rows
    )
    computed = np.array(cached.num_computed_tokens, dtype=np.int32)
    if (computed < states.prefill_len.np[seats]).any():
        return "a prompt is still being read"
    if worst := aside[seats].max():
        return REQUESTS[worst]
    asks = seats_of_sampler.asks_of(seats)
    reason = seats_of_sampler.reason(asks)
    if reason is not None:
        return reason
    blocks = []
    for row, given in enumerate(cached.new_block_ids):
        if given is None:
            continue
        for group, ids in enumerate(given):
            if not ids:
                continue
            column = int(tables.num_blocks.np[group, seats[row]])
            if len(ids) > 1:
                return "a request has more than one new block"
            if column >= tables.block_tables[group].gpu.shape[1]:
                return "a block table is full"
            blocks.append((row, group, column, ids[0]))
    return Plan(requests, seats, computed, asks, blocks, described)
