"""What Triton kernels do to memory: out of bounds, races, dependence on program order.

Triton's interpreter runs the programs of a launch one after the other, in the memory
of this process, so a kernel that reads past its tensors or whose programs overwrite
each other's results looks right in it. `Sanitizer` watches every lane of every load,
store and atomic:

    with Sanitizer() as sanitizer:
        kernel[grid](x, y, n, BLOCK=1024)
    sanitizer.check()

A kernel's tests enter one around each launch, or let a fixture do it. It reports, once
per kernel and line, with program, argument and byte:

``out of bounds``  an address that is no element of the tensor its pointer came from.
    The tensor is the view that was passed: a neighbouring row of the same storage is
    out of bounds, and so is a gap between rows. A pointer that was loaded from memory
    or passed as a number may point into any argument and into ``reachable``.
``misaligned``  an address that is no multiple of what is read or written there.
``race``  a store by one program of what another one loads or stores, or an atomic
    operation on what another one loads or stores plainly, in no order; also two lanes
    of one store with different values for one address.
``order``  results that differ when the programs run in reverse or shuffled, bit for
    bit: sums of floating-point atomics, ``atomic_xchg``, tickets that choose a place.

An access out of bounds or misaligned is left out, the rest of the launch goes on.
What two programs do is in order if one released after it and the other acquired
before it, by atomics of one element on one address, ``sem`` saying which: the last
program to arrive at a counter may read what all others stored. With ``relaxed`` it
may not, and an atomic of scope ``cta`` counts as a load and a store. Two programs that
store the same bits at one address do not race. Accesses of different widths are
compared byte by byte.

What comes out of a launch is what its programs compute in their usual order, to the
last bit; other orders run in between, and the memory is put back.

Limits: what the given data makes a kernel do is all that is seen. Programs run one
after the other: races between the threads or warps of one program, barriers and
fences that are missing in compiled code, and programs that wait for later ones are
not seen. Of several programs that load an address, or change it atomically, the first
is remembered, which can hide a race only where some of them are ordered and others are
not; the other orders of a launch have another first one. Reads of memory that nobody
wrote are not reported. Rounding and reduction orders are the interpreter's. Tensors
have to lie in the memory of this process, or the launch is not watched, which `check`
says; with a pretend device, enter the sanitizer before the device.
"""

import ctypes
import functools
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

Kind = Literal["out of bounds", "misaligned", "race", "order"]
Program = tuple[int, int, int]
Access = Literal["load", "store", "atomic"]

# What each kind of access must not meet, done by another program in no order.
CONFLICTS: dict[Access, tuple[Access, ...]] = {
    "load": ("store", "atomic"),
    "store": ("store", "load", "atomic"),
    "atomic": ("store", "load"),
}
WRITES: tuple[Access, ...] = ("store", "atomic")
PAST = {"load": "loaded", "store": "stored", "atomic": "changed atomically"}

# Orders in which the programs of a launch run: from their number to a permutation.
ORDERS: dict[str, Callable[[int], Any]] = {
    "natural": np.arange,
    "reversed": lambda programs: np.arange(programs)[::-1],
    "shuffled": lambda programs: np.random.default_rng(programs).permutation(programs),
}

# A kernel is given addresses of its own making for its arguments, far from each other
# and from what the process uses, so that an address tells the argument it came from.
ARGUMENTS = 1 << 63
ROOM = 1 << 50  # bytes of addresses per argument
PAGE = 4096  # alignment within it is kept

# A program that waits for one which has not run yet would wait forever: another order
# may take so many times the accesses of the natural one, and a few more.
PATIENCE = 20
FEW = 100


class KernelFault(RuntimeError):
    """A fault, where a `Sanitizer` raises the first one instead of collecting."""


class _CannotWatch(Exception):
    """One line: why a launch runs unwatched."""


class _Waiting(Exception):
    """Says that a program waits for one that comes later."""


@dataclass(frozen=True)
class Fault:
    """One line of a kernel that does what it must not.

    Attributes:
        kind: See the module's docstring.
        kernel: Name of the kernel that was launched.
        program: The first program that did it.
        file: Source file of the load, store or atomic.
        line: Its line, in the kernel or in a function that it calls.
        what: What happened, naming argument and byte.
        launches: In how many launches.
    """

    kind: Kind
    kernel: str
    program: Program
    file: str
    line: int
    what: str
    launches: int = 1

    def __str__(self) -> str:
        often = f" (in {self.launches} launches)" if self.launches > 1 else ""
        place = _place((self.file, self.line))
        return f"{self.kind} in {self.kernel} at {place}: {self.what}{often}"


