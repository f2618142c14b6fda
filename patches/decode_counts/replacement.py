# SPDX-License-Identifier: Apache-2.0
"""Token counts of a batch in which every request samples exactly one token.

The constants are shared by all steps: they are never written, so a copy of an
earlier step that is still under way on the output stream reads what it should.
Readers: `post_update`, the output copy, model states with recurrent layers,
speculators, the auxiliary-output connector; none of them writes.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.sampler import Sampler

# The batch being sampled, if its counts are constant. Sampling a batch is one call
# on one thread, and a batch is recognised by its own seq_lens, so what is left here
# by another thread or call cannot be mistaken.
_batch: InputBatch | None = None

_ones: dict[tuple[torch.device, int], torch.Tensor] = {}
_zeros: dict[tuple[torch.device, int], torch.Tensor] = {}


def counts_are_constant(batch: InputBatch) -> bool:
    """Whether every request of ``batch`` samples one token and rejects none.

    A decoding request has computed its prompt. A dummy one has computed nothing, and
    stays with the stock kernel, so that warming up compiles it.
    """
    return (
        not batch.has_prefill
        and batch.num_draft_tokens == 0
        and batch.num_draft_tokens_per_req is None
        and batch.cu_num_logits_np[-1] == batch.num_reqs
        and batch.num_computed_tokens_np[0] > 0
    )


def name_batch(original: Callable[..., Any]) -> Callable[..., Any]:
    """`Sampler.__call__`, saying for which batch it runs."""

    def __call__(
        self: Sampler, logits: torch.Tensor, input_batch: InputBatch, **kwargs: Any
    ) -> Any:
        global _batch
        if not counts_are_constant(input_batch):
            return original(self, logits, input_batch, **kwargs)
        _batch = input_batch
        try:
            return original(self, logits, input_batch, **kwargs)
        finally:
            _batch = None

    return __call__


def give_constants(original: Callable[..., Any]) -> Callable[..., Any]:
    """`get_num_sampled_and_rejected`: ``[num_reqs]`` int32 ones, and zeros."""

    def get_num_sampled_and_rejected(
        num_sampled: torch.Tensor, seq_lens: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        batch = _batch
        if batch is None or seq_lens is not batch.seq_lens:
            return original(num_sampled, seq_lens, *args, **kwargs)
        key = (num_sampled.device, batch.num_reqs)
        if key not in _ones:
            # One entry per batch size that occurs: at most max_num_seqs.
            _ones[key] = torch.ones_like(num_sampled)
            _zeros[key] = torch.zeros_like(num_sampled)
        return _ones[key], _zeros[key]

    return get_num_sampled_and_rejected


def copy_constants(original: Callable[..., Any]) -> Callable[..., Any]:
    """`async_copy_to_np`, which needs no copy of what the host knows."""

    def async_copy_to_np(x: torch.Tensor) -> np.ndarray:
        if x.ndim == 1:
            count = x.shape[0]
            if x is _ones.get((x.device, count)):
                return np.ones(count, dtype=np.int32)
            if x is _zeros.get((x.device, count)):
                return np.zeros(count, dtype=np.int32)
        return original(x)

    return async_copy_to_np
