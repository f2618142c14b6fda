"""A CUDA GPU as timing sees it: graphs, events, and the bandwidth of a copy."""

import ctypes
import statistics
import time
from collections.abc import Callable

import torch

COUNTED_NODES = (0, 1, 2)  # CU_GRAPH_NODE_TYPE_KERNEL, _MEMCPY, _MEMSET
CYCLES_PER_SECOND = 2e9  # of the SM clock, rather too many
COPIES = 20


class Graph:
    """Captured calls.

    Attributes:
        launches: Kernels, copies and fills in it; ``None`` if the driver did not say.
    """

    def __init__(self, work: Callable[[], None]) -> None:
        self._graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(self._graph):
            work()
        self._graph.instantiate()
        self.launches = _nodes(self._graph.raw_cuda_graph())

    def replay(self) -> None:
        """Enqueue all of it."""
        self._graph.replay()


class Cuda:
    """The current CUDA device; see `measure.Device`."""

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties()
        self.l2_bytes: int = properties.L2_cache_size
        self.memory_bytes: int = properties.total_memory
        size = 4 * self.l2_bytes // torch.float32.itemsize
        self._others = torch.zeros(size, device="cuda")

    def synchronize(self) -> None:
        """Wait for everything."""
        torch.cuda.synchronize()

    def empty_cache(self) -> None:
        """Read so much else that the L2 cache holds nothing of before.

        Written lines would still be on their way to memory while the next is timed.
        """
        self._others.amax()

    def seconds(self, work: Callable[[], None], ahead: float) -> float:
        """Device time of what ``work`` enqueues.

        It starts behind a kernel that waits for ``ahead`` seconds, so that the time in
        which the host enqueues it is not in the figure.
        """
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(ahead * CYCLES_PER_SECOND))
        start.record()
        work()
        end.record()
        end.synchronize()
        milliseconds: float = start.elapsed_time(end)
        return milliseconds / 1e3

    def refuses(self, work: Callable[[], None]) -> str:
        """What in ``work`` makes the host wait, which no graph can hold."""
        torch.cuda.set_sync_debug_mode("error")
        try:
            work()
        except RuntimeError as error:
            return next(iter(str(error).splitlines()), "RuntimeError")
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return ""

    def capture(self, work: Callable[[], None]) -> Graph:
        """``work`` as one graph."""
        torch.cuda.synchronize()
        return Graph(work)

    def launches(self, work: Callable[[], None]) -> int | None:
        """Kernels and copies that ``work`` enqueues, by the profiler of torch."""
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        torch.cuda.synchronize()
        try:
            with profile(activities=[ProfilerActivity.CUDA]) as profiler:
                work()
                torch.cuda.synchronize()
        except RuntimeError:  # no CUPTI, or somebody else has it
            return None
        events = [
            event for event in profiler.events() if event.device_type == DeviceType.CUDA
        ]
        return len(events) or None

    def host_clock(self) -> float:
        """Seconds, from anywhere."""
        return time.perf_counter()

    def copy_bytes_per_second(self) -> float:
        """Bytes read and written per second by a copy far larger than the L2 cache."""
        size = min(max(8 * self.l2_bytes, 1 << 30), self.memory_bytes // 8)
        source = torch.empty(size, dtype=torch.uint8, device="cuda").fill_(1)
        target = torch.empty_like(source)

        def copy() -> None:
            target.copy_(source)

        for _ in range(COPIES):
            copy()
        taken = [self.seconds(copy, 1e-4) for _ in range(COPIES)]
        return 2 * size / statistics.median(taken)


def _nodes(graph: int) -> int | None:
    """Of a ``CUgraph``: asked of the driver, which is there wherever CUDA is."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    number = ctypes.c_size_t()
    handle = ctypes.c_void_p(graph)
    if driver.cuGraphGetNodes(handle, None, ctypes.byref(number)):
        return None
    nodes = (ctypes.c_void_p * number.value)()
    if driver.cuGraphGetNodes(handle, nodes, ctypes.byref(number)):
        return None
    kind = ctypes.c_int()
    counted = 0
    for node in nodes:
        if driver.cuGraphNodeGetType(ctypes.c_void_p(node), ctypes.byref(kind)):
            return None
        counted += kind.value in COUNTED_NODES
    return counted
