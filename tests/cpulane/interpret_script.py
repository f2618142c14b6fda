"""Run in a process of the lane: small kernels whose results depend on its changes."""

import torch
import triton
import triton.language as tl

from vllm_ext_cpulane.engine import report
from vllm_ext_cpulane.hook import platform_hook

platform_hook()


@triton.jit
def _loop_kernel(out_ptr, start, stop, STEP: tl.constexpr):
    at = 0
    for i in range(start, stop, STEP):
        tl.store(out_ptr + at, (i // 2).to(tl.int64))
        at += 1
    for i in tl.range(3):
        tl.store(out_ptr + at, i.to(tl.int64))
        at += 1
    for i in tl.static_range(2):
        tl.store(out_ptr + at, tl.full((), i, tl.int64))
        at += 1


@triton.jit
def _wide_loop_kernel(out_ptr, bound_ptr):
    bound = tl.load(bound_ptr)
    for i in range(bound, bound + 1):
        tl.store(out_ptr, i * 2)


@triton.jit
def _narrow_loop_kernel(out_ptr, bound):
    for i in range(bound, bound + 1):
        tl.store(out_ptr, (i * 2).to(tl.int64))


def loop() -> list[int]:
    out = torch.full((8,), -99)
    _loop_kernel[(1,)](out, -3, 2, STEP=2)
    return out.tolist()


def doubled(bound: torch.Tensor | int) -> int:
    out = torch.zeros(1, dtype=torch.int64)
    kernel = (
        _wide_loop_kernel if isinstance(bound, torch.Tensor) else _narrow_loop_kernel
    )
    kernel[(1,)](out, bound)
    return out.item()


report(
    {
        "loop": loop(),
        "wide": doubled(torch.tensor([2**30])),
        "narrow": doubled(2**30),
    }
)
