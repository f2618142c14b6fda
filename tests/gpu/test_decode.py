"""All patches together against stock, on a GPU with FULL CUDA graphs.

Run with ``make gpu`` on a machine that has one; the CPU lane's package must be
importable there (``PYTHONPATH=cpulane``), for its tiny model only.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_ext.patches import SERIES
from vllm_ext_cpulane.engine import run_script

pytestmark = pytest.mark.gpu
SCRIPT = Path(__file__).parent / "decode_script.py"
GPU = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "VLLM_GPU_SYNC_CHECK": "error",
    # FlashInfer draws from the host's generator: no two runs are the same.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "HF_HUB_OFFLINE": "1",
}
V2 = {
    patch.name
    for patch in SERIES
    if all(".worker.gpu." in module for module in patch.modules)
}


@pytest.mark.parametrize("seed", ["11", "12"])
def test_same_answers(seed: str, tmp_path: Path):
    stock = run_script(SCRIPT, GPU | {"VEXT": "0"}, seed, timeout=550)
    patched = run_script(
        SCRIPT,
        GPU | {"VEXT": "1", "VEXT_STRICT": "1", "VEXT_STATE_DIR": str(tmp_path)},
        seed,
        timeout=550,
    )
    assert patched["answers"] == stock["answers"]
    for name in V2 - {"late_metadata"}:  # that one leaves FlashAttention 3 to stock
        state, calls, aside = patched["patches"][name]
        assert state == "in use"
        assert calls > sum(aside.values()), aside
