"""Stock and patched schedulers on random traffic; then with planted bugs."""

import copy
import gc
import json
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from types import SimpleNamespace
from typing import Any
from unittest import mock

import vllm
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from vllm_ext.patches.scheduler_fast_path import replacement
from vllm_ext.soak import traffic, twins
from vllm_ext.soak.traffic import Arrival, Event, Setup, Traffic
from vllm_ext_cpulane.engine import report

NEVER = replacement.NEVER
Row = replacement.Row
STEPS = 120


@contextmanager
def learning(change: Any) -> Iterator[None]:
    """`Row.learn` followed by ``change(row, scheduler)``."""
    learn = Row.learn

    def changed(self: Any, scheduler: Any, request: Any) -> None:
        learn(self, scheduler, request)
        change(self, scheduler)

    with mock.patch.object(Row, "learn", changed):
        yield


def no_block(row: Any, scheduler: Any) -> None:
    row.room += scheduler.block_size


def no_stop(row: Any, scheduler: Any) -> None:
    row.stops = frozenset()


def no_end(row: Any, scheduler: Any) -> None:
    row.plain = replacement.NEVER


def no_last(row: Any, scheduler: Any) -> None:
    row.last = replacement.NEVER


def no_caching(row: Any, scheduler: Any) -> None:
    row.full = replacement.NEVER


def no_late_caching(row: Any, scheduler: Any) -> None:
    if type(scheduler) is AsyncScheduler:
        row.full += scheduler.block_size


def always_answered(row: Any, scheduler: Any) -> None:
    row.answered = True


@contextmanager
def stale_list() -> Iterator[None]:
    """The lists of the step before are given out again."""
    steady, before = replacement._steady_step, {}

    def step(self: Any) -> Any:
        made = steady(self)
        old = before.get(id(self))
        before[id(self)] = made
        if made and old and old.names == made.names:
            made = made._replace(computed=old.computed)
        return made

    with mock.patch.object(replacement, "_steady_step", step):
        yield


@contextmanager
def roster_given_out() -> Iterator[None]:
    """The list of names that is kept is the one that is given out."""
    steady = replacement._steady_step

    def step(self: Any) -> Any:
        made = steady(self)
        if made and made.names == self._vext_roster.names:
            made = made._replace(names=self._vext_roster.names)
        return made

    with mock.patch.object(replacement, "_steady_step", step):
        yield


@contextmanager
def stale_roster() -> Iterator[None]:
    """The requests of the step before are taken for those of this one."""
    roster = replacement._roster

    def kept(self: Any) -> Any:
        return self.__dict__.get("_vext_roster") or roster(self)

    with mock.patch.object(replacement, "_roster", kept):
        yield


@contextmanager
def wrong_order() -> Iterator[None]:
    steady = replacement._steady_step

    def step(self: Any) -> Any:
        made = steady(self)
        return made and made._replace(due=made.due[::-1])

    with mock.patch.object(replacement, "_steady_step", step):
        yield


@contextmanager
def no_finished_sets() -> Iterator[None]:
    merged = replacement._merged

    def without(outputs: Any, rest: Any) -> Any:
        for each in rest.values():
            each.finished_requests = None
        return merged(outputs, rest)

    with mock.patch.object(replacement, "_merged", without):
        yield


class Anything:
    """Equal to every number."""

    def __ne__(self, other: object) -> bool:
        return False


def never_preempted(row: Any, scheduler: Any) -> None:
    row.preemptions = Anything()


def resumed_unheard(row: Any, scheduler: Any) -> None:
    row.answered |= row.preemptions > 0


class Everything(set[str]):
    def issuperset(self, other: object) -> bool:
        return True


@contextmanager
def seeing(name: str, instead: object) -> Iterator[None]:
    """While a step is looked at, the scheduler's field ``name`` is another."""
    steady = replacement._steady_step

    def step(self: Any) -> Any:
        kept = getattr(self, name)
        setattr(self, name, instead)
        try:
            return steady(self)
        finally:
            setattr(self, name, kept)

    with mock.patch.object(replacement, "_steady_step", step):
        yield


# Traffic that random traffic seldom is, by what would go wrong in it.
SPECIAL = (
    {
        # An abort has a paused scheduler called, which forgets its last step.
        name: Traffic(
            Setup(second=second),
            30,
            (Arrival(0, 0, 3, 30), Arrival(1, 0, 3, 30, aborted=6)),
            (Event(5, "pause"), Event(9, "resume")),
        )
        for name, second in (
            ("scheduled in a pause", True),
            ("history forgotten", False),
        )
    }
    | {
        "a last chunk taken for a token": Traffic(
            Setup(budget=8, seats=4), 20, (Arrival(0, 0, 9),)
        ),
        # The first is preempted for the second, and resumes at its last token.
        "a resumption not told": Traffic(
            Setup(priority=True, blocks=6),
            40,
            (Arrival(0, 0, 7, 20, priority=2), Arrival(1, 1, 8, 3)),
        ),
    }
    | {
        f"more rows than {what}": Traffic(
            Setup(seats=4),
            12,
            tuple(Arrival(i, 0) for i in range(3)),
            (Event(4, event),),
        )
        for what, event in (("tokens", "few tokens"), ("input", "small input"))
    }
    | {
        "a chunk without blocks": Traffic(
            Setup(ahead=False, caching=False, budget=6, seats=4),
            20,
            (Arrival(0, 0, 20),),
        ),
    }
)

