"""A pretend device: host and device kept apart, on a machine that has no device.

Its tensors are of device type ``pretend``. Their data lies in ordinary CPU tensors
that only device operations reach, so code takes its accelerator branches, and every
crossing between host and device is seen exactly once: `PretendDevice` is the one place
that intercepts aten operations and interpreted Triton launches, and tells observers
(the sync detector, the graph emulator) of each as an `Operation`.

    with PretendDevice() as device:
        device.observers.append(print)
        x = torch.zeros(4, device=DEVICE)
        x.sum().item()      # Operation(kind="sync", name="_local_scalar_dense", ...)

A device that ``lags`` runs nothing before the host waits for it: the host is as far
ahead as code allows, so that a staging buffer written again too early, a result read
before its event, or a stream that forgot to wait for another gives wrong data here,
where on a GPU it does so now and then.

Memory: `pin` and ``pin_memory=True`` mark host memory as pinned; `uva_view` gives the
device's view of pinned memory, as ``cudaHostGetDevicePointer`` does.

Limits: aten operations compute with the CPU's kernels (rounding and random numbers
are the CPU's); freed memory is never handed out again, so a missing ``record_stream``
is not seen; Triton kernels run in its interpreter; custom operations count as one
launch and are not looked into; one device, and one thread that uses it (other threads
may wait for events).

Source: wrapper tensor plus dispatch mode, as torch's own FakeTensor; the Python
PrivateUse1 backend is torch's.
"""

import collections
import inspect
import linecache
import numbers
import os
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = "pretend"
POISON = 0xFF  # as float NaN, as integer -1
EVENT_WAIT = "Event.synchronize"
HERE = Path(__file__).parents[2]
HOST = torch.device("cpu")

Kind = Literal["launch", "triton", "graph", "h2d", "d2h", "sync"]

aten = torch.ops.aten

# Their result's size or value has to be known on the host.
READS = {
    **dict.fromkeys((aten._local_scalar_dense, aten.item), "reads a value"),
    **dict.fromkeys((aten.equal, aten.is_nonzero, aten.allclose), "reads a value"),
    **dict.fromkeys(
        (
            *(aten.nonzero, aten.masked_select, aten.bincount, aten.unique_dim),
            *(aten._unique, aten._unique2, aten.unique_consecutive),
        ),
        "has a result whose size depends on data",
    ),
}
FILLS = {aten.masked_fill, aten.masked_fill_, aten.index_fill, aten.index_fill_}
INDEXING = {
    *(aten.index, aten._unsafe_index),
    *(aten.index_put, aten.index_put_, aten._index_put_impl_),
}
ALLOCATIONS = {
    *(aten.empty, aten.empty_strided, aten.empty_like),
    *(aten.new_empty, aten.new_empty_strided),
}
# Views by what they do, not by what their schema says.
VIEWS = {aten._unsafe_view, aten.detach, aten.alias, aten.lift_fresh}


@dataclass(frozen=True)
class Where:
    """A line of the code that is being looked at: neither torch's nor Triton's."""

    file: str
    line: int
    function: str

    @property
    def text(self) -> str:
        """The line itself."""
        return linecache.getline(self.file, self.line).strip()

    @property
    def path(self) -> str:
        """The file, from the folder on in which packages are installed, or ours lie."""
        return self.file.rpartition("site-packages/")[2].removeprefix(f"{HERE}/")

    def __str__(self) -> str:
        return f"{self.path}:{self.line} in {self.function}"


NOWHERE = Where("?", 0, "?")


@dataclass
class Operation:
    """Something that the host asks of the device.

    Attributes:
        kind: ``launch`` (aten or custom operation), ``triton``, ``graph`` (a replay),
            ``h2d``, ``d2h``, or ``sync`` for what does nothing but wait.
        name: Operation or kernel.
        where: The line that asked.
        wait: Why the host has to wait for the device here; empty if it does not.
        function: ``OpOverload``, or the kernel's Python function.
        args: As passed, with device tensors as `PretendTensor`.
        kwargs: Likewise.
        grid: Of a Triton launch.
        result: What the operation gave the host, once it was submitted.
    """

    kind: Kind
    name: str
    where: Where
    wait: str = ""
    function: Any = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    grid: tuple[int, ...] = ()
    result: Any = None

    def __str__(self) -> str:
        waits = f" {self.wait}" if self.wait else ""
        return f"{self.kind} {self.name}{waits} at {self.where} | {self.where.text}"


