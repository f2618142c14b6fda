"""Steps run out of graphs, in a real engine whose CUDA graphs are the emulator's.

Argument: the case. ``async``, ``sync`` and ``lags`` decode random workloads, first as
stock does, then by step graphs, then by graphs of whole steps, in one engine. In
``small``, `planted` spoils one buffer after the other and `whole` one part of a
whole step, and look whether the self-check sees it. `ring` has no engine: it plays the
ring of slots on a device whose clock it turns.
"""

import dataclasses
import logging
import os
import random
import re
import sys
import tempfile
from collections import Counter
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import workload

from vllm_ext.prove import engine, pretend
from vllm_ext.prove.pretend import DEVICE, PretendDevice
from vllm_ext_cpulane.engine import report
from vllm_ext_cpulane.tinymodel import write_model

CANARY = -77
BLOCKS = 13  # of the KV cache: less than eight requests may want
workload.VOCAB = 512


def booted(device: PretendDevice, shape: Any = None, **options: Any) -> Any:
    """An engine of a model of one layer, or of this ``shape``."""
    from vllm.v1.attention.backends import triton_attn

    # Its kernel without segments: a sixteenth of the programs to interpret.
    triton_attn.MIN_LAUNCH_GRID_SIZE_2D = 0
    folder = tempfile.mkdtemp()
    shape = shape or {"layers": 1, "heads": 1, "head_dim": 64}
    model = write_model(folder, workload.VOCAB, tokenizer=True, weights=True, **shape)
    defaults = {"num_gpu_blocks_override": BLOCKS, "enable_prefix_caching": False}
    return engine.booted(device, **{"model": str(model)} | defaults | options)


class Watch:
    """Counts what a runner does in each kind of step.

    Attributes:
        eligible: Steps by graphs.
        checked: Steps by graphs and by stock.
        others: The rest.
        preempted: Requests, in any step.
        allocations: In steps by graphs, on the device or pinned.
        submissions: Of steps by graphs: how often each set of them was seen.
        canaries: Cells of seats that were not in a step by graphs and changed.
        waits: Of the host for the device, in steps by graphs.
    """

    def __init__(self, runner: Any, device: PretendDevice, canaries: bool) -> None:
        self.eligible = self.checked = self.others = self.preempted = 0
        self.allocations = self.canaries = self.waits = 0
        self.submissions: Counter[str] = Counter()
        self._runner, self._canaries = runner, canaries
        self._ours = False
        self._kinds: Counter[str] = Counter()
        self._execute, self._sample = runner.execute_model, runner.sample_tokens
        runner.execute_model, runner.sample_tokens = self.execute, self.sample
        device.observers.append(self._saw)
        self._device, self._stock = device, (device._born, pretend.pin)
        born, pin = self._stock

        def count(stock: Any) -> Any:
            def made(*args: Any) -> Any:
                self.allocations += self._ours
                return stock(*args)

            return made

        device._born = count(born)
        pretend.pin = count(pin)

    def stop(self) -> None:
        self._device.observers.remove(self._saw)
        self._device._born, pretend.pin = self._stock
        del self._runner.execute_model, self._runner.sample_tokens

    def _saw(self, operation: Any) -> None:
        self._kinds["wait" if operation.wait else operation.kind] += 1

    def execute(self, scheduled: Any, *args: Any, **kwargs: Any) -> Any:
        runner = self._runner
        self.preempted += len(scheduled.preempted_req_ids or ())
        tokens = scheduled.total_num_scheduled_tokens
        if tokens:
            self._planned = scheduled.num_scheduled_tokens
            self._before = self._state(scheduled) if self._canaries else None
        # Whether it is a step by graphs is known afterwards; it begins with `_plan`.
        self._kinds.clear()
        allocations, self._ours = self.allocations, True
        result = self._execute(scheduled, *args, **kwargs)
        self._ours = runner._pending is not None
        if not self._ours:
            self.allocations = allocations
        if runner._pending is not None:
            self.eligible += 1
        elif runner._check is not None:
            self.checked += 1
        elif tokens:
            self.others += 1
        return result

    def sample(self, grammar: Any) -> Any:
        result = self._sample(grammar)
        if self._ours:
            kinds = self._kinds
            self.waits += kinds.pop("wait", 0)
            self.submissions[" ".join(f"{k}:{kinds[k]}" for k in sorted(kinds))] += 1
            if self._before is not None:
                self.canaries += self._changed()
        self._ours = False
        return result

    def _tensors(self) -> list[torch.Tensor]:
        runner = self._runner
        states = runner.req_states
        found = [
            states.num_computed_tokens.gpu,
            states.last_sampled_tokens,
            states.total_len.gpu,
            states.all_token_ids.gpu,
            runner.sampler.penalties_state.output_bin_counts,
            *(table.gpu for table in runner.block_tables.block_tables),
        ]
        return [pretend.data_of(tensor) for tensor in found]

    def _state(self, scheduled: Any) -> list[torch.Tensor]:
        """All state by seat, after seats that nobody has were filled with canaries."""
        free = self._runner.req_states.free_indices
        with pretend._later():
            for tensor in self._tensors():
                tensor[free] = CANARY
            return [tensor.clone() for tensor in self._tensors()]

    def _changed(self) -> int:
        """Cells that changed and are no seat's of this step."""
        index = self._runner.req_states.req_id_to_index
        mine = [index[name] for name in self._planned]
        others = [i for i in range(self._runner.max_num_reqs) if i not in mine]
        with pretend._later():
            pairs = zip(self._before or (), self._tensors(), strict=True)
            return sum(int((a[others] != b[others]).sum()) for a, b in pairs)


