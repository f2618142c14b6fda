"""A batch of requests in vLLM's terms, for vLLM's sampler and for ours."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from vllm_ext.kernels import sample

MOST_LISTED, MOST_STOPS = 48, 16
TILE = 64  # small, so that a few hundred tokens have every kind of edge
WIDTH = 5 * TILE + 9
INF = float("inf")
KINDS = [
    *("normal", "one stands out", "ties", "nearly flat", "all equal"),
    *("all but a few masked", "all but one masked", "all masked", "large", "largest"),
    *("infinite", "denormal", "ascending", "descending"),
]


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


def every_kind(vocab_size: int) -> list[Request]:
    """Requests with each feature, alone and with others, in one batch.

    At position ``5 * row + 3``, one is a token before its minimum length, one is at it.
    """
    some = [t % vocab_size for t in (0, 3, 64, 65, 130, vocab_size - 1, 3)]
    few = list(dict.fromkeys(some))
    half = range(0, vocab_size, 2)
    bias = {t: 4.0 - 1.5 * i for i, t in enumerate(few)}
    often = [t for t in range(vocab_size) for _ in range(t % 4)]
    pushed = dict.fromkeys(few, 9.0)
    heavy = {"repetition_penalty": 10.0, "prompt": half, "output": some}
    light = {"repetition_penalty": 0.01, "prompt": some[:3], "output": some[2:]}
    return [
        Request(),
        Request(temperature=1.0, seed=1),
        Request(temperature=0.7, seed=-(2**63)),
        Request(temperature=0.8, seed=2**63 - 1, min_p=0.1),
        Request(temperature=1.0, seed=5, min_p=1.0),
        Request(**heavy),
        Request(temperature=0.9, seed=6, **light),
        Request(frequency_penalty=0.5, presence_penalty=-0.7, output=often),
        Request(temperature=0.6, seed=7, min_p=0.3, presence_penalty=2.0, output=often),
        Request(logit_bias=bias),
        Request(temperature=1.2, seed=8, logit_bias=bias, min_p=0.05),
        Request(temperature=1.1, seed=9, allowed_token_ids=few),
        Request(allowed_token_ids=few, logit_bias=bias, stop_token_ids=few[:1]),
        Request(1.5, 10, logit_bias=pushed, stop_token_ids=few, min_length=70),
        Request(stop_token_ids=few, min_length=1000, logit_bias=bias, **light),
        Request(1.5, 11, logit_bias=pushed, stop_token_ids=few, min_length=79),
        Request(temperature=0.5, min_p=0.2, allowed_token_ids=few, **light),
        Request(temperature=2.0, seed=12, min_p=1e-6, stop_token_ids=few),
    ]


def logits_of(kind: str, rows: int, vocab_size: int, seed: int = 0) -> torch.Tensor:
    """Random and adversarial logits, float32."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, vocab_size, generator=generator)
    each = torch.arange(rows)
    if kind == "one stands out":
        x[each, torch.randint(vocab_size, (rows,), generator=generator)] += 12
    elif kind == "ties":
        x = (x * 2).round()
    elif kind == "nearly flat":
        x *= 0.05
    elif kind == "all equal":
        x = torch.full_like(x, 1.5)
    elif kind == "all but a few masked":
        x[torch.rand(rows, vocab_size, generator=generator) < 0.97] = -INF
    elif kind == "all but one masked":
        x = torch.full_like(x, -INF)
        x[each, each * 31 % vocab_size] = -3.0
    elif kind == "all masked":
        x = torch.full_like(x, -INF)
    elif kind == "large":
        x *= 3000
    elif kind == "largest":
        x = x.sign() * 3.0e38
    elif kind == "infinite":
        x[each, (each * 17 + 5) % vocab_size] = INF
        x[each, each % vocab_size] = INF
    elif kind == "denormal":
        x *= 1e-40
    elif kind == "ascending":
        x = x.sort(dim=1).values
    elif kind == "descending":
        x = x.sort(dim=1, descending=True).values
    else:
        assert kind == "normal"
        x *= 2.5
    return x


def run(
    logits: torch.Tensor,
    batch: list[Request],
    fenced: Any,
    *,
    seats: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    rows: int | None = None,
    module: Any = sample,
    **options: Any,
) -> torch.Tensor:
    """Tokens of a launch on ``logits``; seats and positions as they come."""
    device = logits.device
    options = {"tile": TILE, "programs": 3 * len(logits), **options}
    if seats is None:
        seats = torch.arange(len(logits), dtype=torch.int32)
    if positions is None:
        positions = torch.arange(len(logits)) * 5 + 3
    return module.sample(
        logits,
        torch.tensor([len(logits) if rows is None else rows], dtype=torch.int32).to(
            device
        ),
        ours(module, batch, logits.shape[1], device),
        seats.to(device),
        positions.to(device),
        torch.arange(len(logits)).to(device),
        fenced(len(logits)),
        module.make_scratch(len(logits), logits.shape[1], device, **options),
    )


def reference(
    logits: torch.Tensor,
    batch: list[Request],
    fenced: Any,
    *,
    seats: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """What the reference draws."""
    device = logits.device
    each = torch.arange(len(logits), device=device)
    return sample.sample_reference(
        logits,
        torch.tensor([len(logits)], device=device),
        ours(sample, batch, logits.shape[1], device),
        each if seats is None else seats.to(device),
        each * 5 + 3 if positions is None else positions.to(device),
        each,
        fenced(len(logits)),
    )
