"""The graph of a whole step: its forward pass, its check, and the memory of graphs.

In a real engine whose CUDA graphs are the emulator's.
"""

import dataclasses
import inspect
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from step_graph import booted, captured, short

from vllm_ext.prove import engine
from vllm_ext.prove.graphs import Graph, graph_pool_handle
from vllm_ext.prove.pretend import PretendDevice
from vllm_ext_cpulane.engine import report

FREE = 1 << 40
BYTES_OF_A_NODE = 1 << 18  # more than a driver takes: no floor hides it
BYTES_OF_A_ROW = 1 << 20  # of activations


# -- the forward pass ------------------------------------------------------------------


def forward(runner: Any) -> dict[str, Any]:
    """What each capture gives to the model, around it and in it, by rows."""
    from vllm.v1.worker.gpu import cudagraph_utils

    from vllm_ext.patches.step_graph import graphs

    runner.cudagraph_manager.release_graphs()
    with watched(runner, cudagraph_utils) as stock:
        runner.capture_model()
    graph = runner.step_graph
    with watched(runner, graphs) as mono:
        captured(runner, graph)
    return {"stock": stock, "mono": mono}


@contextmanager
def watched(runner: Any, module: Any) -> Iterator[dict[int, list[str]]]:
    """Different forward passes that begin in ``module``, by rows, as texts."""
    found: dict[int, list[str]] = {}
    around = ""
    stock = module.set_forward_context

    def set_forward_context(*args: Any, **kwargs: Any) -> Any:
        nonlocal around
        bound = inspect.signature(stock).bind(*args, **kwargs)
        bound.apply_defaults()
        around = described(bound.arguments)
        return stock(*args, **kwargs)

    def called(_: Any, args: Any, kwargs: Any) -> None:
        assert not args
        text = f"{around} {described(kwargs)}"
        seen = found.setdefault(len(kwargs["input_ids"]), [])
        if text not in seen:
            seen.append(text)

    hook = runner.model.register_forward_pre_hook(called, with_kwargs=True)
    with mock.patch.object(module, "set_forward_context", set_forward_context):
        yield found
    hook.remove()


def described(value: Any) -> str:
    """Everything in it: of tensors where they are, of other objects which."""
    if isinstance(value, torch.Tensor):
        return f"{value.data_ptr()} {list(value.shape)} {value.stride()} {value.dtype}"
    if isinstance(value, dict):
        return str({name: described(each) for name, each in value.items()})
    if type(value).__name__.endswith("Metadata"):
        fields = dataclasses.fields(value)
        return described({each.name: getattr(value, each.name) for each in fields})
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    return f"{type(value).__name__} {getattr(value, 'name', id(value))}"


# -- the check -------------------------------------------------------------------------


def checked(llm: Any) -> dict[str, Any]:
    """What the check says of graphs that do not write keys and values."""
    from vllm_ext.patches.step_graph import check, graphs

    runner = engine.model_runner(llm)
    first = runner.step_graph
    stock = short(llm, runner, None)
    found: dict[str, Any] = {}

    def look(name: str, graph: Any, flashinfer: bool = False) -> None:
        with (
            mock.patch.object(type(runner), "turn_off", autospec=True) as turn_off,
            # Stock would leave no batch of these requests to it: they have seeds.
            mock.patch.object(check, "_by_flashinfer", return_value=flashinfer),
        ):
            same = short(llm, runner, graph) == stock
        said = [call.args[1] for call in turn_off.call_args_list]
        found[name] = {"same": same, "said": said}

    sound = captured(runner, first)
    look("sound", sound)
    look("sound, FlashInfer", sound, flashinfer=True)
    set_forward_context = graphs.set_forward_context

    def without(*args: Any, **kwargs: Any) -> Any:
        return set_forward_context(*args, **kwargs | {"slot_mapping": None})

    with mock.patch.object(graphs, "set_forward_context", without):
        look("nowhere", captured(runner, first))

    model = runner.model

    class Wrong:
        """The model, with other hidden states."""

        compute_logits, lm_head = model.compute_logits, model.lm_head

        def __call__(self, **given: Any) -> torch.Tensor:
            return -model(**given)

    with mock.patch.object(runner, "model", Wrong()):
        wrong = captured(runner, first)
    look("wrong", wrong)
    look("wrong, FlashInfer", wrong, flashinfer=True)

    asked: list[bool] = []

    def agree(right: bool) -> bool:
        asked.append(right)
        return False

    with (
        mock.patch.object(check, "agree", agree),
        mock.patch.object(graphs.StepGraph, "replay_step") as replayed,
    ):
        look("another rank", sound)
    found["by FlashInfer"] = [
        check._by_flashinfer(
            SimpleNamespace(
                use_flashinfer=there,
                sampling_states=SimpleNamespace(
                    any_greedy=lambda seats, greedy=greedy: greedy,
                    any_explicit_seed=lambda seats, seed=seed: seed,
                ),
            ),
            SimpleNamespace(idx_mapping_np=None),
        )
        for there in (True, False)
        for greedy in (False, True)
        for seed in (False, True)
    ]
    found["another rank"] |= {"asked": asked, "replayed": replayed.call_count}
    runner.step_graph = first
    return found


