"""torch.compile, as far as the machine makes sense of it."""

import functools
from collections.abc import Callable
from typing import Any

import torch

Function = Callable[..., Any]


@functools.cache
def compiled(function: Function, device: str) -> Function:
    """``function`` compiled for all shapes at once.

    Without a GPU it is traced and run as it is: Inductor would compile C++ for minutes,
    and nothing is timed.
    """
    if device == "cuda":
        program: Function = torch.compile(function, dynamic=True)
        return program
    traced = torch.compile(function, dynamic=True, backend="aot_eager")

    def call(*args: Any) -> Any:
        # The CPU lane turns it off, since vLLM compiles small functions on the CPU.
        with torch._dynamo.config.patch(disable=False):
            return traced(*args)

    return call
