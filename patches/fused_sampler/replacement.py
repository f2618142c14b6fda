# SPDX-License-Identifier: Apache-2.0
"""`Sampler.__call__` from the model's logits to tokens, in one launch.

Stock stays underneath: it keeps its own states, and a step that asks for something
that the kernels do not take is stock's from beginning to end. Tokens are new tensors,
as in stock, since they are copied to the host while the next step may already run.
"""

from collections.abc import Callable
from typing import Any

import torch
from vllm.config.model import PROCESSED_LOGPROBS_MODES
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample import sampler as stock
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

from vllm_ext.kernels.sample import DTYPES
from vllm_ext.patches.fused_sampler.state import (
    FILTERS,
    MOST_LOGPROBS,
    PROCESSED,
    Seats,
    new_application,
    seats_of,
)
from vllm_ext.patching.engine import step_aside

NAME = "fused_sampler"
WARM_UP = "_warmup_"  # how requests are called with which vLLM compiles its kernels


def take_seats(original: Callable[..., None]) -> Callable[..., None]:
    """`Sampler.__init__`, after which there are `Seats`."""
    new_application()

    def __init__(self: Sampler, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, vllm_config, *args, **kwargs)
        # With sleep mode, models are loaded into memory that sleeping empties: those
        # seats are made later, at the first call.
        if not vllm_config.model_config.enable_cumem_allocator:
            self._vext_seats = Seats(self)

    return __init__


def join(original: Callable[..., None]) -> Callable[..., None]:
    """`Sampler.add_request`."""

    def add_request(self: Sampler, req_idx: int, sampling_params: Any) -> None:
        original(self, req_idx, sampling_params)
        seats = seats_of(self)
        if seats is None:
            with torch.inference_mode(False):
                seats = self._vext_seats = Seats(self)
        if seats.refused is None:
            seats.join(req_idx, sampling_params)

    return add_request


def write(original: Callable[..., None]) -> Callable[..., None]:
    """`Sampler.apply_staged_writes`."""

    def apply_staged_writes(self: Sampler) -> None:
        original(self)
        seats = seats_of(self)
        if seats is not None and seats.refused is None:
            seats.write()

    return apply_staged_writes


def count_in_two_launches(original: Callable[..., None]) -> Callable[..., None]:
    """`bincount`, which sets the bits of generated tokens too."""

    def bincount(
        expanded_idx_mapping: torch.Tensor,
        all_token_ids: torch.Tensor,
        prompt_len: torch.Tensor,
        prefill_len: torch.Tensor,
        prompt_bin_mask: torch.Tensor,
        output_bin_counts: torch.Tensor,
        max_prefill_len: int,
    ) -> None:
        given = (expanded_idx_mapping, all_token_ids, prompt_len, prefill_len)
        seats = seats_of(prompt_bin_mask)
        if seats is None:
            original(*given, prompt_bin_mask, output_bin_counts, max_prefill_len)
        else:
            seats.count(*given, max_prefill_len)

    return bincount


def sample_in_one_launch(original: Callable[..., Any]) -> Callable[..., Any]:
    """`Sampler.__call__`."""

    def __call__(
        self: Sampler, logits: torch.Tensor, input_batch: InputBatch
    ) -> SamplerOutput:
        seats = seats_of(self)
        if seats is None:
            with torch.inference_mode(False):
                seats = self._vext_seats = Seats(self)
        if seats.refused is not None:
            _leave(seats.refused, input_batch)
            return original(self, logits, input_batch)
        unfit = _unfit(seats, logits)
        if unfit is None and not seats.warmed:
            # The first call is that of vLLM's memory profile; later ones find both
            # our kernels and stock's compiled.
            seats.warm(logits)
            seats.drawn_elsewhere(input_batch.idx_mapping_np)
            return original(self, logits, input_batch)
        asks = seats.asks_of(input_batch.idx_mapping_np)
        reason = unfit or seats.reason(asks) or _reason(self, logits, input_batch, asks)
        if reason is not None:
            _leave(reason, input_batch)
            seats.drawn_elsewhere(input_batch.idx_mapping_np)
            return original(self, logits, input_batch)
        return _sample(self, seats, logits, input_batch, asks)

    return __call__


