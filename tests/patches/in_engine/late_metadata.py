"""FULL steps on the CPU: a graph's replay is played by the model itself.

There is no graph here. `dispatch` answers FULL for decode batches and `run_fullgraph`
runs the model on the input buffers, with the metadata that `prepare_attn` returned
and a replay would not read; or, to see what a replay sees, without reading it. The
CPU's builder counts as one that only collects, which for this purpose it does.
"""

import dataclasses

import torch
import workload
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.config import set_current_vllm_config
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadataBuilder
from vllm.v1.attention.backends.triton_attn import TritonAttentionMetadataBuilder
from vllm.v1.worker.gpu import model_runner
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from vllm_ext.patches.late_metadata import PATCH, replacement
from vllm_ext.testing import applied
from vllm_ext_cpulane.engine import report, tiny_engine

llm = tiny_engine(enable_prefix_caching=False)
runner = workload.model_runner(llm)
[[group]] = runner.attn_groups
cpu_builder = group.metadata_builders[0]
stock = DefaultModelState.prepare_attn
found = {"late": 0, "at once": 0, "late outside FULL": 0, "differ": []}
step = {}


def dispatch(num_reqs, num_tokens, uniform_token_count, *args, **kwargs):
    full = uniform_token_count == 1
    return BatchExecutionDescriptor(
        cg_mode=CUDAGraphMode.FULL if full else CUDAGraphMode.NONE,
        num_tokens=num_tokens,
        num_reqs=num_reqs,
        uniform_token_count=1 if full else None,
    )


def run_model(desc):
    with set_forward_context(
        step["metadata"],
        runner.vllm_config,
        num_tokens=desc.num_tokens,
        slot_mapping=step["slots"],
    ):
        return runner.model(
            input_ids=runner.input_buffers.input_ids[: desc.num_tokens],
            positions=runner.input_buffers.positions[: desc.num_tokens],
        )


def read_nothing(desc):
    return torch.ones(desc.num_tokens, 64, dtype=torch.bfloat16)


def prepare_attn(batch, mode, tables, slots, *args, **kwargs):
    metadata = DefaultModelState.prepare_attn(
        runner.model_state, batch, mode, tables, slots, *args, **kwargs
    )
    step["metadata"] = metadata
    step["slots"] = model_runner.build_slot_mappings_by_layer(
        slots, runner.kv_cache_config
    )
    late = isinstance(metadata, replacement.LateMetadata)
    found["late" if late else "at once"] += 1
    found["late outside FULL"] += late and mode != CUDAGraphMode.FULL
    if late and comparing:
        compare(
            metadata,
            stock(runner.model_state, batch, mode, tables, slots, *args, **kwargs),
        )
    return metadata


def compare(ours, theirs):
    if list(ours) != list(theirs):
        found["differ"].append("layers")
    for layer, metadata in theirs.items():
        for field in dataclasses.fields(metadata):
            if field.name == "scheduler_metadata":
                continue  # the CPU kernel's own plan, which holds addresses
            mine = getattr(ours[layer], field.name)
            value = getattr(metadata, field.name)
            equal = (
                torch.equal(mine, value)
                if isinstance(value, torch.Tensor)
                else mine == value
            )
            if not equal:
                found["differ"].append(field.name)


class Operations(TorchDispatchMode):
    """Notes every operation that is not a view."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            found["operations"].append(str(func))
        return func(*args, **(kwargs or {}))


runner.cudagraph_manager.dispatch = dispatch
runner.cudagraph_manager.run_fullgraph = run_model
runner.model_state.prepare_attn = prepare_attn
plain = workload.run(llm, workload.requests(5, 20))
found["at once"] = 0
name = f"{type(cpu_builder).__module__}.{type(cpu_builder).__qualname__}"

with applied(PATCH) as outcome:
    comparing = False
    found["unknown builder"] = [
        workload.run(llm, workload.requests(5, 4)) is not None and found["late"],
        list(outcome.aside),
    ]
    replacement.ONLY_COLLECTS[name] = lambda builder: True
    found["same answers"] = workload.run(llm, workload.requests(5, 20)) == plain
    comparing = True
    workload.run(llm, workload.requests(5, 10))
    comparing = False

    # What a replay reads of it.
    runner.cudagraph_manager.run_fullgraph = read_nothing
    built = []
    stock_build = cpu_builder.build
    cpu_builder.build = lambda *args, **kwargs: (
        built.append(1),
        stock_build(*args, **kwargs),
    )[1]
    before = found["at once"]
    workload.run(llm, workload.requests(5, 10))
    found["built late"] = len(built) - (found["at once"] - before)
    del cpu_builder.build

# Builders that are named as only collecting: what they do to tensors.
found["operations"], found["collected"] = [], []
for builder_class in (TritonAttentionMetadataBuilder, FlashAttentionMetadataBuilder):
    with set_current_vllm_config(runner.vllm_config):
        builder = builder_class(
            group.kv_cache_spec,
            group.layer_names,
            runner.vllm_config,
            torch.device("cpu"),
        )
    group.metadata_builders[0] = builder
    if not replacement._only_collects(group):
        found["operations"].append(f"{builder_class.__name__} is not known")
    class_build = builder.build

    def build(*args, class_build=class_build, name=builder_class.__name__, **kwargs):
        with Operations():
            metadata = class_build(*args, **kwargs)
        found["collected"].append(name)
        return metadata

    builder.build = build
    runner.cudagraph_manager.dispatch = lambda reqs, tokens, *_, **__: dispatch(
        reqs, tokens, 1
    )
    workload.run(llm, [workload.Request("x", [5], {"max_tokens": 3}, arrives=0)])
report(found)
