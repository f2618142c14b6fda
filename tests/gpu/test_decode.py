"""Patches against stock, on a GPU with FULL CUDA graphs.

Run with ``make gpu`` on a machine that has one; the CPU lane's package must be
importable there (``PYTHONPATH=cpulane``), for its tiny model only. Each engine is
booted once, for all workloads.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from vllm_ext.patches import SERIES
from vllm_ext_cpulane.engine import run_script

pytestmark = pytest.mark.gpu
SCRIPT = Path(__file__).parent / "decode_script.py"
SEEDS = ("11", "12")
GPU = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "VLLM_GPU_SYNC_CHECK": "error",
    # FlashInfer draws from the host's generator: no two runs are the same.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "HF_HUB_OFFLINE": "1",
}
V2 = {
    patch.name: patch
    for patch in SERIES
    if all(".worker.gpu." in module for module in patch.modules)
}
# By what is on beside the defaults; what time may not suffice for comes last.
ARMS = {
    "both": {"VEXT_PATCHES": "+fused_sampler,+step_graph"},
    "mono": {"VEXT_PATCHES": "+step_graph", "VEXT_STEP_GRAPH": "mono"},
    "defaults": {},
    "step_graph": {"VEXT_PATCHES": "+step_graph"},
    "fused_sampler": {"VEXT_PATCHES": "+fused_sampler"},
}
STEPPED = ("step_graph", "mono", "both")


def answered(environment: dict[str, str]) -> dict:
    return run_script(SCRIPT, GPU | environment, *SEEDS, timeout=550)


@pytest.fixture(scope="module")
def stock():
    return answered({"VEXT": "0"})["answers"]


@pytest.fixture(scope="module", params=ARMS)
def patched(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    settings = {"VEXT": "1", "VEXT_STRICT": "1", "VEXT_STATE_DIR": str(folder)}
    return {**answered(GPU | settings | ARMS[request.param]), "arm": request.param}


def test_same_answers(stock, patched):
    for name, expected in stock.items():
        given = patched["answers"][name]
        assert given["tokens"] == expected["tokens"], name
        assert given["reason"] == expected["reason"], name


def test_same_logprobs(stock, patched):
    """Of patches that leave the arithmetic to stock to the bit, ranks included."""
    exact = patched["arm"] not in ("fused_sampler", "both")
    for name, expected in stock.items():
        given = patched["answers"][name]["logprobs"]
        if exact:
            assert given == expected["logprobs"], name
            continue
        assert len(given) == len(expected["logprobs"])
        for row, stock_row in zip(given, expected["logprobs"], strict=True):
            assert [entry[0] for entry in row] == [entry[0] for entry in stock_row]
            assert all(
                math.isclose(mine[1], theirs[1], rel_tol=1e-5, abs_tol=1e-5)
                for mine, theirs in zip(row, stock_row, strict=True)
            ), name


def test_patches_were_used(patched):
    on = {name for name, patch in V2.items() if patch.default}
    on |= {"fused_sampler"} if patched["arm"] in ("fused_sampler", "both") else set()
    if patched["arm"] in STEPPED:
        on = {"step_graph"}  # little is left to the others
    for name in on - {"late_metadata"}:  # that one leaves FlashAttention 3 to stock
        state, calls, aside = patched["patches"][name]
        assert state == "in use"
        assert name == "step_graph" or calls > sum(aside.values()), aside


def test_step_graphs_decoded_and_stayed_on(patched):
    """A self-check that found a difference would have turned them off."""
    found = patched["step_graph"]
    if patched["arm"] not in STEPPED:
        assert found is None
        return
    assert found["mono"] == (patched["arm"] == "mono")
    assert found["eligible"] - found["checked"] > 60
    assert found["moved"] == []
    assert found["cost"]["graphs"] == 3 * 16  # `bench engine` says what they took
