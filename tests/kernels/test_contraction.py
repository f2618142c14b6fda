"""The compiler fuses in our kernels what it fuses in vLLM's, and nothing else.

A product and a sum that are fused round once instead of twice. The interpreter does
not do it, and it depends on what stands around them. So PTX is compared, of each line
that computes what a line of vLLM's does, for each GPU and with fusion on and off: its
default is about to change in Triton. `logprobs` is not here: it adds up in an order of
its own, and its tests state a tolerance.
"""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from vllm_ext_cpulane.engine import run_script
from vllm_ext_cpulane.environment import lane_environment

SCRIPT = Path(__file__).with_name("contraction_script.py")
SAMPLE, FILTERED = "_sample_kernel", "_sample_top_k_top_p_kernel"
PENALTIES, NOISE = "_penalties_kernel", "_gumbel_sample_kernel"
CASES = ["80 1", "90 1", "100 1", "90 0"]  # GPU, and whether fusion is on

# What is computed: the lines of ours, the kernel and the lines of vLLM's.
LINES = {
    "repetition": (
        ["x *= tl.where(x > 0, 1.0 / scale, scale)"],
        *(PENALTIES, ["logits *= tl.where(logits > 0, 1.0 / scale, scale)"]),
    ),
    "frequency": (
        *(["x -= frequency * counts"], PENALTIES),
        ["logits -= freq_penalty * output_bin_counts"],
    ),
    "presence": (
        *(["x -= presence * (counts > 0)"], PENALTIES),
        ["logits -= pres_penalty * output_bin_mask"],
    ),
    "temperature": (
        *(["x = x / temperature"], "_temperature_kernel"),
        ["logits = logits / temperature"],
    ),
    "the sum of logit and noise": (
        [
            "scores = _over(x, temperature) + _noise(h)",
            "x = tl.where(x < threshold, _NEVER, x + _noise(_hash(begun, ids)))",
            "scores = y + _noise(h)",
            "scores = y + _noise(_hash(begun, ids))",
            "scores = _value(key) + _noise(_hash(begun, ids))",
        ],
        *(NOISE, ['logits = tl.where(mask, logits + gumbel_noise, float("-inf"))']),
    ),
    "logarithm near one": (
        ["far = tl.log(tl.maximum(1.0 - u, 5.960464477539063e-08))"],
        *(NOISE, ["direct = tl.log(tl.maximum(1.0 - value, 5.960464477539063e-08))"]),
    ),
    "threshold of min-p": (
        [
            "threshold = _over(peak, temperature) + tl.log(_float(params_ptr, _MIN_P))",
            "threshold = peak + tl.log(_float(params_ptr, _MIN_P))",
        ],
        "_min_p_kernel",
        # The second is where the compiler says that the sum is.
        [
            "threshold = max_val + tl.log(min_p)",
            "for i in range(0, vocab_size, BLOCK_SIZE):",
        ],
    ),
}

# Constants of the noise: of a hash as a float, and of the series.
HASH = (2.0**-16, 2.0**-32)
SERIES = tuple(1 / n for n in range(1, 8))
CONSTANTS = {"0f" + struct.pack(">f", value).hex().upper() for value in HASH + SERIES}


def differences(found):
    """By what is computed, where each kernel's operations are not vLLM's."""
    different = set()
    for case, kernels in found.items():

        def kinds(kernel, lines, kernels=kernels):
            return {kind for line in lines for kind in kernels[kernel].get(line, ())}

        def noise(kernel, kernels=kernels):
            """By constants: which line a product is from, the compiler does not say."""
            return {
                kind
                for line in kernels[kernel].values()
                for kind in line
                if CONSTANTS & {*kind.split()}
            }

        for ours in kernels.keys() & {SAMPLE, FILTERED}:
            for what, (lines, stock, its_lines) in LINES.items():
                expected = kinds(stock, its_lines)
                assert expected, (what, case)
                if kinds(ours, lines) != expected:
                    different.add((what, ours, case))
            if noise(ours) != noise(NOISE):
                different.add(("noise", ours, case))
        assert len({c for kind in noise(NOISE) for c in kind.split()} & CONSTANTS) == 9
    return different


def compiled(*arguments):
    return run_script(SCRIPT, lane_environment("discard"), *arguments)


def test_is_fused_as_in_stock():
    found = compiled()
    assert list(found) == CASES
    assert all({SAMPLE, FILTERED} <= kernels.keys() for kernels in found.values())
    assert differences(found) == set()


@pytest.mark.parametrize(
    ("bug", "where"),
    [
        ("no branch", {"repetition", "frequency"}),
        ("a product for a quotient", {"temperature"}),
    ],
)
def test_a_planted_difference_is_found(bug, where):
    assert {what for what, *_ in differences(compiled(bug))} == where
