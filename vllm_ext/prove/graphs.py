"""CUDA graphs on the pretend device: what one would bake in, and what it would read.

`Graph` stands for ``torch.cuda.CUDAGraph``, `graph` for ``torch.cuda.graph``; while a
`PretendDevice` is in use they are in torch's place, and code runs unchanged:

    with PretendDevice():
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            out = step(buffers)     # runs nothing
        captured.replay()           # runs what was recorded, and none of step's Python

As on a GPU, a capture executes nothing; a replay runs the recorded operations and
launches on the very memory, with the very numbers and grids that they were recorded
with. A graph keeps only the memory that was allocated during its capture. The rest it
knows by address, so that its owner may free it. On top of that, a replay says what a
GPU does not:

`CaptureError`  what cannot be captured, at the line where it is asked for
`DeadInput`     memory that a replay would read or write, and that was freed; also
                behind a table of pointers that a kernel follows
`StaleInput`    pinned memory that the host wrote again after it had submitted a
                replay and before the device read it (on a device that lags)
`PoolReuse`     memory that another graph of the same pool may have overwritten
`Graph.unwritten`  reads of graph memory that nothing in the graph wrote

`diff` compares two captures of one step in different states: every launch that
differs in operation, number, grid or address, and that one graph can therefore not do.
`vllm_ext.prove.stepgraph` does so with the decode step of vLLM.

Limits: a launch of a kernel counts as reading and writing all its tensors until a
replay has shown which it touches. Reads of unwritten memory are seen at the level of
bytes, but not through operations that pick elements of their input (`PICKING`), and
not in tensors that somebody outside the graph holds. Tables of pointers are recognised
among 64-bit integers that a kernel is given, by their values at the time of capture;
a pointer that is computed, or comes from elsewhere, is looked at when it is followed.
Which memory two graphs of a pool share depends on the allocator: everything that it
could give out twice counts. A stale input is told from a device's own writes by what
this graph writes: pinned memory that other work writes in between is reported too.
On a device that lags, memory lives as long as something that is pending uses it.
Conditional nodes and updates of a captured graph do not exist here.

Source: the semantics of CUDA stream capture and of torch.cuda's graph pools.
"""

import bisect
import difflib
import inspect
import itertools
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock
from weakref import WeakSet

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

from vllm_ext.prove import pretend
from vllm_ext.prove.pretend import POISON, Operation, Stream, Where, current, data_of
from vllm_ext.prove.stepdrawing import write as steps
from vllm_ext.prove.stepgraph import html, verdicts, write

aten = torch.ops.aten

__all__ = [
    "Address",
    "CaptureError",
    "DeadInput",
    "Difference",
    "Graph",
    "GraphError",
    "Memory",
    "Node",
    "PoolReuse",
    "StaleInput",
    "describe",
    "diff",
    "graph",
    "graph_pool_handle",
    "html",
    "names",
    "steps",
    "verdicts",
    "write",
]

# Write their first argument whole, without reading it.
FILLING = {
    *(aten.copy_, aten.fill_, aten.zero_, aten.random_, aten.uniform_, aten.normal_),
    *(aten.exponential_, aten.bernoulli_),
}
# Write some elements of their first argument.
SCATTERING = {
    *(aten.index_put_, aten._index_put_impl_, aten.index_copy_, aten.index_fill_),
    *(aten.scatter_, aten.masked_fill_, aten.masked_scatter_),
}
# Read some elements of their input.
PICKING = {
    *(aten.index, aten._unsafe_index, aten.gather, aten.index_select, aten.embedding),
    aten.take,
}

STALE = (
    "was written by the host after it had submitted the replay and before the device "
    "read it"
)


class GraphError(RuntimeError):
    """A CUDA graph would not do what the code without it does."""


class CaptureError(GraphError):
    """Something cannot be captured."""


class DeadInput(GraphError):
    """A replay would touch memory that was freed."""


class StaleInput(GraphError):
    """The host wrote memory that a submitted replay had still to read."""


class PoolReuse(GraphError):
    """Memory of a graph was read after another graph of its pool may have used it."""


# -- memory ------------------------------------------------------------------------


