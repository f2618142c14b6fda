"""A decode step of Model Runner V2 as stock submits it, and as ``step_graph`` does.

All is recorded: one engine on the pretend device decodes the same four requests
without its step graph, with it, and with one in mono, and every operation that the
host submits in one steady step is written down. What the graphs hold is read from them.

Runs in a process of its own on the CPU lane.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from vllm_ext import hostbench, jsonfile
from vllm_ext.children import Child, serve
from vllm_ext.prove.pretend import Operation, PretendDevice
from vllm_ext.prove.verdict import Verdict

NAME = "step_graph"

# Greedy and sampled rows; the step is their fifth, in the middle of a block.
REQUESTS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.8, "seed": 1},
    {"temperature": 0.0},
    {"temperature": 1.3, "seed": 2},
    {"temperature": 0.7, "seed": 3, "top_p": 0.9},
)
STEP = 5
TOKENS = STEP + 3
KINDS = {
    "h2d": "copy to device",
    "d2h": "copy to host",
    "graph": "replay",
    "triton": "Triton",
    "launch": "torch",
}
FORWARD = "forward graph, vLLM's: the model"
OURS = ("prep graph", FORWARD, "sampler graph")
WHOLE = ("step graph",)


def write(path: Path, say: Callable[[str], None]) -> None:
    """Record and write ``docs/step-graph.md``.

    Raises:
        CannotRunError: There is no CPU lane.
        ChildError: The engine failed.
        CannotWriteError: The file cannot be written.
    """
    jsonfile.write_text(path, draw(look(say)))


def look(say: Callable[[str], None]) -> dict[str, Any]:
    """What `of_engine` finds in an engine of its own.

    Raises:
        CannotRunError: There is no CPU lane.
        ChildError: The engine failed.
    """
    say("recording three decode steps of a real engine on the pretend device")
    environment = hostbench.environment("interpret")
    environment |= {
        **{"VEXT": "1", "VEXT_PATCHES": NAME, "VEXT_STEP_GRAPH": None},
        **{"VEXT_STEP_GRAPH_CHECK": "0", "VLLM_CPU_KVCACHE_SPACE": None},
    }
    child = Child("vllm_ext.prove.stepdrawing", environment, "the engine")
    try:
        found: dict[str, Any] = child.ask("record", 600)
        return found
    finally:
        child.close()


def judge(found: dict[str, Any]) -> Verdict:
    """Whether the steps that `of_engine` recorded were graphs, with stock's tokens."""
    tokens = found["tokens"]
    for name, replays in (("ours", len(OURS)), ("mono", len(WHOLE))):
        if [kind for kind, _ in found[name]] != ["h2d", *["graph"] * replays, "d2h"]:
            what = f"{name}: the step was not one of its graphs"
        elif tokens[name] != tokens["stock"]:
            what = f"{name}: other tokens than stock's"
        else:
            continue
        return Verdict("graphs", NAME, "not proven", what, fault=True)
    stock, ours, mono = (len(found[name]) for name in ("stock", "ours", "mono"))
    detail = (
        f"{stock} submissions -> {ours}, in mono {mono}; the "
        f"{sum(map(len, tokens['stock']))} tokens of both are stock's"
    )
    return Verdict("graphs", NAME, "proven on CPU", detail)


def main() -> None:
    """Serve one question: record."""
    serve({"record": record})


def record() -> dict[str, Any]:
    """Boot an engine and look; see `of_engine`."""
    from vllm_ext.prove import engine

    with ExitStack() as stack:
        device = stack.enter_context(PretendDevice())
        llm = stack.enter_context(engine.booted(device))
        return of_engine(llm, device)


def of_engine(llm: Any, device: PretendDevice) -> dict[str, Any]:
    """Decode `REQUESTS` three times.

    Returns:
        ``stock``, ``ours`` and ``mono``, each the operations of the step in order, as
        kind and name; ``graphs`` and ``whole``, for each graph of ours and of mono the
        names of its operations; ``tokens``, by the same three names, what each
        request was given.
    """
    from vllm_ext.prove import engine

    runner = engine.model_runner(llm)
    graph = runner.step_graph
    runner.step_graph = None
    tokens = {}
    stock, tokens["stock"] = _step(llm, runner, device)
    runner.step_graph = graph
    ours, tokens["ours"] = _step(llm, runner, device)
    with torch.inference_mode():
        runner.step_graph = type(graph)(runner, graph.seats, mono=True)
        runner.step_graph.capture()
    mono, tokens["mono"] = _step(llm, runner, device)
    whole, runner.step_graph = runner.step_graph, graph
    rows = len(REQUESTS)
    captured = (
        graph._prep[rows],
        graph.manager.graphs[graph.by_rows[rows]],
        graph._sampler[rows, True],
    )

    def nodes(graph: Any) -> list[list[str]]:
        return [[node.kind, node.name] for node in graph.nodes]

    return {
        "stock": stock,
        "ours": ours,
        "graphs": [nodes(each) for each in captured],
        "mono": mono,
        "tokens": tokens,
        "whole": [nodes(whole._step[rows, True])],
    }