def decode(case: str, seed: int) -> None:
    with PretendDevice(lags=case == "lags") as device:
        if case == "sync":
            make_synchronous()
        with booted(device) as llm:
            runner = engine.model_runner(llm)
            requests = workload.requests(seed, 40, longest=20, last_arrival=84)
            for request in requests:  # logprobs make a step stock's: now and then
                if int(request.name) % 9:
                    request.params.pop("logprobs", None)
                request.params["max_tokens"] += 8
            graph, runner.step_graph = runner.step_graph, None
            stock = None if case == "lags" else workload.run(llm, requests)

            canaries = case == "sync"
            found = by(graph, llm, device, requests, canaries)
            runner._calendar = type(runner._calendar)()
            whole = captured(runner, graph)
            found["mono"] = by(whole, llm, device, requests, canaries)
            for each in (found, found["mono"]):
                each["stock"] = stock and workload.findings(stock)["answers"]
            if case == "lags":
                found["kernel"] = wrong_kernel(llm, runner, graph)
            report(found)


def by(
    graph: Any, llm: Any, device: PretendDevice, requests: Any, canaries: bool = False
) -> dict[str, Any]:
    """What requests are given by a step graph, and what its steps do."""
    runner = engine.model_runner(llm)
    runner.step_graph = graph
    watch = Watch(runner, device, canaries)
    findings = workload.findings(workload.run(llm, requests))
    watch.stop()
    on = runner.step_graph is graph
    short(llm, runner, None)  # a row of padding, in a graph of vLLM's
    return {
        **findings,
        **{k: v for k, v in vars(watch).items() if k[0] != "_"},
        "on": on,
        "unwritten": unwritten(graph),
        "cost": graph.cost,
        "table": [str(entry) for entry in graph.buffers.table()],
        "moved": graph.buffers.moved(runner),
        "async": is_async(llm),
    }


@torch.inference_mode()
def captured(runner: Any, other: Any, mono: bool = True) -> Any:
    """Graphs of whole steps, beside the ``other`` ones of the same engine."""
    graph = type(other)(runner, other.seats, mono=mono)
    graph.capture()
    return graph


