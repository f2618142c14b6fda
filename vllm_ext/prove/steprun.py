"""The decode step of Model Runner V2 as one CUDA graph: what keeps it from being one.

A real engine runs on the pretend device (`vllm_ext.prove.engine`). Decode steps of it
are captured, from the block tables to ``post_update``, and each is run by replaying
the graph that was made of it; the tokens have to be those of steps that were not
captured. Each argument that differs between two captures is one that a graph captured
once would get wrong.

What the host hands over in a step, ``async_tensor_h2d``, is copied in front of the
graph, and the tokens are copied back behind it, as a step graph would have it. The
forward pass is the one that vLLM's own graph for that batch size holds.

Runs in a process of its own on the CPU lane, as a child of `vllm_ext.prove.stepgraph`.
"""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from vllm_ext import gpupath
from vllm_ext.children import serve
from vllm_ext.prove import engine, graphs
from vllm_ext.prove.pretend import PretendDevice, Stream
from vllm_ext.prove.stepgraph import EVERY_STEP, STOCK
from vllm_ext.prove.verdict import reason
from vllm_ext.testing import all_applied

SEATS = 4
STEADY = 3  # steps captured before a request is replaced by another, and after
WARM = 3  # steps before the first capture
VOCABULARY = 512
# Greedy and sampled rows in one batch, at several temperatures. The last one waits
# until the one before has ended.
REQUESTS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.8, "seed": 1},
    {"temperature": 0.0},
    {"temperature": 1.3, "seed": 2},
    {"temperature": 0.8, "seed": 3, "max_tokens": WARM + STEADY},
    {"temperature": 1.1, "seed": 4},
)
MAX_TOKENS = WARM + 2 * STEADY + 4

ON_BLOCK = "when a block is appended"
ON_CHANGE = "when a request is replaced"


@dataclass(frozen=True)
class Step:
    """One captured step.

    Attributes:
        is_new: Its requests did not decode together in the step before.
        got_block: One of them got a block.
    """

    is_new: bool
    got_block: bool
    graph: graphs.Graph


def main() -> None:
    """Serve one question: look at the step."""
    serve({"look": look})


def look(patches: dict[str, list[str]], stock: bool) -> dict[str, dict[str, Any]]:
    """Decode `REQUESTS` with steps run out of graphs, once for each set of patches.

    Args:
        patches: By what they are called, names of patches that are applied together.
        stock: Look at vLLM without patches too, and decode without graphs.

    Returns:
        By what the patches are called, stock under `STOCK`: ``tokens`` of each
        request; ``eager``, those without graphs, for stock; ``steps``, how many were
        captured; ``calls`` of the patches; ``launches`` of the first graph by kind;
        ``unwritten`` as `graphs.Graph` has it, of all graphs; ``freed``, how many
        arguments of the first graph are freed memory in the end; ``moving``, see
        `_moving`; ``graph``, the first one as `graphs.describe` has it, with what
        moves from it to the second. For patches that do not fit, or whose step cannot
        be captured or replayed, only ``failed``, one line; those behind them are left
        out, because the engine may be in the middle of a step.
    """
    from vllm_ext_cpulane.tinymodel import write_model

    with ExitStack() as stack:
        device = stack.enter_context(PretendDevice())
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="vllm-ext-"))
        model = write_model(
            *(folder, VOCABULARY), layers=1, tokenizer=True, weights=True
        )
        llm = stack.enter_context(engine.booted(device, model=str(model)))
        runner = engine.model_runner(llm)
        gpupath.graphs_that_replay(runner)
        found = {}
        if stock:
            eager = _decode(llm, "eager")
            found[STOCK] = _finding(llm, device, STOCK) | {"eager": eager, "calls": 0}
        for subject, names in patches.items():
            try:
                with all_applied(names) as outcomes:
                    finding = _finding(llm, device, subject)
            except Exception as error:  # stock and the other patches are reported
                found[subject] = {"failed": reason(error)}
                break
            calls = sum(sum(outcome.calls.values()) for outcome in outcomes)
            found[subject] = finding | {"calls": calls}
        return found


def _finding(llm: Any, device: PretendDevice, name: str) -> dict[str, Any]:
    captured: list[Step] = []
    with _captured_steps(engine.model_runner(llm), device, captured):
        tokens = _decode(llm, name)
    first, second = (step.graph for step in captured[:2])
    try:
        first.replay()
        freed = 0
    except graphs.DeadInput as error:
        freed = len(str(error).splitlines())
    return {
        "tokens": tokens,
        "steps": len(captured),
        "launches": first.counts(),
        "unwritten": [line for step in captured for line in step.graph.unwritten],
        "freed": freed,
        "moving": _moving(captured),
        "graph": graphs.describe(first, graphs.diff(first, second)),
    }