@dataclass(eq=False)
class Memory:
    """One storage, as a graph knows it: weakly, unless it is the graph's own.

    Attributes:
        label: ``in0``, ``in1``, ... for memory that was there before the capture,
            ``own0``, ``own1``, ... for what was allocated in it.
        shape: Of the tensor through which it was first seen.
        dtype: Likewise.
        where: Where it was allocated, or first used.
        pinned: The host's own memory, which it may write at any time.
        kept: The storage itself, for the graph's own memory.
        nth: How much of the graph's own memory the same line had allocated before.
    """

    label: str
    shape: tuple[int, ...]
    dtype: str
    where: Where
    address: int
    size: int
    pinned: bool
    weak: StorageWeakRef
    kept: Any = None
    nth: int = 0

    @property
    def birth(self) -> tuple[Where, int]:
        """The same in two captures of the same code."""
        return self.where, self.nth

    @property
    def identity(self) -> int:
        """Unique among all memory, freed or not, that is known to a graph."""
        return int(self.weak.cdata)

    def storage(self) -> Any:
        """The storage, or ``None`` if it was freed."""
        return torch.UntypedStorage._new_with_weak_ptr(self.weak.cdata)

    @property
    def held_outside(self) -> bool:
        """Whether any tensor stands on the graph's own memory."""
        count: int = torch._C._storage_Use_Count(self.identity)
        return count > 1

    def __str__(self) -> str:
        return f"{self.label} {list(self.shape)} {self.dtype}"


@dataclass(frozen=True)
class Address:
    """What a graph keeps of a tensor."""

    memory: Memory
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def tensor(self) -> torch.Tensor:
        storage = self.memory.storage()
        empty = torch.empty(0, dtype=self.dtype)
        return empty.set_(storage, self.offset, self.shape, self.stride)

    def of_bytes(self, flags: np.ndarray) -> np.ndarray:
        """This tensor's part of ``flags``, an array with an entry for each byte."""
        size = self.dtype.itemsize
        part: np.ndarray = np.lib.stride_tricks.as_strided(
            flags[self.offset * size :],
            (*self.shape, size),
            (*(stride * size for stride in self.stride), 1),
        )
        return part

    @property
    def layout(self) -> str:
        return f"{list(self.shape)} {_short(self.dtype)}"


@dataclass(frozen=True)
class Baked:
    """A number that the host passed in a tensor of its own."""

    tensor: torch.Tensor


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _array(storage: Any) -> np.ndarray:
    """The bytes of a storage, to be read and written."""
    flat: np.ndarray = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
    return flat


# -- nodes -------------------------------------------------------------------------


@dataclass(eq=False)
class Node:
    """One operation or launch of a graph.

    Attributes:
        kind: As `Operation` has it.
        arguments: By name: an `Address`, a `Baked` number, or the text of a value.
        reads: The memory that it reads, by argument.
        writes: The memory that it writes, by argument.
        observed: Whether ``reads`` and ``writes`` of a kernel are what it was seen to
            touch; before, they are all that it was given.
    """

    kind: str
    name: str
    where: Where
    grid: tuple[int, ...]
    work: Callable[..., None]
    data: tuple[Any, ...]
    arguments: dict[str, Any]
    function: Any = None
    reads: dict[str, Address] = field(default_factory=dict)
    writes: dict[str, Address] = field(default_factory=dict)
    tables: list[tuple[str, int, int, Memory]] = field(default_factory=list)
    observed: bool = False

    def __str__(self) -> str:
        return f"{self.name} at {self.where} | {self.where.text}"

    def says(self, argument: str, what: str) -> str:
        """``what`` is true of ``argument``, in one line that names the place."""
        place = f"at {self.where} | {self.where.text}"
        return f"{self.name} argument {argument} {what}, {place}"

    def addresses(self) -> Iterator[tuple[str, Address]]:
        for name, value in self.arguments.items():
            if isinstance(value, Address):
                yield name, value

    def argument_of(self, memory: Memory) -> str:
        """The argument by which it knows ``memory``."""
        for name, address in self.addresses():
            if address.memory is memory:
                return name
        for name, _, _, target in self.tables:
            if target is memory:
                return f"{name} (a table of pointers)"
        return "(a pointer that it followed)"


def _named(operation: Operation) -> dict[str, Any]:
    """The arguments of an operation by name; lists of tensors with one name each."""
    args, kwargs = operation.args, operation.kwargs
    if operation.kind == "triton":
        names = inspect.getfullargspec(operation.function).args
    elif operation.name in ("to", "copy_"):
        names = ["target", "source"]
    else:
        names = [each.name for each in operation.function._schema.arguments]
    named: dict[str, Any] = {}
    for name, value in (*zip(names, args, strict=False), *kwargs.items()):
        if isinstance(value, list | tuple) and any(map(_is_tensor, value)):
            named |= {f"{name}[{i}]": each for i, each in enumerate(value)}
        else:
            named[name] = value
    return named


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _text(value: Any) -> str:
    return str(value) if isinstance(value, torch.dtype | torch.device) else repr(value)


