# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""`MinTokensLogitsProcessor._mask_stop_token_logits` with shapes the host knows.

Carries vLLM's signature and the lines that mask.
"""

import torch
from vllm.v1.sample.logits_processor.builtin import MinTokensLogitsProcessor


def mask_stop_token_logits(
    self: MinTokensLogitsProcessor,
    logits: torch.Tensor,
    logits_slice: tuple[torch.Tensor, torch.Tensor],
    restore_logits_slice: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """Set entries to -inf, except in rows that would be left with -inf alone.

    Args:
        logits: ``[rows, vocab]`` float32, changed in place.
        logits_slice: Rows and token ids of the entries, int32 or int64.
        restore_logits_slice: Those of them that may be spared; one pair may occur
            twice. A spared entry gets its value back if that was finite.
    """
    restore_rows, _ = restore_logits_slice
    stop_logits = logits[restore_logits_slice]
    logits.index_put_(logits_slice, self.neg_inf_tensor)

    # -inf is a row's largest value only if it is the only one: NaN wins over it.
    row_needs_restore = logits.amax(dim=-1) == float("-inf")
    restore_mask = row_needs_restore[restore_rows] & torch.isfinite(stop_logits)
    restored = torch.where(restore_mask, stop_logits, logits[restore_logits_slice])
    # Equal pairs carry equal values, so the order of these writes does not matter.
    logits.index_put_(restore_logits_slice, restored)