def wrong_kernel(llm: Any, runner: Any, graph: Any) -> dict[str, list[str]]:
    """What the self-check says of a kernel that steps without graphs launch, too."""
    seats = type(graph.seats)
    draw = seats.draw
    found = {}

    def spoiled(self: Any, *args: Any, **kwargs: Any) -> None:
        draw(self, *args, **kwargs)
        args[-1].add_(1)

    for name, drawn in (("sound", draw), ("spoiled", spoiled)):
        with (
            mock.patch.object(seats, "draw", drawn),
            mock.patch.object(type(runner), "turn_off", autospec=True) as turn_off,
        ):
            short(llm, runner, captured(runner, graph, mono=False))
        found[name] = [call.args[1] for call in turn_off.call_args_list]
    return found


def unwritten(graph: Any) -> list[str]:
    """Reads of what nothing in a graph wrote, and that vLLM's own do not make.

    Those are of what attention leaves in rows of padding, however many there are.
    """

    def lines(graphs: Any) -> set[str]:
        found = {line for each in graphs for line in each.unwritten}
        return {re.sub(r"\d+ elements", "elements", line) for line in found}

    ours = (*graph._prep.values(), *graph._sampler.values(), *graph._step.values())
    return sorted(lines(ours) - lines(graph.manager.graphs.values()))


def is_async(llm: Any) -> bool:
    config = llm.llm_engine.vllm_config.scheduler_config
    return bool(config.async_scheduling)


def make_synchronous() -> None:
    """Let engines that are built from now on do one step after the other."""
    from vllm.platforms.cpu import CpuPlatform

    engine.put_on_device()
    as_cuda = CpuPlatform.check_and_update_config

    def check_and_update_config(cls: type, config: Any) -> None:
        as_cuda(config)
        config.scheduler_config.async_scheduling = False

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)


# -- planted bugs --------------------------------------------------------------------

# Made and used within one graph, or not ours: nothing can come between.
OUT_OF_REACH = {"tokens", "hidden_states", "ring.host_tokens"}
BY_SEAT = {"all_token_ids", "output_bin_counts"}  # of which the check restores some


@torch.inference_mode()
def spoil(entry: Any, seats: torch.Tensor) -> None:
    """What a bug in whoever writes a buffer may do to it."""
    if entry.tensor.dtype == torch.bool:
        entry.tensor.logical_not_()
    elif entry.name == "groups.layout":
        entry.tensor[:, 3] += 1  # block sizes
    elif entry.name in BY_SEAT:
        entry.tensor[seats] += 1
    elif entry.name == "staging":
        entry.tensor[8:9] -= 1  # a seat
    else:
        entry.tensor.add_(1)


def planted(llm: Any) -> dict[str, Any]:
    """Spoil a buffer of the graphs' at a time, under the self-check."""
    from vllm_ext.kernels import decode_inputs
    from vllm_ext.patches.step_graph.graphs import StepGraph

    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    prepare, replay, pack = (
        StepGraph.prepare,
        StepGraph.replay_sampler,
        decode_inputs.pack,
    )
    found: dict[str, Any] = {}
    logging.getLogger("vllm.vllm_ext").addHandler(Listener(logging.ERROR))
    runner = engine.model_runner(llm)
    graph = runner.step_graph
    stock = short(llm, runner, None)

    def look(name: str) -> None:
        said.clear()
        same = short(llm, runner, graph) == stock
        on = runner.step_graph is not None
        found[name] = {"same": same, "said": said[:], "on": on}

    def plant(entry: Any) -> None:
        def packed(staging: Any, *args: Any) -> int:
            words = pack(staging, *args)
            if entry.name == "ring.packed":
                staging[8] -= 1
            return words

        def prepared(self: Any, plan: Any) -> None:
            prepare(self, plan)
            if entry.name == "staging" or "the prep graph" in entry.written_by:
                spoil(entry, decode_inputs.seats(self.buffers.staging, 1).long())

        def replayed(self: Any, plan: Any) -> None:
            replay(self, plan)
            if "the sampler graph" in entry.written_by:
                spoil(entry, decode_inputs.seats(self.buffers.staging, 1).long())

        fixed = not entry.written_by
        kept = entry.tensor.clone() if fixed else entry.tensor
        if fixed:
            spoil(entry, kept)
        with (
            mock.patch.object(decode_inputs, "pack", packed),
            mock.patch.object(StepGraph, "prepare", prepared),
            mock.patch.object(StepGraph, "replay_sampler", replayed),
        ):
            look(entry.name)
        if fixed:
            with torch.inference_mode():
                entry.tensor.copy_(kept)

    look("sound")
    for entry in graph.buffers.table():
        if entry.name not in OUT_OF_REACH:
            plant(entry)
    look("sound again")
    return found