PLANTED: dict[str, Any] = {
    "scheduled in a pause": lambda: seeing("_pause_state", PauseState.UNPAUSED),
    "history forgotten": lambda: seeing("prev_step_scheduled_req_ids", Everything()),
    "a last chunk taken for a token": lambda: seeing("_inflight_prefills", set()),
    "a resumption not told": lambda: learning(resumed_unheard),
    "a block not allocated": lambda: learning(no_block),
    "a stop missed": lambda: learning(no_stop),
    "the end missed": lambda: learning(no_end),
    "a step too many": lambda: learning(no_last),
    "a block not cached": lambda: learning(no_caching),
    "a block cached late": lambda: learning(no_late_caching),
    "an event lost": lambda: learning(always_answered),
    "a stale list reused": stale_list,
    "a stale roster reused": stale_roster,
    "a list given out and kept": roster_given_out,
    "more rows than tokens": lambda: seeing("max_num_scheduled_tokens", NEVER),
    "more rows than input": lambda: seeing(
        "scheduler_config", SimpleNamespace(max_num_batched_tokens=NEVER)
    ),
    "blocks in another order": wrong_order,
    "finished requests not told": no_finished_sets,
    "a preemption forgotten": lambda: learning(never_preempted),
}


def found(most: int) -> dict[str, Any]:
    """By bug: what it looks like in the smallest traffic that shows it."""
    looks = {}
    for name, plant in PLANTED.items():
        looks[name] = None
        with plant():
            drawn = (traffic.random_traffic(seed, STEPS) for seed in range(most))
            for seed, whole in enumerate([SPECIAL[name]] if name in SPECIAL else drawn):
                if twins.failing_step(whole) is None:
                    continue
                small = traffic.smallest(whole, twins.failing_step)
                try:
                    twins.run(small)
                except twins.DifferenceError as difference:
                    looks[name] = {
                        "seed": seed,
                        "requests": len(small.arrivals),
                        "steps": small.steps,
                        "says": str(difference),
                        "traffic": str(small),
                    }
                break
    return looks


NANS = SimpleNamespace(VLLM_COMPUTE_NANS_IN_LOGITS=True)


class Elsewhere(Scheduler):
    """A scheduler with fields of its own, and none of vLLM's but this one."""

    def __init__(self) -> None:
        self.running = []


def after_an_error() -> dict[str, list[Any]]:
    """By kind of step: who runs, and whether a stand-in was left, once stock failed."""
    left = {}
    for name, waiting in (("steady", False), ("other", True)):
        side = twins.Side(Setup(ahead=False), patched=True)
        scheduler, manager = side.scheduler, side.scheduler.kv_cache_manager
        side.add(Arrival(0, 0, 3))
        scheduled = scheduler.schedule()
        made = twins._plan(scheduler, scheduled).output()
        scheduler.update_from_output(scheduled, made)
        if waiting:
            side.add(Arrival(1, 1, 3))
        with (
            mock.patch.object(replacement, "WORTH_A_SPLIT", 1),
            mock.patch.object(manager, "new_step_starts", side_effect=OSError),
            suppress(OSError),
        ):
            scheduler.schedule()
        running = [request.request_id for request in scheduler.running]
        left[name] = [running, "allocate_slots" in vars(manager)]
    return left


def _subclassed(thing: Any) -> Any:
    """A copy whose class is a subclass of its own."""
    other = copy.copy(thing)
    other.__class__ = type("Other", (type(thing),), {})
    return other


def refused_schedulers() -> dict[str, str]:
    """By what is unusual of a scheduler, and nothing else: why it is refused."""
    scheduler = twins.Side(Setup(), patched=False).scheduler
    manager = scheduler.kv_cache_manager
    coordinator, pool = manager.coordinator, manager.block_pool
    [group] = coordinator.single_type_managers
    unusual: list[tuple[str, Any, str, Any]] = [
        ("nothing", scheduler, "running", []),
        *(
            (name, scheduler, name, value)
            for name, value in {
                "vllm_config": SimpleNamespace(speculative_config=object()),
                "num_spec_tokens": 1,
                "connector": object(),
                "aux_output_connector": object(),
                "ec_connector": object(),
                "is_mm_encoder_only": True,
                "is_encoder_decoder": True,
                "use_pp": True,
                "decode_stagger": 2,
                "num_sampled_tokens_per_step": 2,
                "perf_metrics": object(),
                "return_sampling_mask": True,
            }.items()
        ),
        ("NaN", replacement, "envs", NANS),
        ("manager", scheduler, "kv_cache_manager", _subclassed(manager)),
        ("pool", manager, "block_pool", _subclassed(pool)),
        ("coordinator", manager, "coordinator", _subclassed(coordinator)),
        ("no group", coordinator, "single_type_managers", ()),
        ("two groups", coordinator, "single_type_managers", (group, group)),
        ("group", coordinator, "single_type_managers", (_subclassed(group),)),
        ("block size", group, "block_size", 2 * group.block_size),
    ]
    reasons = {}
    for what, thing, name, value in unusual:
        with mock.patch.object(thing, name, value, create=name == "decode_stagger"):
            reasons[what] = replacement._why_not_this_scheduler(scheduler)
    return reasons


