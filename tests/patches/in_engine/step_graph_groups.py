"""Step graphs of a model whose layers keep different things, in a real engine.

One layer attends to everything, the other one to the last `WINDOW` tokens, and it has
twice the heads of keys and values. So vLLM makes two groups of KV cache of them: a
block is 32 tokens of one and 16 of the other, all blocks are of one pool, and what the
window has left behind is given to other requests while its request decodes.
"""

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
import vllm
import workload
from step_graph import booted, by, captured

from vllm_ext.prove import engine
from vllm_ext.prove.pretend import PretendDevice, data_of
from vllm_ext_cpulane.engine import report

WINDOW = 6
SHAPE = {"layers": 2, "kv_heads": (1, 2), "window": WINDOW}
BLOCKS = 8  # of the KV cache: fewer than the requests may want


@contextmanager
def registered() -> Iterator[None]:
    """Let the architecture of `SHAPE` be one whose layers differ in their heads."""
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM
    from vllm.model_executor.models.utils import extract_layer_index

    class Layer(LlamaDecoderLayer):
        def __init__(self, vllm_config: Any, prefix: str = "", **_: Any) -> None:
            config = copy.copy(vllm_config.model_config.hf_config)
            number = extract_layer_index(prefix)
            config.num_key_value_heads = config.layer_kv_heads[number]
            super().__init__(vllm_config, prefix, config)

    class Uneven(LlamaForCausalLM):
        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=Layer)

    ModelRegistry.register_model("LlamaForCausalLM", Uneven)
    yield


class Tables:
    """What attention is told of blocks in steps by graphs, beside the scheduler's.

    Attributes:
        wrong: Blocks in reach of a row's token that its input table has otherwise.
        slots: Slots that are not where a row's token belongs.
        left: Blocks that lie wholly before the window of a row.
        nulled: How many of them its input table says 0 for.
        reused: How many of them were in use by a row of that step.
    """

    def __init__(self, llm: Any) -> None:
        self.wrong = self.slots = self.left = self.nulled = self.reused = 0
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        self._manager = scheduler.kv_cache_manager

    @contextmanager
    def watching(self) -> Iterator[None]:
        from vllm_ext.patches.step_graph.graphs import StepGraph

        forward = StepGraph.forward

        def seen(graph: Any, plan: Any) -> None:
            forward(graph, plan)
            self.look(graph, plan)

        with mock.patch.object(StepGraph, "forward", seen):
            yield

    def look(self, graph: Any, plan: Any) -> None:
        groups = graph.buffers.groups
        slots = data_of(groups.slot_mappings).tolist()
        configs = graph.runner.kv_cache_config.kv_cache_groups
        left: list[int] = []
        used: set[int] = set()
        for row, (name, seat) in enumerate(zip(plan.requests, plan.seats, strict=True)):
            position = int(plan.computed[row])
            for group, blocks in enumerate(self._manager.get_block_ids(name)):
                size = configs[group].kv_cache_spec.block_size
                window = getattr(configs[group].kv_cache_spec, "sliding_window", None)
                first = 0
                if window is not None:
                    first = max(position - window + 1, 0) // size
                last = position // size
                given = data_of(groups.input_block_tables[group])[row].tolist()
                self.wrong += given[first : last + 1] != blocks[first : last + 1]
                slot = blocks[last] * size + position % size
                self.slots += slots[group][row] != slot
                self.nulled += given[:first].count(0)
                left += data_of(groups.block_tables[group])[seat, :first].tolist()
                used.update(blocks[first : last + 1])
        self.left += len(left)
        self.reused += len([block for block in left if block in used])


def requests() -> list[workload.Request]:
    made = workload.requests(5, 6, longest=20, last_arrival=14)
    for request in made:
        request.params.pop("logprobs", None)  # make a step stock's
        request.params["max_tokens"] += 10
    return made


def brief(llm: Any, runner: Any, graph: Any) -> list[str]:
    """A few steps of two requests, each of which is checked; what is said of them."""
    from vllm_ext.patches.step_graph.check import Calendar

    runner.step_graph, runner._calendar = graph, Calendar("1")
    params = {"temperature": 0.0, "max_tokens": 4, "ignore_eos": True}
    prompts = [list(range(4, 35)), list(range(400, 422))]  # 32 is a block's first token
    with mock.patch.object(type(runner), "turn_off", autospec=True) as told:
        workload.run(
            llm,
            [
                workload.Request(str(number), prompt, {**params}, 0)
                for number, prompt in enumerate(prompts)
            ],
        )
    return [call.args[1] for call in told.call_args_list]


