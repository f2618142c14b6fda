"""The compiler fuses in ``sample`` what it fuses in vLLM's kernels, and nothing else.

A product and a sum that are fused round once instead of twice, which the interpreter
does not do and which depends on what stands around them.
"""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from vllm_ext_cpulane.engine import run_script
from vllm_ext_cpulane.environment import lane_environment

SCRIPT = Path(__file__).with_name("fusion_script.py")
OURS = "_sample_kernel"
PENALTIES, NOISE = "_penalties_kernel", "_gumbel_sample_kernel"

# What is computed: the line of ours, the kernel and the line of vLLM's.
LINES = {
    "repetition": (
        "x *= tl.where(x > 0, 1.0 / scale, scale)",
        *(PENALTIES, "logits *= tl.where(logits > 0, 1.0 / scale, scale)"),
    ),
    "frequency": (
        *("x -= frequency * counts", PENALTIES),
        "logits -= freq_penalty * output_bin_counts",
    ),
    "presence": (
        *("x -= presence * (counts > 0)", PENALTIES),
        "logits -= pres_penalty * output_bin_mask",
    ),
    "temperature": (
        *("x = x / temperature", "_temperature_kernel"),
        "logits = logits / temperature",
    ),
    "the sum of logit and noise": (
        *("scores = _over(x, temperature) + _noise(h)", NOISE),
        'logits = tl.where(mask, logits + gumbel_noise, float("-inf"))',
    ),
    "logarithm near one": (
        "far = tl.log(tl.maximum(1.0 - u, 5.960464477539063e-08))",
        *(NOISE, "direct = tl.log(tl.maximum(1.0 - value, 5.960464477539063e-08))"),
    ),
}


# Constants of the noise: of a hash as a float, and of the series.
HASH = (2.0**-16, 2.0**-32)
SERIES = tuple(1 / n for n in range(1, 8))


@pytest.fixture(scope="module")
def found():
    return run_script(SCRIPT, lane_environment("discard"))


@pytest.mark.parametrize("what", LINES)
def test_is_fused_as_in_stock(what, found):
    line, kernel, stock = LINES[what]
    assert found[OURS][line] == found[kernel][stock]


def test_the_noise_is_fused_as_in_stock(found):
    """By constants: the compiler does not say of each product which line it is from."""
    constants = {
        "0f" + struct.pack(">f", value).hex().upper() for value in HASH + SERIES
    }

    def fused(kernel: str) -> set[str]:
        kinds = {kind for line in found[kernel].values() for kind in line}
        return {
            kind
            for kind in kinds
            if kind.startswith(("fma", "mul")) and constants & {*kind.split()}
        }

    assert fused(OURS) == fused(NOISE)
    assert len(fused(NOISE)) == len(constants)
