"""Two schedulers on the same traffic, stock and patched, compared after every call.

Real schedulers of vLLM with real KV cache managers; only the model is left out, and
its tokens follow from the traffic. What is compared: every field of what a call
returned; then the state of every request, the queues and counters of the scheduler,
every block with its references and hashes, the order of the free list, the prefix
cache, and the events that were published. Left out are times, and what a patch keeps
for itself (names that begin with ``_vext``).
"""

import random
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from functools import cache, partial
from itertools import zip_longest
from types import MethodType
from typing import Any
from unittest import mock

import msgspec
import numpy as np
import torch
from vllm.config import (
    CacheConfig,
    KVEventsConfig,
    ModelConfig,
    SchedulerConfig,
    VllmConfig,
)
from vllm.sampling_params import RepetitionDetectionParams, SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
)
from vllm.v1.outputs import LogprobsLists, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from vllm_ext.children import serve
from vllm_ext.patches.scheduler_fast_path import replacement
from vllm_ext.soak.traffic import (
    VOCABULARY,
    Arrival,
    Setup,
    Traffic,
    random_traffic,
    smallest,
)

QUEUES = ("waiting", "kv_holding_waiting")


class DifferenceError(Exception):
    """Stock and patched differ: in which step, after which call, and in what."""

    def __init__(self, step: int, call: str, where: str) -> None:
        super().__init__(f"step {step}, after {call}: {where}")
        self.step = step


@dataclass
class Seen:
    """What the traffic made the schedulers do, to judge whether it was worth it."""

    steps: int = 0
    calls: int = 0  # after which everything was compared
    scheduled: int = 0  # calls that scheduled tokens
    fast: int = 0  # of these, by the patch
    updated: int = 0  # calls with tokens to evaluate
    fast_updates: int = 0
    finished: Counter[str] = field(default_factory=Counter)
    preempted: int = 0
    hits: int = 0  # prompt tokens found in the prefix cache
    events: int = 0
    shapes: set[tuple[object, ...]] = field(default_factory=set)


class Publisher:
    """Keeps the KV cache events that a scheduler published since they were taken."""

    def __init__(self) -> None:
        self.batches: list[list[Any]] = []
        self.count = 0

    def publish(self, batch: Any) -> None:
        self.batches.append(batch.events)
        self.count += len(batch.events)

    def take(self) -> list[list[Any]]:
        taken, self.batches = self.batches, []
        return taken

    def shutdown(self) -> None:
        """Nothing to end."""


