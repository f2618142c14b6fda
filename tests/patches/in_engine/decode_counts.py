"""Each pair of token counts that the sampler gets, against what stock computes.

Reports how often stock ran, in which kind of batch, and what the shared constants
hold at the end.
"""

import numpy as np
import torch
import workload
from vllm.v1.worker.gpu import async_utils
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.sample import sampler as sampler_module

from vllm_ext.patches.decode_counts import PATCH, replacement
from vllm_ext.testing import applied
from vllm_ext_cpulane.engine import report, tiny_engine

# Chunks of prompts, so that some requests sample nothing in a step.
llm = tiny_engine(enable_prefix_caching=False, max_num_batched_tokens=24)
runner = workload.model_runner(llm)
found = {
    **{"differ": 0, "shared": 0, "computed": 0, "shared with a prefill": 0},
    **{"nothing sampled": 0, "copies": 0, "copies of constants": 0},
    "other batch differs": 0,
}
batch = None


def sample(hidden_states, input_batch, *args):
    global batch
    batch = input_batch
    return GPUModelRunner.sample(runner, hidden_states, input_batch, *args)


def same(ours, theirs):
    return ours.dtype == theirs.dtype and np.array_equal(ours, theirs)


def is_constant(tensor):
    kept = (*replacement._ones.values(), *replacement._zeros.values())
    return any(tensor is known for known in kept)


def checked_counts(num_sampled, *args):
    ours = patched_counts(num_sampled, *args)
    theirs = stock_counts(torch.ones_like(num_sampled), *args)
    for mine, expected in zip(ours, theirs, strict=True):
        found["differ"] += not same(mine.numpy(), expected.numpy())
    shared = is_constant(ours[0])
    found["shared" if shared else "computed"] += 1
    found["shared with a prefill"] += shared and bool(batch.has_prefill)
    found["nothing sampled"] += int((theirs[0] == 0).sum())
    # Meanwhile, somebody counts for a batch that is not the sampler's.
    sampled, rejected = patched_counts(
        torch.tensor([2, 1], dtype=torch.int32),
        torch.tensor([3, 9], dtype=torch.int32),
        torch.tensor([0, 3, 4], dtype=torch.int32),
        torch.tensor([0, 1]),
        torch.tensor([1, 10], dtype=torch.int32),
    )
    if [sampled.tolist(), rejected.tolist()] != [[2, 0], [1, 0]]:
        found["other batch differs"] += 1
    return ours


def checked_copy(tensor):
    ours, theirs = patched_copy(tensor), stock_copy(tensor)
    found["differ"] += not same(ours, theirs)
    found["copies"] += 1
    found["copies of constants"] += is_constant(tensor)
    ours[...] = 7  # the reader owns it
    return theirs


stock_counts = sampler_module.get_num_sampled_and_rejected
stock_copy = async_utils.async_copy_to_np
runner.sample = sample
with applied(PATCH):
    patched_counts = sampler_module.get_num_sampled_and_rejected
    patched_copy = async_utils.async_copy_to_np
    sampler_module.get_num_sampled_and_rejected = checked_counts
    async_utils.async_copy_to_np = checked_copy
    workload.run(llm, workload.requests(3, 24))
    shared = found["shared"]
    runner._dummy_sampler_run(torch.zeros(3, 64, dtype=torch.bfloat16))
    found["shared with a dummy"] = found["shared"] - shared
    sampler_module.get_num_sampled_and_rejected = patched_counts
    async_utils.async_copy_to_np = patched_copy

found["ones"] = sorted({int(v) for ones in replacement._ones.values() for v in ones})
found["zeros"] = sorted({int(v) for no in replacement._zeros.values() for v in no})
report(found)
