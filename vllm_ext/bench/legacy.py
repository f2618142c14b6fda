"""Reproduction only: repetition penalties as vLLM applied them in early 2025.

``vllm-ext bench linkedin`` puts one of these into an engine of its own, to show what
vLLM's pull request #16436 gained. They are never part of a patch and are not installed
into an engine that serves. The arithmetic is restated from the pull request's
description: a positive logit of a token that was seen is divided by the penalty, any
other multiplied.
"""

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Penalties = Callable[
    ["torch.Tensor", "torch.Tensor", "torch.Tensor", "torch.Tensor"], None
]


def boolean(
    logits: "torch.Tensor",
    prompt_mask: "torch.Tensor",
    output_mask: "torch.Tensor",
    repetition_penalties: "torch.Tensor",
) -> None:
    """By boolean indices, of which each makes the host wait for the device.

    How many elements an index chooses is known to the device alone: six times in this
    function the host waits for all work before it, to learn the size of a tensor.

    Args:
        logits: ``[requests, vocabulary]``, changed in place.
        prompt_mask: ``[requests, vocabulary]`` bool, tokens of the prompt.
        output_mask: ``[requests, vocabulary]`` bool, tokens that were generated.
        repetition_penalties: ``[requests]``, above zero.
    """
    factor = _factor(prompt_mask, output_mask, repetition_penalties)
    above = logits > 0
    logits[above] = logits[above] / factor[above]
    other = ~above
    logits[other] = logits[other] * factor[other]


def where(
    logits: "torch.Tensor",
    prompt_mask: "torch.Tensor",
    output_mask: "torch.Tensor",
    repetition_penalties: "torch.Tensor",
) -> None:
    """By ``torch.where``: no sizes that depend on data, nothing to wait for."""
    import torch

    factor = _factor(prompt_mask, output_mask, repetition_penalties)
    logits *= torch.where(logits > 0, 1.0 / factor, factor)


def _factor(
    prompt_mask: "torch.Tensor", output_mask: "torch.Tensor", penalties: "torch.Tensor"
) -> "torch.Tensor":
    import torch

    return torch.where(prompt_mask | output_mask, penalties[:, None], 1.0)


FORMS: dict[str, Penalties] = {"boolean": boolean, "where": where}


CALLS: Counter[str] = Counter()  # of what `put_in_place` put there


def put_in_place(name: str) -> None:
    """Let engines of this process apply penalties in the way of that ``name``.

    Model Runner V1 alone goes through what is replaced.
    """
    from vllm import _custom_ops

    form = FORMS[name]

    def counted(*tensors: "torch.Tensor") -> None:
        CALLS[name] += 1
        form(*tensors)

    _custom_ops.apply_repetition_penalties = counted