# -- tensors -----------------------------------------------------------------------


# Memory that has been the device's, by its address; what is freed stays until another
# takes its place. Pointers that kernels find in memory lead here.
storages: dict[int, StorageWeakRef] = {}


class PretendTensor(torch.Tensor):  # type: ignore[misc]
    """A tensor of the device. ``data_on_device`` is for instruments, not for the host.

    Args:
        data: CPU tensor that holds the data; shared, not copied.
    """

    data_on_device: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, data: torch.Tensor) -> "PretendTensor":
        tensor: PretendTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            data.size(),
            strides=data.stride(),
            storage_offset=data.storage_offset(),
            dtype=data.dtype,
            device=torch.device(DEVICE, 0),
        )
        tensor.data_on_device = data
        storage = data.untyped_storage()
        known = storages.get(storage.data_ptr())
        if known is None or known.cdata != storage._cdata:
            storages[storage.data_ptr()] = StorageWeakRef(storage)
        return tensor

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        # With no device in use it is a debugger that asks.
        data = self.cpu() if _devices else self.data_on_device
        return f"PretendTensor({data}, device='{DEVICE}:0')"

    def __format__(self, how: str) -> str:
        return format(self.item(), how) if self.dim() == 0 else str(self)

    def __setitem__(self, index: Any, value: Any) -> None:
        # Of a CUDA tensor only: the number becomes a host tensor, and what happens
        # then is up to the operation that gets it (see `_why_it_waits`).
        if isinstance(value, numbers.Number):
            value = torch.tensor(value, dtype=self.dtype)
        super().__setitem__(index, value)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(
            f"can't convert {DEVICE}:0 device type tensor to numpy. "
            "Use Tensor.cpu() to copy the tensor to host memory first."
        )

    def data_ptr(self) -> int:
        return int(self.data_on_device.data_ptr())

    def untyped_storage(self) -> Any:
        return self.data_on_device.untyped_storage()

    def is_pinned(self, *_: Any, **__: Any) -> bool:
        return False

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return current().dispatch(function, args, kwargs or {})


def on_device(value: Any) -> bool:
    """Whether ``value`` is a tensor of the pretend device."""
    return isinstance(value, PretendTensor)


def data_of(value: Any) -> Any:
    """The CPU tensor behind a device tensor; anything else as it is."""
    return value.data_on_device if isinstance(value, PretendTensor) else value


def pin(tensor: torch.Tensor) -> torch.Tensor:
    """Mark the storage of a host tensor as pinned; returns the tensor."""
    tensor.untyped_storage().pretend_pinned = True
    for device in _devices:
        device.allocated["pinned"] += 1
    return tensor


def is_pinned(tensor: torch.Tensor) -> bool:
    """Whether a host tensor lies in pinned memory."""
    return hasattr(tensor.untyped_storage(), "pretend_pinned")


def uva_view(tensor: torch.Tensor) -> PretendTensor:
    """The device's view of pinned host memory; the same bytes.

    Raises:
        ValueError: The memory is not pinned.
    """
    if not is_pinned(tensor):
        raise ValueError("only pinned host memory has an address on the device")
    with _disable_current_modes():
        return PretendTensor(tensor.detach())


# -- streams -----------------------------------------------------------------------


class _Mark:
    """A point in a stream; `done` once everything before it has run."""

    def __init__(self, stream: "Stream") -> None:
        self.stream, self.done = stream, False