class Side:
    """One scheduler with its requests, and the steps it has in flight."""

    def __init__(self, setup: Setup, *, patched: bool) -> None:
        self.setup = setup
        self.scheduler = _scheduler(setup)
        self.fast = Counter[str]()
        if patched:
            self._patch("schedule", replacement.steady_schedule)
            self._patch("update_from_output", replacement.steady_update)
        self.published = self.scheduler.kv_event_publisher = Publisher()
        self.in_flight: deque[tuple[Any, Plan]] = deque()
        self._alive: dict[str, Request] = {}
        self._hasher = get_request_block_hasher(setup.block_size, sha256)

    def _patch(self, name: str, wrap: Callable[[Any], Any]) -> None:
        """Put a wrapper on this instance alone; count the calls that it handles."""
        stock = getattr(Scheduler, name)
        assert stock.__code__.co_filename.endswith("sched/scheduler.py"), "not stock"

        def counted(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
            # Alone or with rows kept out of sight: then the patch has called it.
            rest = name == "schedule" and scheduler.running == []
            rest |= name != "schedule" and not args[0].num_scheduled_tokens
            self.fast[name] += rest
            return stock(scheduler, *args, **kwargs)

        setattr(self.scheduler, name, MethodType(wrap(counted), self.scheduler))

    def add(self, arrival: Arrival) -> None:
        params = SamplingParams(
            max_tokens=arrival.max_tokens,
            min_tokens=min(arrival.min_tokens, arrival.max_tokens),
            stop_token_ids=list(arrival.stops),
            logprobs=2 if arrival.logprobs else None,
            repetition_detection=RepetitionDetectionParams(
                max_pattern_size=2, min_pattern_size=1, min_count=2
            )
            if arrival.repetition
            else None,
        )
        if arrival.eos is not None:
            params.update_from_generation_config({}, arrival.eos)
        self.scheduler.add_request(
            Request(
                request_id=f"r{arrival.name}",
                prompt_token_ids=arrival.prompt(),
                sampling_params=params,
                pooling_params=None,
                arrival_time=float(arrival.step),
                priority=arrival.priority,
                client_index=arrival.client,
                trace_headers={"trace": "1"} if arrival.traced else None,
                cache_salt="salt" if arrival.salt else None,
                block_hasher=self._hasher if self.setup.caching else None,
            )
        )

    def happen(self, kind: str) -> Any:
        scheduler = self.scheduler
        if kind in ("reset", "preempt"):
            return scheduler.reset_prefix_cache(reset_running_requests=kind != "reset")
        if kind == "few tokens":
            scheduler.max_num_scheduled_tokens = 2
        if kind == "small input":
            scheduler.scheduler_config.max_num_batched_tokens = 2
        states = {
            "pause": PauseState.PAUSED_ALL,
            "hold": PauseState.PAUSED_NEW,
            "resume": PauseState.UNPAUSED,
        }
        if kind in states:
            scheduler.set_pause_state(states[kind])
        return None

    def state(self) -> dict[str, Any]:
        """Everything of the scheduler that can be compared with another's."""
        scheduler, manager = self.scheduler, self.scheduler.kv_cache_manager
        pool = manager.block_pool
        seen = {**self._alive, **scheduler.requests}
        self._alive = dict(scheduler.requests)
        return {
            "request": {name: _request(request) for name, request in seen.items()},
            "scheduler": {
                name: plain(value)
                for name, value in vars(scheduler).items()
                if not name.startswith("_vext") and _is_plain(value)
            },
            **{
                name: [request.request_id for request in getattr(scheduler, name)]
                for name in QUEUES
            },
            "blocks": [
                (block.ref_cnt, block.block_hash, block.block_hash_num_tokens)
                for block in pool.blocks
            ],
            "free list": [
                block.block_id for block in pool.free_block_queue.get_all_free_blocks()
            ],
            "free": pool.get_num_free_blocks(),
            "prefix cache": {
                key: list(found) if isinstance(found, dict) else [found.block_id]
                for key, found in pool.cached_block_hash_to_block._cache.items()
            },
            "more hashes": dict(pool.cached_block_hashes_by_block),
            "events waiting": plain(pool.kv_event_queue),
            "prefix statistics": plain(manager.prefix_cache_stats),
            "group": [
                {
                    name: plain(value)
                    for name, value in vars(group).items()
                    if _is_plain(value)
                }
                for group in manager.coordinator.single_type_managers
            ],
            "published": plain(self.published.take()),
        }


@dataclass
class Plan:
    """What the model will make of a step: tokens by request, in an order of its own."""

    tokens: dict[str, list[int]]
    logprobs: bool

    def output(self) -> ModelRunnerOutput:
        """For one scheduler: it may change the lists."""
        names, count = list(self.tokens), len(self.tokens)
        made = np.arange(count * 3).reshape(count, 3)
        return ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: i for i, name in enumerate(names)},
            sampled_token_ids=[list(tokens) for tokens in self.tokens.values()],
            logprobs=LogprobsLists(made, made / 7, made[:, 0])
            if self.logprobs
            else None,
            pooler_output=[],
        )


def run(traffic: Traffic, seen: Seen | None = None) -> Seen:
    """Put both schedulers through ``traffic``; what they did is added to ``seen``.

    Raises:
        DifferenceError: They do not do the same.
    """
    with mock.patch.object(replacement, "WORTH_A_SPLIT", traffic.setup.split):
        return _run(traffic, seen or Seen())


