"""From logits to a token, launch by launch and byte by byte: the child of `traffic`.

A real engine of Model Runner V2 decodes on the pretend device. In one decode step of
each sampling mode everything is recorded that its sampler submits. Logits are put in
the place of the tiny model's: a few tokens hold most of the probability, as in what a
large model says.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import numpy as np
import torch

from vllm_ext.children import serve
from vllm_ext.prove import engine
from vllm_ext.prove.graphs import FILLING, PICKING, SCATTERING
from vllm_ext.prove.pretend import Operation, PretendDevice
from vllm_ext.testing import all_applied

VOCABULARY = 151_936  # Qwen2.5 and Qwen3
PROMPT = 24  # tokens, all of them different
STEPS = 2  # of a request: its prompt, and one that decodes, which is recorded

aten = torch.ops.aten
COPYING = ("to", "copy_")  # as a pretend device names them: source and target are given
PENALTIES = {
    **{"repetition_penalty": 1.1, "frequency_penalty": 0.4},
    "presence_penalty": 0.3,
}
QWEN = {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.1}
ALONE: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.7},
    "min-p": {"temperature": 1.0, "min_p": 0.1},
    "top-k": {"temperature": 0.7, "top_k": 20},
    "top-p": {"temperature": 0.7, "top_p": 0.9},
    "top-k, top-p": {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    "three penalties": {"temperature": 0.0, **PENALTIES},
    "Qwen2.5's default": QWEN,
    "greedy, logprobs 0": {"temperature": 0.0, "logprobs": 0},
    "greedy, logprobs 5": {"temperature": 0.0, "logprobs": 5},
    "greedy, logprobs 20": {"temperature": 0.0, "logprobs": 20},
}
MIXED = ("greedy", "temperature", "min-p", "Qwen2.5's default")
MODES = {
    **{mode: [wanted] for mode, wanted in ALONE.items()},
    f"rows of {len(MIXED)} modes": [ALONE[mode] for mode in MIXED],
}


def main() -> None:
    """Serve one question: record each mode."""
    serve({"record": record})


def record(patches: list[str], modes: list[str]) -> dict[str, Any]:
    """What a sampler submits in a decode step, stock and with patches.

    Args:
        patches: Names, applied together.
        modes: Of `MODES`.

    Returns:
        ``stock`` and ``patched``: by mode ``rows``; ``launches``, names in order;
        ``bytes`` that they read and write. ``calls`` of the patches, and ``aside``,
        how many steps they left to stock code for which reason.
    """
    from vllm_ext_cpulane.tinymodel import write_model

    with ExitStack() as stack:
        device = stack.enter_context(PretendDevice())
        folder = stack.enter_context(TemporaryDirectory(prefix="vllm-ext-"))
        model = write_model(folder, VOCABULARY, layers=1, tokenizer=True, weights=True)
        llm = stack.enter_context(engine.booted(device, model=str(model)))
        found: dict[str, Any] = {"stock": _all_recorded(llm, device, modes)}
        with all_applied(patches) as outcomes:
            found["patched"] = _all_recorded(llm, device, modes)
        found["calls"] = {
            each.patch.name: sum(each.calls.values()) for each in outcomes
        }
        aside: Counter[str] = Counter()
        for each in outcomes:
            aside.update(each.aside)
        return found | {"aside": dict(aside)}


def _all_recorded(
    llm: Any, device: PretendDevice, modes: list[str]
) -> dict[str, dict[str, Any]]:
    """The recorded step of each mode; none is the first of its batch size."""
    found = {}
    for rows in sorted({len(MODES[mode]) for mode in modes}):
        _decode(llm, f"{rows} rows first", [ALONE["greedy"]] * rows)
    for mode in modes:
        steps: list[dict[str, Any]] = []
        with _samplers_recorded(device, steps):
            _decode(llm, mode, MODES[mode])
        found[mode] = [step for step in steps if step["rows"] == len(MODES[mode])][-1]
    return found


def _decode(llm: Any, name: str, asked: list[dict[str, Any]]) -> None:
    from vllm import SamplingParams

    core = llm.llm_engine
    for row, wanted in enumerate(asked):
        params = SamplingParams(
            max_tokens=STEPS, ignore_eos=True, detokenize=False, **wanted
        )
        prompt = [300 + 40 * row + index for index in range(PROMPT)]
        core.add_request(f"{name} {row}", {"prompt_token_ids": prompt}, params)
    while core.has_unfinished_requests():
        core.step()


@contextmanager
def _samplers_recorded(
    device: PretendDevice, steps: list[dict[str, Any]]
) -> Iterator[None]:
    """Note each call of the sampler: its rows, launches and bytes."""
    from vllm.v1.worker.gpu.sample.sampler import Sampler

    call = Sampler.__call__

    def __call__(self: Any, logits: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        logits.copy_(likely(*logits.shape).to(logits.device))
        names: list[str] = []
        moved = 0

        def note(operation: Operation) -> None:
            nonlocal moved
            if operation.kind == "sync":
                return
            names.append(operation.name)
            if operation.kind != "triton":
                moved += bytes_of(operation)

        device.observers.append(note)
        try:
            with bytes_moved() as in_kernels:
                result = call(self, logits, *args, **kwargs)
                device.finish()
        finally:
            device.observers.remove(note)
        steps.append(
            {
                **{"rows": len(logits), "launches": names},
                "bytes": moved + in_kernels.total(),
            }
        )
        return result

    with mock.patch.object(Sampler, "__call__", __call__):
        yield


def likely(rows: int, vocab_size: int) -> torch.Tensor:
    """``[rows, vocab_size]`` bfloat16 in which a few tokens stand out."""
    generator = torch.Generator().manual_seed(3)
    ranks = torch.randperm(vocab_size, generator=generator)
    noise = torch.randn(rows, vocab_size, generator=generator) * 0.3
    return (noise - 1.7 * ranks.float().log1p()).bfloat16()


def bytes_of(operation: Operation) -> int:
    """What an operation of torch or a copy has to move: each tensor once.

    Of what it picks from, or writes in places, as much as it picks or writes. More
    may be moved; never less.
    """
    arguments = [*operation.args, *operation.kwargs.values()]
    given = [each for each in _tensors(arguments)]
    made = _tensors([operation.result])
    packet = getattr(operation.function, "overloadpacket", None)
    if packet in PICKING:
        # The first is picked from, the others say where.
        return 2 * sum(map(_size, made)) + sum(map(_size, given[1:]))
    if packet in SCATTERING and packet is not aten.masked_fill_:
        return 2 * sum(map(_size, given[1:]))
    if packet in FILLING or operation.name in COPYING:
        return sum(map(_size, given))
    # What is returned and was given, as `out` or as itself, is written.
    return sum(map(_size, given)) + sum(map(_size, made))


def _tensors(values: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for each in values:
        if isinstance(each, torch.Tensor):
            found.append(each)
        elif isinstance(each, list | tuple):
            found += _tensors(each)
    return found


def _size(tensor: torch.Tensor) -> int:
    """Bytes; what is repeated by a stride of 0 counts once."""
    number: int = tensor.element_size()
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        number *= length if stride else min(length, 1)
    return number


@contextmanager
def bytes_moved() -> Iterator[Counter[str]]:
    """Bytes that interpreted kernels load, store and change atomically.

    Lanes of one access that have the same address move it once.
    """
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    moved: Counter[str] = Counter()

    def places(mask: Any, pointers: Any) -> int:
        mask, addresses = np.broadcast_arrays(
            getattr(mask, "data", mask), pointers.data
        )
        return len(np.unique(addresses[mask.astype(bool)]))

    def load(self: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        size = interpreter._get_np_dtype(pointers.get_element_ty()).itemsize
        moved["load"] += places(mask, pointers) * size
        return stock["create_masked_load"](self, pointers, mask, *rest, **named)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        moved["store"] += places(mask, pointers) * value.data.itemsize
        return stock["create_masked_store"](self, pointers, value, mask, *rest)

    def atomic(
        self: Any, op: Any, pointers: Any, value: Any, mask: Any, *how: Any
    ) -> Any:
        moved["atomic"] += 2 * places(mask, pointers) * value.data.itemsize
        return stock["create_atomic_rmw"](self, op, pointers, value, mask, *how)

    hooks: dict[str, Callable[..., Any]] = {
        "create_masked_load": load,
        "create_masked_store": store,
        "create_atomic_rmw": atomic,
    }
    stock = {name: getattr(builder, name) for name in hooks}
    with ExitStack() as stack:
        for name, hook in hooks.items():
            stack.enter_context(mock.patch.object(builder, name, hook))
        yield moved


if __name__ == "__main__":
    main()