def whole(llm: Any) -> dict[str, Any]:
    """Leave out a part of a whole step at a time, under the self-check."""
    runner = engine.model_runner(llm)
    first = runner.step_graph
    stock = short(llm, runner, None)
    found: dict[str, Any] = {}
    said: list[str] = []

    def look(name: str, graph: Any) -> None:
        with mock.patch.object(type(runner), "turn_off", autospec=True) as turn_off:
            same = short(llm, runner, graph) == stock
        said.extend(call.args[1] for call in turn_off.call_args_list)
        found[name] = {"same": same, "said": said[:]}
        said.clear()

    graph = captured(runner, first)
    look("sound", graph)
    kept = dict(graph._prep)
    model = runner.model

    class Without:
        """The model, with hidden states that are not of this step."""

        compute_logits = model.compute_logits

        def __init__(self, states: torch.Tensor) -> None:
            self.states = states

        def __call__(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
            return self.states[: len(input_ids)]

    stale = graph.buffers.hidden_states
    for name, patched in {
        "inputs": mock.patch.object(graph, "_make_inputs"),
        "forward": mock.patch.object(runner, "model", Without(torch.ones_like(stale))),
        "hidden states": mock.patch.object(runner, "model", Without(stale)),
        "draw": mock.patch.object(graph, "_draw"),
    }.items():
        with patched, torch.inference_mode():
            graph.capture()
        graph._prep = dict(kept)
        look(name, graph)
    runner.step_graph = first
    return found


def unchecked(llm: Any, device: PretendDevice, look: Any) -> Any:
    """What ``look`` sees of steps of which none is checked."""
    from vllm_ext.patches.step_graph.check import Calendar

    engine.model_runner(llm)._calendar = Calendar("0")
    return look(llm, device)


def short(llm: Any, runner: Any, graph: Any, check: str = "1") -> Any:
    """Three requests and a few steps, each of which is checked, or none."""
    from vllm_ext.patches.step_graph.check import Calendar

    runner.step_graph, runner._calendar = graph, Calendar(check)
    requests = [
        workload.Request("0", list(range(4, 19)), {"temperature": 0.0}, 0),
        workload.Request(
            "1",
            [9, 8, 7],
            {"temperature": 0.9, "seed": 1, "repetition_penalty": 1.3},
            0,
        ),
        workload.Request("2", [5] * 16, {"temperature": 0.7, "seed": 2, "top_k": 9}, 0),
    ]
    for request in requests:
        request.params = {"max_tokens": 3, "ignore_eos": True, **request.params}
    return workload.run(llm, requests)


# -- who is eligible -----------------------------------------------------------------

# By attribute of the runner, a value that no step graph is for.
ENGINES: dict[str, Any] = {
    **{"use_pp": True, "use_dcp": True, "lora_config": "one", "fast_prefill": "on"},
    **{"pcp_manager": "one", "batch_sharder": "one", "ubatch_runner": "one"},
    **{"speculative_config": "one", "decode_query_len": 2, "check_ep_fault": True},
    **{"is_pooling_model": True, "is_encoder_decoder": True, "eplb": "one"},
    **{"uses_inputs_embeds": True, "kv_connector": "one", "model_state": "one"},
    **{"aux_output_connector": "one", "kernel_block_sizes": [8]},
}
# By field of the scheduler's output.
STEPS: dict[str, Any] = {
    **{"scheduled_new_reqs": ["one"], "total_num_scheduled_tokens": 9},
    **{"scheduled_spec_decode_tokens": {"0": [1]}, "new_block_ids_to_zero": [3]},
    **{"has_structured_output_requests": True, "kv_cache_block_copies": ["one"]},
    "scheduled_encoder_inputs": {"0": [0]},
}


def eligible(llm: Any) -> dict[str, Any]:
    """What is said of engines and steps that differ in one thing from a good one."""
    from vllm_ext.patches.step_graph import eligibility

    runner = engine.model_runner(llm)
    graph = runner.step_graph
    engines: dict[str, Any] = {"as it is": list(eligibility.reasons_of_engine(runner))}
    for name, value in ENGINES.items():
        if name == "eplb":
            value = SimpleNamespace(state=value)
        with mock.patch.object(runner, name, value):
            engines[name] = list(eligibility.reasons_of_engine(runner))
    with mock.patch.object(runner.cudagraph_manager, "_candidates", {}):
        engines["graphs"] = list(eligibility.reasons_of_engine(runner))
    [[group]] = runner.attn_groups
    builder = group.get_metadata_builder()
    with mock.patch.object(builder, "supports_draft_decode_metadata_update", False):
        engines["metadata"] = list(eligibility.reasons_of_engine(runner))
    impl = runner.compilation_config.static_forward_context[group.layer_names[0]].impl
    for backend, version, expected in (
        *(("FLASHINFER", None, "backend"), ("FLASH_ATTN", None, "no version")),
        *(("FLASH_ATTN", 2, "FlashAttention 2"), ("FLASH_ATTN", 3, "FlashAttention 3")),
    ):
        named = SimpleNamespace(get_name=lambda backend=backend: backend)
        with (
            mock.patch.object(group, "backend", named),
            mock.patch.object(impl, "vllm_flash_attn_version", version, create=True),
        ):
            engines[expected] = list(eligibility.reasons_of_engine(runner))

    steps: dict[str, Any] = {}
    plan = graph.plan

    def look(scheduled: Any) -> Any:
        verdict = plan(scheduled)
        if isinstance(verdict, str) or steps:
            return verdict
        before = host_state(runner)
        cached = scheduled.scheduled_cached_reqs
        changes: dict[str, Any] = {**STEPS}
        rows = len(cached.req_ids)
        tokens = scheduled.num_scheduled_tokens
        changes["num_scheduled_tokens"] = dict(reversed(tokens.items()))
        for name, field, value in (
            ("prompt", "num_computed_tokens", [0] * rows),
            ("two blocks", "new_block_ids", [([1, 2],)] * rows),
        ):
            other = dataclasses.replace(cached, **{field: value})
            changes[name] = dataclasses.replace(scheduled, scheduled_cached_reqs=other)
        for name, change in changes.items():
            if not isinstance(change, type(scheduled)):
                change = dataclasses.replace(scheduled, **{name: change})
            found = plan(change)
            steps[name] = found if isinstance(found, str) else "eligible"
        seat = verdict.seats[0]
        for name, holder, value in (
            ("aside", graph.aside, 2),
            ("asks", graph.seats.asks, 8),
            ("full", runner.block_tables.num_blocks.np[0], 8),
        ):
            kept, holder[seat] = holder[seat], value
            given = dataclasses.replace(cached, new_block_ids=[([1],)] * rows)
            found = plan(dataclasses.replace(scheduled, scheduled_cached_reqs=given))
            holder[seat] = kept
            steps[name] = found if isinstance(found, str) else "eligible"
        with mock.patch.object(graph, "by_rows", graph.by_rows[:rows]):
            steps["rows"] = plan(scheduled)
        steps["nothing has changed"] = before == host_state(runner)
        return verdict

    graph.plan = look
    short(llm, runner, graph, "0")
    del graph.plan
    return {"engines": engines, "steps": steps}


def host_state(runner: Any) -> list[Any]:
    """What the host knows of requests."""
    states = runner.req_states
    return [
        states.num_computed_tokens_np.tolist(),
        states.num_computed_prefill_tokens.tolist(),
        runner.block_tables.num_blocks.np.tolist(),
        dict(states.req_id_to_index),
        list(states.free_indices),
        runner.step_graph.aside.tolist(),
        runner.step_graph.seats.asks.tolist(),
        runner.step_graph._turn,
    ]


# -- a life --------------------------------------------------------------------------


def life(llm: Any) -> dict[str, Any]:
    """What comes and goes with an engine: graphs, KV cache, other ranks, a failure."""
    from vllm_ext.patches.step_graph import check, graphs

    found: dict[str, Any] = {}
    runner = engine.model_runner(llm)
    first = runner.step_graph
    stock = short(llm, runner, None)
    runner.step_graph = first

    def look(name: str) -> None:
        graph = runner.step_graph
        same = short(llm, runner, graph, "0") == stock
        found[name] = {"same": same, "on": runner.step_graph is not None}

    look("captured")
    runner.cudagraph_manager.release_graphs()
    look("released")
    runner.capture_model()
    found["another"] = runner.step_graph is not first
    look("captured again")
    found["checks that fail"] = checks_that_fail(llm, runner, stock)
    runner.cudagraph_manager.release_graphs()
    with mock.patch.dict(os.environ, {graphs.VARIABLE: "mono"}):
        runner.capture_model()
    found["mono"] = runner.step_graph.mono
    look("captured as one")
    runner.cudagraph_manager.release_graphs()
    look("released as one")
    runner.capture_model()
    found["not mono"] = not runner.step_graph.mono
    head = runner.model.lm_head.weight
    with mock.patch.object(type(head), "data_ptr", return_value=1):
        look("another head")
    runner.cudagraph_manager.release_graphs()
    runner.capture_model()
    # A backend that makes its metadata anew in each step, as FlashAttention 3 does.
    lengths = torch.zeros_like(runner.input_buffers.seq_lens)
    [[group]] = runner.attn_groups
    runner.cudagraph_manager.release_graphs()

    def make(metadata: Any) -> None:
        lengths.copy_(runner.input_buffers.seq_lens)

    builder = group.get_metadata_builder()
    with mock.patch.object(builder, "update_draft_decode_metadata", make):
        runner.capture_model()
    look("with metadata")
    now = runner.input_buffers.seq_lens
    found["metadata"] = [lengths.cpu().tolist(), now.cpu().tolist()]

    total_len = runner.req_states.total_len
    kept, total_len.gpu = total_len.gpu, total_len.gpu.clone()
    found["moved"] = runner.step_graph.buffers.moved(runner)
    total_len.gpu = kept
    runner.cudagraph_manager.release_graphs()
    runner.capture_model(profile_only=True)
    look("captured for a profile")

    runner.cudagraph_manager.release_graphs()
    stock_record = graphs.record
    graphs.record = mock.Mock(side_effect=RuntimeError("out of memory"))
    runner.capture_model()
    graphs.record = stock_record
    look("not captured")

    runner.cudagraph_manager.release_graphs()
    group = SimpleNamespace(world_size=2, cpu_group=None)
    asked: list[int] = []

    def all_reduce(flag: torch.Tensor, op: Any, group: Any) -> None:
        asked.append(int(flag))
        flag.fill_(0 if len(asked) == 2 else int(flag))

    with (
        mock.patch.object(check, "get_tp_group", return_value=group),
        mock.patch.object(torch.distributed, "all_reduce", all_reduce),
    ):
        runner.capture_model()
        found["of two ranks"] = runner.step_graph is not None
        same = short(llm, runner, runner.step_graph) == stock
        on = runner.step_graph is not None
    found["the other rank differs"] = {"same": same, "on": on, "asked": asked}

    runner.cudagraph_manager.release_graphs()
    runner.capture_model()
    config = runner.kv_cache_config
    runner.initialize_kv_cache(config)
    found["another KV cache"] = runner.step_graph is not None
    return found


def checks_that_fail(llm: Any, runner: Any, stock: Any) -> dict[str, Any]:
    """What becomes of a step whose check runs out of memory in one of its parts."""
    from vllm_ext.patches.step_graph import check

    bracketed = runner.step_graph
    whole = captured(runner, bracketed)
    found = {}
    for name, graph, holder in (
        *((part, bracketed, check.Check) for part in ("__init__", "draw", "problems")),
        ("replay_sampler", bracketed, type(bracketed)),
        ("replay_step", whole, type(whole)),
    ):
        failing = mock.Mock(side_effect=RuntimeError("out of memory"))
        with mock.patch.object(holder, name, failing):
            same = short(llm, runner, graph) == stock
        on = runner.step_graph is not None
        found[name] = {"same": same, "on": on, "times": failing.call_count}
    runner.step_graph = bracketed
    return found


# -- the ring ------------------------------------------------------------------------


def ring() -> dict[str, Any]:
    """Steps whose device runs when the dice say so, read when the dice say so."""
    from vllm_ext.patches.step_graph.graphs import StepOutput

    settle = StepOutput.settle
    sound = [play(seed, settle) for seed in range(40)]
    # Whoever takes a slot does not ask; who wants the tokens does.
    with mock.patch.object(StepOutput, "settle"):
        wrong = [play(seed, settle) for seed in range(8)]
    return {"sound": sound, "a slot is taken at once": wrong}


def play(seed: int, settle: Any) -> int:
    """How many of 60 steps gave other tokens than those that they were given.

    Args:
        seed: Of the dice.
        settle: What whoever wants an output calls first.
    """
    choose = random.Random(seed)
    with PretendDevice(lags=True) as device:
        device.stream = main = pretend.Stream()
        copying = pretend.Stream()
        graph = empty_step_graph(main, copying)
        waiting: list[tuple[int, Any]] = []
        wrong = 0

        def take() -> bool:
            step, output = waiting.pop(0)
            settle(output)
            tokens = output.get_output().sampled_token_ids
            return bool(tokens != [[10 * step + row] for row in range(4)])

        for step in range(60):
            plan: Any = SimpleNamespace(
                **{"padded": 4, "seats": np.arange(4) + 10 * step, "blocks": []},
                **{"asks": 0, "requests": ["a", "b", "c", "d"]},
            )
            graph.prepare(plan)
            waiting.append((step, graph.sample(plan)))
            for stream in (main, copying):
                stream.advance(choose.choice([0, 0, 0, 1, 3, 9]))
            while waiting and choose.random() < 0.45:
                wrong += take()
        while waiting:
            wrong += take()
        return wrong


def empty_step_graph(main: pretend.Stream, copying: pretend.Stream) -> Any:
    """A `StepGraph` whose tokens are its seats, and that has no model."""
    from vllm_ext.patches.step_graph import graphs
    from vllm_ext.patches.step_graph.buffers import make_ring

    rows, place = 4, torch.device(DEVICE, 0)
    words = graphs.decode_inputs.words(rows, 1)
    graph = object.__new__(graphs.StepGraph)
    ring = make_ring(4, words, rows, place)
    pretend.pin(ring.packed)
    pretend.pin(ring.host_tokens)
    staging = torch.zeros(words, dtype=torch.int32, device=place)
    graph.groups, graph.sizes, graph._turn, graph.mono = 1, [rows], 0, False
    graph.buffers = SimpleNamespace(ring=ring, staging=staging)
    graph.seats = SimpleNamespace(freshen=lambda *_: None)
    graph._slots = [graphs.Slot(graph, number) for number in range(len(ring))]
    graph.runner = SimpleNamespace(
        main_stream=main,
        output_copy_stream=copying,
        observability_config=SimpleNamespace(cudagraph_metrics=False),
    )

    def sampler() -> None:
        ring.tokens[graph.slot.number].copy_(staging[8 : 8 + rows])

    graph._prep = {rows: SimpleNamespace(replay=lambda: None)}
    graph._sampler = {(rows, False): SimpleNamespace(replay=sampler)}
    return graph


if __name__ == "__main__":
    if sys.argv[1] == "small":
        import vllm

        from vllm_ext.prove import stepdrawing

        with PretendDevice() as device, booted(device) as llm:
            found = {"drawing": unchecked(llm, device, stepdrawing.of_engine)}
            found |= {"eligible": eligible(llm)}
            found |= {"planted": planted(llm), "whole": whole(llm)}
            found |= {"life": life(llm)}
        report({**found, "ring": ring(), "vllm": vllm.__version__})
    else:
        decode(sys.argv[1], int(sys.argv[2]))
