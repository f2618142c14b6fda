"""Masking all but the tokens that top-k and top-p keep, for those who need the logits.

The logits are fp32, as vLLM has them there. Masking is done in place, and what is
masked keeps less when it is masked again, so each call masks a copy: every figure has
the copy in it. Sampling with top-k and top-p is in bench_sample.py.
"""

from collections.abc import Callable

import torch

from vllm_ext.kernels import top_k_top_p
from vllm_ext.microbench import shapes, stock
from vllm_ext.microbench.measure import Provider
from vllm_ext.microbench.shapes import Case

MODES = ("top-k+top-p",)
DTYPES = ("fp32",)

MARGIN = 2e-6  # of probability: closer to p than this float32 may say otherwise

Mask = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _masking(case: Case, device: str, mask: Mask) -> Provider:
    rows, sampling = case.batch, case.sampling
    k = torch.full((rows,), sampling.top_k, dtype=torch.int32, device=device)
    p = torch.full((rows,), sampling.top_p, device=device)
    return Provider(lambda logits: mask(logits.clone(), k, p))


def stock_triton(case: Case, device: str) -> Provider:
    """Model Runner V2 without FlashInfer."""
    stock.need_vllm()
    from vllm.v1.sample.ops.topk_topp_triton import apply_top_k_top_p_triton

    return _masking(case, device, apply_top_k_top_p_triton)


def stock_sort(case: Case, device: str) -> Provider:
    """vLLM's PyTorch form, which sorts."""
    stock.need_vllm()
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch

    return _masking(case, device, apply_top_k_top_p_pytorch)


def ours(case: Case, device: str) -> Provider:
    """`vllm_ext.kernels.top_k_top_p.mask_top_k_top_p`."""
    scratch = top_k_top_p.make_scratch(case.batch, case.vocabulary, device)
    return _masking(
        case,
        device,
        lambda logits, k, p: top_k_top_p.mask_top_k_top_p(logits, k, p, scratch),
    )


PROVIDERS = {"stock": stock_triton, "torch.sort": stock_sort, "ours": ours}


def bench_top_k_top_p(measure: Callable[..., None], case: Case, provider: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    measure(
        provider,
        PROVIDERS,
        case,
        make_args=lambda number: (shapes.logits(case, number, device),),
        check=lambda prepared: check(case, prepared, device),
        set_bytes=case.logits_bytes,
        # The copy reads and writes; masking reads, and writes what is not kept.
        moved_bytes=4 * case.logits_bytes,
    )


def check(case: Case, provider: Provider, device: str) -> None:
    """Compare what is kept with a sort in float64.

    The order of equal logits is not compared: vLLM's two forms differ in it.

    Raises:
        AssertionError: A row keeps another number of tokens, or others.
    """
    logits = shapes.logits(case, 0, device)
    masked = provider.call(logits)
    k, p = case.sampling.top_k, case.sampling.top_p
    for row, (before, after) in enumerate(zip(logits, masked, strict=True)):
        x = before.double().sort(descending=True).values[:k]
        shares = x.softmax(0)
        ahead = shares.cumsum(0) - shares
        kept = after[after > -float("inf")].double().sort(descending=True).values
        exact = ((ahead[1:] - p).abs() >= MARGIN).all() and (x[1:] < x[:-1]).all()
        if exact:
            expected = x[ahead < p]
            assert torch.equal(kept, expected), f"row {row} keeps other tokens"