class Stream:
    """Stands for ``torch.cuda.Stream``: what was submitted and has not run yet."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.pending: collections.deque[Callable[[], None]] = collections.deque()
        self.device = torch.device(DEVICE, 0)
        self.cuda_stream = id(self)
        self._outer: list[Stream] = []  # one may be entered again within itself
        if _devices:
            current().streams.append(self)

    def submit(self, run: Callable[[], None]) -> None:
        """Run now; on a device that lags, when somebody waits."""
        device = current()
        if device.lags:
            self.pending.append(run)
        else:
            with device.lock:
                run()

    def advance(self, operations: int | None = None) -> None:
        """Let the device run the next ``operations``, or all that are pending."""
        with current().lock:
            while self.pending and operations != 0:
                self.pending.popleft()()
                operations = None if operations is None else operations - 1

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: "Event") -> None:
        event.wait(self)

    def wait_stream(self, stream: "Stream") -> None:
        self.wait_event(stream.record_event())

    def synchronize(self) -> None:
        current().report_wait("Stream.synchronize", "waits for a stream")
        self.advance()

    def query(self) -> bool:
        current().refuse_while_capturing("Stream.query", "asks for a stream")
        return not self.pending

    def __enter__(self) -> "Stream":
        device = current()
        self._outer.append(device.stream)
        device.stream = self
        return self

    def __exit__(self, *_: object) -> None:
        current().stream = self._outer.pop()


class Event:
    """Stands for ``torch.cuda.Event`` and ``torch.Event``; takes no times."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self._mark: _Mark | None = None
        self._capture: Capture | None = None

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or current().stream
        capture = current().capture
        if capture is not None and capture.takes(stream):
            capture.record(self, stream)
            self._capture, self._mark = capture, None
            return
        self._capture = None
        mark = self._mark = _Mark(stream)
        mark.stream.submit(lambda: setattr(mark, "done", True))

    def wait(self, stream: Stream | None = None) -> None:
        mark, capture = self._mark, self._capture
        if capture is not None and capture is current().capture:
            capture.wait(self, stream or current().stream)
        elif mark is not None:
            stream, taking = stream or current().stream, current().capture
            if taking is not None and taking.takes(stream):
                current().refuse_while_capturing(
                    "Event.wait", "waits for an event from outside the capture"
                )
            stream.submit(lambda: self._finish(mark))

    def synchronize(self) -> None:
        current().report_wait(EVENT_WAIT, "waits for an event")
        if self._capture is not None:
            raise RuntimeError("the host cannot wait for an event of a capture")
        if self._mark is not None:
            self._finish(self._mark)

    def query(self) -> bool:
        current().refuse_while_capturing("Event.query", "asks for an event")
        return self._mark is None or self._mark.done

    def elapsed_time(self, end: "Event") -> float:
        raise NotImplementedError("a pretend device has no clock")

    @staticmethod
    def _finish(mark: _Mark) -> None:
        while not mark.done:
            mark.stream.advance(1)


# -- the device --------------------------------------------------------------------

_devices: list["PretendDevice"] = []


def current() -> "PretendDevice":
    """The device that is in use.

    Raises:
        RuntimeError: There is none.
    """
    if not _devices:
        raise RuntimeError("a pretend tensor was used outside of PretendDevice")
    return _devices[-1]


@cache
def _register() -> None:
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(DEVICE)


class Capture(ABC):
    """What takes submissions in place of the device while a graph is captured."""

    @abstractmethod
    def refuse(self, operation: Operation) -> None:
        """Raise for what cannot be captured."""

    @abstractmethod
    def add(
        self, operation: Operation, work: Callable[..., None], data: tuple[Any, ...]
    ) -> None:
        """Keep ``work``, which does the operation once more each time it is called.

        Args:
            operation: Its tensors keep memory alive: not to be kept.
            work: To be called with ``data``; holds no tensor itself.
            data: Trees with the CPU tensors behind the device's.
        """

    @abstractmethod
    def takes(self, stream: "Stream") -> bool:
        """Whether ``stream`` is being captured."""

    @abstractmethod
    def record(self, event: "Event", stream: "Stream") -> None:
        """``event`` was recorded in ``stream``, which is being captured."""

    @abstractmethod
    def wait(self, event: "Event", stream: "Stream") -> None:
        """``stream`` waits for ``event``, which was recorded in this capture."""

    @abstractmethod
    def allocated(self, data: torch.Tensor) -> None:
        """Learn of memory that was allocated while capturing."""


