"""A batch of requests with top-k and top-p, for vLLM's sampler and for ours."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from sampling_batch import Request, every_kind, ours

from vllm_ext.kernels import sample as plain
from vllm_ext.kernels import top_k_top_p

TILE, GROUP, CANDIDATES = 64, 16, 32  # small, to have every edge in few tokens
MARGIN = 2e-6
"""How close to ``p`` the mass before a token may be for float32 to say otherwise."""


@dataclasses.dataclass
class Filtered(Request):
    """A `Request` with the rest of vLLM's ``SamplingParams`` that choose tokens."""

    top_k: int = 0
    top_p: float = 1.0


def every_filter(vocab_size: int) -> list[Filtered]:
    """Each filter alone and with others, at every edge of ``k`` and ``p``, among rows
    that have none and rows with each feature of ``sample``."""
    filters: list[dict[str, Any]] = [
        *({"top_k": k} for k in (1, 2, 5, 20, CANDIDATES + 1, vocab_size // 2)),
        *({"top_k": k} for k in (vocab_size - 1, vocab_size, vocab_size + 7)),
        *({"top_p": p} for p in (1e-9, 0.1, 0.5, 0.9, 0.999, 1 - 2**-24)),
        *({"top_k": k, "top_p": 0.8} for k in (1, 3, 20, CANDIDATES + 9)),
        {"top_k": vocab_size - 1, "top_p": 0.95},
        {"top_k": 20, "min_p": 0.1},
        {"top_p": 0.7, "min_p": 0.05},
        {"top_p": 0.7, "min_p": 1e-6},
        {"top_p": 0.9, "top_k": 10, "min_p": 0.02},
        {"top_p": 0.9, "top_k": 60, "min_p": 1e-7},
        {"min_p": 0.2},
    ]
    temperatures = (1.0, 0.7, 1.3)
    batch = [
        Filtered(temperature=temperatures[i % 3], seed=i * 7919, **each)
        for i, each in enumerate(filters)
    ]
    for i, request in enumerate(every_kind(vocab_size)):
        fields = {f.name: getattr(request, f.name) for f in dataclasses.fields(request)}
        each = ({"top_k": 4}, {"top_p": 0.8}, {"top_k": 9, "top_p": 0.9}, {})[i % 4]
        batch.append(Filtered(**fields, **each))
    return batch


def asked(batch: list[Filtered], vocab_size: int, device: Any) -> plain.Requests:
    """``Requests`` of a batch, seat by seat."""
    requests = ours(plain, batch, vocab_size, "cpu")
    for seat, request in enumerate(batch):
        requests.params[seat] = top_k_top_p.pack(
            top_k=request.top_k,
            top_p=request.top_p,
            temperature=request.temperature,
            seed=request.seed,
            min_p=request.min_p,
            repetition_penalty=request.repetition_penalty,
            frequency_penalty=request.frequency_penalty,
            presence_penalty=request.presence_penalty,
            listed=int(requests.params[seat, plain._LISTED.value]),
            only_listed=len(request.allowed_token_ids) > 0,
            min_length=request.min_length,
        )
    moved = {
        field.name: getattr(requests, field.name).to(device)
        for field in dataclasses.fields(requests)
    }
    return plain.Requests(**moved)


def scratch_for(
    rows: int, vocab_size: int, device: Any, module: Any = top_k_top_p, **options: Any
) -> Any:
    options = {"tile": TILE, "group": GROUP, "candidates": CANDIDATES, **options}
    options.setdefault("programs", 3 * max(rows, 1))
    return module.make_scratch(max(rows, 1), vocab_size, device, **options)


def arguments(
    logits: torch.Tensor,
    batch: list[Filtered],
    *,
    seats: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    rows: int | None = None,
) -> tuple[Any, ...]:
    """Of the launcher and of the reference, up to ``out``."""
    device = logits.device
    each = torch.arange(len(logits))
    number = torch.tensor([len(logits) if rows is None else rows], dtype=torch.int32)
    seats = each.to(torch.int32) if seats is None else seats
    positions = each * 5 + 3 if positions is None else positions
    return (
        logits,
        number.to(device),
        asked(batch, logits.shape[1], device),
        seats.to(device),
        positions.to(device),
        each.to(device),
    )


def run(
    logits: torch.Tensor,
    batch: list[Filtered],
    fenced: Any,
    *,
    module: Any = top_k_top_p,
    seats: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    rows: int | None = None,
    **options: Any,
) -> torch.Tensor:
    """Tokens of a launch on ``logits``; seats and positions as they come."""
    given = arguments(logits, batch, seats=seats, positions=positions, rows=rows)
    scratch = scratch_for(*logits.shape, logits.device, module, **options)
    tokens = module.sample_top_k_top_p(*given, fenced(len(logits)), scratch)
    assert not scratch.arrived.any(), "counters are not as they were"
    return tokens


def reference(
    logits: torch.Tensor, batch: list[Filtered], fenced: Any, **given: Any
) -> torch.Tensor:
    """What the reference draws."""
    return top_k_top_p.sample_top_k_top_p_reference(
        *arguments(logits, batch, **given), fenced(len(logits))
    )


def undecided(y: torch.Tensor, k: int, p: float) -> bool:
    """Whether the end of what top-p keeps is closer than `MARGIN` in float64.

    ``y``: ``[V]``, a row as it is when probabilities are made of it.
    """
    x = y.double().sort(descending=True).values[:k]
    weights = torch.where(x == x[0], 1.0, (x - x[0]).exp()).nan_to_num(0.0)
    before = (weights.cumsum(0) - weights)[1:] / weights.sum()
    return p < 1.0 and bool(((before - p).abs() < MARGIN).any())
