"""Stock and patched schedulers on random traffic; then with planted bugs."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import vllm
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from vllm_ext.patches.scheduler_fast_path import replacement
from vllm_ext.soak import traffic, twins
from vllm_ext_cpulane.engine import report

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


PLANTED: dict[str, Any] = {
    "a block not allocated": lambda: learning(no_block),
    "a stop missed": lambda: learning(no_stop),
    "the end missed": lambda: learning(no_end),
    "a step too many": lambda: learning(no_last),
    "a block not cached": lambda: learning(no_caching),
    "a block cached late": lambda: learning(no_late_caching),
    "an event lost": lambda: learning(always_answered),
    "a stale list reused": stale_list,
    "a stale roster reused": stale_roster,
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
            for seed in range(most):
                whole = traffic.random_traffic(seed, STEPS)
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


class Elsewhere(Scheduler):
    """A scheduler with fields of its own, and none of vLLM's but this one."""

    def __init__(self) -> None:
        self.running = []


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
    answer["strangers"] = strangers()
    answer["planted"] = found(most) if most else {}
    report(json.loads(json.dumps(answer)))