@dataclass
class Kernel:
    """What a `Sanitizer` saw of one kernel.

    Attributes:
        launches: How many there were.
        reordered: How many of them also ran in other orders.
        sizes: Grid and tensor shapes, each combination once.
        problem: Why a launch failed or could not be watched; empty if none did.
    """

    launches: int = 0
    reordered: int = 0
    sizes: dict[Any, int] = field(default_factory=dict)
    problem: str = ""


def _place(where: tuple[str, int]) -> str:
    file, line = where
    return f"{os.sep.join(file.split(os.sep)[-2:])}:{line}"


# -- memory of a launch ------------------------------------------------------------


class _Region:
    """Memory of one or more overlapping storages."""

    def __init__(self, start: int, end: int) -> None:
        self.start = start
        self.bytes = np.ctypeslib.as_array(
            (ctypes.c_uint8 * (end - start)).from_address(start)
        )
        self.before: Any = None  # of the launch, if it writes here
        self.after: Any = None  # what the natural order made of it, likewise

    def holds(self, address: int, width: int) -> bool:
        return 0 <= address - self.start <= len(self.bytes) - width

    def keep(self) -> None:
        """It is about to be written."""
        if self.before is None:
            self.before = self.after = self.bytes.copy()


class _View:
    """A tensor: which bytes are its elements.

    Args:
        name: Of the argument.
        tensor: Has to stay alive as long as this.
    """

    def __init__(self, name: str, tensor: Any) -> None:
        self.name = name
        self.tensor = tensor
        self.region: Any = None
        self.start: int = tensor.data_ptr()
        item = tensor.element_size()
        dims = sorted(
            (stride * item, size)
            for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
            if size > 1 and stride
        )
        self._run: int = item if tensor.numel() else 0  # bytes without a gap
        while dims and dims[0][0] == self._run:
            self._run *= dims.pop(0)[1]
        self._dims = dims[::-1] if self._run else []
        self.extent: int = self._run + sum(
            step * (size - 1) for step, size in self._dims
        )

    def holds(self, offsets: Any, width: int) -> Any:
        """Whether ``width`` bytes at each of ``offsets`` (int64) are elements."""
        inside = offsets >= 0
        for step, size in self._dims:
            offsets = offsets - np.minimum(offsets // step, size - 1) * step
        return inside & (offsets + width <= self._run)

    def __str__(self) -> str:
        tensor = self.tensor
        kind = str(tensor.dtype).removeprefix("torch.")
        layout = f", strides {list(tensor.stride())}" if self._dims else ""
        return f"{self.name} ({kind}{list(tensor.shape)}{layout})"


class _Memory:
    """What a launch may touch.

    Args:
        arguments: In the order of their invented addresses.
        reachable: Views that only pointers from memory lead to.
    """

    def __init__(self, arguments: list[_View], reachable: list[_View]) -> None:
        self.arguments = arguments
        self.views = [view for view in (*arguments, *reachable) if view.extent]
        self.invented = [
            ARGUMENTS + ROOM * number + ROOM // 2 + view.start % PAGE
            for number, view in enumerate(arguments)
        ]
        self.regions = self._merge()

    def _merge(self) -> list[_Region]:
        """Regions that do not overlap, and to each view its own."""
        groups: list[list[_View]] = []
        end = 0
        for view in sorted(self.views, key=_span):
            start, stop = _span(view)
            if start >= end:
                groups.append([])
            groups[-1].append(view)
            end = max(end, stop)
        regions = []
        for group in groups:
            starts, ends = zip(*map(_span, group), strict=True)
            regions.append(_Region(min(starts), max(ends)))
            for view in group:
                view.region = regions[-1]
        return regions

    @property
    def written(self) -> list[_Region]:
        """What was written in any order so far."""
        return [region for region in self.regions if region.before is not None]

    def split(self, addresses: Any, width: int) -> Iterator[tuple[Any, int, Any]]:
        """Sort ``addresses`` by the tensor they came from.

        Yields:
            A view, the address at which the kernel believes it begins, and which of
            the addresses; without a view for those that lead nowhere.
        """
        low, high = int(addresses.min()), int(addresses.max())
        number = (low - ARGUMENTS) // ROOM
        if low >= ARGUMENTS and number == (high - ARGUMENTS) // ROOM:
            if number < len(self.arguments):
                yield self.arguments[number], self.invented[number], slice(None)
            else:
                yield None, 0, slice(None)
            return
        left: Any = np.ones(len(addresses), bool)
        numbers = np.where(
            addresses >= np.uint64(ARGUMENTS),
            ((addresses - np.uint64(ARGUMENTS)) // np.uint64(ROOM)).astype(np.int64),
            -1,
        )
        for number in np.unique(numbers[numbers >= 0]):
            if number < len(self.arguments):
                members = np.flatnonzero(numbers == number)
                left[members] = False
                yield self.arguments[number], self.invented[number], members
        for view in self.views:
            if not left.any():
                return
            offsets = (addresses - np.uint64(view.start)).astype(np.int64)
            members = np.flatnonzero(left & (numbers < 0) & view.holds(offsets, width))
            if len(members):
                left[members] = False
                yield view, view.start, members
        if left.any():
            yield None, 0, np.flatnonzero(left)

    def real(self, addresses: Any) -> Any:
        """The process's own addresses, where ``addresses`` are invented."""
        found = addresses.copy()
        for number, view in enumerate(self.arguments):
            begin = np.uint64(ARGUMENTS + ROOM * number)
            mine = (addresses >= begin) & (addresses - begin < np.uint64(ROOM))
            found[mine] -= np.uint64(self.invented[number] - view.start)
        return found

    def name(self, address: int) -> str:
        """Where ``address`` lies, from the view it is in or nearest to."""

        def distance(view: _View) -> int:
            return max(view.start - address, address - view.start - view.extent + 1, 0)

        if not self.views:
            return "no tensor"
        view = min(self.views, key=distance)
        if distance(view) > PAGE:
            return "far from every tensor"
        return f"byte {address - view.start} of {view}"


def _unwrapped(tensor: Any) -> Any:
    """The tensor in a ``triton.reinterpret``, or itself."""
    return getattr(tensor, "base", tensor)


def _span(view: _View) -> tuple[int, int]:
    """Begin and end of the storage that it is a view of."""
    storage = view.tensor.untyped_storage()
    start: int = storage.data_ptr()
    return start, start + storage.nbytes()


def _bits(array: Any) -> Any:
    return array.view(f"u{array.itemsize}")


# -- one run of the programs of a launch ---------------------------------------------


class _Trace:
    """Which program did what where, for one run of a launch in one order.

    Args:
        order: Name of the order.
        patience: Accesses after which programs wait for each other.
    """

    def __init__(self, order: str, patience: float = math.inf) -> None:
        self.order = order
        self.patience = patience
        self.program = 0
        self._programs: Any = None  # by turn
        # By number: program, how often it had released, and source line. None is 0.
        self.events: list[tuple[int, int, tuple[str, int]]] = [(-1, 0, ("", 0))]
        self._begin = 1  # first event of the running program
        self._epoch = 1
        self._clock: Any = None  # by program: its epoch that is known to be over
        self._released: dict[int, Any] = {}  # clocks, by address
        self._last: dict[tuple[_Region, Access], Any] = {}  # events, by granule
        self._granule: dict[_Region, int] = {}  # bytes

    def begin(self, turn: int, programs: int) -> int:
        """Another program runs: the one whose ``turn`` it is in this order."""
        if self._programs is None:
            self._programs = ORDERS[self.order](programs)
        self.program = int(self._programs[turn])
        self._begin = len(self.events)
        self._epoch = 1
        self._clock = None
        return self.program

    def note(self, where: tuple[str, int]) -> None:
        """An access begins at the line ``where``."""
        if len(self.events) > self.patience:
            raise _Waiting("a program waits for one that comes later")
        self.events.append((self.program, self._epoch, where))

    def synchronize(self, address: int, programs: int, semantic: str) -> None:
        """The running program did an atomic on ``address`` that orders programs."""
        released = self._released.get(address)
        if self._clock is None:
            self._clock = np.zeros(programs, np.int32)
        if "ACQUIRE" in semantic and released is not None:
            np.maximum(self._clock, released, out=self._clock)
        if "RELEASE" in semantic:
            self._clock[self.program] = self._epoch
            if released is None:
                released = self._released[address] = np.zeros(programs, np.int32)
            np.maximum(released, self._clock, out=released)
            self._epoch += 1

    def meet(
        self, access: Access, region: _Region, addresses: Any, width: int, same: Any
    ) -> tuple[int, Access, int] | None:
        """Record an access of ``width`` bytes at each of ``addresses``, all aligned.

        Args:
            same: Asked once, if it matters: for which of them a store changes nothing.

        Returns:
            The first access of another program that it races with: which of the
            addresses, what it did, number of the event. Or ``None``.
        """
        granules, each = self._granules(region, addresses, width)
        unchanged: Any = None
        found = None
        for other in CONFLICTS[access]:
            last = self._last.get((region, other))
            if last is None:
                continue
            events = last[granules]
            racing = self._unordered(events)
            if access == other == "store" and racing.any():
                unchanged = np.repeat(same(), each)
                racing &= ~unchanged
            if found is None and racing.any():
                at = int(racing.argmax())
                found = at // each, other, int(events[at])
        last = self._last.get((region, access))
        if last is None:
            size = len(region.bytes) // self._granule[region] + 2
            last = self._last[region, access] = np.zeros(size, np.int32)
            last[granules] = len(self.events) - 1
        else:
            # Of what is in no order one is kept: of two stores the one that changed
            # something, of others the first.
            kept = self._unordered(last[granules])
            if access == "store":
                kept &= False if unchanged is None else unchanged
            last[granules[~kept]] = len(self.events) - 1
        return found

    def write(self, region: _Region, address: int) -> int:
        """Number of an event that wrote the byte at ``address``; 0 for none."""
        if region not in self._granule:
            return 0
        ((granule,), _) = self._granules(region, np.array([address]), 1)
        written = [self._last.get((region, access)) for access in WRITES]
        return max(int(last[granule]) if last is not None else 0 for last in written)

    def _granules(self, region: _Region, addresses: Any, width: int) -> tuple[Any, int]:
        """Numbers of what is covered from each of ``addresses``, and how many each."""
        granule = self._granule.setdefault(region, width)
        if width < granule:
            finer = granule // width
            before = region.start % granule // width  # the region
            for key in [key for key in self._last if key[0] is region]:
                self._last[key] = np.repeat(self._last[key], finer)[before:]
            granule = self._granule[region] = width
        numbers = addresses // granule - region.start // granule
        each = width // granule
        if each > 1:
            numbers = (numbers[:, None] + np.arange(each)).reshape(-1)
        return numbers, each

    def _unordered(self, events: Any) -> Any:
        """Which are another program's, with nothing that puts them before now."""
        found = (events > 0) & (events < self._begin)
        if self._clock is not None and found.any():
            for event in np.unique(events[found]):
                program, epoch, _ = self.events[event]
                if epoch <= self._clock[program]:
                    found &= events != event
        return found


# -- the sanitizer -----------------------------------------------------------------


class Sanitizer:
    """Watches the launches of interpreted kernels while it is entered.

    Args:
        reachable: Tensors that kernels reach through pointers in memory, as through
            vLLM's ``block_table_ptrs``.
        reorder: How many launches of a kernel with the same grid and shapes are also
            run in other orders; without a number all.
        raises: Raise `KernelFault` at the first fault, out of the launch.

    Attributes:
        kernels: What was launched, by name.

    Raises:
        RuntimeError: On entering: Triton compiles in this process, or another
            sanitizer is in use.
    """

    _in_use = False

    def __init__(
        self,
        reachable: Iterable[Any] = (),
        *,
        reorder: float = math.inf,
        raises: bool = False,
    ) -> None:
        self.kernels: dict[str, Kernel] = {}
        self._reachable = [
            _View(f"reachable[{number}]", tensor)
            for number, tensor in enumerate(reachable)
        ]
        self._reorder = reorder
        self._raises = raises
        self._faults: dict[tuple[Any, ...], Fault] = {}
        self._stock: dict[str, Any] = {}
        self._undo: list[tuple[Any, str, Any]] = []
        # Of the launch that is going on:
        self._executor: Any = None
        self._memory: Any = None  # a `_Memory`
        self._trace: Any = None  # a `_Trace`
        self._invented: dict[int, int] = {}  # what to add to an address, by tensor's id
        self._found: set[tuple[Any, ...]] = set()

    @property
    def faults(self) -> list[Fault]:
        """What was found so far, in the order in which it was."""
        return list(self._faults.values())

    def check(self) -> None:
        """Raise if something was found or a launch was not watched.

        Raises:
            KernelFault: All of it, a line each.
        """
        found = [str(fault) for fault in self.faults]
        found += [f"{n}: {k.problem}" for n, k in self.kernels.items() if k.problem]
        if found:
            raise KernelFault("\n".join(found))

    def __enter__(self) -> "Sanitizer":
        import triton
        from triton.runtime import interpreter

        if not triton.knobs.runtime.interpret:
            raise RuntimeError(
                "kernels are compiled in this process; start it with TRITON_INTERPRET=1"
            )
        if Sanitizer._in_use:
            raise RuntimeError("another Sanitizer is in use; leave it first")
        self._interpreter = interpreter
        self._folder = os.path.dirname(triton.__file__) + os.sep
        executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
        hooks = (
            (executor, "__call__", self._launch),
            (executor, "_init_args_hst", self._take_arguments),
            (interpreter, "_implicit_cvt", self._invent_address),
            (builder, "set_grid_idx", self._begin_program),
            (builder, "create_masked_load", self._load),
            (builder, "create_masked_store", self._store),
            (builder, "create_atomic_rmw", self._atomic),
            (builder, "create_atomic_cas", self._compare_and_swap),
            (builder, "create_ptr_to_int", self._reveal_address),
        )
        self._stock = {name: getattr(owner, name) for owner, name, _ in hooks}
        self._undo = [(owner, name, self._stock[name]) for owner, name, _ in hooks]
        for owner, name, hook in hooks:
            setattr(owner, name, self._hooked(name, hook))
        Sanitizer._in_use = True
        return self

    def __exit__(self, *error: object) -> None:
        while self._undo:
            setattr(*self._undo.pop())
        Sanitizer._in_use = False

    def _hooked(self, name: str, hook: Any) -> Any:
        """A function for a class: the hook, and stock where a launch is not watched."""
        stock = self._stock[name]

        def call(*args: Any, **kwargs: Any) -> Any:
            watched = self._trace is not None or hook == self._launch
            return (hook if watched else stock)(*args, **kwargs)

        return call

    # -- launches --------------------------------------------------------------------

    def _launch(self, executor: Any, *args: Any, **kwargs: Any) -> None:
        kernel = self.kernels.setdefault(executor.fn.__name__, Kernel())
        kernel.launches += 1
        launch = functools.partial(self._stock["__call__"], executor, *args, **kwargs)
        self._executor = executor
        self._found.clear()
        try:
            self._run(launch, _Trace("natural"))
            size = self._size()
            kernel.sizes[size] = kernel.sizes.get(size, 0) + 1
            if self._programs() > 1 and kernel.sizes[size] <= self._reorder:
                kernel.reordered += 1
                self._run_in_other_orders(launch)
        except _CannotWatch as error:
            kernel.problem = f"not watched: {error}"
            self._trace = None
            launch()
        except KernelFault:
            raise
        except Exception as error:
            kernel.problem = f"failed: {error}"
            raise
        finally:
            self._executor = self._memory = self._trace = None

    def _run(self, launch: Callable[[], None], trace: _Trace) -> None:
        self._trace = trace
        try:
            launch()
        except self._interpreter.InterpreterError as error:
            cause: BaseException | None = error
            while cause is not None:  # one for each call of a function by another
                if isinstance(cause, (KernelFault, _Waiting)):
                    raise cause from None
                cause = cause.__cause__
            raise

    def _run_in_other_orders(self, launch: Callable[[], None]) -> None:
        """Compare what comes out; afterwards what the natural order made is there."""
        memory, natural = self._memory, self._trace
        for region in memory.written:
            region.after = region.bytes.copy()
        patience = PATIENCE * (len(natural.events) + FEW)
        try:
            for order in list(ORDERS)[1 : self._programs()]:
                for region in memory.written:
                    region.bytes[:] = region.before
                try:
                    self._run(launch, _Trace(order, patience))
                except KernelFault:
                    raise
                except Exception as error:
                    self._report_failure(error)
                else:
                    self._compare(natural)
        finally:
            for region in memory.written:
                region.bytes[:] = region.after

    def _compare(self, natural: _Trace) -> None:
        for region in self._memory.written:
            differs = region.bytes != region.after
            if not differs.any():
                continue
            address = region.start + int(differs.argmax())
            traces = (self._trace, natural)
            trace = next(each for each in traces if each.write(region, address))
            program, _, where = trace.events[trace.write(region, address)]
            self._fault(
                "order",
                f"wrote {self._memory.name(address)}; programs that run "
                f"{self._trace.order} make {counted(int(differs.sum()), 'byte')} "
                "different",
                where=where,
                program=program,
            )

    def _report_failure(self, error: Exception) -> None:
        _, _, where = self._trace.events[-1]
        self._fault(
            "order",
            f"fails when programs run {self._trace.order}: {error}",
            where=where,
            program=self._trace.program,
        )

    def _take_arguments(self, executor: Any, args: Any, kwargs: Any) -> Any:
        """Before programs run: what the arguments are, in the process's memory."""
        taken = self._stock["_init_args_hst"](executor, args, kwargs)
        given = zip(args, taken[0], strict=True)
        pairs = [*zip(executor.arg_names, given, strict=False)]
        pairs += [(name, (kwargs[name], taken[1][name])) for name in kwargs]
        views = []
        for name, (given, host) in pairs:
            for label, theirs, ours in _tensors(name, given, host):
                view = _View(label, _unwrapped(ours))
                start, _ = _span(view)
                if _unwrapped(theirs).untyped_storage().data_ptr() != start:
                    raise _CannotWatch(f"{label} is not in this process's memory")
                views.append((view, ours))
        if self._memory is None:
            self._memory = _Memory([view for view, _ in views], self._reachable)
        self._invented = {
            id(tensor): invented - view.start
            for (view, tensor), invented in zip(
                views, self._memory.invented, strict=True
            )
        }
        return taken

    def _invent_address(self, value: Any) -> Any:
        """A kernel's view of an argument: a pointer is given an invented address."""
        converted = self._stock["_implicit_cvt"](value)
        shift = self._invented.get(id(value))
        if shift is not None:
            converted.handle.data = converted.handle.data + np.uint64(shift)
        return converted

    def _reveal_address(self, builder: Any, pointer: Any, *rest: Any) -> Any:
        real = self._memory.real(pointer.data)
        pointer = self._interpreter.TensorHandle(real, pointer.dtype)
        return self._stock["create_ptr_to_int"](builder, pointer, *rest)

    def _begin_program(self, builder: Any, x: int, y: int, z: int) -> None:
        _, height, depth = builder.grid_dim
        turn = (x * height + y) * depth + z
        program = self._trace.begin(turn, self._programs())
        self._stock["set_grid_idx"](builder, *self._name(program))

    def _programs(self) -> int:
        return math.prod(self._interpreter.interpreter_builder.grid_dim)

    def _name(self, program: int) -> Program:
        _, height, depth = self._interpreter.interpreter_builder.grid_dim
        return program // (height * depth), program // depth % height, program % depth

    def _size(self) -> Any:
        shapes = tuple(tuple(view.tensor.shape) for view in self._memory.arguments)
        return self._interpreter.interpreter_builder.grid_dim, shapes

    # -- accesses --------------------------------------------------------------------

    def _load(
        self, builder: Any, pointers: Any, mask: Any, *rest: Any, **named: Any
    ) -> Any:
        pointers, mask = self._touch(("load",), pointers, mask, self._width(pointers))
        return self._stock["create_masked_load"](
            builder, pointers, mask, *rest, **named
        )

    def _store(
        self, builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any
    ) -> Any:
        width = value.data.itemsize
        pointers, mask = self._touch(("store",), pointers, mask, width, value.data)
        stock = self._stock["create_masked_store"]
        result = stock(builder, pointers, value, mask, *rest)
        if pointers.data.size > 1:
            self._check_lanes(pointers.data, value.data, _array(mask))
        return result

    def _atomic(
        self, builder: Any, op: Any, pointer: Any, value: Any, mask: Any, *how: Any
    ) -> Any:
        accesses = self._atomically(*how)
        pointer, mask = self._touch(accesses, pointer, mask, value.data.itemsize)
        self._synchronize(pointer, mask, *how)
        return self._stock["create_atomic_rmw"](builder, op, pointer, value, mask, *how)

    def _compare_and_swap(
        self, builder: Any, pointer: Any, compared: Any, value: Any, *how: Any
    ) -> Any:
        stock = self._stock["create_atomic_cas"]
        handle = self._interpreter.TensorHandle
        shape = pointer.data.shape
        accesses, every = self._atomically(*how), np.ones(shape, bool)
        pointer, mask = self._touch(accesses, pointer, every, value.data.itemsize)
        self._synchronize(pointer, mask, *how)
        done = _array(mask)
        if done.all():
            return stock(builder, pointer, compared, value, *how)
        # There is no mask to leave lanes out with.
        result = np.zeros(shape, compared.data.dtype)
        if done.any():
            lanes = [
                handle(np.broadcast_to(each.data, shape)[done], each.dtype)
                for each in (pointer, compared, value)
            ]
            result[done] = stock(builder, *lanes, *how).data
        return handle(result, compared.dtype.scalar)

    def _atomically(self, semantic: Any, scope: Any) -> tuple[Access, ...]:
        return ("load", "store") if scope.name == "CTA" else ("atomic",)

    def _synchronize(self, pointer: Any, mask: Any, semantic: Any, scope: Any) -> None:
        if pointer.data.size == 1 and scope.name != "CTA" and _array(mask).all():
            address = int(pointer.data.item())
            self._trace.synchronize(address, self._programs(), semantic.name)

    def _width(self, pointers: Any) -> int:
        """Bytes of an element."""
        element = pointers.get_element_ty()
        width: int = self._interpreter._get_np_dtype(element).itemsize
        return width

    def _touch(
        self,
        accesses: tuple[Access, ...],
        pointers: Any,
        mask: Any,
        width: int,
        value: Any = None,
    ) -> tuple[Any, Any]:
        """Check and record one load, store or atomic.

        Returns:
            Pointers to real memory, and the mask without the lanes that must not be.
        """
        shape = pointers.data.shape
        wanted = np.broadcast_to(_array(mask), shape).reshape(-1)
        lanes = np.flatnonzero(wanted)
        if not len(lanes):
            return pointers, mask
        self._trace.note(self._where())
        given = pointers.data.reshape(-1)
        real = given.copy()
        refused: Any = np.zeros(len(given), bool)
        for view, begin, members in self._memory.split(given[lanes], width):
            at = lanes[members]
            if view is None:
                self._report_nowhere(accesses[-1], given[at], width)
                refused[at] = True
                continue
            offsets = (given[at] - np.uint64(begin)).astype(np.int64)
            real[at] = offsets + view.start
            bad = self._check_bounds(accesses[-1], view, offsets, width)
            if bad.any():
                refused[at[bad]] = True
                at = at[~bad]
            if len(at):
                stored = None
                if value is not None:
                    stored = np.broadcast_to(value, shape).reshape(-1)[at]
                self._check_races(accesses, view, real[at], width, stored)
        handle = self._interpreter.TensorHandle
        if refused.any():
            allowed = (wanted & ~refused).reshape(shape)
            mask = handle(allowed, self._interpreter.tl.int1)
        return handle(real.reshape(shape), pointers.dtype), mask

    def _check_bounds(
        self, access: Access, view: _View, offsets: Any, width: int
    ) -> Any:
        """Which ``offsets`` must not be touched."""
        what = f"{access} of {counted(width, 'byte')} at byte"
        outside = ~view.holds(offsets, width)
        if outside.any():
            offset = int(offsets[outside][0])
            region = view.region
            inside = region and region.holds(view.start + offset, width)
            beside = "elsewhere in its storage" if inside else "outside of its storage"
            self._fault(
                "out of bounds",
                f"{what} {offset} of {view}, {beside}{_lane_count(outside)}",
            )
        odd = ~outside & ((view.start + offsets) % width != 0)
        if odd.any():
            self._fault(
                "misaligned",
                f"{what} {int(offsets[odd][0])} of {view}{_lane_count(odd)}",
            )
        return outside | odd

    def _report_nowhere(self, access: Access, addresses: Any, width: int) -> None:
        address = int(addresses[0])
        self._fault(
            "out of bounds",
            f"{access} of {counted(width, 'byte')} at {address:#x}, in no tensor of "
            "the launch and in none that is reachable: "
            f"{self._memory.name(int(self._memory.real(addresses[:1])[0]))}",
        )

    def _check_races(
        self,
        accesses: tuple[Access, ...],
        view: _View,
        addresses: Any,
        width: int,
        value: Any,
    ) -> None:
        if accesses != ("load",):
            view.region.keep()

        def same() -> Any:
            if value is None:
                return np.zeros(len(addresses), bool)
            return self._read(addresses, True, value) == _bits(value)

        for access in accesses:
            met = self._trace.meet(
                access, view.region, addresses.astype(np.int64), width, same
            )
            if met is not None:
                at, other, event = met
                program, _, where = self._trace.events[event]
                self._fault(
                    "race",
                    f"{access} of {counted(width, 'byte')} at byte "
                    f"{int(addresses[at]) - view.start} of {view}, which program "
                    f"{self._name(program)} {PAST[other]} at {_place(where)}, with "
                    "nothing that orders the two",
                )

    def _check_lanes(self, addresses: Any, value: Any, mask: Any) -> None:
        """After a store: every lane's value is there, or two lanes had one address."""
        value = np.broadcast_to(value, addresses.shape)
        lost = mask & (self._read(addresses, mask, value) != _bits(value))
        if lost.any():
            place = self._memory.name(int(addresses[lost][0]))
            self._fault("race", f"lanes of one store have different values for {place}")

    def _read(self, addresses: Any, mask: Any, like: Any) -> Any:
        """What lies at ``addresses``, in elements of the size of ``like``'s."""
        mask = np.broadcast_to(mask, addresses.shape)
        zeros = np.zeros(addresses.shape, like.dtype)
        read = self._interpreter._interpreter.load
        return _bits(read(addresses, mask, zeros, like.dtype))

    # -- faults ----------------------------------------------------------------------

    def _where(self) -> tuple[str, int]:
        """File and line of the running kernel, or of the function that it calls."""
        frame: Any = sys._getframe(2)
        while frame is not None:
            file = frame.f_code.co_filename
            if file != __file__ and not file.startswith(self._folder):
                return file, frame.f_lineno
            frame = frame.f_back
        return "?", 0

    def _fault(
        self,
        kind: Kind,
        what: str,
        *,
        where: tuple[str, int] | None = None,
        program: int | None = None,
    ) -> None:
        """Add a fault, by default of the access that is going on."""
        if where is None or program is None:
            program, _, where = self._trace.events[-1]
        name = self._executor.fn.__name__
        key = (kind, name, where)
        if key not in self._faults:
            number = self._name(program)
            text = f"program {number}: {what}"
            self._faults[key] = Fault(kind, name, number, where[0], where[1], text)
        elif key not in self._found:
            fault = self._faults[key]
            self._faults[key] = replace(fault, launches=fault.launches + 1)
        self._found.add(key)
        if self._raises:
            raise KernelFault(str(self._faults[key]))


def _array(mask: Any) -> Any:
    """The booleans of a mask, which the interpreter hands over in two ways."""
    return mask if isinstance(mask, np.ndarray) else mask.data


def counted(number: int, what: str) -> str:
    """``1 byte``, ``2 bytes``."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def _lane_count(bad: Any) -> str:
    return f" ({int(bad.sum())} of {len(bad)} lanes)" if len(bad) > 1 else ""


def _tensors(name: str, given: Any, host: Any) -> Iterator[tuple[str, Any, Any]]:
    """Name, tensor and its copy on the host of what one argument holds."""
    if isinstance(given, tuple):
        for number, (theirs, ours) in enumerate(zip(given, host, strict=True)):
            yield from _tensors(f"{name}[{number}]", theirs, ours)
    elif hasattr(given, "block_shape"):
        yield from _tensors(name, given.base, host.base)
    elif hasattr(given, "data_ptr"):
        yield name, given, host
