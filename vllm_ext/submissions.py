"""Count what the host would hand to a GPU in a stretch of code that runs on the CPU.

On the CPU lane every tensor is a CPU tensor, so a count has to know which of them
would be on the device. The rule: memory that NumPy shares is the host's, all other
memory the device's. vLLM's buffers for unified addressing are both, and count as the
device's, since what reads them is a kernel.

Counted, one each:

``triton``  a launch, taken from the driver that discards them
``aten``    an operator on device memory (on a GPU: at least one kernel)
``h2d``     a copy from host to device memory
``d2h``     a copy from device to host memory, or the read of a device value
``graph``   a replay of a CUDA graph

Not counted: views, allocations, and operators whose tensors are all the host's.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KINDS = ("triton", "aten", "h2d", "d2h", "graph")

_aten = torch.ops.aten
_ALLOCATIONS = {
    *(_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.empty_permuted),
    *(_aten.new_empty, _aten.new_empty_strided),
    *(_aten.lift_fresh, _aten.set_, _aten.resize_),
}
# Inference mode shows operators before they are taken apart: the first one is what
# the other two are made of.
_READS = {_aten._local_scalar_dense, _aten.item, _aten.is_nonzero}
_MISSING = object()


class HostMemory:
    """Knows which memory is the host's, by watching NumPy share it.

    Has to watch while an engine is built. Steps are to be watched by `Submissions`,
    which keeps copies to the host apart from what they were copied from.
    """

    def __init__(self) -> None:
        # Storages are kept: a freed address would come back as the device's.
        self._storages: dict[int, torch.UntypedStorage] = {}

    def __contains__(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._storages

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        """Take ``tensor``'s memory for the host's, and return ``tensor``."""
        storage = tensor.untyped_storage()
        if storage.nbytes():
            self._storages[storage.data_ptr()] = storage
        return tensor

    def discard(self, tensor: torch.Tensor) -> None:
        """Take ``tensor``'s memory for the device's."""
        self._storages.pop(tensor.untyped_storage().data_ptr(), None)

    @contextmanager
    def watching(self) -> Iterator[None]:
        from vllm.v1.worker.cpu.buffer_utils import UvaBuffer

        def numpy(stock: Callable[..., Any]) -> Callable[..., Any]:
            def shared(tensor: torch.Tensor, **options: Any) -> Any:
                return stock(self.add(tensor), **options)

            return shared

        def from_numpy(stock: Callable[..., Any]) -> Callable[..., Any]:
            return lambda array: self.add(stock(array))

        def uva(stock: Callable[..., Any]) -> Callable[..., Any]:
            def made(buffer: Any, *arguments: Any, **options: Any) -> None:
                stock(buffer, *arguments, **options)
                self.discard(buffer.cpu)

            return made

        with ExitStack() as stack:
            stack.enter_context(_replaced(torch.Tensor, "numpy", numpy))
            stack.enter_context(_replaced(torch, "from_numpy", from_numpy))
            stack.enter_context(_replaced(UvaBuffer, "__init__", uva))
            yield


class Submissions(TorchDispatchMode):  # type: ignore[misc]
    """Counts, while it is entered, by kind and by name.

    Args:
        host: Which memory is the host's.
        launches: The driver's own count of launches, by kernel.
    """

    def __init__(self, host: HostMemory, launches: Mapping[str, int]) -> None:
        super().__init__()
        self.names: Counter[tuple[str, str]] = Counter()
        self._host = host
        self._launches = launches
        self._seen: Counter[str] = Counter()
        self._paused = 0
        self._stack = ExitStack()

    @property
    def kinds(self) -> dict[str, int]:
        """Submissions so far: one number for each of `KINDS`."""
        counts = dict.fromkeys(KINDS, 0)
        for (kind, _), number in self.names.items():
            counts[kind] += number
        return counts

    def add(self, kind: str, name: str, number: int = 1) -> None:
        """Count what no operator shows: a stubbed kernel, a replayed graph."""
        if not self._paused:
            self.names[kind, name] += number

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing meanwhile."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    def __enter__(self) -> "Submissions":
        self._seen = Counter(self._launches)
        self._stack.enter_context(self._host.watching())
        self._watch_copies()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()
        for name, number in (Counter(self._launches) - self._seen).items():
            self.add("triton", name, number)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._paused or func.overloadpacket in _ALLOCATIONS:
            return result
        read = [leaf for leaf in tree_leaves((args, kwargs)) if _is_tensor(leaf)]
        made = [leaf for leaf in tree_leaves(result) if _is_tensor(leaf)]
        if made and not func._schema.is_mutable and _alias(made, read):
            return result  # a view, a conversion to the type that it has
        hosts = [tensor in self._host for tensor in read]
        if func.overloadpacket is _aten.copy_ and len(hosts) == 2:
            kind = {(False, True): "h2d", (True, False): "d2h"}.get(
                (hosts[0], hosts[1]), "" if hosts[0] else "aten"
            )
        elif func.overloadpacket in _READS:
            kind = "" if hosts[0] else "d2h"
        elif hosts and all(hosts):
            kind = ""
            for tensor in made:
                self._host.add(tensor)
        else:
            kind = "aten"
        if kind:
            self.add(kind, func.overloadpacket.__name__)
        return result

    def _watch_copies(self) -> None:
        """See the copies that are none when both sides are the CPU."""
        from vllm.utils import torch_utils
        from vllm.v1.outputs import LogprobsTensors
        from vllm.v1.worker.gpu.buffer_utils import UvaBufferPool

        def h2d(stock: Callable[..., Any]) -> Callable[..., Any]:
            def copied(*args: Any, **kwargs: Any) -> Any:
                self.add("h2d", "async_tensor_h2d")
                with self.paused():
                    result = stock(*args, **kwargs)
                    # Stock hands back the host's memory itself.
                    return result.clone() if result in self._host else result

            return copied

        def to(stock: Callable[..., Any]) -> Callable[..., Any]:
            def moved(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                target = args[0] if args else kwargs.get("device")
                if target != "cpu" or not isinstance(target, str):
                    return stock(tensor, *args, **kwargs)
                if tensor not in self._host:
                    self.add("d2h", "to")
                with self.paused():
                    result = stock(tensor, *args, **kwargs)
                    # Without a copy it would turn the device's memory into the host's.
                    return self._host.add(
                        result.clone() if result is tensor else result
                    )

            return moved

        def logprobs(stock: Callable[..., Any]) -> Callable[..., Any]:
            def moved(tensors: Any) -> Any:
                result = stock(tensors)
                if result is not tensors:
                    return result
                # The short cut for tensors that are the CPU's already.
                fields = [field for field in tensors if _is_tensor(field)]
                self.add("d2h", "to_cpu_nonblocking", len(fields))
                with self.paused():
                    copies = (
                        self._host.add(field.clone()) if _is_tensor(field) else field
                        for field in tensors
                    )
                    return type(tensors)(*copies)

            return moved

        def staged(stock: Callable[..., Any]) -> Callable[..., Any]:
            def host_work(*args: Any, **kwargs: Any) -> Any:
                with self.paused():
                    return stock(*args, **kwargs)

            return host_work

        enter = self._stack.enter_context
        enter(_replaced(torch.Tensor, "to", to))
        enter(_replaced(LogprobsTensors, "to_cpu_nonblocking", logprobs))
        enter(_replaced(UvaBufferPool, "copy_to_uva", staged))
        stock_h2d = torch_utils.async_tensor_h2d
        for module in list(sys.modules.values()):
            if vars(module).get("async_tensor_h2d") is stock_h2d:
                enter(_replaced(module, "async_tensor_h2d", h2d))


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _alias(made: list[torch.Tensor], read: list[torch.Tensor]) -> bool:
    memory = {tensor.untyped_storage().data_ptr() for tensor in read}
    return all(tensor.untyped_storage().data_ptr() in memory for tensor in made)


@contextmanager
def _replaced(
    holder: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    own = vars(holder).get(name, _MISSING)
    setattr(holder, name, wrap(getattr(holder, name)))
    try:
        yield
    finally:
        if own is _MISSING:
            delattr(holder, name)
        else:
            setattr(holder, name, own)
