"""What is sampled from in each step, against stock's gathers."""

import torch
import workload
from vllm.v1.worker.gpu.model_runner import GPUModelRunner

from vllm_ext.patches.identity_gathers import PATCH
from vllm_ext.testing import applied
from vllm_ext_cpulane.engine import report, tiny_engine

llm = tiny_engine(enable_prefix_caching=False, max_num_batched_tokens=24)
runner = workload.model_runner(llm)
sampler = runner.sampler
found = {
    **{"differ": [], "views": 0, "gathers": 0, "view of a prompt": 0},
    **{"not given back": 0, "written": 0},
}
expected = {}
source = {}


def take(name, given):
    """Compare a tensor of the step with the gather that stock would make."""
    gathered = expected[name]
    if given.shape != gathered.shape or given.stride() != gathered.stride():
        found["differ"].append(f"layout of {name}")
    if given.dtype != gathered.dtype or not torch.equal(given, gathered):
        found["differ"].append(name)
    is_view = given.data_ptr() == source[name].data_ptr()
    if name == "hidden_states":
        found["views" if is_view else "gathers"] += 1
        found["view of a prompt"] += is_view and bool(longest > 1)


def sample(hidden_states, input_batch, *args):
    global longest
    longest = input_batch.num_scheduled_tokens.max()
    indices = input_batch.logits_indices
    source["hidden_states"] = hidden_states
    source["pos"] = input_batch.positions
    source["input_ids"] = input_batch.input_ids
    for name, tensor in source.items():
        expected[name] = tensor[indices]
    before = {name: tensor.clone() for name, tensor in source.items()}
    output = patched(runner, hidden_states, input_batch, *args)
    found["not given back"] += input_batch.logits_indices is not indices
    for name, tensor in source.items():
        found["written"] += not torch.equal(before[name], tensor)
    return output


def compute_logits(hidden_states, *args):
    take("hidden_states", hidden_states)
    return stock_logits(hidden_states, *args)


def sample_logits(logits, expanded, idx, idx_np, pos, input_ids, *args, **kwargs):
    take("pos", pos)
    take("input_ids", input_ids)
    return stock_sample(logits, expanded, idx, idx_np, pos, input_ids, *args, **kwargs)


plain = workload.run(llm, workload.requests(4, 24))
with applied(PATCH) as outcome:
    patched = GPUModelRunner.sample
    stock_logits, stock_sample = runner.model.compute_logits, sampler.sample
    runner.model.compute_logits = compute_logits
    sampler.sample = sample_logits
    runner.sample = sample
    found["same answers"] = workload.run(llm, workload.requests(4, 24)) == plain
    found["aside"] = dict(outcome.aside)

    # What is handed to code that is not vLLM's is a copy.
    views = found["views"]
    sampler.logits_processors.append(
        type(
            "Own",
            (),
            {
                "add_request": lambda *_: False,
                "apply_staged_writes": lambda *_: None,
                "apply": lambda _, logits, context: logits,
            },
        )()
    )
    workload.run(llm, workload.requests(4, 2))
    del sampler.logits_processors[-1]
    found["views beside a processor of the user"] = found["views"] - views
    found["reasons"] = list(outcome.aside)

    # A batch is given back its indices although sampling it failed.
    sampler.sample = lambda *args, **kwargs: 1 / 0
    runner.sample = lambda *args: caught(*args)

    def caught(hidden_states, input_batch, *args):
        indices = input_batch.logits_indices
        try:
            patched(runner, hidden_states, input_batch, *args)
        except ZeroDivisionError:
            found["not given back"] += input_batch.logits_indices is not indices
            found["failed"] = True
        sampler.sample = stock_sample
        return patched(runner, hidden_states, input_batch, *args)

    runner.model.compute_logits = stock_logits
    workload.run(llm, [workload.Request("x", [5], {"max_tokens": 2}, arrives=0)])

report(found)