def _flow(node: Node, made: Sequence[Address]) -> None:
    """Fill in what an operation reads and writes."""
    if node.kind == "triton":
        node.reads = dict(node.addresses())
        node.writes = dict(node.reads)
        return
    if node.kind in ("h2d", "d2h") or node.name in ("to", "copy_"):
        _put(node.reads, node, "source")
        _put(node.writes, node, "target")
        return
    packet = node.function.overloadpacket
    written = {
        each.name
        for each in node.function._schema.arguments
        if each.alias_info is not None and each.alias_info.is_write
    }
    outputs = {each.name for each in node.function._schema.arguments if each.is_out}
    for name, _ in node.addresses():
        base = name.partition("[")[0]
        if base in written:
            _put(node.writes, node, name)
        if base in outputs or (base in written and packet in FILLING | SCATTERING):
            continue
        _put(node.reads, node, name)
    names = ["result"] if len(made) == 1 else [f"result[{i}]" for i in range(len(made))]
    node.writes |= dict(zip(names, made, strict=True))


def _put(flow: dict[str, Address], node: Node, name: str) -> None:
    value = node.arguments.get(name)
    if isinstance(value, Address):
        flow[name] = value


# -- the graph ---------------------------------------------------------------------

# Graphs by the handle of their pool.
_pools: dict[Hashable, WeakSet["Graph"]] = {}
_handles = itertools.count(1)
# Memory that another graph may have overwritten, and which graph that is.
_lost: dict[int, tuple[StorageWeakRef, str]] = {}


