# SPDX-License-Identifier: Apache-2.0
"""`InputBatch.add_request`, whose mask of allowed tokens is pinned when it is made."""

from collections.abc import Callable
from typing import Any

from vllm.utils.torch_utils import PIN_MEMORY
from vllm.v1.worker.gpu_input_batch import CachedRequestState, InputBatch


def pin_after_adding(original: Callable[..., int]) -> Callable[..., Any]:
    """`InputBatch.add_request`; see the patch."""

    def add_request(self: InputBatch, request: CachedRequestState) -> int:
        row = original(self, request)
        wanted = request.sampling_params
        if PIN_MEMORY and wanted is not None and wanted.allowed_token_ids:
            mask = self.allowed_token_ids_mask_cpu_tensor
            assert mask is not None
            if not mask.is_pinned():
                self.allowed_token_ids_mask_cpu_tensor = mask.pin_memory()
        return row

    return add_request
