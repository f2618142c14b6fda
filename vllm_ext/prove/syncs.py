"""What makes the host wait for the device, with file and line.

A decode step is fast while the host stays ahead of the device. One ``.item()`` ends
that: the host waits until all that was submitted has run, and the device then waits
for the host. `watch` names every such wait, and counts what was submitted:

    with PretendDevice() as device, watch(device) as found:
        ids = logits.argmax(-1).tolist()
    found.waits[0]  # d2h to copies to the host and blocks at f.py:7 in f | ids = ...
    found.counts    # {"launch": 1, "triton": 0, "graph": 0, "h2d": 0, "d2h": 1}
    found.allocated  # {"device": 1}: the result of argmax

Waiting for an event is told apart, in ``found.events``: the host waits for one point
of the device's work, and one such wait per step is what a decode step needs.

Without a pretend device, ``watch()`` asks CUDA the same questions: it turns the
warnings of ``torch.cuda.set_sync_debug_mode`` into waits with file and line, and adds
what that mode does not see, explicit synchronization and ``non_blocking`` copies that
pass through pageable memory. It counts nothing there. For a whole engine on a GPU,
vLLM's own ``VLLM_GPU_SYNC_CHECK=error`` raises at the same operations.

`vllm_ext.prove.audit` asks this of every sampling feature of vLLM, and
`vllm_ext.prove.cuda` whether a GPU, where there is one, gives the same answers.

Limits: on the pretend device an operation waits if it is listed there
(`vllm_ext.prove.pretend.READS` and what follows): what an operator library does inside
a custom operation is not seen, nor what torch reads back to check it, as in
``torch.linalg.inv``, ``histc`` without a range and ``isin`` of many. Compiled code is
not looked into on either.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_ext.prove.audit import verdicts, write
from vllm_ext.prove.pretend import EVENT_WAIT, Operation, PretendDevice, Where, where

__all__ = ["Found", "Wait", "verdicts", "watch", "write"]

KINDS = ("launch", "triton", "graph", "h2d", "d2h")
CUDA_WARNING = "called a synchronizing CUDA operation"

aten = torch.ops.aten


@dataclass(frozen=True)
class Wait:
    """One time that the host waited for the device.

    Attributes:
        kind: As of an `Operation`; ``sync`` where CUDA does not say.
        op: Operation; ``?`` where CUDA does not say.
        why: In words.
        where: The line that is to blame.
    """

    kind: str
    op: str
    why: str
    where: Where

    def __str__(self) -> str:
        return f"{self.kind} {self.op} {self.why} at {self.where} | {self.where.text}"


@dataclass
class Found:
    """What was seen while watching.

    Attributes:
        waits: In order, those for an event left out.
        events: Waits for an event.
        submitted: How often each ``(kind, name)`` was handed to the device.
        allocated: Tensors that were made, on the ``device`` and in ``pinned`` memory.
    """

    waits: list[Wait] = field(default_factory=list)
    events: list[Wait] = field(default_factory=list)
    submitted: Counter[tuple[str, str]] = field(default_factory=Counter)
    allocated: Counter[str] = field(default_factory=Counter)

    @property
    def counts(self) -> dict[str, int]:
        """Submissions by kind, of all `KINDS`."""
        return {
            kind: sum(n for (its, _), n in self.submitted.items() if its == kind)
            for kind in KINDS
        }

    def note(self, operation: Operation) -> None:
        """Take in one operation of a pretend device."""
        if operation.kind != "sync":
            self.submitted[operation.kind, operation.name] += 1
        if operation.wait:
            kept = self.events if operation.name == EVENT_WAIT else self.waits
            kept.append(
                Wait(operation.kind, operation.name, operation.wait, operation.where)
            )


@contextmanager
def watch(device: PretendDevice | None = None) -> Iterator[Found]:
    """Note what the code inside submits and waits for.

    Args:
        device: The pretend device in use; ``None`` for CUDA.

    Raises:
        RuntimeError: There is neither a pretend device nor a CUDA GPU.
    """
    found = Found()
    if device is None:
        with _watch_cuda(found):
            yield found
        return
    device.observers.append(found.note)
    before = Counter(device.allocated)
    try:
        yield found
    finally:
        device.observers.remove(found.note)
        found.allocated = device.allocated - before


# -- CUDA --------------------------------------------------------------------------


@contextmanager
def _watch_cuda(found: Found) -> Iterator[None]:
    if not torch.cuda.is_available():
        raise RuntimeError(
            "there is no CUDA GPU to watch; pass a PretendDevice that is in use"
        )

    def warned(message: Any, *args: Any, **kwargs: Any) -> None:
        if CUDA_WARNING in str(message):
            found.waits.append(Wait("sync", "?", "waits for the device", where()))
        else:
            show(message, *args, **kwargs)

    def explicit(holder: Any, name: str, op: str, why: str, kept: list[Wait]) -> None:
        stock: Callable[..., Any] = getattr(holder, name)

        def synchronize(*args: Any, **kwargs: Any) -> Any:
            kept.append(Wait("sync", op, why, where()))
            torch.cuda.set_sync_debug_mode("default")  # or it would be told twice
            try:
                return stock(*args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode("warn")

        undo.enter_context(mock.patch.object(holder, name, synchronize))

    before = torch.cuda.get_sync_debug_mode()
    with ExitStack() as undo:
        undo.callback(torch.cuda.set_sync_debug_mode, before)
        undo.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("always", message=f".*{CUDA_WARNING}")
        show = warnings.showwarning
        undo.enter_context(mock.patch.object(warnings, "showwarning", warned))
        device, stream, event = "waits for the device", "waits for a stream", EVENT_WAIT
        explicit(torch.cuda, "synchronize", "synchronize", device, found.waits)
        op = "Stream.synchronize"
        explicit(torch.cuda.Stream, "synchronize", op, stream, found.waits)
        why = "waits for an event"
        explicit(torch.cuda.Event, "synchronize", event, why, found.events)
        undo.enter_context(_EagerCopies(found))
        torch.cuda.set_sync_debug_mode("warn")
        yield


class _EagerCopies(TorchDispatchMode):  # type: ignore[misc]
    """Notes ``non_blocking`` copies that block all the same, which nothing warns of."""

    def __init__(self, found: Found) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket in (aten.copy_, aten._to_copy):
            eager = (kwargs or {}).get("non_blocking") or args[2:] == (True,)
            source = args[1] if function.overloadpacket is aten.copy_ else args[0]
            host = result if source.is_cuda else source
            if eager and source.device != result.device and not host.is_pinned():
                self.found.waits.append(
                    Wait(
                        "d2h" if source.is_cuda else "h2d",
                        function.overloadpacket.__name__,
                        f"copies {'to' if source.is_cuda else 'from'} "
                        "pageable host memory",
                        where(),
                    )
                )
        return result