class PretendDevice(TorchDispatchMode):  # type: ignore[misc]
    """The pretend device; in use inside ``with``.

    Args:
        lags: Run nothing before the host waits for it.

    Attributes:
        observers: Called with each `Operation` when it is submitted.
        allocated: How many tensors were made in memory of their own so far, on the
            ``device`` and in ``pinned`` memory of the host.
        stream: The current `Stream`.
        streams: Every `Stream` made while this device was in use.
        capture: Set while a graph is captured.
    """

    def __init__(self, *, lags: bool = False) -> None:
        _register()
        super().__init__()
        self.lags = lags
        self.observers: list[Callable[[Operation], None]] = []
        self.allocated: collections.Counter[str] = collections.Counter()
        self.stream = self.default_stream = Stream()
        self.capture: Capture | None = None
        self.lock = threading.RLock()
        self.streams = [self.stream]
        self._undo = ExitStack()

    def __enter__(self) -> "PretendDevice":
        if self in _devices:
            raise RuntimeError("this pretend device is in use already")
        _devices.append(self)
        self._undo.enter_context(_stand_ins(self))
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        try:
            if exc[0] is None:
                self.finish()
        finally:
            self._undo.close()
            _devices.remove(self)

    # -- what the host may do ----------------------------------------------------------

    def finish(self) -> None:
        """Run all that is pending, without calling it a wait."""
        for stream in self.streams:
            stream.advance()

    def synchronize(self, *_: Any, **__: Any) -> None:
        """``torch.cuda.synchronize``."""
        self.report_wait("synchronize", "waits for the device")
        self.finish()

    def report_wait(self, name: str, why: str) -> None:
        """Tell the observers that the host waits."""
        self._tell(Operation("sync", name, where(), wait=why))

    def _tell(self, operation: Operation) -> None:
        if self.capture is not None and operation.wait:
            self.capture.refuse(operation)
        for observer in self.observers:
            observer(operation)

    def submit(
        self, operation: Operation, work: Callable[..., None], *data: Any
    ) -> None:
        """Hand ``work(*data)`` to the capture, or to the current stream."""
        self._tell(operation)
        capture = self.capturing
        if capture is not None:
            capture.add(operation, work, data)
        else:
            self.stream.submit(lambda: work(*data))

    def refuse_while_capturing(self, name: str, why: str) -> None:
        """For what is no wait, but must not happen during a capture."""
        if self.capture is not None:
            self.capture.refuse(Operation("sync", name, where(), wait=why))

    @property
    def capturing(self) -> Capture | None:
        """The capture, if it takes what is submitted to the current stream."""
        if self.capture is not None and self.capture.takes(self.stream):
            return self.capture
        return None

    @property
    def _deferred(self) -> bool:
        return self.lags or self.capturing is not None

    # -- aten --------------------------------------------------------------------------

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return self.dispatch(function, args, kwargs or {})

    def dispatch(self, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Do one aten or custom operation, on whichever side it belongs."""
        if _is_composite(function):  # as they come in inference mode
            with self._seeing():
                return function.decompose(*args, **kwargs)
        packet = function.overloadpacket
        flat, _ = tree_flatten((args, kwargs))
        device_tensors = [each for each in flat if on_device(each)]
        made_there = _names_device(kwargs.get("device"))
        if packet is aten._to_copy and (device_tensors or made_there):
            return self._convert(function, args[0], kwargs)
        made_here = kwargs.get("device") is not None and not made_there
        if made_here or not (device_tensors or made_there):
            # Of a device tensor, what makes a host tensor reads the shape alone.
            pinned = kwargs.pop("pin_memory", False)
            made = function(*map_data(args), **map_data(kwargs))
            return pin(made) if pinned else made
        if packet is aten.copy_:
            return self._copy(function, *args, **kwargs)
        if packet in ALLOCATIONS:
            return self._allocate(function, args, kwargs)
        if torch.Tag.inplace_view in function.tags:
            return self._reshape(function, *args, **kwargs)
        if _is_view(function):
            # A view is an inference tensor if, and only if, its base is one.
            inference = device_tensors[0].is_inference()
            with _disable_current_modes(), torch.inference_mode(inference):
                views = function(*map_data(args), **map_data(kwargs))
                return tree_map(_wrapped, views)
        return self._launch(function, args, kwargs, flat)

    def _reshape(
        self, function: Any, tensor: PretendTensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Change in place what a tensor looks like, and no data: ``squeeze_``.

        Raises:
            NotImplementedError: It would need other memory.
        """
        if function.overloadpacket in (aten.resize_, aten.set_):
            raise NotImplementedError(f"{function} of a {DEVICE} tensor")
        with _disable_current_modes(), torch.inference_mode(tensor.is_inference()):
            seen = tensor.data_on_device.detach()  # what is pending keeps the old shape
            tensor.data_on_device = function(seen, *args, **kwargs)
        with torch._C._DisableTorchDispatch():  # the shape of the wrapper itself
            function(tensor, *args, **kwargs)
        return tensor

    @contextmanager
    def _seeing(self) -> Iterator[None]:
        """Intercept again what is called from within `dispatch`."""
        super().__enter__()
        try:
            yield
        finally:
            super().__exit__(None, None, None)

    def _convert(self, function: Any, source: Any, kwargs: dict[str, Any]) -> Any:
        """``_to_copy``: to another device, another dtype, or both."""
        kwargs = dict(kwargs)
        target = kwargs.pop("device", None)
        kwargs.pop("pin_memory", None)
        eager = bool(kwargs.pop("non_blocking", False))
        to_device = on_device(source) if target is None else _names_device(target)
        with _disable_current_modes():
            made = torch.empty_like(
                data_of(source),
                dtype=kwargs.get("dtype"),
                memory_format=kwargs.get("memory_format") or torch.preserve_format,
            )
            made.untyped_storage().fill_(POISON)
        # As torch: only a copy that does not block is to pinned memory.
        result = self._born(made) if to_device else pin(made) if eager else made
        kind, wait = _crossing(source, result, eager)
        self._transfer(Operation(kind, "to", where(), wait), function, result, source)
        return result

    def _copy(
        self, function: Any, target: Any, source: Any, non_blocking: bool = False
    ) -> Any:
        kind, wait = _crossing(source, target, non_blocking)
        operation = Operation(kind, "copy_", where(), wait)
        self._transfer(operation, function, target, source)
        return target

    def _transfer(
        self, operation: Operation, function: Any, target: Any, source: Any
    ) -> None:
        operation.function = function
        operation.args, operation.result = (target, source), target
        into, out_of = data_of(target), data_of(source)
        self.submit(operation, _copy_data, into, out_of)
        if operation.wait:
            self.stream.advance()

    def _allocate(self, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        kwargs = {**kwargs, "device": HOST}
        kwargs.pop("pin_memory", None)
        with _disable_current_modes():
            made = function(*map_data(args), **kwargs)
        return self._born(made)

    def _born(self, data: torch.Tensor) -> PretendTensor:
        """A device tensor on fresh memory, which holds rubbish."""
        self.allocated["device"] += 1
        with _disable_current_modes():
            data.untyped_storage().fill_(POISON)
            capture = self.capturing
            if capture is not None:
                capture.allocated(data)
            return PretendTensor(data)

    def _launch(
        self, function: Any, args: Any, kwargs: dict[str, Any], flat: list[Any]
    ) -> Any:
        packet = function.overloadpacket
        wait = _why_it_waits(packet, args, kwargs)
        if packet in INDEXING:
            args = _indices_on_device(*args)
        elif "device" not in kwargs:  # zeros_like and so on
            _refuse_mixed_devices(function, flat)
        kind: Kind = "launch"
        if packet in (aten._local_scalar_dense, aten.item):
            kind = "d2h"
        operation = Operation(
            kind, packet.__name__, where(), wait, function, args, kwargs
        )
        on_host = {name: HOST for name in ("device",) if name in kwargs}
        inner_kwargs = {**map_data(kwargs), **on_host}
        inner_kwargs.pop("pin_memory", None)
        inner_args = map_data(args)

        def call() -> Any:
            with _disable_current_modes():
                return function(*inner_args, **inner_kwargs)

        if wait or not self._deferred:
            if wait:
                self._tell(operation)
                self.stream.advance()
                with self.lock:
                    result = call()
            else:
                box: list[Any] = []
                self.submit(operation, lambda: box.append(call()))
                [result] = box
            result = self._wrap_results(function, args, kwargs, result)
            self.allocated["device"] += sum(map(on_device, _fresh(function, result)))
            operation.result = result
            return result
        result = self._promise(function, args, kwargs)
        operation.result = result
        made = [data_of(each) for each in _fresh(function, result)]

        def run(args: Any, kwargs: Any, made: list[torch.Tensor]) -> None:
            with _later():
                values = _fresh(function, function(*args, **kwargs))
                for into, value in zip(made, values, strict=True):
                    into.copy_(value)

        if self.capture is None:  # a capture sees to host tensors by itself
            inner_args = tree_map(_taken, args)
            inner_kwargs = {**inner_kwargs, **tree_map(_taken, kwargs), **on_host}
            inner_kwargs.pop("pin_memory", None)
        self.submit(operation, run, inner_args, inner_kwargs, made)
        return result

    def _promise(self, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The results of an operation that has not run: their shapes, on fresh memory.

        Raises:
            NotImplementedError: The operation cannot say what it will give.
        """
        returns = function._schema.returns
        if all(each.alias_info for each in returns):
            return self._wrap_results(function, args, kwargs, None)

        def on_meta(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return torch.empty_strided(
                    value.shape, value.stride(), dtype=value.dtype, device="meta"
                )
            return value

        with _disable_current_modes():
            meta_kwargs = tree_map(on_meta, kwargs)
            if "device" in kwargs:
                meta_kwargs["device"] = torch.device("meta")
            meta_kwargs.pop("pin_memory", None)
            try:
                shapes = function(*tree_map(on_meta, args), **meta_kwargs)
            except NotImplementedError as error:
                raise NotImplementedError(
                    f"{function} cannot be run later: it has no meta kernel"
                ) from error

        def make(shape: Any) -> Any:
            if not isinstance(shape, torch.Tensor):
                return shape
            with _disable_current_modes():
                return self._born(
                    torch.empty_strided(shape.shape, shape.stride(), dtype=shape.dtype)
                )

        return self._wrap_results(function, args, kwargs, tree_map(make, shapes))

    def _wrap_results(
        self, function: Any, args: Any, kwargs: dict[str, Any], results: Any
    ) -> Any:
        """Results as the caller sees them: what was written is the argument itself."""
        schema = function._schema
        written = {
            tuple(argument.alias_info.before_set): _argument(schema, at, args, kwargs)
            for at, argument in enumerate(schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        }
        given = results if len(schema.returns) > 1 else (results,)
        if results is None:
            given = (None,) * len(schema.returns)
        wrapped = []
        for declared, value in zip(schema.returns, given, strict=False):
            alias = declared.alias_info
            if alias is not None and tuple(alias.before_set) in written:
                value = written[tuple(alias.before_set)]
            wrapped.append(tree_map(_wrapped, value))
        if not wrapped:
            return None
        return wrapped[0] if len(wrapped) == 1 else tuple(wrapped)

    # -- Triton ------------------------------------------------------------------------

    def launch_triton(
        self, stock: Callable[..., None], executor: Any, args: Any, kwargs: Any
    ) -> None:
        """Submit one launch of an interpreted kernel.

        Raises:
            ValueError: A pointer argument is host memory that is not pinned.
        """
        for name, value in (
            *zip(executor.arg_names, args, strict=False),
            *kwargs.items(),
        ):
            if not _is_tensor(value) or on_device(value) or is_pinned(value):
                continue
            raise ValueError(
                f"Pointer argument {name} of {executor.fn.__name__} cannot be accessed "
                "from Triton (cpu tensor?)"
            )
        grid = executor.grid
        if callable(grid):
            known = {k: v for k, v in kwargs.items() if k in executor.arg_names}
            grid = grid(inspect.getcallargs(executor.fn, *args, **known))
        fixed = type(executor)(
            executor.fn, executor.arg_names, tuple(grid), executor.pre_run_hooks
        )
        operation = Operation(
            **{"kind": "triton", "name": executor.fn.__name__, "where": where()},
            **{"function": executor.fn, "args": tuple(args), "kwargs": dict(kwargs)},
            grid=tuple(grid),
        )
        inner_args, inner_kwargs = map_data(tuple(args)), map_data(dict(kwargs))

        def run(args: Any, kwargs: Any) -> None:
            with _disable_current_modes():
                stock(fixed, *args, **kwargs)

        self.submit(operation, run, inner_args, inner_kwargs)


# -- small questions -----------------------------------------------------------------


def _taken(value: Any) -> Any:
    """The data of a device tensor; of a host tensor a copy: CUDA takes its value."""
    if _is_tensor(value) and not on_device(value):
        with _disable_current_modes():
            return value.clone()
    return data_of(value)


def map_data(value: Any) -> Any:
    """``value`` with the CPU tensors behind its device tensors in their place."""
    return tree_map(data_of, value)


@contextmanager
def _later() -> Iterator[None]:
    """Work on data when the host may have left the mode in which it asked for it."""
    with _disable_current_modes(), torch.inference_mode():
        yield


def _copy_data(into: torch.Tensor, out_of: torch.Tensor) -> None:
    with _later():
        into.copy_(out_of)


def _wrapped(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and not on_device(value):
        return PretendTensor(value)
    return value


def _fresh(function: Any, results: Any) -> list[Any]:
    """The tensors among ``results`` that are not arguments."""
    returns = function._schema.returns
    given = results if len(returns) > 1 else (results,)
    flat: list[Any] = []
    for declared, value in zip(returns, given, strict=False):
        if declared.alias_info is None:
            flat += [each for each in tree_flatten(value)[0] if _is_tensor(each)]
    return flat


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _argument(schema: Any, at: int, args: Any, kwargs: dict[str, Any]) -> Any:
    return args[at] if at < len(args) else kwargs.get(schema.arguments[at].name)


def _names_device(device: Any) -> bool:
    return device is not None and torch.device(device).type == DEVICE


@cache
def _is_composite(function: Any) -> bool:
    """Whether torch writes this operation in terms of others, on every device."""
    composite: bool = torch._C._dispatch_has_kernel_for_dispatch_key(
        function.name(), "CompositeImplicitAutograd"
    )
    return composite


def _is_view(function: Any) -> bool:
    return function.is_view or function.overloadpacket in VIEWS


def _crossing(source: Any, target: Any, eager: bool) -> tuple[Kind, str]:
    """What a copy is, and why the host waits for it."""
    if on_device(source) == on_device(target):
        return "launch", ""
    kind: Kind = "h2d" if on_device(target) else "d2h"
    host, way = (source, "from") if kind == "h2d" else (target, "to")
    # Gaps are closed, and rows repeated, where the source lies: on the host that takes
    # pageable memory. A dtype is converted on the device, by a copy that blocks on
    # the host.
    direct = (
        host.is_contiguous()
        and (eager or source.dtype == target.dtype)
        and (kind == "d2h" or source.shape == target.shape)
    )
    if not (is_pinned(host) and direct):
        return kind, f"copies {way} pageable host memory"
    return kind, "" if eager else f"copies {way} the host and blocks"


def _why_it_waits(packet: Any, args: Any, kwargs: dict[str, Any]) -> str:
    """Why the host waits for an operation; what CUDA builds of torch 2.13 do."""
    if packet in READS:
        return READS[packet]
    if packet is aten.repeat_interleave and kwargs.get("output_size") is None:
        return "has a result whose size depends on data"
    if packet in FILLS and on_device(args[-1]):
        return "reads the value that it fills with"
    if packet is aten.where and any(not on_device(each) for each in args):
        # A Python number is made on the device; a host tensor is copied to it.
        return "copies a number from pageable host memory"
    if packet in INDEXING:
        return _why_indexing_waits(*args)
    return ""


def _why_indexing_waits(
    tensor: Any, indices: Any, value: Any = None, accumulate: bool = False, *_: Any
) -> str:
    given = [each for each in indices if each is not None]
    masks = [each for each in given if each.dtype in (torch.bool, torch.uint8)]
    number = _is_tensor(value) and not on_device(value)
    if any(on_device(mask) for mask in masks):
        # One mask and a host number are turned into masked_fill_.
        if number and value.numel() == 1 and len(given) == 1 and not accumulate:
            return ""
        return "has a boolean mask as its index"
    # A mask on the host is expanded there, in pinned memory that it does not wait for.
    if any(not on_device(each) and each.dtype != torch.bool for each in given):
        return "has an index that lies on the host"
    return "copies a number from pageable host memory" if number else ""


def _indices_on_device(tensor: Any, indices: Any, *rest: Any) -> tuple[Any, ...]:
    """Arguments of an indexing, each mask that lies on the host expanded there.

    Raises:
        RuntimeError: The indexed tensor lies on the host, an index on the device.
    """
    if not on_device(tensor):
        raise RuntimeError(
            "indices should be either on cpu or on the same device as the indexed "
            "tensor (cpu)"
        )
    expanded: list[Any] = []
    for index in indices:
        if _is_tensor(index) and not on_device(index) and index.dtype == torch.bool:
            with _disable_current_modes():
                expanded += map(PretendTensor, index.nonzero().unbind(1))
        else:
            expanded.append(index)
    return tensor, expanded, *rest


def _refuse_mixed_devices(function: Any, flat: Sequence[Any]) -> None:
    """CUDA's rule: host tensors with at least one dimension do not mix."""
    if function.namespace == "aten" and any(
        _is_tensor(each) and not on_device(each) and each.dim() for each in flat
    ):
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two "
            f"devices, {DEVICE}:0 and cpu! ({function})"
        )


def where() -> Where:
    """The line that is to blame for what happens now."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if not _is_machinery(code.co_filename):
            return Where(code.co_filename, frame.f_lineno, code.co_name)
        frame = frame.f_back  # type: ignore[assignment]
    return NOWHERE


@cache
def _is_machinery(file: str) -> bool:
    if file.endswith("/prove/crossings.py"):  # what is looked at, not who looks
        return False
    return (
        "/torch/" in file
        or "/triton/" in file
        or "/vllm_ext/prove/" in file
        or "/unittest/mock" in file
        or file.startswith("<")
        or file.endswith(
            ("/contextlib.py", "/functools.py", "/triton_utils/jit_monitor.py")
        )
    )


class _Generator(torch.Generator):  # type: ignore[misc]
    """A generator of the device, which draws as the CPU's does."""

    def __new__(cls, device: Any = "cpu") -> "_Generator":
        place = HOST if _names_device(device) else device
        made: _Generator = super().__new__(cls, place)
        return made


# -- stand-ins -------------------------------------------------------------------------


@contextmanager
def _stand_ins(device: PretendDevice) -> Iterator[None]:
    """Put the device in the place of torch's CUDA functions."""
    from vllm_ext.prove import graphs  # which is made of what is above

    tensor_of = torch.tensor

    def tensor(data: Any, *args: Any, pin_memory: bool = False, **kwargs: Any) -> Any:
        made = tensor_of(data, *args, **kwargs)
        return pin(made) if pin_memory else made

    @contextmanager
    def use(stream: Stream | None) -> Iterator[None]:
        with stream or nullcontext():
            yield

    def set_stream(stream: Stream) -> None:
        device.stream = stream

    replaced: list[tuple[Any, str, Any]] = [
        (torch, "tensor", tensor),
        (torch, "Generator", _Generator),
        (torch.Tensor, "pin_memory", lambda self, *_, **__: pin(self.clone())),
        (torch.Tensor, "is_pinned", lambda self, *_, **__: is_pinned(self)),
        (torch.Tensor, "record_stream", lambda *_, **__: None),
        (torch, "Event", Event),
        (torch.cuda, "Event", Event),
        (torch.cuda, "Stream", Stream),
        (torch.cuda, "stream", use),
        (torch.cuda, "set_stream", set_stream),
        (torch.cuda, "current_stream", lambda *_, **__: device.stream),
        (torch.cuda, "default_stream", lambda *_, **__: device.default_stream),
        (torch.cuda, "synchronize", device.synchronize),
        (torch.cuda, "CUDAGraph", graphs.Graph),
        (torch.cuda, "graph", graphs.graph),
        (torch.cuda, "graph_pool_handle", graphs.graph_pool_handle),
        (torch.accelerator, "synchronize", device.synchronize),
        (torch.accelerator, "empty_cache", lambda: None),
        (torch.accelerator, "get_memory_info", lambda *_: (0, 0)),
        (torch.accelerator, "current_stream", lambda *_, **__: device.stream),
        (torch.accelerator, "set_stream", set_stream),
        (torch, "Stream", Stream),
        (
            torch.cuda,
            "is_current_stream_capturing",
            lambda: device.capturing is not None,
        ),
    ]
    with ExitStack() as stack:
        for holder, name, value in replaced:
            stack.enter_context(mock.patch.object(holder, name, value))
        # torch.tensor(list, device=...) then builds on the host and copies.
        only_cpu = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, only_cpu)
        if os.environ.get("TRITON_INTERPRET") == "1":  # imported already or not
            stack.enter_context(_triton_launches(device))
        yield


@contextmanager
def _triton_launches(device: PretendDevice) -> Iterator[None]:
    from triton.runtime.interpreter import GridExecutor

    stock = GridExecutor.__call__

    def call(executor: Any, *args: Any, **kwargs: Any) -> None:
        device.launch_triton(stock, executor, args, kwargs)

    with mock.patch.object(GridExecutor, "__call__", call):
        yield
