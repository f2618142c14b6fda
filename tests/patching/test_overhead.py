"""What a patched call pays for being patched: one Python call, and no more."""

from __future__ import annotations

import statistics
import time

from toypackage import Toy, patch_of

from vllm_ext.patching.declare import Edit

LIMIT_US = 0.5


def test_a_patched_call_costs_under_half_a_microsecond(toy: Toy):
    patch = patch_of(Edit("toy.ops:scale", by="ours.replacement:scale"))
    toy.engine(patch).offer(patch)
    ops = toy.load("toy.ops")
    ops.scale(1)  # the witness goes
    plain, patched = toy.load("ours.replacement").scale, ops.scale

    def microseconds(function) -> float:
        started = time.thread_time()
        for _ in range(20_000):
            function(1)
        return (time.thread_time() - started) / 20_000 * 1e6

    costs = [microseconds(patched) - microseconds(plain) for _ in range(9)]
    assert statistics.median(costs) < LIMIT_US
    assert patched is not plain
