# SPDX-License-Identifier: Apache-2.0
"""What every seat asks of the sampler, on the device and on the host.

A seat is an index into vLLM's request states. `Seats` is made with a ``Sampler``, or
when one that has none is called or gets a request, and follows it: `Seats.join` when
it got a request, `Seats.write` when it wrote what was staged. `seats_of` finds it. It
owns what the kernels read, at one address for ever:

* ``requests``: 64 bytes of parameters per seat, lists of biased, allowed and stop
  tokens, and planes of bits. ``prompt_bits`` and ``output_counts`` are vLLM's own
  tensors, which vLLM keeps up to date.
* the scratch memory of the kernels, and an ``[1]`` number of rows that has no end.

Nothing of it is written in a step that no request joins. Then: a copy from pinned
memory and a kernel for the parameters, and the same for lists, if there are any.

Whether a batch is ours, and what it needs, is one OR over ``asks``, an array of the
host:

    asks = seats.asks_of(batch.idx_mapping_np)
    reason = seats.refused or seats.reason(asks)       # stock's step, if not None
    seats.freshen(asks, idx_mapping, idx_mapping_np)   # a launch, where tokens were
                                                       # drawn by others
    seats.draw(logits, num_rows, idx_mapping, positions, logits_indices, out,
               filters=bool(asks & FILTERS))           # one launch

`Seats.draw` is that launch and nothing else, on tensors of the caller's: it can be
captured. ``filters=True`` is right for any batch, and needed where a row has top-k or
top-p. In a graph, whoever replays it asks `Seats.reason` before, and calls `freshen`.
Where tokens of a batch were drawn by anyone else, `Seats.drawn_elsewhere` says so.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.sampling_params import SamplingParams
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.buffer_utils import StagedWriteTensor
from vllm.v1.worker.gpu.sample.bad_words import BadWordsState
from vllm.v1.worker.gpu.sample.logit_bias import LogitBiasState
from vllm.v1.worker.gpu.sample.penalties import PenaltiesState
from vllm.v1.worker.gpu.sample.sampler import Sampler

from vllm_ext.kernels import bin_counts, logprobs, sample, top_k_top_p

# What a seat asks for: bits of `Seats.asks`.
FILTERS = 1  # top-k or top-p
PROCESSED = 2  # the token is not drawn from the logits as they are
STALE = 4  # bits of generated tokens have to be made anew
BAD_WORDS = 8
THINKING = 16
RESTORES = 32  # stop tokens come back if a grammar leaves nothing else
UNKNOWN = 64  # nobody joined here since the patch was applied

REASONS = {
    BAD_WORDS: "bad words",
    THINKING: "thinking budget",
    RESTORES: "minimum of tokens with a grammar",
    UNKNOWN: "request from before the patch",
}
STOCK = sum(REASONS)

LONGEST_LIST = 1024 + 128  # vLLM's limits: biases and stop tokens
OWN_PROCESSORS = (LogitBiasState, PenaltiesState, BadWordsState)
MOST_LOGPROBS = 20
NO_END = 2**31 - 1

_application = object()


def new_application() -> None:
    """From now on the seats of samplers made so far are nobody's.

    Requests may have been added to them while the patch was not applied.
    """
    global _application
    _application = object()


def seats_of(sampler: Any) -> Seats | None:
    """The seats that follow ``sampler``, or whose a plane of prompt bits is."""
    seats: Seats | None = getattr(sampler, "_vext_seats", None)
    if seats is None or seats.application is not _application:
        return None
    return seats


class Seats:
    """See the module.

    Args:
        sampler: Whose requests these are; those that it has already stay stock's.

    Attributes:
        application: Of the patch, in which they were made.
        refused: Why no step of this sampler is ours; ``None`` if steps can be. If it
            is not, there is nothing else but ``application``.
        requests: For the kernels.
        asks: ``[max_num_reqs]`` int32 on the host.
        no_end: ``[1]`` int32 on the device: a number of rows above all others.
        each: ``[max_num_reqs]`` int64 on the device, 0, 1, 2 and so on.
        ones: ``[max_num_reqs]`` int32 on the device.
        warmed: Whether the kernels have been compiled.
    """

    def __init__(self, sampler: Sampler) -> None:
        self.application = _application
        self.refused = _refusal(sampler)
        if self.refused is not None:
            return
        states = sampler.req_states
        device, size = states.device, states.max_num_reqs
        self.vocab_size = states.vocab_size
        self._sampler = sampler
        self._bias_state = sampler.logits_processors[0]
        self._bad_words_state = sampler.logits_processors[2]

        penalties = sampler.penalties_state
        plane = penalties.prompt_bin_mask
        plane._vext_seats = self  # by which `bincount` finds these seats
        self._params = StagedWriteTensor((size, sample.WORDS), torch.int32, device)
        self._listed = StagedWriteTensor((size, LONGEST_LIST), torch.int32, device)
        self._bias = StagedWriteTensor((size, LONGEST_LIST), torch.float32, device)
        self.requests = sample.Requests(
            params=self._params.gpu,
            prompt_bits=plane,
            output_bits=torch.zeros_like(plane),
            output_counts=penalties.output_bin_counts,
            listed_bits=torch.zeros_like(plane),
            listed=self._listed.gpu,
            bias=self._bias.gpu,
        )
        self._scratch = sample.make_scratch(size, self.vocab_size, device)
        self._filters_scratch = top_k_top_p.make_scratch(size, self.vocab_size, device)
        self._logprobs_scratch = logprobs.make_scratch(size, self.vocab_size, device)
        self._wanted = torch.full(
            (size,), MOST_LOGPROBS, dtype=torch.int32, device=device
        )
        self.no_end = torch.tensor([NO_END], dtype=torch.int32, device=device)
        self.each = torch.arange(size, dtype=torch.int64, device=device)
        self.ones = torch.ones(size, dtype=torch.int32, device=device)
        self.asks = np.full(size, UNKNOWN, dtype=np.int32)
        self._joined: dict[int, list[int]] = {}  # parameters of seats to be written
        self._lists: dict[int, tuple[list[int], list[float]]] = {}
        self.warmed = False

    # -- requests ---------------------------------------------------------------------

    def join(self, seat: int, params: SamplingParams) -> None:
        """A request was given to the sampler, and has this seat from now on."""
        sampler = self._sampler
        states, penalties = sampler.sampling_states, sampler.penalties_state
        biases = self._bias_state
        ids, bias = self._list(params)
        sampled = float(states.temperature.np[seat]) != 0.0
        k, p = int(states.top_k.np[seat]), float(states.top_p.np[seat])
        if not sampled or k == states.vocab_size:
            k = 0
        if not sampled:
            p = 1.0
        words = top_k_top_p.pack(
            temperature=float(states.temperature.np[seat]),
            seed=int(states.seeds.np[seat]),
            min_p=float(states.min_p.np[seat]),
            repetition_penalty=float(penalties.repetition_penalty.np[seat]),
            frequency_penalty=float(penalties.frequency_penalty.np[seat]),
            presence_penalty=float(penalties.presence_penalty.np[seat]),
            listed=len(ids),
            only_listed=bool(params.allowed_token_ids),
            min_length=int(biases.min_lens.np[seat]),
            top_k=k,
            top_p=p,
        )
        self._joined[seat] = words.tolist()  # sync: none, it is on the host
        self._lists.pop(seat, None)
        if ids:
            self._lists[seat] = ids, bias

        thinking = sampler.thinking_budget_state
        self.asks[seat] = (
            FILTERS * (k > 0 or p < 1.0)
            | PROCESSED * bool(sampler.needs_logits_processing[seat])
            | BAD_WORDS * bool(self._bad_words_state.num_bad_words.np[seat])
            | THINKING * (thinking.enabled and bool(thinking.use_thinking_budget[seat]))
            | RESTORES * bool(biases.restore_when_all_masked.np[seat])
        )

    def _list(self, params: SamplingParams) -> tuple[list[int], list[float]]:
        """The entries of a request's list, and what is added to their logits."""
        stops = params.all_stop_token_ids if params.min_tokens > 0 else ()
        if not (params.logit_bias or params.allowed_token_ids or stops):
            return [], []

        def known(tokens: Any) -> list[int]:
            return [token for token in tokens if 0 <= token < self.vocab_size]

        bias = params.logit_bias or {}
        ids, values = sample.entries(
            {token: bias[token] for token in known(bias)},
            known(params.allowed_token_ids or ()),
            known(stops),
        )
        return ids.tolist(), values.tolist()  # sync: none, they are on the host

    def write(self) -> None:
        """Bring to the device what requests that joined ask for."""
        if not self._joined:
            return
        for seat, words in self._joined.items():
            self._params.stage_write(seat, 0, words)
        self._params.apply_write()
        self._joined.clear()
        if self._lists:
            for seat, (ids, bias) in self._lists.items():
                self._listed.stage_write(seat, 0, ids)
                self._bias.stage_write(seat, 0, bias)
            self._listed.apply_write()
            self._bias.apply_write()
            device = self._params.gpu.device
            seats = async_tensor_h2d([*self._lists], device, torch.int64)
            bin_counts.bits_of_lists(seats, self.requests, self.vocab_size)
            self._lists.clear()

    def count(
        self,
        seats: torch.Tensor,
        tokens: torch.Tensor,
        prompt_lengths: torch.Tensor,
        lengths: torch.Tensor,
        longest: int,
    ) -> None:
        """Count the tokens of requests with penalties that joined.

        The arguments are those of `bin_counts.count_tokens`.
        """
        bin_counts.count_tokens(
            *(seats, tokens, prompt_lengths, lengths, longest),
            *(self.requests, self.vocab_size),
        )

    # -- batches ----------------------------------------------------------------------

    def asks_of(self, seats: np.ndarray) -> int:
        """What a batch asks for: that of all its seats together."""
        return int(np.bitwise_or.reduce(self.asks[seats]))

    def reason(self, asks: int) -> str | None:
        """Why a batch that asks for this is stock's, if it is."""
        if asks & STOCK:
            return next(reason for bit, reason in REASONS.items() if asks & bit)
        return None

    def freshen(self, asks: int, idx_mapping: torch.Tensor, seats: np.ndarray) -> None:
        """Before a draw: bits of the tokens that others drew for these seats.

        Args:
            asks: What the batch asks for.
            idx_mapping: ``[B]`` int64 on the device, a seat for each row.
            seats: The same on the host.
        """
        if asks & STALE:
            bin_counts.bits_of_counts(
                self.no_end, idx_mapping, self.requests, self.vocab_size
            )
            self.asks[seats] &= ~STALE

    def drawn_elsewhere(self, seats: np.ndarray) -> None:
        """Tokens of these seats were drawn by somebody else's kernels."""
        penalized = self._sampler.penalties_state.use_penalty[seats]
        self.asks[seats[penalized]] |= STALE

    def draw(
        self,
        logits: torch.Tensor,
        num_rows: torch.Tensor,
        idx_mapping: torch.Tensor,
        positions: torch.Tensor,
        logits_indices: torch.Tensor,
        out: torch.Tensor,
        *,
        filters: bool,
    ) -> None:
        """Draw a token for each row, in one launch.

        Args:
            logits: ``[B, V]``, as the model and a grammar left them; never written.
            num_rows: ``[1]`` int32: rows from there on are left alone.
            idx_mapping: ``[B]`` int64, the seat of each row; negative: none.
            positions: ``[T]`` int64, of the tokens of the step.
            logits_indices: ``[B]`` int64, which of them is a row's.
            out: ``[B]`` int64, gets the tokens.
            filters: Whether a row may have top-k or top-p.
        """
        rows = (logits, num_rows, self.requests, idx_mapping, positions, logits_indices)
        if filters:
            top_k_top_p.sample_top_k_top_p(*rows, out, self._filters_scratch)
        else:
            sample.sample(*rows, out, self._scratch)

    def logprobs(
        self,
        logits: torch.Tensor,
        num_rows: torch.Tensor,
        idx_mapping: torch.Tensor,
        sampled: torch.Tensor,
        ids: torch.Tensor,
        values: torch.Tensor,
        ranks: torch.Tensor,
    ) -> None:
        """Logprobs of what was drawn and of the likeliest tokens, in one launch.

        Args:
            logits: ``[B, V]``, those that they are of.
            num_rows: As in `draw`.
            idx_mapping: As in `draw`.
            sampled: ``[B]`` int64, the tokens.
            ids: ``[B, 1 + n]`` int64, gets the token and the ``n`` likeliest, at most
                `MOST_LOGPROBS`.
            values: ``[B, 1 + n]`` float32, gets their logprobs.
            ranks: ``[B]`` int64, gets the ranks of the tokens.
        """
        logprobs.logprobs(
            *(logits, num_rows, self._wanted, idx_mapping, sampled),
            *(ids, values, ranks, self._logprobs_scratch),
        )

    def warm(self, logits: torch.Tensor) -> None:
        """Compile all that serving launches for logits like these."""
        self.warmed = True
        none = torch.zeros_like(self.no_end)
        first, row = logits[:1], self.each[:1]
        token = torch.zeros_like(row)
        for filters in (False, True):
            self.draw(first, none, row, row, row, token, filters=filters)
        scores = torch.zeros(1, 2, dtype=torch.float32, device=token.device)
        ids = torch.zeros_like(scores, dtype=torch.int64)
        self.logprobs(first, none, row, token, ids, scores, token)
        bin_counts.bits_of_counts(none, row, self.requests, self.vocab_size)
        bin_counts.bits_of_lists(row, self.requests, self.vocab_size)


def _refusal(sampler: Sampler) -> str | None:
    """Why steps of ``sampler`` are never ours, if so."""
    if type(sampler) is not Sampler:
        return "watermarking, or a sampler of the model's own"
    if tuple(map(type, sampler.logits_processors)) != OWN_PROCESSORS:
        return "custom logits processor"
    if sampler.trace_replay_state is not None:
        return "trace replay"
    if sampler.return_sampling_mask:
        return "sampling mask"
    if sampler.use_fp64_gumbel:
        return "noise in float64"
    if sampler.compute_nans:
        return "counting NaN in logits"
    if sampler.req_states.vocab_size > top_k_top_p.MAX_VOCABULARY:
        return "too large a vocabulary"
    return None
