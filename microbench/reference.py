"""What a sampler has to give, from the definitions, in float64.

Competitors draw from different random numbers, so their tokens are judged by the set
they may come from and by how often the likeliest is drawn. Who claims stock's own
tokens is tested for that with the kernels.
"""

import math

import torch

from vllm_ext.microbench.shapes import Sampling

# A kept set has a border, on which float32 sums and equal logits decide; tokens within
# this distance of it, in units of a logit, may be kept or not.
BORDER = 2e-3
FALSE_ALARM = 1e-6  # of the test how often the likeliest token is drawn
LOGPROB_ERROR = 1e-4


def penalized(
    logits: torch.Tensor,
    prompt_mask: torch.Tensor,
    output_counts: torch.Tensor,
    sampling: Sampling,
) -> torch.Tensor:
    """``[batch, vocabulary]`` with penalties, in the dtype of ``logits``.

    Repetition is that of the CTRL paper, presence and frequency are OpenAI's.
    """
    appeared = output_counts > 0
    factor = torch.where(prompt_mask | appeared, sampling.repetition, 1.0).to(
        logits.dtype
    )
    scaled = torch.where(logits > 0, logits / factor, logits * factor)
    taken = sampling.frequency * output_counts + sampling.presence * appeared
    return scaled - taken.to(logits.dtype)


def distribution(
    logits: torch.Tensor,
    sampling: Sampling,
    seen: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What each token's probability is, and which tokens may be drawn.

    Args:
        logits: ``[batch, vocabulary]``.
        sampling: Of all rows.
        seen: `shapes.seen`, when there are penalties.

    Returns:
        ``[batch, vocabulary]`` float64, rows that add up to one; and the same shape in
        bool, which also holds the tokens on the border.
    """
    values = logits.double()
    if sampling.penalizes:
        assert seen is not None
        values = penalized(values, *seen, sampling)
    if sampling.temperature == 0:
        best = values == values.max(dim=-1, keepdim=True).values
        return best / best.sum(dim=-1, keepdim=True), best
    values = values / sampling.temperature
    kept = torch.ones_like(values, dtype=torch.bool)
    if sampling.min_p:
        top = values.max(dim=-1, keepdim=True).values
        kept &= values >= top + math.log(sampling.min_p)
    if sampling.top_k:
        least = values.topk(sampling.top_k, dim=-1).values[:, -1:]
        kept &= values >= least
    if sampling.top_p < 1:
        masked = values.masked_fill(~kept, -math.inf)
        ordered = masked.sort(dim=-1, descending=True)
        shares = ordered.values.softmax(dim=-1)
        before = shares.cumsum(dim=-1) - shares
        kept &= torch.zeros_like(kept).scatter(
            -1, ordered.indices, before < sampling.top_p
        )
    probabilities = values.masked_fill(~kept, -math.inf).softmax(dim=-1)
    least = values.masked_fill(~kept, math.inf).min(dim=-1, keepdim=True).values
    return probabilities, values >= least - BORDER


class Draws:
    """Judges tokens that were drawn from one batch of logits, again and again."""

    def __init__(self, probabilities: torch.Tensor, allowed: torch.Tensor) -> None:
        self._allowed = allowed
        self._top = probabilities.max(dim=-1)
        self._hits = 0
        self._number = 0

    def add(self, tokens: torch.Tensor) -> None:
        """One draw of each row.

        Raises:
            AssertionError: A token that no row may draw.
        """
        tokens = tokens.reshape(-1).long()
        rows, width = self._allowed.shape
        assert tokens.shape == (rows,), f"{tuple(tokens.shape)} tokens for {rows} rows"
        inside = (tokens >= 0) & (tokens < width)
        assert bool(inside.all()), f"token {tokens[~inside][0].item()} does not exist"
        fine = self._allowed.gather(1, tokens[:, None])[:, 0]
        if not bool(fine.all()):
            row = int((~fine).nonzero()[0])
            raise AssertionError(
                f"row {row} drew token {tokens[row].item()}, which is not kept"
            )
        self._hits += int((tokens == self._top.indices).sum())
        self._number += rows

    def judge(self) -> None:
        """Whether the likeliest tokens came as often as they should.

        By Hoeffding's inequality, wrong about one of a million sound samplers.

        Raises:
            AssertionError: They did not.
        """
        expected = float(self._top.values.mean()) * self._number
        slack = math.sqrt(self._number / 2 * math.log(2 / FALSE_ALARM))
        assert abs(self._hits - expected) <= slack, (
            f"of {self._number} draws {self._hits} gave the likeliest token, "
            f"expected {expected:.0f} +- {slack:.0f}"
        )


def check_logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, found: torch.Tensor, number: int
) -> None:
    """Raw logprobs: of the drawn token, then of the ``number`` likeliest.

    Args:
        logits: ``[batch, vocabulary]``.
        tokens: ``[batch]``, drawn.
        found: ``[batch, 1 + number]``; the order of equal tokens is free.

    Raises:
        AssertionError: They are further off than 1e-4 of themselves.
    """
    exact = logits.double().log_softmax(dim=-1)
    drawn = exact.gather(1, tokens.reshape(-1, 1).long())
    expected = torch.cat((drawn, exact.topk(number, dim=-1).values), dim=1)
    assert found.shape == expected.shape, f"{tuple(found.shape)} logprobs"
    error = (found.double() - expected).abs() / (1 + expected.abs())
    assert float(error.max()) <= LOGPROB_ERROR, (
        f"a logprob is off by {float(error.max()):.1e} of itself"
    )


def check_ids_and_ranks(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    values: torch.Tensor,
    ids: torch.Tensor,
    ranks: torch.Tensor | None,
) -> None:
    """Token ids that have those logprobs, and how many tokens are as likely or more.

    Args:
        logits: ``[batch, vocabulary]``.
        tokens: ``[batch]``, drawn.
        values: ``[batch, 1 + n]`` logprobs, right.
        ids: ``[batch, 1 + n]``; the first is the drawn token.
        ranks: ``[batch]``, from 1; ``None`` where they are not known.

    Raises:
        AssertionError: One is wrong, or named twice.
    """
    exact = logits.double().log_softmax(dim=-1)
    assert torch.equal(ids[:, 0].long(), tokens.long()), "not the drawn tokens' ids"
    error = (exact.gather(1, ids.long()) - values.double()).abs()
    error /= 1 + values.double().abs()
    assert float(error.max()) <= LOGPROB_ERROR, "an id is not of its logprob"
    for row in ids[:, 1:].tolist():
        assert len(set(row)) == len(row), "a token is named twice"
    if ranks is None:
        return
    drawn = logits.gather(1, tokens.reshape(-1, 1).long())
    expected = (logits >= drawn).sum(dim=1)
    assert torch.equal(ranks.long(), expected), "a rank is wrong"