def _two_that_decode() -> twins.Side:
    """Two requests, of which a step is in flight that only decodes."""
    side = twins.Side(Setup(ahead=False), patched=True)
    for name in range(2):
        side.add(Arrival(name, 0, 3))
    scheduler = side.scheduler
    for _ in range(2):
        scheduled = scheduler.schedule()
        plan = twins._plan(scheduler, scheduled)
        scheduler.update_from_output(scheduled, plan.output())
    scheduled = scheduler.schedule()
    side.in_flight.append((scheduled, twins._plan(scheduler, scheduled)))
    return side


def refused_requests() -> dict[str, str]:
    """By what is unusual of a request, and nothing else: why it is refused."""
    usual = vars(_two_that_decode().scheduler.requests["r0"])
    changes: dict[str, Any] = {
        "nothing": None,
        "sampling_params": None,
        "pooling_params": object(),
        "structured_output_request": object(),
        "mm_features": [object()],
        "resumable": True,
    }
    return {
        name: replacement._why_not_this_request(
            SimpleNamespace(**usual | ({} if name == "nothing" else {name: value}))
        )
        for name, value in changes.items()
    }


def left_to_stock() -> dict[str, bool]:
    """By what is unusual of an output: whether stock is given all of the step."""
    unusual: dict[str, Any] = {
        "scheduled_spec_decode_tokens": {"r0": [1]},
        "sampled_token_ids": [],
        "prompt_logprobs_dict": {"r0": object()},
        "prompt_token_id_logprobs_dict": {"r0": object()},
        "pooler_output": [object()],
        "num_nans_in_logits": {"r0": 1},
        "kv_connector_output": object(),
        "ec_connector_output": object(),
    }
    side = _two_that_decode()
    scheduled, plan = side.in_flight.popleft()
    asked: list[Any] = []

    def stock(scheduler: Any, scheduled: Any, made: Any) -> dict[int, Any]:
        asked.append(scheduled)
        return {}

    update = replacement.steady_update(stock)
    left = {}
    for name, value in {**unusual, "nothing": None}.items():
        made = plan.output()
        whose = scheduled if hasattr(scheduled, name) else made
        with (
            mock.patch.object(whose, name, value) if name in unusual else nullcontext()
        ):
            update(side.scheduler, scheduled, made)
        left[name] = asked[-1] is scheduled
    return left


def held() -> dict[str, int]:
    """By the way that all requests end: how many are in memory after the last step."""
    alive = {}
    for way in ("length", "abort"):
        side = _two_that_decode()
        scheduler = side.scheduler
        watched = [weakref.ref(each) for each in scheduler.requests.values()]
        assert scheduler._vext_roster is not None, "no step was steady"
        if way == "abort":
            side.scheduler.finish_requests(["r0", "r1"], RequestStatus.FINISHED_ABORTED)
        while side.in_flight or scheduler.has_requests():
            if not side.in_flight:
                scheduled = scheduler.schedule()
                if not scheduled.num_scheduled_tokens:
                    continue
                side.in_flight.append((scheduled, twins._plan(scheduler, scheduled)))
            scheduled, plan = side.in_flight.popleft()
            scheduler.update_from_output(scheduled, plan.output())
        gc.collect()
        alive[way] = sum(each() is not None for each in watched)
    return alive


def strangers() -> dict[str, str]:
    """Why each of these is left to stock code."""
    managed = twins.Side(traffic.Setup(), patched=False).scheduler
    managed.kv_cache_manager = object()
    return {
        "scheduler": replacement._kind(Elsewhere()).refused,
        "manager": replacement._kind(managed).refused,
    }


if __name__ == "__main__":
    first, count, most = map(int, sys.argv[1:])
    answer = {"vllm": vllm.__version__, "same": twins.compare(first, count, STEPS)}
    answer["special"] = {
        name: twins.failing_step(each) for name, each in SPECIAL.items()
    }
    answer["strangers"], answer["after an error"] = strangers(), after_an_error()
    answer["refused schedulers"] = refused_schedulers()
    answer["refused requests"] = refused_requests()
    answer["left to stock"], answer["held"] = left_to_stock(), held()
    answer["planted"] = found(most) if most else {}
    report(json.loads(json.dumps(answer)))
