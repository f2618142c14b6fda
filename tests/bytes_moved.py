"""Bytes that a kernel moves, counted lane by lane in Triton's interpreter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def bytes_moved() -> Iterator[Counter[str]]:
    """Bytes that lanes load, store and change atomically, by kind of access."""
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    moved: Counter[str] = Counter()

    def lanes(mask, pointers):
        mask = getattr(mask, "data", mask)
        return int((mask & (pointers.data == pointers.data)).sum())

    def load(self, pointers, mask, *rest, **named):
        size = interpreter._get_np_dtype(pointers.get_element_ty()).itemsize
        moved["load"] += lanes(mask, pointers) * size
        return stock["create_masked_load"](self, pointers, mask, *rest, **named)

    def store(self, pointers, value, mask, *rest):
        moved["store"] += lanes(mask, pointers) * value.data.itemsize
        return stock["create_masked_store"](self, pointers, value, mask, *rest)

    def atomic(self, op, pointers, value, mask, *how):
        moved["atomic"] += 2 * lanes(mask, pointers) * value.data.itemsize
        return stock["create_atomic_rmw"](self, op, pointers, value, mask, *how)

    hooks = {
        "create_masked_load": load,
        "create_masked_store": store,
        "create_atomic_rmw": atomic,
    }
    stock = {name: getattr(builder, name) for name in hooks}
    with pytest.MonkeyPatch.context() as patch:
        for name, hook in hooks.items():
            patch.setattr(builder, name, hook)
        yield moved
