"""A batch of requests in vLLM's terms, for vLLM's sampler and for ours."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

MOST_LISTED, MOST_STOPS = 48, 16


@dataclasses.dataclass
class Request:
    """What a request asks for; names as in vLLM's ``SamplingParams``."""

    temperature: float = 0.0
    seed: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[int, float] = dataclasses.field(default_factory=dict)
    allowed_token_ids: Sequence[int] = ()
    stop_token_ids: Sequence[int] = ()
    min_length: int = 0  # of prompt and output together
    prompt: Sequence[int] = ()
    output: Sequence[int] = ()


def packed(rows: list[set[int]], vocab_size: int) -> torch.Tensor:
    """Sets of tokens as planes of bits, int32 words."""
    words = torch.zeros(len(rows), -(-vocab_size // 32), dtype=torch.int64)
    for row, tokens in enumerate(rows):
        for token in tokens:
            words[row, token // 32] += 1 << token % 32
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def ours(module: Any, batch: list[Request], vocab_size: int, device: Any) -> Any:
    """A ``Requests`` of the module ``vllm_ext.kernels.sample``, seat by seat."""
    state = module.make_requests(len(batch), vocab_size, "cpu", MOST_LISTED)
    listed = []
    for seat, request in enumerate(batch):
        ids, bias = module.entries(
            request.logit_bias, request.allowed_token_ids, request.stop_token_ids
        )
        state.listed[seat, : len(ids)] = ids
        state.bias[seat, : len(ids)] = bias
        listed.append({int(i) % module.STOP for i in ids})
        for token in request.output:
            state.output_counts[seat, token] += 1
        state.params[seat] = module.pack(
            temperature=request.temperature,
            seed=request.seed,
            min_p=request.min_p,
            repetition_penalty=request.repetition_penalty,
            frequency_penalty=request.frequency_penalty,
            presence_penalty=request.presence_penalty,
            listed=len(ids),
            only_listed=len(request.allowed_token_ids) > 0,
            min_length=request.min_length,
        )
    planes = {
        "prompt_bits": [{*request.prompt} for request in batch],
        "output_bits": [{*request.output} for request in batch],
        "listed_bits": listed,
    }
    for name, rows in planes.items():
        getattr(state, name).copy_(packed(rows, vocab_size))
    moved = {
        field.name: getattr(state, field.name).to(device)
        for field in dataclasses.fields(state)
    }
    return type(state)(**moved)


def stock_tokens(
    stock: SimpleNamespace,
    logits: torch.Tensor,
    batch: list[Request],
    seats: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """What vLLM's own functions draw, one after the other as its sampler calls them.

    Args:
        stock: These functions by name.
        logits: ``[B, V]``.
        batch: By seat.
        seats: ``[B]``, none negative.
        positions: ``[B]`` int64.
    """
    rows, vocab_size = logits.shape
    device = logits.device
    x = torch.empty(rows, vocab_size, dtype=torch.float32, device=device).copy_(logits)
    integers = {"dtype": torch.int32, "device": device}

    def numbers(name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        values = [getattr(request, name) for request in batch]
        return torch.tensor(values, dtype=dtype, device=device)

    def table(name: str, width: int, dtype: torch.dtype = torch.int32) -> Any:
        values = torch.zeros(len(batch), width, dtype=dtype)
        lengths = torch.zeros(len(batch), dtype=torch.int32)
        for seat, request in enumerate(batch):
            row = getattr(request, name)
            row = [*row.values()] if dtype == torch.float32 else [*row]
            values[seat, : len(row)] = torch.tensor(row, dtype=dtype)
            lengths[seat] = len(row)
        return lengths.to(device), values.to(device)

    num_allowed, allowed = table("allowed_token_ids", MOST_LISTED)
    num_bias, biased = table("logit_bias", MOST_LISTED)
    _, bias = table("logit_bias", MOST_LISTED, torch.float32)
    num_stops, stops = table("stop_token_ids", MOST_STOPS)
    stock.apply_logit_bias(
        *(x, seats, positions, num_allowed, allowed, num_bias, biased, bias),
        *(numbers("min_length", torch.int32), num_stops),
        *(torch.zeros(len(batch), **integers), stops),
    )
    counts = torch.zeros(len(batch), vocab_size, dtype=torch.int32)
    for seat, request in enumerate(batch):
        for token in request.output:
            counts[seat, token] += 1
    stock.apply_penalties(
        *(x, seats, torch.zeros(rows, **integers), torch.zeros(rows, **integers)),
        *(numbers("repetition_penalty"), numbers("frequency_penalty")),
        numbers("presence_penalty"),
        packed([{*request.prompt} for request in batch], vocab_size).to(device),
        counts.to(device),
    )
    stock.apply_temperature(x, seats, numbers("temperature"))
    stock.apply_min_p(x, seats, numbers("min_p"))
    return stock.gumbel_sample(
        *(x, seats, numbers("temperature"), numbers("seed", torch.int64), positions),
        apply_temperature=False,
        is_drafting=False,
    )
