# SPDX-License-Identifier: Apache-2.0
"""`GPUModelRunner.sample`, reading rows in place where they would be copied as is.

The views are of buffers that the next step overwrites, on the stream on which this
step's readers were launched before: they see this step's rows, as in stock the
gathers do. Nothing of them leaves the call: the sampler's output is made of new
tensors.
"""

from collections.abc import Callable
from typing import Any

import torch
from vllm.v1.watermarking.gpu_sampler import GPUWatermarkSampler
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.sample.bad_words import BadWordsState
from vllm.v1.worker.gpu.sample.logit_bias import LogitBiasState
from vllm.v1.worker.gpu.sample.penalties import PenaltiesState
from vllm.v1.worker.gpu.sample.sampler import Sampler

from vllm_ext.patching.engine import step_aside

NAME = "identity_gathers"
OWN_SAMPLERS = (Sampler, GPUWatermarkSampler)
OWN_PROCESSORS = (LogitBiasState, PenaltiesState, BadWordsState)


def one_token_each(batch: InputBatch) -> bool:
    """Whether token i of ``batch`` is the one that request i samples from."""
    return (
        batch.num_tokens == batch.num_reqs
        and batch.num_draft_tokens == 0
        and batch.logits_indices.shape[0] == batch.num_reqs
    )


def sample_from_views(original: Callable[..., Any]) -> Callable[..., Any]:
    """`GPUModelRunner.sample`; ``logits_indices`` is a slice while it runs."""

    def sample(
        self: GPUModelRunner,
        hidden_states: torch.Tensor,  # [tokens after padding, hidden]
        input_batch: InputBatch,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if not one_token_each(input_batch):
            return original(self, hidden_states, input_batch, *args, **kwargs)
        reason = _reason_to_gather(self, hidden_states)
        if reason is not None:
            step_aside(NAME, reason)
            return original(self, hidden_states, input_batch, *args, **kwargs)

        indices = input_batch.logits_indices
        input_batch.logits_indices = slice(input_batch.num_reqs)
        try:
            return original(self, hidden_states, input_batch, *args, **kwargs)
        finally:
            input_batch.logits_indices = indices

    return sample


def _reason_to_gather(
    runner: GPUModelRunner, hidden_states: torch.Tensor
) -> str | None:
    """Why somebody in this step may not take a view, if so."""
    sampler = runner.sampler
    if runner.batch_sharder is not None:
        return "batch-sharded sampling"
    if runner.pcp_manager is not None:
        return "prefill context parallelism"
    if type(sampler) not in OWN_SAMPLERS:
        return "sampler of the model's own"
    if tuple(map(type, sampler.logits_processors)) != OWN_PROCESSORS:
        # They are handed positions and input ids, and may keep or change them.
        return "custom logits processor"
    if not hidden_states.is_contiguous():
        # A gather makes contiguous rows; the product must see the same layout.
        return "hidden states not contiguous"
    return None
