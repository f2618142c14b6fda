"""All patches together against stock: tokens, logprobs, ranks and reasons, exactly.

Real engines on the CPU, one process each. There are no CUDA graphs on a CPU, so no
step is a FULL replay here; see test_late_metadata.py for those.
"""

import tempfile
from pathlib import Path

import pytest

from vllm_ext_cpulane.engine import run_script
from vllm_ext_cpulane.environment import lane_environment

pytestmark = pytest.mark.vllm
SCRIPT = Path(__file__).parent / "in_engine" / "same_tokens.py"
LANE = lane_environment("interpret")

# Patches that have to be at work in a case; the others have nothing to do there.
ALWAYS = {"clean_sampler_writes", "identity_gathers"}
DECODING = ALWAYS | {"repeated_batch", "decode_counts"}
CASES = {
    "plain": DECODING,
    "async scheduling": DECODING,
    "preemption": DECODING,
    "prefix caching": DECODING,
    "chunked prefill": DECODING,
    "n-gram drafts": ALWAYS,
    "lora": DECODING,
}


@pytest.mark.parametrize("case", CASES)
def test_same_answers(case):
    stock = run_script(SCRIPT, LANE | {"VEXT": "0"}, case, "11")
    with tempfile.TemporaryDirectory() as states:  # for calls to be counted
        patched = run_script(
            SCRIPT,
            LANE | {"VEXT": "1", "VEXT_STRICT": "1", "VEXT_STATE_DIR": states},
            *(case, "11"),
        )
    assert stock["patches"] == {}
    idle = {name for name in CASES[case] if not patched["patches"][name][1]}
    assert not idle
    assert any(answer["logprobs"] for answer in stock["answers"].values()) or (
        case == "n-gram drafts"
    )
    assert patched["answers"] == stock["answers"]