class Graph(pretend.Capture):
    """Stands for ``torch.cuda.CUDAGraph``.

    Attributes:
        nodes: What a replay runs, in order.
        memories: All memory that it touches; what it follows pointers to is added
            when that is seen.
        unwritten: After a replay: reads of the graph's memory that nothing in the
            graph wrote before, one line each.
        where: The line that began the capture.
    """

    def __init__(self, keep_graph: bool = False) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget the capture and give its memory back."""
        self.nodes: list[Node] = []
        self.unwritten: list[str] = []
        self.where = pretend.NOWHERE
        self._memories: dict[int, Memory] = {}
        self._reusable: list[Memory] = []
        self._shared: list[Memory] = []
        self._later: WeakSet[Graph] = WeakSet()
        self._counts = {"in": itertools.count(), "own": itertools.count()}
        self._error = ""
        self._births: Counter[Where] = Counter()
        self._pool: Hashable = None
        self._clocks: dict[Stream, dict[Stream, int]] = {}
        self._events: dict[Any, dict[Stream, int]] = {}
        self._last: dict[Stream, Node] = {}
        self._index: _Index | None = None

    @property
    def memories(self) -> list[Memory]:
        return list(self._memories.values())

    def pool(self) -> Any:
        """The handle of its pool, for other graphs to share it."""
        return self._pool

    # -- capture -----------------------------------------------------------------------

    def capture_begin(
        self, pool: Any = None, capture_error_mode: str = "global"
    ) -> None:
        """Take what the current stream is given, instead of running it.

        Raises:
            CaptureError: Another capture is under way, or the stream is the default.
        """
        device = current()
        where = pretend.where()
        if device.capture is not None:
            raise CaptureError(f"a capture is under way already, at {where}")
        if device.stream is device.default_stream:
            raise CaptureError(
                "the default stream cannot be captured, use torch.cuda.graph or a "
                f"stream of your own: at {where} | {where.text}"
            )
        self.reset()
        self.where = where
        self._pool = (0, next(_handles)) if pool is None else pool
        self._origin = device.stream
        self._clocks[self._origin] = {self._origin: 0}
        device.capture = self

    def capture_end(self) -> None:
        """End the capture.

        Raises:
            CaptureError: It failed before, or a stream that joined it is not waited
                for.
        """
        self.abandon()
        if self._error:
            raise CaptureError(f"the capture had failed before: {self._error}")
        seen = self._clocks[self._origin]
        for stream, clock in self._clocks.items():
            if seen.get(stream, 0) != clock[stream]:
                raise CaptureError(
                    "unjoined work: the captured stream does not wait for the stream "
                    f"of {self._last[stream]}"
                )
        own = [memory for memory in self.memories if memory.kept is not None]
        self._reusable = [memory for memory in own if not memory.held_outside]
        others = _pools.setdefault(self._pool, WeakSet())
        for other in others:
            free = [
                memory
                for memory in other.memories
                if memory.kept is not None and not memory.held_outside
            ]
            self._shared += free
            if free:
                other._later.add(self)
        if others and _guard not in current().observers:
            current().observers.append(_guard)
        others.add(self)
        self._index = None

    def abandon(self) -> None:
        """Take nothing more; for a capture that ended in an error."""
        device = current()
        if device.capture is not self:
            raise CaptureError("this graph is not being captured")
        device.capture = None

    def takes(self, stream: Stream) -> bool:
        return stream in self._clocks

    def refuse(self, operation: Operation) -> None:
        self._error = (
            f"{operation.name} {operation.wait} at {operation.where} | "
            f"{operation.where.text}"
        )
        raise CaptureError(f"not possible while a graph is captured: {self._error}")

    def record(self, event: Any, stream: Stream) -> None:
        self._events[event] = dict(self._clocks[stream])

    def wait(self, event: Any, stream: Stream) -> None:
        clock = self._clocks.setdefault(stream, {stream: 0})
        for other, count in self._events[event].items():
            clock[other] = max(clock.get(other, 0), count)

    def allocated(self, data: torch.Tensor) -> None:
        self._memory(data, kept=data.untyped_storage())

    def add(
        self, operation: Operation, work: Callable[..., None], data: tuple[Any, ...]
    ) -> None:
        host_numbers = {
            id(each)
            for each in tree_flatten((operation.args, operation.kwargs))[0]
            if operation.kind == "launch"
            and _is_tensor(each)
            and not pretend.on_device(each)
        }

        def keep(value: Any) -> Any:
            if not _is_tensor(value):
                return value
            if id(value) in host_numbers:
                return Baked(value.clone())
            return self._address(value)

        def describe(value: Any) -> Any:
            return keep(data_of(value)) if _is_tensor(value) else _text(value)

        with _disable_current_modes():
            node = Node(
                operation.kind,
                operation.name,
                operation.where,
                operation.grid,
                work,
                tree_map(keep, data),
                {name: describe(value) for name, value in _named(operation).items()},
                operation.function,
            )
            made = node.data[2] if operation.kind == "launch" and data[2:] else []
            _flow(node, made)
            self._find_tables(node)
        self.nodes.append(node)
        stream = current().stream
        self._clocks[stream][stream] += 1
        self._last[stream] = node

    def _address(self, data: torch.Tensor) -> Address:
        return Address(
            self._memory(data),
            data.storage_offset(),
            tuple(data.shape),
            tuple(data.stride()),
            data.dtype,
        )

    def _memory(self, data: torch.Tensor, kept: Any = None) -> Memory:
        storage = data.untyped_storage()
        known = self._memories.get(storage._cdata)
        if known is None:
            kind = "in" if kept is None else "own"
            where = pretend.where()
            nth = 0
            if kept is not None:
                nth = self._births[where]
                self._births[where] += 1
            known = self._memories[storage._cdata] = Memory(
                f"{kind}{next(self._counts[kind])}",
                tuple(data.shape),
                _short(data.dtype),
                where,
                storage.data_ptr(),
                storage.nbytes(),
                hasattr(storage, "pretend_pinned"),
                StorageWeakRef(storage),
                kept,
                nth,
            )
        return known

    def _find_tables(self, node: Node) -> None:
        """Learn of the memory behind tables of pointers that a kernel is given."""
        if node.kind != "triton":
            return
        for name, address in node.addresses():
            if address.dtype not in (torch.int64, torch.uint64):
                continue
            if address.memory.kept is not None:
                continue
            if self._index is None:
                self._index = _Index()
            values = address.tensor().view(torch.int64).reshape(-1).numpy()
            for at, storage in self._index.find(values):
                flat = torch.empty(0, dtype=torch.uint8).set_(storage)
                target = self._memory(flat)
                node.tables.append((name, at, int(values[at]), target))

    # -- replay ------------------------------------------------------------------------

    def replay(self) -> None:
        """Submit the whole graph to the current stream.

        Raises:
            CaptureError: During a capture, or before this graph was captured.
            DeadInput: Memory that it would touch was freed.
            PoolReuse: Memory that it would read may be another graph's by now.
            StaleInput: As soon as it is seen; on a device that lags, by who waits.
        """
        device = current()
        if device.capture is not None:
            raise CaptureError("a replay cannot be captured")
        if not self.nodes:
            raise CaptureError("replay of a graph that was not captured")
        self._check_alive()
        self._claim_pool()
        kept = [memory.storage() for memory in self.memories]  # as long as it runs
        sent = {}
        if device.lags:
            sent = {
                memory: _array(storage).copy()
                for memory, storage in zip(self.memories, kept, strict=True)
                if memory.pinned and storage is not None
            }
        lost = [*self._reusable, *self._shared]
        for later in self._later:
            lost += [each for each in later.memories if each.kept is not None]
        operation = Operation("graph", "CUDAGraph.replay", pretend.where())
        device.submit(operation, self._run, kept, lost, sent)

    def _check_alive(self) -> None:
        dead = []
        for node in self.nodes:
            for name, address in node.addresses():
                if address.memory.weak.expired():
                    what = f"is memory that was freed ({address.memory})"
                    dead.append(node.says(name, what))
            for name, at, value, target in node.tables:
                table = node.arguments[name]
                if target.weak.expired() and not table.memory.weak.expired():
                    now = table.tensor().view(torch.int64).reshape(-1)[at]
                    if int(now) == value:
                        what = "points to memory that was freed"
                        dead.append(node.says(f"{name}[{at}]", what))
        if dead:
            raise DeadInput("\n".join(dead))

    def _claim_pool(self) -> None:
        """Say whose memory this replay may overwrite, and whether it needs any."""
        mine = f"the graph captured at {self.where}"
        for memory in self._shared:
            _lost[memory.identity] = (memory.weak, mine)
        for later in self._later:
            for memory in later.memories:
                if memory.kept is not None:
                    _lost[memory.identity] = (memory.weak, mine)
        for memory in self.memories:
            if memory.kept is not None:
                _lost.pop(memory.identity, None)
        for node in self.nodes:
            for name, address in node.reads.items():
                if address.memory.kept is None and address.memory.identity in _lost:
                    _, other = _lost[address.memory.identity]
                    what = f"is another graph's, and {other} may have overwritten it"
                    raise PoolReuse(node.says(name, what))

    def _run(
        self, kept: list[Any], lost: list[Memory], sent: dict[Memory, np.ndarray]
    ) -> None:
        with _disable_current_modes(), torch.inference_mode():
            for memory in lost:
                storage = memory.storage()
                if storage is not None and storage.nbytes():
                    storage.fill_(POISON)
            _Run(self, sent).nodes()

    # -- what it is --------------------------------------------------------------------

    def counts(self) -> dict[str, int]:
        """How many nodes of each kind."""
        found: dict[str, int] = {}
        for node in self.nodes:
            found[node.kind] = found.get(node.kind, 0) + 1
        return found

    def enable_debug_mode(self) -> None:
        """Nothing to enable."""

    def debug_dump(self, path: str) -> None:
        """Write the nodes, a line each."""
        with open(path, "w") as file:
            file.writelines(f"{node}\n" for node in self.nodes)


def _guard(operation: Operation) -> None:
    """See work outside of graphs that reads what another graph may have overwritten."""
    if not _lost or current().capturing is not None:
        return
    args, _ = tree_flatten((operation.args, operation.kwargs))
    for at, value in enumerate(args):
        if not pretend.on_device(value):
            continue
        key = value.data_on_device.untyped_storage()._cdata
        filled = at == 0 and operation.kind != "triton"
        if filled and getattr(operation.function, "overloadpacket", None) in FILLING:
            _lost.pop(key, None)
        elif key in _lost:
            raise PoolReuse(
                f"{operation.name} reads memory of a graph that {_lost[key][1]} may "
                f"have overwritten, at {operation.where} | {operation.where.text}"
            )


class _Index:
    """All live memory of the device, to be found by address."""

    def __init__(self) -> None:
        live = []
        for address, weak in pretend.storages.items():
            storage = torch.UntypedStorage._new_with_weak_ptr(weak.cdata)
            if storage is not None and storage.nbytes():
                live.append((address, storage))
        live.sort(key=lambda each: each[0])
        self._starts = np.array([address for address, _ in live], dtype=np.int64)
        self._sizes = np.array([each.nbytes() for _, each in live], dtype=np.int64)
        self._weak = [StorageWeakRef(storage) for _, storage in live]

    def find(self, values: np.ndarray) -> Iterator[tuple[int, Any]]:
        """Position and storage of each value that is an address in live memory."""
        if not len(self._starts):
            return
        at: Any = np.searchsorted(self._starts, values, side="right") - 1
        inside = (at >= 0) & (values - self._starts[at] < self._sizes[at])
        for position in np.flatnonzero(inside):
            weak = self._weak[at[position]]
            storage = torch.UntypedStorage._new_with_weak_ptr(weak.cdata)
            if storage is not None:
                yield int(position), storage


class _Run:
    """One replay, with what is known of each byte that it touches."""

    def __init__(self, graph: Graph, sent: dict[Memory, np.ndarray]) -> None:
        self._graph, self._sent = graph, sent
        self._written: dict[Memory, np.ndarray] = {
            memory: np.zeros(memory.size, dtype=bool) for memory in graph._reusable
        }
        # What the graph itself writes, as far as is known.
        self._stored = {
            address.memory
            for node in graph.nodes
            if node.kind != "triton" or node.observed
            for address in node.writes.values()
        }
        self._notes: dict[str, None] = {}
        self._order()

    def nodes(self) -> None:
        graph = self._graph
        for node in graph.nodes:
            if node.kind == "triton":
                self._launch(node)
            else:
                self._operate(node)
        graph.unwritten = list(self._notes)

    # -- operations --------------------------------------------------------------------

    def _operate(self, node: Node) -> None:
        packet = getattr(node.function, "overloadpacket", None)
        for name, address in node.reads.items():
            self._check_sent(node, name, address)
            flags = self._written.get(address.memory)
            if flags is None or packet in PICKING:
                continue
            part = address.of_bytes(flags)
            if not part.all():
                missing = np.logical_not(part).any(axis=-1)
                self._note(node, name, int(np.count_nonzero(missing)))
        before = {}
        if packet in SCATTERING:
            before = {
                address.memory: _array(address.memory.storage()).copy()
                for address in node.writes.values()
                if address.memory in self._written
            }
        node.work(*tree_map(_restored, node.data))
        for address in node.writes.values():
            self._stored.add(address.memory)
            flags = self._written.get(address.memory)
            if flags is None:
                continue
            if address.memory in before:
                now = _array(address.memory.storage())
                flags |= now != before[address.memory]
            else:
                address.of_bytes(flags)[...] = True

    def _check_sent(self, node: Node, name: str, address: Address) -> None:
        sent = self._sent.get(address.memory)
        if sent is None or address.memory in self._stored:
            return
        now = address.of_bytes(_array(address.memory.storage()))
        if not np.array_equal(now, address.of_bytes(sent)):
            raise StaleInput(node.says(name, STALE))

    def _note(self, node: Node, name: str, elements: int) -> None:
        what = f"has {elements} elements that are read and that nothing wrote"
        self._notes.setdefault(node.says(name, what))

    # -- launches ----------------------------------------------------------------------

    def _order(self) -> None:
        graph = self._graph
        memories = [
            each for each in graph.memories if each.size and not each.weak.expired()
        ]
        memories.sort(key=lambda each: each.address)
        self._memories = memories
        self._starts = [each.address for each in memories]

    def _launch(self, node: Node) -> None:
        loads: set[Memory] = set()
        stores: set[Memory] = set()

        def load(addresses: np.ndarray, size: int) -> None:
            for memory, offsets in self._split(node, addresses, size):
                loads.add(memory)
                if memory in self._written or memory in self._sent:
                    self._check_load(node, memory, offsets, size)

        def store(addresses: np.ndarray, size: int) -> None:
            for memory, offsets in self._split(node, addresses, size):
                stores.add(memory)
                self._stored.add(memory)
                flags = self._written.get(memory)
                if flags is not None:
                    for byte in range(size):
                        flags[offsets + byte] = True

        try:
            with _watching(load, store):
                node.work(*tree_map(_restored, node.data))
        except Exception as error:  # which the interpreter wraps
            if isinstance(error.__cause__, GraphError):
                raise error.__cause__ from None
            raise
        node.reads = self._seen(node, loads, node.reads if node.observed else {})
        node.writes = self._seen(node, stores, node.writes if node.observed else {})
        node.observed = True

    def _seen(
        self, node: Node, memories: set[Memory], before: dict[str, Address]
    ) -> dict[str, Address]:
        seen = dict(before)
        for memory in memories:
            whole = Address(memory, 0, (memory.size,), (1,), torch.uint8)
            name = node.argument_of(memory)
            value = node.arguments.get(name)
            seen[name] = value if isinstance(value, Address) else whole
        return seen

    def _check_load(
        self, node: Node, memory: Memory, offsets: np.ndarray, size: int
    ) -> None:
        flags = self._written.get(memory)
        if flags is not None and not flags[offsets].all():
            self._note(node, node.argument_of(memory), int((~flags[offsets]).sum()))
        sent = self._sent.get(memory)
        if sent is not None and memory not in self._stored:
            now = _array(memory.storage())
            for byte in range(size):
                if (now[offsets + byte] != sent[offsets + byte]).any():
                    raise StaleInput(node.says(node.argument_of(memory), STALE))

    def _split(
        self, node: Node, addresses: np.ndarray, size: int
    ) -> Iterator[tuple[Memory, np.ndarray]]:
        """Which memory each address lies in, and where in it."""
        while addresses.size:
            lowest = int(addresses.min())
            at = bisect.bisect_right(self._starts, lowest) - 1
            memory = self._memories[at]
            end = memory.address + memory.size
            if at < 0 or lowest + size > end:
                self._follow(node, lowest, size)
                continue
            if int(addresses.max()) + size <= end:  # as nearly always
                yield memory, (addresses - np.uint64(memory.address)).view(np.int64)
                return
            inside = addresses + np.uint64(size) <= np.uint64(end)
            offsets = addresses[inside] - np.uint64(memory.address)
            yield memory, offsets.view(np.int64)
            addresses = addresses[~inside]

    def _follow(self, node: Node, address: int, size: int) -> None:
        """Get to know memory that a kernel reaches by a pointer it found in memory."""
        found = list(_Index().find(np.array([address, address + size - 1])))
        if len(found) < 2:
            raise DeadInput(
                f"{node.name} follows a pointer into memory that is not the device's, "
                f"or was freed, at {node.where} | {node.where.text}"
            )
        self._graph._memory(torch.empty(0, dtype=torch.uint8).set_(found[0][1]))
        self._order()


def _restored(value: Any) -> Any:
    if isinstance(value, Address):
        return value.tensor()
    return value.tensor if isinstance(value, Baked) else value


@contextmanager
def _watching(
    load: Callable[[np.ndarray, int], None], store: Callable[[np.ndarray, int], None]
) -> Iterator[None]:
    """Tell the addresses of each load and store of Triton's interpreter, before it."""
    from triton.runtime.interpreter import InterpreterBuilder

    def lanes(pointers: Any, mask: Any) -> tuple[np.ndarray, int]:
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        addresses = pointers.data.reshape(-1)
        if mask is not None:
            addresses = addresses[
                np.broadcast_to(mask.data, pointers.data.shape).reshape(-1)
            ]
        return addresses, size

    stock_load = InterpreterBuilder.create_masked_load
    stock_store = InterpreterBuilder.create_masked_store
    stock_rmw = InterpreterBuilder.create_atomic_rmw
    stock_cas = InterpreterBuilder.create_atomic_cas

    def masked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        load(*lanes(pointers, mask))
        return stock_load(self, pointers, mask, *rest)

    def masked_store(
        self: Any, pointers: Any, value: Any, mask: Any, *rest: Any
    ) -> Any:
        store(*lanes(pointers, mask))
        return stock_store(self, pointers, value, mask, *rest)

    def atomic_rmw(
        self: Any, how: Any, pointers: Any, value: Any, mask: Any, *rest: Any
    ) -> Any:
        load(*lanes(pointers, mask))
        store(*lanes(pointers, mask))
        return stock_rmw(self, how, pointers, value, mask, *rest)

    def atomic_cas(self: Any, pointers: Any, *rest: Any) -> Any:
        load(*lanes(pointers, None))
        store(*lanes(pointers, None))
        return stock_cas(self, pointers, *rest)

    with (
        mock.patch.object(InterpreterBuilder, "create_masked_load", masked_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", masked_store),
        mock.patch.object(InterpreterBuilder, "create_atomic_rmw", atomic_rmw),
        mock.patch.object(InterpreterBuilder, "create_atomic_cas", atomic_cas),
    ):
        yield


# -- two captures --------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """What keeps two captures of one step from being one graph.

    Attributes:
        position: Of the node in the first capture; in the second, if the first
            does not have it.
        operation: Its name.
        argument: Which differs; ``grid`` for the grid, empty for the operation.
        kind: ``operation``, ``grid``, ``number``, ``address`` or ``shape``.
        before: What the first capture has.
        after: What the second has.
        where: The line of the launch.
        memory: Behind the argument, in the first capture.
    """

    position: int
    operation: str
    argument: str
    kind: str
    before: str
    after: str
    where: Where
    memory: Memory | None = None

    def __str__(self) -> str:
        what = {
            "operation": "in one capture only, the host took another branch:",
            "grid": "grid:",
            "number": f"argument {self.argument} is another number:",
            "address": f"argument {self.argument} moves:",
            "shape": f"argument {self.argument} has another shape:",
        }[self.kind]
        return (
            f"launch {self.position} {self.operation} {what} {self.before} -> "
            f"{self.after} at {self.where} | {self.where.text}"
        )


def diff(first: Graph, second: Graph) -> list[Difference]:
    """Every launch that only one of two captures has, or that differs.

    Memory that a graph allocated itself is the same if the same line allocated it, and
    as often before.
    """
    keys = [
        [(node.name, node.where) for node in captured.nodes]
        for captured in (first, second)
    ]
    found: list[Difference] = []
    matcher = difflib.SequenceMatcher(None, keys[0], keys[1], autojunk=False)
    for tag, begin, end, other, last in matcher.get_opcodes():
        if tag == "equal":
            for position in range(begin, end):
                node = first.nodes[position]
                found += _compare(
                    position, node, second.nodes[position - begin + other]
                )
            continue
        for captured, span in ((first, (begin, end)), (second, (other, last))):
            present, absent = ("launched", "not launched")
            if captured is second:
                present, absent = absent, present
            for position in range(*span):
                node = captured.nodes[position]
                found.append(
                    Difference(
                        *(position, node.name, "", "operation", present, absent),
                        node.where,
                    )
                )
    return found


def _compare(position: int, node: Node, other: Node) -> Iterator[Difference]:
    def differs(argument: str, kind: str, before: Any, after: Any) -> Difference:
        value = node.arguments.get(argument)
        return Difference(
            *(position, node.name, argument, kind, str(before), str(after)),
            node.where,
            value.memory if isinstance(value, Address) else None,
        )

    if node.grid != other.grid:
        yield differs("grid", "grid", node.grid, other.grid)
    for name in dict.fromkeys((*node.arguments, *other.arguments)):
        left, right = (each.arguments.get(name, "nothing") for each in (node, other))
        if isinstance(left, Address) and isinstance(right, Address):
            if _base(left) != _base(right) or left.offset != right.offset:
                yield differs(name, "address", _place(left), _place(right))
            elif (left.shape, left.stride, left.dtype) != (
                right.shape,
                right.stride,
                right.dtype,
            ):
                yield differs(name, "shape", left.layout, right.layout)
        elif isinstance(left, Baked) and isinstance(right, Baked):
            if not torch.equal(left.tensor, right.tensor):
                yield differs(name, "number", left.tensor, right.tensor)
        elif left != right:
            yield differs(name, "number", left, right)


def _base(address: Address) -> Any:
    """The same for the same memory: of a graph's own, for what one line allocated."""
    memory = address.memory
    return memory.birth if memory.kept is not None else memory.identity


def _place(address: Address) -> str:
    offset = f"+{address.offset}" if address.offset else ""
    return f"{address.memory.label}@{address.memory.address:#x}{offset}"


# -- in torch's place ----------------------------------------------------------------


class graph:
    """Stands for ``torch.cuda.graph``.

    Args:
        cuda_graph: A `Graph`.
        pool: Handle of the pool whose memory it may share.
        stream: Captured stream; by default one of its own.
        capture_error_mode: Taken and not used: there is one thread.
    """

    def __init__(
        self,
        cuda_graph: Graph,
        pool: Any = None,
        stream: Stream | None = None,
        capture_error_mode: str = "global",
        **_: Any,
    ) -> None:
        self._graph, self._pool, self._mode = cuda_graph, pool, capture_error_mode
        self._stream = Stream() if stream is None else stream

    def __enter__(self) -> None:
        current().synchronize()
        self._stream.__enter__()
        try:
            self._graph.capture_begin(self._pool, self._mode)
        except BaseException:
            self._stream.__exit__()
            raise

    def __exit__(self, error: Any, *_: Any) -> None:
        try:
            if error is None:
                self._graph.capture_end()
            else:
                self._graph.abandon()
        finally:
            self._stream.__exit__()


def graph_pool_handle() -> tuple[int, int]:
    """Stands for ``torch.cuda.graph_pool_handle``."""
    return (1, next(_handles))


# -- for people ----------------------------------------------------------------------

# What torch calls the arguments of any operation: no name for what is in them.
NAMELESS = {
    *("self", "other", "input", "target", "source", "result", "mat1", "mat2"),
    *("src", "index", "indices", "tensor", "tensors", "values", "mask", "out", "dst"),
}


def names(captured: Graph) -> dict[Memory, str]:
    """What kernels call each memory most; its label, if they have no name for it."""
    found: dict[Memory, Counter[str]] = {}
    for node in captured.nodes:
        for argument, address in node.addresses():
            name = argument.partition("[")[0].removesuffix("_ptr").removesuffix("_ptrs")
            if node.kind == "triton" or name not in NAMELESS:
                found.setdefault(address.memory, Counter())[name] += 1
        for argument, at, _, target in node.tables:
            name = f"{argument.removesuffix('_ptr').removesuffix('_ptrs')}[{at}]"
            found.setdefault(target, Counter())[name] += 1
    return {
        memory: found[memory].most_common(1)[0][0] if memory in found else memory.label
        for memory in captured.memories
    }


def describe(captured: Graph, moving: Sequence[Difference] = ()) -> dict[str, Any]:
    """A graph as data, for `vllm_ext.prove.page`.

    Args:
        captured: Replayed at least once, or kernels count as writing all they have.
        moving: Of this capture and another.

    Returns:
        ``memories``: by position ``label``, ``name``, ``shape``, ``dtype``,
        ``bytes``, ``own`` (the graph's), ``pinned``. ``nodes``: in order ``name``,
        ``kind``, ``grid``, ``where``, ``text``, ``arguments`` (``name``, ``text``,
        ``moves``), and ``reads`` and ``writes``, positions of memories.
    """
    place = {memory: at for at, memory in enumerate(captured.memories)}
    called = names(captured)
    moves = {(each.position, each.argument) for each in moving}

    def argument(position: int, name: str, value: Any) -> dict[str, Any]:
        memory = None
        if isinstance(value, Address):
            memory = place[value.memory]
            text = value.layout + (f" +{value.offset}" if value.offset else "")
        else:
            text = str(value.tensor) if isinstance(value, Baked) else value
        moved = (position, name) in moves
        return {"name": name, "text": text, "memory": memory, "moves": moved}

    return {
        "memories": [
            {
                **{"label": memory.label, "name": called[memory]},
                **{"shape": list(memory.shape), "dtype": memory.dtype},
                **{"bytes": memory.size, "own": memory.kept is not None},
                "pinned": memory.pinned,
            }
            for memory in captured.memories
        ],
        "nodes": [
            {
                **{"name": node.name, "kind": node.kind, "grid": list(node.grid)},
                **{"where": str(node.where), "text": node.where.text},
                "arguments": [
                    argument(position, name, value)
                    for name, value in node.arguments.items()
                ],
                "reads": sorted({place[each.memory] for each in node.reads.values()}),
                "writes": sorted({place[each.memory] for each in node.writes.values()}),
            }
            for position, node in enumerate(captured.nodes)
        ],
    }
