# SPDX-License-Identifier: Apache-2.0
"""Tensors of the device copied to the host together, for stock to read there."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from vllm.v1.outputs import LogprobsLists, LogprobsTensors


def after_one_wait(original: Callable[..., LogprobsLists]) -> Callable[..., Any]:
    """`LogprobsTensors.tolists` of copies that were made together."""

    def tolists(
        self: LogprobsTensors, cu_num_generated_tokens: list[int] | None = None
    ) -> LogprobsLists:
        if not _on_host(self.logprobs):
            self = self.to_cpu_nonblocking()
            _wait()
        return original(self, cu_num_generated_tokens)

    return tolists


def parse_on_host(original: Callable[..., Any]) -> Callable[..., Any]:
    """`RejectionSampler.parse_output` of copies that were made together."""

    def parse_output(
        output_token_ids: torch.Tensor,
        vocab_size: int,
        discard_req_indices: Sequence[int] = (),
        logprobs_tensors: LogprobsTensors | None = None,
    ) -> tuple[list[list[int]], LogprobsLists | None]:
        if not _on_host(output_token_ids):
            output_token_ids = output_token_ids.to("cpu", non_blocking=True)
            if logprobs_tensors is not None:
                logprobs_tensors = logprobs_tensors.to_cpu_nonblocking()
            _wait()
        return original(
            output_token_ids, vocab_size, discard_req_indices, logprobs_tensors
        )

    return parse_output


def _on_host(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu"


def _wait() -> None:
    """Wait for what the current stream was given up to here."""
    event = torch.Event()
    event.record()
    event.synchronize()