def _run(traffic: Traffic, seen: Seen) -> Seen:
    sides = Side(traffic.setup, patched=False), Side(traffic.setup, patched=True)
    stock, patched = sides
    depth = 2 if traffic.setup.ahead else 1
    arrivals: dict[int, list[Arrival]] = {}
    for arrival in traffic.arrivals:
        arrivals.setdefault(arrival.step, []).append(arrival)
    aborts: dict[tuple[int, bool], list[str]] = {}
    for arrival in traffic.arrivals:
        if arrival.aborted is not None:
            when = arrival.step + arrival.aborted, arrival.within
            aborts.setdefault(when, []).append(f"r{arrival.name}")
    events: dict[int, list[str]] = {}
    for event in traffic.events:
        events.setdefault(event.step, []).append(event.kind)

    def compare(step: int, call: str, *results: Any) -> None:
        for left, right in (results, [side.state() for side in sides]):
            if left != right:
                raise DifferenceError(step, call, difference(left, right))

    def both(step: int, call: str, act: Callable[[Side], Any]) -> tuple[Any, Any]:
        """Do the same on both sides; an error counts as what was returned."""
        results = []
        for side in sides:
            try:
                results.append(act(side))
            except Exception as error:
                results.append(error)
        seen.calls += 1
        left, right = results
        if isinstance(right, Exception):
            if isinstance(left, Exception) and str(left) == str(right):
                raise left
            raise DifferenceError(step, call, f"raised {right!r}") from right
        if isinstance(left, Exception):
            raise DifferenceError(step, call, f"did not raise {left!r}") from left
        compare(step, call, plain(left), plain(right))
        return left, right

    def abort(step: int, within: bool) -> None:
        names = aborts.get((step, within))
        if names:
            both(
                *(step, "an abort"),
                lambda side: side.scheduler.finish_requests(
                    names, RequestStatus.FINISHED_ABORTED
                ),
            )

    def update(step: int) -> None:
        def evaluate(side: Side) -> Any:
            scheduled, plan = side.in_flight.popleft()
            outputs = side.scheduler.update_from_output(scheduled, plan.output())
            _spoil(scheduled)
            return outputs

        left, right = (plain(side.in_flight[0][0]) for side in sides)
        if left != right:
            where = difference(left, right)
            raise DifferenceError(step, "the steps since it was scheduled", where)
        plan = stock.in_flight[0][1]
        seen.updated += bool(plan.tokens)
        before = patched.fast["update_from_output"]
        outputs, _ = both(step, "update_from_output", evaluate)
        seen.fast_updates += bool(plan.tokens) * (
            patched.fast["update_from_output"] - before
        )
        for client in outputs.values():
            for output in client.outputs:
                if output.finish_reason is not None:
                    seen.finished[output.finish_reason.name] += 1
                if output.prefill_stats is not None:
                    seen.hits += output.prefill_stats.num_cached_tokens or 0

    for step in range(traffic.steps):
        seen.steps += 1
        now = events.get(step, [])
        for kind in now:
            both(step, kind, partial(Side.happen, kind=kind))
        for arrival in arrivals.get(step, ()):
            both(step, "add_request", partial(Side.add, arrival=arrival))
        abort(step, False)
        wants = stock.scheduler.has_requests()
        if len(stock.in_flight) < depth and wants:
            before = patched.fast["schedule"], len(patched.scheduler.running)
            throttled = "throttle" in now
            outputs = both(step, "schedule", partial(_schedule, throttled=throttled))
            plan = _plan(stock.scheduler, outputs[0])
            for side, output in zip(sides, outputs, strict=True):
                side.in_flight.append((output, plan))
            seen.preempted += len(outputs[0].preempted_req_ids or ())
            if plan.tokens:
                seen.scheduled += 1
                fast = patched.fast["schedule"] - before[0]
                # An empty step of stock's own looks alike, but has no rows.
                seen.fast += bool(fast and before[1])
            if len(stock.in_flight) < depth and "drain" not in now:
                abort(step, True)
                continue
        abort(step, True)
        if "stall" in now or not stock.in_flight:
            continue
        update(step)
        while "drain" in now and stock.in_flight:
            update(step)
    seen.events += stock.published.count
    seen.shapes.add((traffic.setup.ahead, traffic.setup.second, traffic.setup.caching))
    return seen


