"""The ``kernel`` form of edit, on vLLM's own dispatcher and a real Triton kernel."""

from __future__ import annotations

from vllm_ext_cpulane.engine import run_script
from vllm_ext_cpulane.environment import lane_environment

SCRIPT = """
    import sys
    import torch
    import vllm.v1.worker.gpu.model_runner as runner
    from vllm.triton_utils import dispatcher
    from vllm.v1.worker.gpu import input_batch
    from vllm_ext.patching.declare import Edit, Patch
    from vllm_ext.patching.engine import Engine
    from vllm_ext.patching.fingerprint import Source, fingerprint
    from vllm_ext.plugin import package_folder
    from vllm_ext_cpulane.engine import report

    calls = []

    def double_positions(
        pos_ptr, seq_lens_ptr, idx_mapping_ptr, query_start_loc_ptr,
        num_computed_tokens_ptr, max_num_reqs, **constants
    ):
        calls.append(1)
        pos_ptr[: idx_mapping_ptr.shape[0]] = 2 * num_computed_tokens_ptr[
            idx_mapping_ptr
        ]

    sys.modules["ours"] = type(sys)("ours")
    sys.modules["ours"].double_positions = double_positions

    target = "vllm.v1.worker.gpu.input_batch:_prepare_pos_seq_lens_kernel"
    patch = Patch(
        name="demo", summary="", why="", retire_when="",
        edits=(Edit(target, by="ours:double_positions", how="kernel"),),
    )

    def positions():
        computed = torch.tensor([5, 7, 9], dtype=torch.int32)
        pos = torch.zeros(8, dtype=torch.int64)
        lens = torch.zeros(8, dtype=torch.int32)
        input_batch.prepare_pos_seq_lens(
            torch.tensor([2, 0]), torch.tensor([0, 1, 2], dtype=torch.int32),
            computed, pos, lens,
        )
        return pos[:2].tolist()

    stock = input_batch._prepare_pos_seq_lens_kernel
    source = Source(package_folder())
    engine = Engine(source, {target: {"here": fingerprint(source, target)}})
    before = positions()
    outcome = engine.offer(patch)
    during = positions()
    state, reason = outcome.state, outcome.reason
    engine.revert("demo")
    report({
        "positions": [before, during, positions()],
        "state": state, "reason": reason, "calls": len(calls),
        "stock again": input_batch._prepare_pos_seq_lens_kernel is stock,
        "registered": [name for name in dispatcher._registry if "pos_seq" in name],
    })
"""


def test_a_kernel_is_replaced_and_comes_back():
    found = run_script(SCRIPT, {**lane_environment("interpret"), "VEXT": "0"})
    assert found["state"] == "in use", found["reason"]
    assert found["positions"] == [[9, 5], [18, 10], [9, 5]]
    assert found["calls"] == 1
    assert found["stock again"]
    assert found["registered"] == []