@contextmanager
def _captured_steps(
    runner: Any, device: PretendDevice, captured: list[Step]
) -> Iterator[None]:
    """Run each pure decode step of a full batch as the replay of a graph made of it."""
    from vllm.v1.worker.gpu import buffer_utils, model_runner

    execute, sample = runner.execute_model, runner.sample_tokens
    hand_over, read_back = model_runner.async_tensor_h2d, model_runner.AsyncOutput
    stream = Stream()
    steps = 0
    last: list[str] = []
    handed_over: list[Any] = []  # alive until the step has run

    @contextmanager
    def abandoned_on_error() -> Iterator[None]:
        """At once: before it raises the error, the engine waits for earlier steps."""
        try:
            yield
        except BaseException:
            if device.capture is not None:
                captured[-1].graph.abandon()
                stream.__exit__()
            raise

    def execute_model(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal steps, last
        steps += 1
        tokens = scheduled.num_scheduled_tokens
        decode = list(tokens.values()) == [1] * SEATS
        requests = list(tokens) if decode and not scheduled.scheduled_new_reqs else []
        is_new, last = requests != last, requests
        if steps > WARM and requests:
            blocks = scheduled.scheduled_cached_reqs.new_block_ids
            got_block = any(each is not None for each in blocks)
            captured.append(Step(is_new, got_block, graphs.Graph()))
            stream.__enter__()
            captured[-1].graph.capture_begin()
        with abandoned_on_error():
            return execute(scheduled, *args, **kwargs)

    def sample_tokens(*args: Any, **kwargs: Any) -> Any:
        if device.capture is None:
            return sample(*args, **kwargs)
        asked: list[dict[str, Any]] = []
        keep = mock.patch.object(
            model_runner, "AsyncOutput", lambda **made: asked.append(made)
        )
        with abandoned_on_error(), keep:
            sample(*args, **kwargs)
        graph = captured[-1].graph
        try:
            graph.capture_end()
        finally:
            stream.__exit__()
        graph.replay()
        handed_over.clear()
        [made] = asked
        return read_back(**made)

    def before_the_graph(*args: Any, **kwargs: Any) -> Any:
        if device.capture is None:
            return hand_over(*args, **kwargs)
        with device.default_stream:
            handed_over.append(hand_over(*args, **kwargs))
        return handed_over[-1]

    with (
        mock.patch.object(runner, "execute_model", execute_model),
        mock.patch.object(runner, "sample_tokens", sample_tokens),
        mock.patch.object(model_runner, "async_tensor_h2d", before_the_graph),
        mock.patch.object(buffer_utils, "async_tensor_h2d", before_the_graph),
        abandoned_on_error(),
    ):
        yield


def _decode(llm: Any, name: str) -> list[list[int]]:
    """The tokens of each request; all but `SEATS` of them wait for a seat."""
    from vllm import SamplingParams

    core = llm.llm_engine
    waiting = list(enumerate(REQUESTS))
    running: set[str] = set()
    tokens: dict[str, list[int]] = {}
    while waiting or running:
        while waiting and len(running) < SEATS:
            index, wanted = waiting.pop(0)
            params = {"max_tokens": MAX_TOKENS, "ignore_eos": True, **wanted}
            running.add(f"{name} {index}")
            core.add_request(
                f"{name} {index}",
                {"prompt_token_ids": [4 + 7 * index + i for i in range(3 + index)]},
                SamplingParams(detokenize=False, **params),
            )
        for answer in core.step():
            tokens[answer.request_id] = list(answer.outputs[0].token_ids)
            if answer.finished:
                running.discard(answer.request_id)
    return [tokens[f"{name} {index}"] for index in range(len(REQUESTS))]


def _moving(captured: list[Step]) -> list[dict[str, Any]]:
    """What differs between captures of one step, each argument once.

    Returns:
        ``operation``, ``argument``, ``kind`` (as
        `graphs.Difference` has it), ``when`` (`EVERY_STEP` and so on), ``buffer``
        (what kernels call it), ``why``, ``where``, ``text``.
    """

    def when(one: Step, other: Step) -> str:
        if one.is_new or other.is_new:
            return ON_CHANGE
        return ON_BLOCK if one.got_block or other.got_block else EVERY_STEP

    rank = (EVERY_STEP, ON_BLOCK, ON_CHANGE).index
    pairs = list(zip(captured, captured[1:], strict=False))
    pairs.sort(key=lambda pair: rank(when(*pair)))
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for one, other in pairs:
        called = graphs.names(one.graph)
        for each in graphs.diff(one.graph, other.graph):
            memory = each.memory
            owner = other if each.before == "not launched" else one
            twins = [
                node.where
                for node in owner.graph.nodes[: each.position]
                if node.name == each.operation
            ]
            which = twins.count(each.where)
            record = {
                **{"operation": each.operation, "argument": each.argument},
                **{"kind": each.kind, "when": when(one, other)},
                **{"buffer": called[memory] if memory else "", "why": _why(each)},
                **{"where": str(each.where), "text": each.where.text},
            }
            key = (each.operation, each.where, which, each.argument, each.kind)
            found.setdefault(key, record)
    return list(found.values())


def _why(each: graphs.Difference) -> str:
    if each.kind == "operation":
        return "launched in some steps only"
    if each.kind != "address" or each.memory is None:
        return "computed by the host"
    if each.memory.pinned:
        return "pinned memory, another slot of a pool each time"
    if each.memory.weak.expired():
        return "allocated anew"
    return "another tensor"


if __name__ == "__main__":
    main()