# -- capture and its memory ------------------------------------------------------------


def order(runner: Any) -> list[str]:
    """In which order a capture runs forward passes and records graphs."""
    from vllm_ext.patches.step_graph import graphs

    found: list[str] = []

    def called(*_: Any) -> None:
        found.append("forward")

    def record(*_: Any) -> None:
        found.append("record")

    hook = runner.model.register_forward_pre_hook(called)
    with mock.patch.object(graphs, "record", record):
        captured(runner, runner.step_graph)
    hook.remove()
    return found


@contextmanager
def memory() -> Iterator[None]:
    """A device whose graphs take memory: each for its nodes, and a pool for the most
    rows that one of its graphs has."""
    from vllm.platforms import current_platform

    free, rows_of, capture_end = FREE, Counter[Any](), Graph.capture_end

    def end(graph: Graph) -> None:
        nonlocal free
        capture_end(graph)
        pool = graph.pool()
        rows = max(node.grid[0] for node in graph.nodes if node.grid)
        free -= BYTES_OF_A_ROW * max(0, rows - rows_of[pool])
        free -= BYTES_OF_A_NODE * len(graph.nodes)
        rows_of[pool] = max(rows, rows_of[pool])

    def get_memory_info(*_: Any) -> tuple[int, int]:
        return free, FREE

    platform: Any = type(current_platform)  # the CPU's has no pools
    pool = staticmethod(graph_pool_handle)
    with (
        mock.patch.object(Graph, "capture_end", end),
        mock.patch.object(torch.accelerator, "get_memory_info", get_memory_info),
        mock.patch.object(platform, "graph_pool_handle", pool, create=True),
    ):
        yield


def profiled(runner: Any, form: str, most_rows: int) -> dict[str, Any]:
    """What a profile says that all graphs will take, and what they take."""
    from vllm_ext.patches.step_graph import eligibility, graphs

    config = runner.kv_cache_config
    with (
        mock.patch.dict(os.environ, {graphs.VARIABLE: form}),
        mock.patch.object(eligibility, "MOST_ROWS", most_rows),
        memory(),
    ):
        said = runner.profile_cudagraph_memory()
        left = runner.step_graph is not None
        runner.initialize_kv_cache(config)
        taken = runner.capture_model()
    graph = runner.step_graph
    return {
        **{"said": said, "taken": taken, "left": left, "mono": graph.mono},
        **{"sizes": graph.sizes, "took": graph.took},
    }


def main() -> dict[str, Any]:
    with PretendDevice() as device, booted(device) as llm:
        runner = engine.model_runner(llm)
        found: dict[str, Any] = {"forward": forward(runner), "check": checked(llm)}
        found["order"] = order(runner)
        found["profile"] = {
            # Of these sizes vLLM's profile captures none, and two of all.
            "bracketed": profiled(runner, "bracketed", 2),
            "mono": profiled(runner, "mono", 128),
        }
        return found


if __name__ == "__main__":
    report(main())
