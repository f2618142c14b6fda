"""All patches together against stock: tokens, logprobs, ranks and reasons, exactly.

Real engines on the CPU, one process each. Two cases decode as on CUDA, scheduled
asynchronously and with FULL graphs, whose replay runs the captured pass again.

On the newest vLLM, which may fail, only some of the cases; see conftest.py.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vllm_ext_cpulane.engine import run_script

pytestmark = pytest.mark.vllm
SCRIPT = Path(__file__).parent / "in_engine" / "same_tokens.py"

# Patches that have to be at work in a case; the others have nothing to do there.
ALWAYS = {"clean_sampler_writes", "identity_gathers"}
DECODING = ALWAYS | {"repeated_batch", "decode_counts"}
CASES = {
    "plain": DECODING,
    "async scheduling": DECODING | {"late_metadata"},
    "preemption": DECODING,
    "prefix caching": DECODING | {"late_metadata"},
    "chunked prefill": DECODING,
    "n-gram drafts": ALWAYS,
    "lora": DECODING,
}
ASYNC = {"async scheduling", "prefix caching"}
ON_NEWEST = ("async scheduling", "preemption", "n-gram drafts")


@pytest.mark.parametrize(
    ("lane", "case"),
    [
        *(("installed", case) for case in CASES),
        *(
            pytest.param("newest", case, marks=pytest.mark.early_warning)
            for case in ON_NEWEST
        ),
    ],
    indirect=["lane"],
)
def test_same_answers(lane, case, tmp_path):
    off = {"VEXT": "0"}
    on = {"VEXT": "1", "VEXT_STRICT": "1", "VEXT_STATE_DIR": str(tmp_path)}  # counts
    with ThreadPoolExecutor() as both:
        stock, patched = both.map(
            lambda settings: run_script(SCRIPT, lane | settings, case, "11"), (off, on)
        )
    assert stock["vllm"] == patched["vllm"]
    assert "PYTHONPATH" not in lane or patched["vllm"] == "0.33.0"
    assert stock["patches"] == {}
    idle = {name for name in CASES[case] if not patched["patches"][name][1]}
    assert not idle
    assert any(answer["logprobs"] for answer in stock["answers"].values()) or (
        case == "n-gram drafts"
    )
    assert patched["answers"] == stock["answers"]
    assert patched["preempted"] == stock["preempted"]
    assert (stock["preempted"] > 0) == (case == "preemption")
    assert stock["async"] == (case in ASYNC)
    assert (stock["replays"] > 0) == (case in ASYNC)
    assert patched["replays"] == stock["replays"]
