"""How long a call takes on the device, and what it costs the host.

What is timed is a replay of many calls captured in one CUDA graph: between two kernels
of a step that replays there is no host either. Each figure is taken twice. For *cold*
the calls go round argument sets that together exceed three times the L2 cache, and what
is in the cache is driven out before, so that each finds its arguments in memory, also
those that the competitor before it has just read. For *hot* they all have the same set,
as a sampler has the logits that were written just before.

Competitors take turns within a round, in random order, so that a slow moment of the
machine falls on all of them, and a round in which the card throttled is dropped for
all of them. Their times can therefore be compared in pairs.

A call that cannot be captured, because it reads the host on its way, is queued behind a
kernel that only waits: the host is then ahead of the device unless the call makes it
wait.
"""

import gc
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

ROUNDS = 24  # enough pairs for a verdict among a thousand cases
MOST_ROUNDS = 36  # when some are dropped
L2_TIMES = 3
GRAPH_CALLS = 256
QUEUED_CALLS = 16  # a launch queue holds about a thousand launches
HOT_SECONDS = 2e-3
HOST_CALLS = 10
WARM_SECONDS = 0.2

Args = tuple[Any, ...]
Call = Callable[..., Any]
Check = Callable[[Args, Any], None]


class NotRun(Exception):
    """A competitor that is not there or cannot take the case: one line why."""


class NoRoundLeftError(Exception):
    """The card throttled in every round."""


class WrongReplayError(AssertionError):
    """What ``provider`` answers in a graph is wrong, and was right outside."""

    def __init__(self, provider: str, why: str) -> None:
        super().__init__(f"replayed in a graph: {why}")
        self.provider = provider


class Captured(Protocol):
    """Calls that can be made again without the host."""

    launches: int | None

    def replay(self) -> None: ...


class Device(Protocol):
    """What timing needs of a device; `cuda.Cuda` is the real one."""

    l2_bytes: int

    def synchronize(self) -> None: ...

    def empty_cache(self) -> None:
        """Enqueue what leaves nothing in the L2 cache that a call could want."""
        ...

    def seconds(self, work: Callable[[], None], ahead: float) -> float:
        """Device time of what ``work`` enqueues, the host being ``ahead`` seconds."""
        ...

    def refuses(self, work: Callable[[], None]) -> str:
        """Why ``work`` cannot be captured, as far as that shows before, or nothing."""
        ...

    def capture(self, work: Callable[[], None]) -> Captured: ...

    def launches(self, work: Callable[[], None]) -> int | None:
        """How many kernels and copies ``work`` enqueues, if that can be told."""
        ...

    def host_clock(self) -> float: ...

    def copy_bytes_per_second(self) -> float:
        """What a large copy reads and writes."""
        ...


@dataclass(frozen=True)
class Provider:
    """One competitor, prepared for one case.

    Attributes:
        call: Takes an argument set; what it returns goes to the check.
        uncapturable: Why no graph can hold it, or nothing.
        note: What a reader of its figures has to know.
        twin: Whose answers it claims to give, bit for bit.
    """

    call: Call
    uncapturable: str = ""
    note: str = ""
    twin: Call | None = None


@dataclass
class Times:
    """Of one competitor, all in seconds per call, one of each for each kept round."""

    cold: list[float] = field(default_factory=list)
    hot: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    launches: float | None = None
    sets: int = 0
    calls: int = 0
    dropped: int = 0
    uncapturable: str = ""
    note: str = ""