def note_the_verification(original: Callable[..., Any]) -> Callable[..., Any]:
    """`RejectionSampler.__call__`, whose tokens are none of ours."""

    def __call__(
        self: RejectionSampler,
        logits: torch.Tensor,
        input_batch: InputBatch,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        seats = seats_of(self.sampler)
        if seats is not None and seats.refused is None:
            _leave("drafts to verify", input_batch)
            seats.drawn_elsewhere(input_batch.idx_mapping_np)
        return original(self, logits, input_batch, *args, **kwargs)

    return __call__


def _leave(reason: str, batch: InputBatch) -> None:
    if not batch.req_ids[0].startswith(WARM_UP):
        step_aside(NAME, reason)


def _unfit(seats: Seats, logits: torch.Tensor) -> str | None:
    """Why no kernel of ours can read these logits, if so."""
    if logits.shape[1] != seats.vocab_size:
        return "logits of another vocabulary"
    if logits.dtype not in DTYPES or logits.stride(1) != 1:
        return "logits of another type"
    return None


def _reason(
    sampler: Sampler, logits: torch.Tensor, batch: InputBatch, asks: int
) -> str | None:
    """Why this batch is stock's, if it is."""
    if logits.shape[0] != batch.num_reqs or batch.num_draft_tokens > 0:
        return "several logits of a request"
    if (
        asks & PROCESSED
        and sampler.logprobs_mode in PROCESSED_LOGPROBS_MODES
        and sampler.get_logprobs_dims(batch.idx_mapping_np) is not None
    ):
        return "logprobs of processed logits"
    return None


def _sample(
    sampler: Sampler,
    seats: Seats,
    logits: torch.Tensor,
    batch: InputBatch,
    asks: int,
) -> SamplerOutput:
    rows = batch.num_reqs
    indices = batch.logits_indices
    if isinstance(indices, slice):  # lent by identity_gathers
        indices = seats.each[indices]
    sampled = torch.empty(rows, dtype=torch.int64, device=logits.device)
    seats.freshen(asks, batch.idx_mapping, batch.idx_mapping_np)
    seats.draw(
        *(logits, seats.no_end, batch.idx_mapping, batch.positions, indices, sampled),
        filters=bool(asks & FILTERS),
    )

    # In a decode batch the kernel writes ones over ones, if it is launched at all.
    decodes = not batch.has_prefill and batch.num_computed_tokens_np[0] > 0
    ones = seats.ones[:rows] if decodes else batch.seq_lens.new_ones(rows)
    num_sampled, num_rejected = stock.get_num_sampled_and_rejected(
        ones,
        batch.seq_lens,
        batch.cu_num_logits,
        batch.idx_mapping,
        sampler.req_states.prefill_len.gpu,
    )
    return SamplerOutput(
        sampled_token_ids=sampled.view(-1, 1),
        logprobs_tensors=_logprobs(sampler, seats, logits, batch, sampled),
        num_nans=None,
        num_sampled=num_sampled,
        num_rejected=num_rejected,
    )


def _logprobs(
    sampler: Sampler,
    seats: Seats,
    logits: torch.Tensor,
    batch: InputBatch,
    sampled: torch.Tensor,
) -> LogprobsTensors | None:
    """What stock's ``compute_topk_scores`` returns."""
    wanted = sampler.get_logprobs_dims(batch.idx_mapping_np)
    if wanted is None:
        return None
    number, listed = wanted
    of_logits = sampler.logprobs_mode in ("raw_logits", "processed_logits")
    if number > MOST_LOGPROBS or listed > 0 or of_logits:
        _leave("logprobs alone: many, of given tokens, or no logprobs", batch)
        return stock.compute_topk_scores(
            logits,
            number,
            sampled,
            None,
            logprob_token_ids_state=sampler.logprob_token_ids_state,
            expanded_idx_mapping=batch.expanded_idx_mapping,
            max_per_req_token_ids=listed,
            logits_mode=of_logits,
        )
    device = logits.device
    ids = torch.empty(batch.num_reqs, 1 + number, dtype=torch.int64, device=device)
    values = torch.empty_like(ids, dtype=torch.float32)
    ranks = torch.empty_like(sampled)
    seats.logprobs(
        *(logits, seats.no_end, batch.idx_mapping, sampled, ids, values, ranks)
    )
    return LogprobsTensors(ids, values, ranks)
