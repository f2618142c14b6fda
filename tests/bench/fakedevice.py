"""A GPU that keeps time by what is launched, with an L2 cache that forgets.

Calls say what they cost by `Fake.kernel`. Time on the device and on the host passes
only by that, so figures are exact.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(eq=False)
class Buffer:
    """An argument of a call."""

    size: int


@dataclass
class Graph:
    device: Fake
    kernels: list[tuple[float, float, Buffer]] = field(default_factory=list)

    @property
    def launches(self) -> int:
        return len(self.kernels)

    def replay(self) -> None:
        self.device.replays += 1
        self.device.host += 1e-6
        for kernel in self.kernels:
            self.device.execute(*kernel)


class Fake:
    """See `vllm_ext.microbench.measure.Device`."""

    def __init__(self, l2_bytes: int = 1000, copy: float = 4e12) -> None:
        self.l2_bytes = l2_bytes
        self.now = 0.0
        self.host = 0.0
        self.slower = 1.0  # what a kernel's time is multiplied by
        self.replays = 0
        self.refused = ""
        self._copy = copy
        self._cached: OrderedDict[int, int] = OrderedDict()
        self._recording: Graph | None = None

    def kernel(
        self, seconds: float, miss: float, buffer: Buffer, host: float = 1e-6
    ) -> None:
        """Launch one that takes longer when ``buffer`` is not in the cache."""
        self.host += host
        if self._recording is not None:
            self._recording.kernels.append((seconds, miss, buffer))
        else:
            self.execute(seconds, miss, buffer)

    def execute(self, seconds: float, miss: float, buffer: Buffer) -> None:
        hit = self._cached.pop(id(buffer), None)
        self._cached[id(buffer)] = buffer.size
        while len(self._cached) > 1 and sum(self._cached.values()) > self.l2_bytes:
            self._cached.popitem(last=False)
        self.now += self.slower * (seconds + (miss if hit is None else 0.0))

    def synchronize(self) -> None:
        pass

    def empty_cache(self) -> None:
        self._cached.clear()

    def seconds(self, work: Callable[[], None], ahead: float) -> float:
        began, host = self.now, self.host
        work()
        return max(self.now - began, self.host - host - ahead)

    def refuses(self, work: Callable[[], None]) -> str:
        work()
        return self.refused

    def capture(self, work: Callable[[], None]) -> Graph:
        self._recording = Graph(self)
        try:
            work()
            return self._recording
        finally:
            self._recording = None

    def launches(self, work: Callable[[], None]) -> int | None:
        return self.capture(work).launches

    def host_clock(self) -> float:
        return self.host

    def copy_bytes_per_second(self) -> float:
        return self._copy


def args_of(size: int) -> Callable[[int], tuple[Any, ...]]:
    """Makes argument sets of one buffer."""
    return lambda number: (Buffer(size),)
