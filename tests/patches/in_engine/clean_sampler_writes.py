"""What the device reads after each `apply_staged_writes`, in a real engine.

Reports the calls, those that ran stock, and each parameter that the device would
have read wrong.
"""

from unittest.mock import Mock

import workload
from vllm import SamplingParams
from vllm.v1.worker.gpu.buffer_utils import StagedWriteTensor, UvaBackedTensor
from vllm.v1.worker.gpu.sample.sampler import Sampler

from vllm_ext.patches.clean_sampler_writes import PATCH
from vllm_ext.testing import applied
from vllm_ext_cpulane.engine import report, tiny_engine

llm = tiny_engine(enable_prefix_caching=False)
sampler = workload.model_runner(llm).sampler
states = {
    type(state).__name__: state
    for state in (
        sampler.sampling_states,
        *sampler.logits_processors,
        sampler.logprob_token_ids_state,
    )
}
found = {"wrong": [], "calls": 0, "copied": 0, "to copy": 0}


def watch(owner, name):
    """Call ``owner.name`` through a mock, to count."""
    mock = Mock(side_effect=getattr(owner, name))
    setattr(owner, name, mock)
    return mock


def check_device(when):
    """Every parameter on the device is what the host has; nothing waits."""
    checked = 0
    for state_name, state in states.items():
        for name, value in vars(state).items():
            if isinstance(value, UvaBackedTensor):
                checked += 1
                if (value.gpu.numpy() != value.np).any():
                    found["wrong"].append(f"{when}: {state_name}.{name}")
            elif isinstance(value, StagedWriteTensor) and value._staged_write_indices:
                found["wrong"].append(f"{when}: {state_name}.{name} staged")
    if sampler.penalties_state._new_penalties_reqs:
        found["wrong"].append(f"{when}: penalties of a new request")
    found["checked"] = checked


flush = watch(sampler.sampling_states, "apply_staged_writes")
added = watch(sampler.sampling_states, "add_request")
with applied(PATCH) as outcome:
    patched = Sampler.apply_staged_writes

    def apply_staged_writes():
        before, new = flush.call_count, added.call_count
        added.reset_mock()
        patched(sampler)
        found["calls"] += 1
        found["copied"] += flush.call_count - before
        # The first call copies in any case: nothing is known about what was before.
        found["to copy"] += bool(new) or found["calls"] == 1
        check_device(f"call {found['calls']}")

    sampler.apply_staged_writes = apply_staged_writes
    workload.run(llm, workload.requests(1, 24))
    del sampler.apply_staged_writes

    # A second request in the slot of the first, as after it has finished.
    for temperature in (0.5, 0.7):
        sampler.add_request(0, SamplingParams(temperature=temperature))
        sampler.apply_staged_writes()
        check_device(f"slot 0 at {temperature}")

    # A request that fails half-way has staged a part.
    state_add = sampler.logprob_token_ids_state.add_request
    sampler.logprob_token_ids_state.add_request = Mock(side_effect=ValueError)
    try:
        sampler.add_request(2, SamplingParams(temperature=0.3))
    except ValueError:
        sampler.apply_staged_writes()
        check_device("a request that failed half-way")
    sampler.logprob_token_ids_state.add_request = state_add

    # One of the user's own processors is called each time, request or not.
    own = Mock()
    sampler.logits_processors.append(own)
    for _ in range(3):
        sampler.apply_staged_writes()
    found["own processor"] = own.apply_staged_writes.call_count
    found["aside"] = dict(outcome.aside)
    del sampler.logits_processors[-1]
    sampler.apply_staged_writes()
    clean = flush.call_count
    sampler.apply_staged_writes()
    found["skipped when clean"] = flush.call_count == clean

    # A sampler derived from vLLM's, which sets a parameter before it flushes.
    class Derived(Sampler):
        def apply_staged_writes(self):
            self.sampling_states.temperature.np[0] += 0.25
            super().apply_staged_writes()

    aside = dict(outcome.aside)
    sampler.__class__ = Derived
    for step in range(3):
        sampler.apply_staged_writes()
        check_device(f"step {step} of a derived sampler")
    sampler.__class__ = Sampler
    found["derived aside"] = {
        reason: count - aside.get(reason, 0)
        for reason, count in outcome.aside.items()
        if count != aside.get(reason)
    }

sampler.add_request(3, SamplingParams(temperature=0.4))  # under stock
with applied(PATCH):
    sampler.apply_staged_writes()
    check_device("a request added before the patch came back")
report(found)
