"""Logprobs of tokens that were drawn, their ranks and the five likeliest tokens.

With the drawing of the tokens they are in bench_sample.py.
"""

from collections.abc import Callable
from typing import Any

import torch

from vllm_ext.kernels import logprobs
from vllm_ext.microbench import reference, shapes, stock
from vllm_ext.microbench.measure import Provider
from vllm_ext.microbench.shapes import Case

# Logprobs ``[batch, 1 + n]``, token ids of the same shape, ranks ``[batch]``.
Found = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

MODES = ("logprobs",)
DTYPES = ("bf16", "fp32")


def _number(case: Case) -> int:
    return case.sampling.logprobs or 0


def _drawn(case: Case, device: str) -> torch.Tensor:
    """Tokens as good as any: what is read does not depend on them."""
    return torch.arange(case.batch, device=device) * 31 % case.vocabulary


def stock_v2(case: Case, device: str) -> Provider:
    """Model Runner V2."""
    stock.need_vllm()
    from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores

    number, sampled = _number(case), _drawn(case, device)

    def call(logits: torch.Tensor) -> Found:
        found = compute_topk_scores(logits, number, sampled)
        return found.logprobs, found.logprob_token_ids, found.selected_token_ranks

    return Provider(call)


def plain(case: Case, device: str) -> Provider:
    """PyTorch: a softmax, a gather, a top-k and a count."""
    number, sampled = _number(case), _drawn(case, device)[:, None]

    def call(logits: torch.Tensor) -> Found:
        ids = torch.cat((sampled, logits.topk(number).indices), dim=1)
        ranks = (logits >= logits.gather(1, sampled)).sum(1)
        return logits.float().log_softmax(1).gather(1, ids), ids, ranks

    return Provider(call)


def ours(case: Case, device: str) -> Provider:
    """`vllm_ext.kernels.logprobs`."""
    rows, columns = case.batch, 1 + _number(case)
    wanted = torch.full((rows,), columns - 1, dtype=torch.int32, device=device)
    number = torch.tensor([rows], dtype=torch.int32, device=device)
    seats = torch.arange(rows, dtype=torch.int32, device=device)
    scratch = logprobs.make_scratch(rows, case.vocabulary, device)
    sampled = _drawn(case, device)

    def call(logits: torch.Tensor) -> Found:
        # The caller keeps what a replay wrote, so each call has its own.
        found = torch.empty(rows, columns, dtype=torch.float32, device=device)
        ids = torch.empty(rows, columns, dtype=torch.int64, device=device)
        ranks = torch.empty(rows, dtype=torch.int64, device=device)
        logprobs.logprobs(
            *(logits, number, wanted, seats, sampled, ids, found, ranks), scratch
        )
        return found, ids, ranks

    return Provider(call)


PROVIDERS = {"stock": stock_v2, "torch": plain, "ours": ours}


def bench_logprobs(measure: Callable[..., None], case: Case, provider: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def right(args: tuple[torch.Tensor], found: Found) -> None:
        [logits], (values, ids, ranks) = args, found
        tokens = _drawn(case, device)
        reference.check_logprobs(logits, tokens, values, _number(case))
        # Triton's interpreter compares bf16 by their bits, as stock's kernel does not.
        interpreted = device == "cpu" and provider == "stock" and case.dtype == "bf16"
        reference.check_ids_and_ranks(
            logits, tokens, values, ids, None if interpreted else ranks
        )

    def check(prepared: Any) -> None:
        args = (shapes.logits(case, 0, device),)
        right(args, prepared.call(*args))

    measure(
        provider,
        PROVIDERS,
        case,
        make_args=lambda number: (shapes.logits(case, number, device),),
        check=check,
        check_replay=right,
        set_bytes=case.logits_bytes,
        moved_bytes=case.logits_bytes,
    )
