# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Sampling of Model Runner V1 that does not wait for the token before.

With asynchronous scheduling the host has -1 where the last step's token belongs until
its copy is over. Stock waits for that copy as soon as a request has a penalty or a bad
word. Here the lists are completed one step late, when that copy is long over, and the
last token is taken from where it was sampled:

* Penalties read counts that stay on the device. A step adds the tokens that are new,
  from the host's lists or, where those have -1, from the last step's result. A request
  that moves to another row takes its counts along; one that is new is counted once.
* Bad words are decided by stock as far as the host knows. One whose last token but one
  is the unknown one is decided on the device.

What nobody asked for stays as it is: in rows without penalties and bad words stock's
lists may hold -1 for ever, which is counted as padding.

Carries the lines that apply penalties from vLLM.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from vllm._custom_ops import apply_repetition_penalties
from vllm.model_executor.layers.utils import get_token_bin_counts_and_mask
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler
from vllm.v1.worker.gpu_input_batch import InputBatch
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_ext.patching.engine import step_aside

NAME = "v1_last_token"
UNKNOWN = -1  # vLLM's placeholder in a list of output tokens

Tokens = list[int]  # one request's output; the object stays, its content grows


class Outputs:
    """What the rows of a batch have put out.

    Attributes:
        last: ``[rows of the last step, 1]`` int32, its tokens on the device.
        sources: Per row, where in ``last`` the token is that its list lacks.
    """

    def __init__(self) -> None:
        self.last: torch.Tensor | None = None
        self.sources: list[int | None] = []
        # Tokens that the lists lack: their copy, its event, and where they belong.
        self._owed: tuple[torch.Tensor, Any, list[tuple[Tokens, int, int]]] | None
        self._owed = None
        self._metadata: SamplingMetadata | None = None
        self._rows: list[Tokens] = []
        self._counted: list[int] = []  # per row, how many of its tokens
        self._counts: torch.Tensor | None = None  # [rows, vocab + 1] int32
        self._in_prompt: torch.Tensor | None = None  # [rows, vocab] bool
        self._one: torch.Tensor | None = None

    def follow(self, batch: InputBatch) -> None:
        """Take the last step's tokens over from ``batch``, which then does not wait."""
        self.settle()
        rows = batch.sampling_metadata.output_token_ids
        copy, self.last = batch.sampled_token_ids_cpu, batch.prev_sampled_token_ids
        if copy is None or self.last is None:
            self.sources = [None] * len(rows)
            return
        known = batch.prev_req_id_to_index or {}
        self.sources = [
            known.get(name) if tokens else None
            for name, tokens in zip(batch.req_ids, rows, strict=True)
        ]
        places = [
            (tokens, len(tokens) - 1, source)
            for tokens, source in zip(rows, self.sources, strict=True)
            if source is not None
        ]
        self._owed = copy, batch.async_copy_ready_event, places
        batch.sampled_token_ids_cpu = None

    def settle(self) -> None:
        """Complete the lists up to the step whose tokens were followed last.

        A step later its output has been handed out, so that its copy is over.
        """
        if self._owed is None:
            return
        copy, event, places = self._owed
        self._owed = None
        if not event.query():
            event.synchronize()
        ids = copy.tolist()  # sync: none, it is on the host
        for tokens, place, source in places:
            if place < len(tokens):  # a streaming request may have started again
                tokens[place] = ids[source][0]

    def counts(
        self, metadata: SamplingMetadata, logits: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """How often each row put out each token, and whether its prompt has it.

        Args:
            metadata: Of the batch that was followed.
            logits: ``[rows, vocab]``.

        Returns:
            ``[rows, vocab]`` int32 and bool, on the device of ``logits``.
        """
        rows, vocab = metadata.output_token_ids, logits.shape[1]
        if (
            self._counts is None
            or metadata is not self._metadata
            or self._counts.shape[1] != vocab + 1
        ):
            self._carry(metadata, logits)
        assert self._counts is not None
        assert self._in_prompt is not None

        new = [
            tokens[counted:]
            for tokens, counted in zip(rows, self._counted, strict=True)
        ]
        if any(new):
            tokens = self._tokens(new, vocab)
            assert self._one is not None
            self._counts.scatter_add_(1, tokens, self._one.expand(tokens.shape))
            self._counted = [len(tokens) for tokens in rows]
        return self._counts[:, :vocab], self._in_prompt

    def _carry(self, metadata: SamplingMetadata, logits: torch.Tensor) -> None:
        """Make counts for a changed batch: kept where the request was there before."""
        rows, vocab = list(metadata.output_token_ids), logits.shape[1]
        old, counted = self._counts, self._counted
        if old is not None and old.shape[1] != vocab + 1:
            old = None
        before = {id(tokens): row for row, tokens in enumerate(self._rows)}
        kept = [
            (row, before[id(tokens)])
            for row, tokens in enumerate(rows)
            if id(tokens) in before and len(tokens) >= counted[before[id(tokens)]]
        ]
        size = len(rows), vocab + 1
        self._counts = torch.zeros(size, dtype=torch.int32, device=logits.device)
        self._counted = [0] * len(rows)
        if old is not None and kept:
            moves = async_tensor_h2d(np.array(kept, dtype=np.int64).T, logits.device)
            self._counts.index_copy_(0, moves[0], old.index_select(0, moves[1]))
            for row, was in kept:
                self._counted[row] = counted[was]
        assert metadata.prompt_token_ids is not None
        _, self._in_prompt = get_token_bin_counts_and_mask(
            metadata.prompt_token_ids, vocab, len(rows)
        )
        self._one = self._counts.new_ones((1, 1))
        self._metadata, self._rows = metadata, rows

    def _tokens(self, new: list[Tokens], padding: int) -> torch.Tensor:
        """``[rows, most]`` int64 on the device: tokens to count, then padding."""
        if (
            self.last is not None
            and self.last.shape[0] == len(new)
            and self.sources == list(range(len(new)))
            and all(tokens == [UNKNOWN] for tokens in new)
        ):
            return self.last.long()
        assert self._counts is not None
        most = max(map(len, new))
        table: np.ndarray[Any, Any]
        table = np.full((len(new), most + 1), padding, dtype=np.int64)
        for row, tokens in zip(table, new, strict=True):
            row[: len(tokens)] = tokens
        table[table == UNKNOWN] = padding  # the last column takes its place
        if self.last is None:
            return async_tensor_h2d(table, self._counts.device)
        table[:, most] = [
            UNKNOWN if source is None or not tokens else source
            for source, tokens in zip(self.sources, new, strict=True)
        ]
        found = async_tensor_h2d(table, self._counts.device)
        source = found[:, most]
        last = self.last[:, 0].index_select(0, source.clamp(min=0))
        found[:, most] = torch.where(source < 0, padding, last)
        return found

    def forbid(
        self, logits: torch.Tensor, bad_words: dict[int, list[Tokens]], rows: Any
    ) -> None:
        """Set to -inf, in place, what only the last token forbids.

        Args:
            logits: ``[rows, vocab]`` float32.
            bad_words: By row, words as tokens: the last is forbidden after the others.
            rows: Per row, its tokens.
        """
        hanging: dict[tuple[int, int], list[int]] = {}
        for row, words in bad_words.items():
            if row >= len(self.sources) or self.sources[row] is None:
                continue
            tokens = rows[row]
            for *prefix, forbidden in words:
                before = len(prefix)
                if prefix and tokens[len(tokens) - before : -1] == prefix[:-1]:
                    hanging.setdefault((row, forbidden), []).append(prefix[-1])
        if not hanging:
            return
        assert self.last is not None
        most = max(map(len, hanging.values()))
        table: np.ndarray[Any, Any]
        table = np.full((len(hanging), 3 + most), UNKNOWN, dtype=np.int64)
        for line, ((row, forbidden), after) in zip(table, hanging.items(), strict=True):
            line[:3] = row, forbidden, self.sources[row]
            line[3 : 3 + len(after)] = after
        found = async_tensor_h2d(table, logits.device)
        said = (self.last[found[:, 2]] == found[:, 3:]).any(1)
        # Each entry is there once, so the order of these writes does not matter.
        entries = found[:, 0], found[:, 1]
        logits.index_put_(entries, logits[entries].masked_fill_(said, float("-inf")))


def sample_ahead(original: Callable[..., SamplerOutput]) -> Callable[..., Any]:
    """`GPUModelRunner._sample`, with what the rows have put out at hand."""

    def _sample(
        self: GPUModelRunner,
        logits: torch.Tensor | None,
        spec_decode_metadata: Any,
    ) -> SamplerOutput:
        batch = self.input_batch
        metadata = batch.sampling_metadata
        outputs: Outputs | None = getattr(batch, "_vext_outputs", None)
        needed = bool(metadata.output_token_ids)
        reason = _reason_to_wait(self, spec_decode_metadata) if needed else None
        if reason is not None:
            step_aside(NAME, reason)
        if reason is not None or not needed:
            if outputs is not None:
                outputs.settle()
                del batch._vext_outputs
            return original(self, logits, spec_decode_metadata)

        if outputs is None:
            outputs = batch._vext_outputs = Outputs()
        outputs.follow(batch)
        metadata._vext_outputs = outputs
        try:
            return original(self, logits, spec_decode_metadata)
        finally:
            del metadata._vext_outputs

    return _sample


def forbid_words(original: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    """`Sampler.apply_logits_processors`, after the words that it cannot decide."""

    def apply_logits_processors(
        self: Sampler,
        logits: torch.Tensor,
        sampling_metadata: SamplingMetadata,
        predict_bonus_token: bool,
    ) -> torch.Tensor:
        outputs: Outputs | None = getattr(sampling_metadata, "_vext_outputs", None)
        words = sampling_metadata.bad_words_token_ids
        if outputs is not None and words:
            # Before the others, as stock's words are; -inf stays -inf under those.
            outputs.forbid(logits, words, sampling_metadata.output_token_ids)
        return original(self, logits, sampling_metadata, predict_bonus_token)

    return apply_logits_processors


def penalize(original: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    """`Sampler.apply_penalties`, from counts that stay on the device."""

    def apply_penalties(
        logits: torch.Tensor,
        sampling_metadata: SamplingMetadata,
        output_token_ids: Sequence[Tokens],
    ) -> torch.Tensor:
        outputs: Outputs | None = getattr(sampling_metadata, "_vext_outputs", None)
        if outputs is None or sampling_metadata.no_penalties:
            return original(logits, sampling_metadata, output_token_ids)
        counts, in_prompt = outputs.counts(sampling_metadata, logits)
        in_output = counts > 0
        apply_repetition_penalties(
            logits, in_prompt, in_output, sampling_metadata.repetition_penalties
        )
        # In vLLM's order, for the same rounding.
        logits -= sampling_metadata.frequency_penalties.unsqueeze(dim=1) * counts
        logits -= sampling_metadata.presence_penalties.unsqueeze(dim=1) * in_output
        return logits

    return apply_penalties


def _reason_to_wait(runner: GPUModelRunner, spec_decode_metadata: Any) -> str | None:
    """Why the host has to know the last tokens, or may lose some, if so."""
    batch = runner.input_batch
    holder = batch.sampling_metadata.thinking_budget_state_holder
    if spec_decode_metadata is not None or runner.speculative_config is not None:
        return "speculation"
    if holder is not None and holder.has_tracked_requests():
        return "thinking budget"
    if batch.logitsprocs_need_output_token_ids:
        return "custom logits processor"
    if runner.vllm_config.kv_transfer_config is not None:
        return "KV transfer"  # takes tokens back when a load fails
    if runner.parallel_config.pipeline_parallel_size > 1:
        return "pipeline parallelism"
    if type(runner.sampler) is not Sampler:
        return "sampler from elsewhere"
    return None
