"""torch.compile, as far as the machine makes sense of it."""

import functools
from collections.abc import Callable
from typing import Any

import torch

Function = Callable[..., Any]

VARIANTS = 1000  # of one piece of code; Dynamo's own limits are 8 and, in all, 256


@functools.cache
def compiled(function: Function, device: str) -> Function:
    """``function`` compiled for all shapes at once, or an error.

    Functions that a factory made share their code, and Dynamo counts what it compiles
    by code. Past its limit it would run them uncompiled and only log it.

    Without a GPU it is traced and run as it is: Inductor would compile C++ for minutes,
    and nothing is timed.
    """
    torch._dynamo.config.recompile_limit = VARIANTS
    torch._dynamo.config.accumulated_recompile_limit = VARIANTS
    if device == "cuda":
        program: Function = torch.compile(function, dynamic=True, fullgraph=True)
        return program
    traced = torch.compile(function, dynamic=True, fullgraph=True, backend="aot_eager")

    def call(*args: Any) -> Any:
        # The CPU lane turns it off, since vLLM compiles small functions on the CPU.
        with torch._dynamo.config.patch(disable=False):
            return traced(*args)

    return call
