"""Kernels that get worse, each in one way, when ``PLANTED`` is set in the environment.

Their signatures stay the same, as they would when somebody edits a body.
"""

import os

import torch
import triton
import triton.language as tl

WORSE = tl.constexpr("PLANTED" in os.environ)
TILE = tl.constexpr(1024)


@triton.jit
def _steady_kernel(x_ptr, out_ptr):
    at = tl.arange(0, TILE)
    tl.store(out_ptr + at, tl.load(x_ptr + at) + 1)


@triton.jit
def _spilling_kernel(x_ptr, out_ptr):
    """Worse: every element of a tile 16 times as large is alive across a sum."""
    at = tl.arange(0, TILE * 32 if WORSE else TILE)
    x = tl.load(x_ptr + at)
    tl.store(out_ptr + at, x / tl.sum(x))


@triton.jit
def _narrow_kernel(x_ptr, out_ptr):
    """Worse: every second element is loaded."""
    at = tl.arange(0, TILE)
    tl.store(out_ptr + at, tl.load(x_ptr + at * (2 if WORSE else 1)))


@triton.jit
def _shared_kernel(x_ptr, out_ptr):
    """Worse: a tile is sorted, where its sum would do."""
    x = tl.load(x_ptr + tl.arange(0, TILE))
    if WORSE:
        x = tl.sort(x)
    tl.store(out_ptr, tl.sum(x))


@triton.jit
def _ordered_kernel(x_ptr, y_ptr, z_ptr, out_ptr):
    """Worse: it adds before it multiplies."""
    at = tl.arange(0, TILE)
    x, y, z = tl.load(x_ptr + at), tl.load(y_ptr + at), tl.load(z_ptr + at)
    tl.store(out_ptr + at, (x + z) * y if WORSE else x * y + z)


@triton.jit
def _uncompilable_kernel(x_ptr, out_ptr):
    """Worse: it rounds to a type that sm_80 does not have."""
    at = tl.arange(0, TILE)
    x = tl.load(x_ptr + at)
    if WORSE:
        x = x.to(tl.float8e4nv).to(tl.float32)
    tl.store(out_ptr + at, x)


@triton.jit
def _misaligned_kernel(x_ptr, out_ptr):
    """Worse: it is launched with memory that begins at an odd place."""
    at = tl.arange(0, TILE)
    tl.store(out_ptr + at, tl.load(x_ptr + at))


@triton.jit
def _fused_kernel(x_ptr, y_ptr, z_ptr, out_ptr):
    at = tl.arange(0, TILE)
    x, y, z = tl.load(x_ptr + at), tl.load(y_ptr + at), tl.load(z_ptr + at)
    tl.store(out_ptr + at, x * y + z)


@triton.jit
def _old_kernel(x_ptr, pairs, SCALE: tl.constexpr):
    tl.store(x_ptr, pairs[0] + pairs[1] * SCALE)


@triton.jit
def _new_kernel(x_ptr):
    tl.store(x_ptr, 1.0)


def warm(max_rows: int, vocab_size: int, device: torch.device) -> None:
    x, y, z, out = torch.zeros(4, 64 * TILE.value, device=device)
    one_program = (1,)
    _steady_kernel[one_program](x, out)
    _steady_kernel[one_program](x, out)
    _spilling_kernel[one_program](x, out)
    _narrow_kernel[one_program](x, out, num_warps=2)
    _shared_kernel[one_program](x, out)
    _ordered_kernel[one_program](x, y, z, out)
    _uncompilable_kernel[one_program](x, out)
    _misaligned_kernel[one_program](x[1:] if WORSE else x, out)
    for fusion in (True, False):
        _fused_kernel.warmup(x, y, z, out, grid=one_program, enable_fp_fusion=fusion)
    if WORSE:
        _new_kernel[one_program](x)
    else:
        _old_kernel[one_program](x, (max_rows, vocab_size), SCALE=2)