def compare(first: int, count: int, steps: int) -> dict[str, Any]:
    """Traffics of ``count`` seeds, one after another.

    Returns:
        The fields of `Seen`, and ``differs``: the first difference and the smallest
        traffic that shows it, or ``None``.
    """
    seen = Seen()
    for seed in range(first, first + count):
        whole = random_traffic(seed, steps)
        try:
            run(whole, seen)
        except DifferenceError:
            small = smallest(whole, failing_step)
            try:
                run(small)
            except DifferenceError as difference:
                return _told(seen) | {"differs": f"seed {seed}: {difference}\n{small}"}
    return _told(seen) | {"differs": None}


def _told(seen: Seen) -> dict[str, Any]:
    return {**vars(seen), "shapes": len(seen.shapes)}


def failing_step(traffic: Traffic) -> int | None:
    """For `vllm_ext.soak.traffic.smallest`."""
    try:
        run(traffic)
    except DifferenceError as difference:
        return difference.step
    except Exception:
        return None  # of stock's own: not what is looked for
    return None


def _schedule(side: Side, throttled: bool) -> Any:
    return side.scheduler.schedule(throttled)


def _spoil(scheduled: Any) -> None:
    """Empty the lists of an output: it is its reader's, and nobody else's."""
    rows = scheduled.scheduled_cached_reqs
    for each in (
        *(scheduled.num_scheduled_tokens, rows.req_ids, rows.new_block_ids),
        *(rows.num_computed_tokens, rows.num_output_tokens),
    ):
        each.clear()


def _plan(scheduler: Any, scheduled: Any) -> Plan:
    """One token for each request whose prompt is through, by name and position."""
    tokens = {}
    logprobs = False
    for name in scheduled.num_scheduled_tokens:
        request = scheduler.requests[name]
        logprobs |= request.sampling_params.logprobs is not None
        drawn = random.Random(f"{name} {request.num_computed_tokens}")
        # A request repeats itself now and then.
        token = drawn.randrange(VOCABULARY if drawn.random() < 0.8 else 3)
        tokens[name] = [] if request.is_prefill_chunk else [token]
    order = list(tokens)
    random.Random(len(order)).shuffle(order)
    return Plan({name: tokens[name] for name in order}, logprobs)


# -- what is compared ------------------------------------------------------------------

# A request's views of its own lists, and objects that both sides share.
SKIPPED = {"output_token_ids", "all_token_ids", "_block_hasher", "sampling_params"}
SIMPLE = frozenset((int, float, str, bytes, bool, type(None)))


def _request(request: Request) -> dict[str, Any]:
    return {
        name: [event.type for event in value] if name == "events" else _field(value)
        for name, value in vars(request).items()
        if name not in SKIPPED and not name.startswith("_vext")
    }


def _field(value: Any) -> Any:
    """A copy: the next step changes the list."""
    if type(value) in SIMPLE:
        return value
    return value.copy() if type(value) is list else plain(value)


def _is_plain(value: Any) -> bool:
    return type(value) in SIMPLE or isinstance(
        value, list | dict | set | frozenset | deque | Enum
    )