def sets_needed(set_bytes: int, l2_bytes: int) -> int:
    """How many argument sets exceed three times the cache; two at least."""
    return max(2, L2_TIMES * l2_bytes // set_bytes + 1)


def measure(
    providers: Mapping[str, Provider],
    make_args: Callable[[int], Args],
    *,
    set_bytes: int,
    device: Device,
    throttled: Callable[[float, float], bool] = lambda start, end: False,
    rounds: int = ROUNDS,
    seed: int = 0,
    check_replay: Check | None = None,
) -> dict[str, Times]:
    """Time ``providers`` in turns.

    Args:
        providers: By name. They were checked already.
        make_args: The argument set of a number; no two share memory.
        set_bytes: Size of what a call reads of its argument set.
        device: Where they run.
        throttled: Whether a sample between two moments of `time.monotonic` is void.
        rounds: To keep.
        seed: Of the order of turns.
        check_replay: Given what a replay left in its output.

    Raises:
        NoRoundLeftError: The card throttled all the time.
        WrongReplayError: One answers wrong when replayed.
    """
    number = sets_needed(set_bytes, device.l2_bytes)
    *rotating, kept = [make_args(each) for each in range(number + 1)]
    lanes = {
        name: _Lane(provider, rotating, kept, device)
        for name, provider in providers.items()
    }
    for name, lane in lanes.items():
        lane.warm()
        if check_replay is not None and lane.replayed is not None:
            try:
                check_replay(kept, lane.replayed)
            except AssertionError as error:
                raise WrongReplayError(name, str(error)) from None
    turns = random.Random(seed)
    dropped = 0
    with _no_collection():
        for _ in range(math.ceil(rounds * MOST_ROUNDS / ROUNDS)):
            order = list(lanes)
            turns.shuffle(order)
            started = time.monotonic()
            taken = {name: lanes[name].round() for name in order}
            if throttled(started, time.monotonic()):
                dropped += 1
                continue
            for name, (cold, hot, host) in taken.items():
                times = lanes[name].times
                times.cold.append(cold)
                times.hot.append(hot)
                times.host.append(host)
            if all(len(lane.times.cold) == rounds for lane in lanes.values()):
                break
    if any(not lane.times.cold for lane in lanes.values()):
        raise NoRoundLeftError(f"the GPU throttled in all of {dropped} rounds")
    for lane in lanes.values():
        lane.times.dropped = dropped
    return {name: lane.times for name, lane in lanes.items()}


class _Lane:
    """A provider with its calls captured, or to be queued, and its times so far."""

    def __init__(
        self, provider: Provider, cold: Sequence[Args], hot: Args, device: Device
    ) -> None:
        self.times = Times(
            sets=len(cold), uncapturable=provider.uncapturable, note=provider.note
        )
        self.replayed: Any = None
        self._call, self._device = provider.call, device
        self._cold, self._hot = cold, hot
        self._chunks: list[tuple[Callable[[], None], int]] = []
        self._again: tuple[Callable[[], None], int] = (lambda: None, 1)
        self._ahead = 0.0
        self._turn = 0

    def warm(self) -> None:
        """Compile, capture, and bring the card to its clocks."""
        self._call(*self._hot)
        self._device.synchronize()
        once = self._calls([self._hot])
        if not self.times.uncapturable:
            self.times.uncapturable = self._device.refuses(once)
            self._device.synchronize()
        one = max(self._device.seconds(once, 1e-3), 1e-7)
        largest = QUEUED_CALLS if self.times.uncapturable else GRAPH_CALLS
        size = math.ceil(len(self._cold) / math.ceil(len(self._cold) / largest))
        chunks = [
            self._cold[start : start + size]
            for start in range(0, len(self._cold), size)
        ]
        long = min(largest, max(HOST_CALLS, math.ceil(HOT_SECONDS / one)))
        for chunk in chunks:
            # A few sets only: go round them until the round is long enough.
            times = max(1, long // len(chunk)) if len(chunks) == 1 else 1
            self._chunks.append((self._work([*chunk] * times), len(chunk) * times))
        self._again = (self._work([self._hot] * long, count=True), long)
        self.times.calls = self._chunks[0][1]
        started = self._device.host_clock()
        self._chunks[0][0]()
        self._ahead = 1.5 * (self._device.host_clock() - started) + 1e-4
        self._device.synchronize()
        until = time.monotonic() + WARM_SECONDS
        while True:
            self._again[0]()
            self._device.synchronize()
            if time.monotonic() >= until:
                break

    def round(self) -> tuple[float, float, float]:
        """One sample each of cold, hot and host, in seconds per call."""
        work, calls = self._chunks[self._turn % len(self._chunks)]
        self._turn += 1
        self._device.empty_cache()
        cold = self._device.seconds(work, self._ahead) / calls
        self._device.synchronize()
        started = self._device.host_clock()
        for _ in range(HOST_CALLS):
            self._call(*self._hot)
        host = (self._device.host_clock() - started) / HOST_CALLS
        # What those calls have read is what the next ones find in the cache.
        work, calls = self._again
        hot = self._device.seconds(work, self._ahead) / calls
        self._device.synchronize()
        return cold, hot, host

    def _calls(self, sets: Sequence[Args]) -> Callable[[], None]:
        def work() -> None:
            for args in sets:
                self.replayed = self._call(*args)

        return work

    def _work(self, sets: Sequence[Args], count: bool = False) -> Callable[[], None]:
        eager = self._calls(sets)
        if self.times.uncapturable:
            if count:
                launches = self._device.launches(eager)
                self.times.launches = launches and launches / len(sets)
            self.replayed = None
            return eager
        captured = self._device.capture(eager)
        if count and captured.launches is not None:
            self.times.launches = captured.launches / len(sets)
        return captured.replay


@contextmanager
def _no_collection() -> Iterator[None]:
    gc.collect()
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
