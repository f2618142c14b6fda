"""Every batch that `prepare_inputs` returns, against the one that stock would.

For each step both run from the same state; fields and input buffers have to be equal.
Between steps, dummy runs write the input buffers, as an idle data-parallel rank's do.
"""

import dataclasses
import functools

import numpy as np
import torch
import workload
from vllm.v1.worker.gpu.model_runner import GPUModelRunner

from vllm_ext.patches.repeated_batch import PATCH
from vllm_ext.testing import applied
from vllm_ext_cpulane.engine import report, tiny_engine

# So few blocks that requests are preempted.
llm = tiny_engine(
    enable_prefix_caching=False,
    max_model_len=128,
    block_size=32,
    num_gpu_blocks_override=10,
)
runner = workload.model_runner(llm)
buffers = runner.input_buffers
stock = GPUModelRunner.prepare_inputs
tensors = {k: v for k, v in vars(buffers).items() if isinstance(v, torch.Tensor)}
found = {
    **{"differ": [], "repeated": 0, "rebuilt": 0, "repeated a prefill": 0},
    **{"steps": 0, "preempted": 0, "shared": []},
}
last = last_decode = None


def snapshot():
    return {name: tensor.clone() for name, tensor in tensors.items()}


def restore(saved):
    for name, tensor in tensors.items():
        tensor.copy_(saved[name])


def equal(ours, theirs):
    if isinstance(theirs, torch.Tensor):
        return (
            isinstance(ours, torch.Tensor)
            and (ours.dtype, ours.device) == (theirs.dtype, theirs.device)
            and torch.equal(ours, theirs)
        )
    if isinstance(theirs, np.ndarray):
        return (
            isinstance(ours, np.ndarray)
            and ours.dtype == theirs.dtype
            and np.array_equal(ours, theirs)
        )
    return type(ours) is type(theirs) and ours == theirs


def check(patched, *arguments):
    """The patched batch; what differs from stock's goes into the report."""
    before = snapshot()
    batch = patched(runner, *arguments)
    after = snapshot()
    restore(before)
    expected = stock(runner, *arguments)
    for field in dataclasses.fields(expected):
        if not equal(getattr(batch, field.name), getattr(expected, field.name)):
            found["differ"].append(field.name)
    for name, tensor in tensors.items():
        if not torch.equal(after[name], tensor):
            found["differ"].append(f"buffer {name}")
    restore(after)  # do not mend for the next step what the patch left wrong
    return batch


def probes(step, state, desc):
    """Now and then, a batch that resembles the last one; it is not run."""
    if step % 9 == 0:  # the same requests, for a graph of another size
        size = len(state.req_ids) + 3
        if state.num_tokens < size <= 8:
            yield state, dataclasses.replace(desc, num_tokens=size, num_reqs=size)
    if step % 9 == 4 and not state.has_prefill:  # the same, in another order
        turned = {
            name: value[::-1] if isinstance(value, list) else value[::-1].copy()
            for name, value in state._asdict().items()
            if isinstance(value, list | np.ndarray)
        }
        yield state._replace(**turned), desc
        # Another id in a slot, and an id in another slot.
        yield state._replace(req_ids=turned["req_ids"]), desc
        yield state, desc
        yield state._replace(idx_mapping_np=turned["idx_mapping_np"]), desc


def prepare_inputs(patched, scheduler_output, state, desc, loras):
    global last, last_decode
    found["steps"] += 1
    for probe_state, probe_desc in probes(found["steps"], state, desc):
        check(patched, scheduler_output, probe_state, probe_desc, loras)
    batch = check(patched, scheduler_output, state, desc, loras)

    repeated = last is not None and batch.cu_num_logits is last.cu_num_logits
    found["repeated" if repeated else "rebuilt"] += 1
    found["repeated a prefill"] += repeated and bool(state.has_prefill)
    found["preempted"] += len(scheduler_output.preempted_req_ids or ())
    if repeated:
        # The output of a step in flight holds on to these.
        for name in ("req_ids", "idx_mapping_np", "seq_lens_cpu_upper_bound"):
            if getattr(batch, name) is getattr(last, name):
                found["shared"].append(name)
    last = batch
    if repeated:
        last_decode = scheduler_output, state, desc, loras
    return batch


def dummies(step):
    if step % 7 == 3:
        runner._dummy_run(5, skip_attn=True, is_profile=True)
    if step % 11 == 5:
        runner._dummy_sampler_run(torch.zeros(3, 64, dtype=torch.bfloat16))


plain = workload.run(llm, workload.requests(2, 24, longest=60))
with applied(PATCH) as outcome:
    patched = GPUModelRunner.prepare_inputs
    runner.prepare_inputs = functools.partial(prepare_inputs, patched)
    shadowed = workload.run(llm, workload.requests(2, 24, longest=60), between=dummies)
    del runner.prepare_inputs
    found["aside"] = dict(outcome.aside)
    found["same answers"] = plain == shadowed

buffers.query_start_loc.fill_(0)  # as a step of stock would, with other requests
with applied(PATCH):
    check(GPUModelRunner.prepare_inputs, *last_decode)

report(found)