def planted(llm: Any, runner: Any, graph: Any) -> dict[str, list[str]]:
    """What the self-check finds if something is wrong of one group.

    Each step is prepared once for each bug, and once as it should be.
    """
    from vllm_ext.patches.step_graph import replacement
    from vllm_ext.patches.step_graph.check import Check
    from vllm_ext.patches.step_graph.graphs import StepGraph

    prepare = StepGraph.prepare
    found: dict[str, list[str]] = {}

    def written(name: str, group: int, plan: Any) -> Check:
        """With something else in what the prep graph writes."""

        def prepared(self: Any, plan: Any) -> None:
            prepare(self, plan)
            getattr(self.buffers.groups, name)[group].add_(1)

        with mock.patch.object(StepGraph, "prepare", prepared):
            return Check(graph, plan)

    def described(column: int, values: list[int], group: int, plan: Any) -> Check:
        """With something else in the layout of the tables."""
        cell = graph.buffers.groups.layout[group, column : column + 1]
        kept = cell.clone()
        cell.fill_(values[group])
        check = Check(graph, plan)
        cell.copy_(kept)
        return check

    def given(group: int, plan: Any) -> Check:
        """With other blocks than those that the group was given."""
        blocks = [
            (row, of, column, block ^ (of == group))
            for row, of, column, block in plan.blocks
        ]
        return Check(graph, dataclasses.replace(plan, blocks=blocks))

    bugs: dict[str, Any] = {"blocks": given}
    for name in ("block_tables", "input_block_tables", "slot_mappings"):
        bugs[name] = partial(written, name)
    bugs["width"] = partial(described, 2, [3, 3])
    bugs["block size"] = partial(described, 3, [48, 48])
    windowed = getattr(runner.block_tables, "_sliding_window_reach", [0, 0])
    bugs["reach"] = partial(described, 4, [0 if reach else 1 for reach in windowed])

    class Spoiled(Check):
        def __init__(self, graph: Any, plan: Any) -> None:
            self.wrong = {
                f"{name} of {group}": bug(group, plan)
                for name, bug in bugs.items()
                for group in range(graph.groups)
            }
            super().__init__(graph, plan)

        def problems(self) -> list[str]:
            for name, check in self.wrong.items():
                check._stock_inputs = self._stock_inputs
                found.setdefault(name, []).extend(check._wrong_inputs())
            return super().problems()

    with mock.patch.object(replacement, "Check", Spoiled):
        found["nothing"] = brief(llm, runner, graph)
    return found


@torch.inference_mode()
def in_one_graph(llm: Any, runner: Any, graph: Any) -> list[str]:
    """What the check finds if the graph of a whole step reads null blocks."""
    from vllm_ext.patches.step_graph.graphs import StepGraph

    make, kept = StepGraph._make_inputs, dict(graph._prep)

    def made(self: Any, padded: int, metadata: Any) -> None:
        make(self, padded, metadata)
        self.buffers.groups.input_block_tables[1].zero_()

    graph.sizes = [2]  # brief's
    with mock.patch.object(StepGraph, "_make_inputs", made):
        graph.capture()
    graph._prep = kept
    return brief(llm, runner, graph)


def main() -> dict[str, Any]:
    options: dict[str, Any] = {"num_gpu_blocks_override": BLOCKS, "max_num_seqs": 4}
    options |= {"disable_hybrid_kv_cache_manager": False, "max_model_len": 64}
    with (
        PretendDevice() as device,
        registered(),
        booted(device, SHAPE, **options) as llm,
    ):
        runner = engine.model_runner(llm)
        specs = [each.kv_cache_spec for each in runner.kv_cache_config.kv_cache_groups]
        tables = runner.block_tables
        found: dict[str, Any] = {
            "vllm": vllm.__version__,
            "windows": [getattr(spec, "sliding_window", None) for spec in specs],
            "block sizes": [spec.block_size for spec in specs],
            "widths": [table.gpu.shape[1] for table in tables.block_tables],
            "reaches": getattr(tables, "_sliding_window_reach", None),
        }
        graph, runner.step_graph = runner.step_graph, None
        stock = workload.run(llm, requests())
        found["stock"] = workload.findings(stock)["answers"]
        whole = captured(runner, graph)
        for how, ours in (("bracketed", graph), ("mono", whole)):
            runner._calendar = type(runner._calendar)()
            seen = Tables(llm)
            with seen.watching():
                found[how] = by(ours, llm, device, requests(), canaries=True)
            counts = {k: v for k, v in vars(seen).items() if k[0] != "_"}
            found[how]["tables"] = counts
        found["planted"] = planted(llm, runner, graph)
        found["in one graph"] = in_one_graph(llm, runner, whole)
    return found


if __name__ == "__main__":
    report(main())
