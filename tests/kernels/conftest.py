"""Kernels run on a GPU where there is one, else in Triton's interpreter.

Triton decides which of the two when a kernel is decorated, so it is told here, before
any test of this folder imports one; processes that other tests start are not.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

INTERPRETED = not torch.cuda.is_available()
VARIABLE = "TRITON_INTERPRET"

if INTERPRETED:
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = "1"
    try:
        from vllm_ext_cpulane import interpret

        interpret.install()
        from vllm_ext import kernels

        for each in pkgutil.iter_modules(kernels.__path__):
            importlib.import_module(f"{kernels.__name__}.{each.name}")
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        monkeypatch.setenv(VARIABLE, "1")
        import numpy as np

        np.seterr(all="ignore")  # NaN and infinity are what some tests are about


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture
def interpreter() -> None:
    if not INTERPRETED:
        pytest.skip("not run: it looks into the interpreter, and there is a GPU")


@pytest.fixture(scope="session")
def stock() -> SimpleNamespace:
    """The functions of vLLM's sampler, by name."""
    with pytest.MonkeyPatch.context() as patch:
        if INTERPRETED:
            patch.setenv(VARIABLE, "1")
        found = SimpleNamespace()
        for module, names in {
            "gumbel": ("apply_temperature", "gumbel_sample", "murmur3_hash32"),
            "logit_bias": ("apply_logit_bias",),
            "logprob": ("compute_topk_scores",),
            "min_p": ("apply_min_p",),
            "penalties": ("apply_penalties",),
        }.items():
            module = importlib.import_module(f"vllm.v1.worker.gpu.sample.{module}")
            for name in names:
                setattr(found, name, getattr(module, name))
    return found


@pytest.fixture
def fenced(device: torch.device) -> Iterator[Callable[..., torch.Tensor]]:
    """``fenced(n, dtype)``: memory for ``n`` values; nothing beside it may change."""
    guard = 16
    made = []

    def make(size: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        whole = torch.full((size + 2 * guard,), -77, dtype=dtype, device=device)
        made.append(whole)
        return whole[guard : guard + size]

    yield make
    for whole in made:
        beside = torch.cat((whole[:guard], whole[-guard:]))
        assert (beside == -77).all(), "a kernel wrote beside its output"


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody has written yet is NaN, or a large number."""
    stock_empty = torch.empty

    def empty(*args: object, **kwargs: object) -> torch.Tensor:
        made = stock_empty(*args, **kwargs)
        poison = float("nan") if made.dtype.is_floating_point else 0x7FC00123
        return made.fill_(poison)

    monkeypatch.setattr(torch, "empty", empty)


@pytest.fixture
def variants_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Callable[[], set]]:
    """``variants_of(module, *kernels)``: what would be launched is noted, not launched.

    It returns a function that says, of what was noted since it was last asked, what
    Triton tells variants apart by, beside what it is told not to.
    """
    launched: list[tuple[Any, ...]] = []

    class Recording:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: object) -> Callable[..., None]:
            return lambda *args, **options: launched.append((self.name, args, options))

    def variants() -> set[tuple[Any, ...]]:
        found = {
            (
                name,
                *(getattr(argument, "dtype", type(argument)) for argument in args),
                *sorted(options.items()),
            )
            for name, args, options in launched
        }
        launched.clear()
        return found

    def record(module: Any, *kernels: str) -> Callable[[], set]:
        for name in kernels:
            monkeypatch.setattr(module, name, Recording(name))
        return variants

    return record