def _step(
    llm: Any, runner: Any, device: PretendDevice
) -> tuple[list[list[str]], list[list[int]]]:
    """What is submitted in the step number `STEP` of all requests, and their tokens."""
    from vllm import SamplingParams

    core = llm.llm_engine
    for number, wanted in enumerate(REQUESTS):
        core.add_request(
            f"{number}",
            {"prompt_token_ids": [4 + 7 * number + i for i in range(3 + number)]},
            SamplingParams(
                detokenize=False, ignore_eos=True, max_tokens=TOKENS, **wanted
            ),
        )
    seen: list[list[list[str]]] = []
    tokens: list[list[int]] = [[] for _ in REQUESTS]
    with _watched(runner, device, seen):
        while core.has_unfinished_requests():
            for answer in core.step():
                tokens[int(answer.request_id)] = list(answer.outputs[0].token_ids)
    return seen[STEP], tokens


@contextmanager
def _watched(
    runner: Any, device: PretendDevice, seen: list[list[list[str]]]
) -> Iterator[None]:
    """Append the operations of each step of all requests to ``seen``."""
    operations: list[list[str]] = []
    execute, sample = runner.execute_model, runner.sample_tokens

    def observe(operation: Operation) -> None:
        if operation.kind != "sync":
            operations.append([operation.kind, operation.name])

    def execute_model(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
        operations.clear()
        return execute(scheduled, *args, **kwargs)

    def sample_tokens(*args: Any, **kwargs: Any) -> Any:
        output = sample(*args, **kwargs)
        seen.append(list(operations))
        return output

    device.observers.append(observe)
    try:
        with (
            mock.patch.object(runner, "execute_model", execute_model),
            mock.patch.object(runner, "sample_tokens", sample_tokens),
        ):
            yield
    finally:
        device.observers.remove(observe)


# -- for people ------------------------------------------------------------------------


def draw(found: dict[str, Any]) -> str:
    """The page."""
    before = found["stock"]
    (inputs, _, tokens), [whole] = found["graphs"], found["whole"]
    model = ["launch", "(the model)"]
    short = [*whole[: len(inputs)], model, *whole[-len(tokens) :]]
    lines = [
        "# One decode step, before and after",
        "",
        "Written by `vllm-ext prove graphs --steps docs/step-graph.md` and checked by",
        "its test: do not edit. One steady step of four requests (greedy, temperature,",
        "top-p) in vLLM 0.32.0 with Triton's attention, recorded on the pretend",
        "device: what the host submits, in order, and what the graphs hold.",
        "",
        f"## Stock: {len(before)} submissions",
        "",
        "```",
        "host            device",
        *(_line(kind, FORWARD if kind == "graph" else name) for kind, name in before),
        "```",
        *_ours("`step_graph`", found["ours"], OURS, found["graphs"]),
        *_ours("`VEXT_STEP_GRAPH=mono`", found["mono"], WHOLE, [short]),
        "",
    ]
    return "\n".join(lines)


def _ours(
    title: str,
    step: list[list[str]],
    names: tuple[str, ...],
    graphs: list[list[list[str]]],
) -> list[str]:
    """A section: a step, and what its graphs hold beside the model."""
    lines = ["", f"## {title}: {len(step)} submissions", ""]
    lines += ["```", "host            device"]
    inside = iter(zip(names, graphs, strict=True))
    for kind, name in step:
        if kind != "graph":
            lines.append(_line(kind, name))
            continue
        called, nodes = next(inside)
        lines.append(_line(kind, called))
        if called != FORWARD:
            lines += [f"{'':21}│ {node}" for _, node in nodes]
    return [*lines, "```"]


def _line(kind: str, name: str) -> str:
    return f"{KINDS[kind]:<15} ──▶ {name}"


if __name__ == "__main__":
    main()