def plain(value: Any) -> Any:
    """Values that can be compared: no identities, no times."""
    if type(value) in SIMPLE:
        return value
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, Request):
        return value.request_id
    if isinstance(value, list | tuple | deque):
        return [plain(each) for each in value]
    if isinstance(value, set | frozenset):
        return {plain(each) for each in value}
    if isinstance(value, dict):
        return {plain(key): plain(each) for key, each in value.items()}
    if isinstance(value, np.ndarray):
        return value.tolist()
    if type(value).__name__ == "KVCacheBlock":
        return value.block_id
    if isinstance(value, SamplingParams):
        return repr(value)
    names: Iterator[str] | tuple[str, ...]
    if is_dataclass(value):
        names = (each.name for each in fields(value))
    elif isinstance(value, msgspec.Struct):
        names = value.__struct_fields__
    else:
        return type(value).__name__
    return {name: plain(getattr(value, name)) for name in names if name != "timestamp"}


def difference(left: Any, right: Any, where: str = "") -> str:
    """Where two plain values differ first, and how."""
    if isinstance(left, dict) and isinstance(right, dict):
        for key in [*left, *(key for key in right if key not in left)]:
            if key not in left or key not in right or left[key] != right[key]:
                missing = "nothing"
                return difference(
                    *(left.get(key, missing), right.get(key, missing)),
                    f"{where}.{key}" if where else str(key),
                )
    if isinstance(left, list) and isinstance(right, list):
        for i, (one, other) in enumerate(zip_longest(left, right)):
            if one != other:
                return difference(one, other, f"{where}[{i}]")
    return f"{where} is {left!r} in stock, {right!r} when patched"


# -- schedulers ------------------------------------------------------------------------


def _scheduler(setup: Setup) -> Any:
    config, kv_cache = _config(setup), _kv_cache(setup)
    scheduler = (AsyncScheduler if setup.ahead else Scheduler)(
        config,
        kv_cache,
        StructuredOutputManager(config),
        block_size=setup.block_size,
        include_finished_set=setup.finished_sets,
        log_stats=setup.stats,
    )
    scheduler.use_v2_model_runner = setup.second
    if hasattr(scheduler, "local_prefill_interval"):
        scheduler.local_prefill_interval = setup.interval
        scheduler.last_prefill_step = -setup.interval
    return scheduler


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """Holds a model for the length of the process."""
    from vllm_ext_cpulane.tinymodel import write_model

    folder = tempfile.TemporaryDirectory(prefix="vllm-ext-soak-")
    write_model(folder.name, 256)
    return folder


@cache
def _model(longest: int) -> ModelConfig:
    init_none_hash(sha256)
    return ModelConfig(
        model=_folder().name,
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=longest,
    )


def _config(setup: Setup) -> VllmConfig:
    cache_config = CacheConfig(
        block_size=setup.block_size, enable_prefix_caching=setup.caching
    )
    config = VllmConfig(
        model_config=_model(setup.longest),
        scheduler_config=SchedulerConfig(
            max_num_seqs=setup.seats,
            # Never below the seats: vLLM refuses that; below it is what is scheduled.
            max_num_batched_tokens=max(setup.budget, setup.seats),
            max_num_scheduled_tokens=setup.budget,
            max_model_len=setup.longest,
            is_encoder_decoder=False,
            enable_chunked_prefill=True,
            async_scheduling=setup.ahead,
            policy="priority" if setup.priority else "fcfs",
            long_prefill_token_threshold=setup.chunk,
        ),
        cache_config=cache_config,
        kv_events_config=KVEventsConfig(
            enable_kv_cache_events=setup.reports, publisher="null"
        ),
    )
    cache_config.num_gpu_blocks = setup.blocks
    return config


def _kv_cache(setup: Setup) -> KVCacheConfig:
    spec = FullAttentionSpec(
        block_size=setup.block_size, num_kv_heads=1, head_size=32, dtype=torch.float32
    )
    return KVCacheConfig(
        num_blocks=setup.blocks,
        kv_cache_tensors=[],
        kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
    )


if __name__ == "__main__":
    serve({"compare": compare})
