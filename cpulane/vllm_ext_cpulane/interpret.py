"""vLLM's Triton kernels on the CPU, through the interpreter that Triton ships.

Written for Triton 3.7.1, which torch 2.13 and with it vLLM's CPU build pin. Each
change below is there because kernels of vLLM 0.32 and 0.33 do not run without it, or
because a decode step of a tiny model has to stay below 50 ms.
"""

import ast
import functools
import os
import sys
from collections.abc import Iterator
from math import prod
from types import SimpleNamespace
from typing import Any

RANGE = "_scalar_range"  # the name that rewritten kernels call


class _Driver:
    """Answers "is there a device?" with yes. Nothing is launched through it."""

    @staticmethod
    def is_active() -> bool:
        return True


@functools.cache
def install() -> None:
    """Make vLLM find a Triton, and make its interpreter run vLLM's kernels.

    Raises:
        RuntimeError: Triton was imported as a compiler already.
    """
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            "Triton was imported without TRITON_INTERPRET=1; start the process with "
            "vllm_ext_cpulane.environment.lane_environment"
        )
    os.environ["TRITON_INTERPRET"] = "1"
    _register_backend()
    _patch_language_once()
    _describe_shapes_once()
    _skip_overflow_checks()
    _yield_scalars_from_loops()


def _register_backend() -> None:
    """vLLM's CPU build turns Triton off unless it has a backend called "cpu"."""
    from triton.backends import Backend, backends

    backends["cpu"] = Backend(compiler=None, driver=_Driver)


def _patch_language_once() -> None:
    """Patch ``triton.language`` now and keep it, instead of around every call.

    Stock walks through its members at each launch and each call of one jitted
    function by another: a third of the time of a decode step.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    everywhere = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    interpreter._patch_lang(everywhere)
    nothing_to_restore = SimpleNamespace(restore=lambda: None)
    interpreter._patch_lang = lambda fn: nothing_to_restore


def _skip_overflow_checks() -> None:
    """Leave out the eight operations that check an integer operation for overflow.

    Compiled code leaves them out too, and the interpreter computes them to report
    nothing. It also fills a table of dtypes at each look-up; once is enough.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(
        sanitize_overflow=False
    )
    stock = interpreter._get_np_dtype
    of_scalar = functools.cache(stock)

    def get_np_dtype(dtype: tl.dtype) -> Any:
        return of_scalar(dtype) if type(dtype) is tl.dtype else stock(dtype)

    interpreter._get_np_dtype = get_np_dtype


def _describe_shapes_once() -> None:
    """Keep what a value says of its shape: few shapes, thousands of values a step."""
    import triton.language as tl

    @functools.cache
    def describe(shape: tuple[int, ...]) -> tuple[tl.tuple, tl.constexpr]:
        return tl.tuple([tl.constexpr(s) for s in shape]), tl.constexpr(prod(shape))

    def init(self: tl.tensor, handle: Any, type: tl.dtype) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = describe(type.shape if type.is_block() else ())

    tl.tensor.__init__ = init


def _yield_scalars_from_loops() -> None:
    """Make the variable of a loop a scalar tensor, as it is in compiled code.

    Stock yields Python ints, which have no ``.to()`` (the top-k and top-p kernel asks
    for it), divide towards minus infinity and never wrap around.
    ``tl.static_range`` is unrolled when compiled and keeps its ints.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    semantic = interpreter.interpreter_semantic

    def scalar_range(
        arg1: Any, arg2: Any = None, step: Any = 1, **hints: Any
    ) -> Iterator[tl.tensor]:
        bounds = (0, arg1, step) if arg2 is None else (arg1, arg2, step)
        start, stop, step = (semantic.to_tensor(bound) for bound in bounds)
        dtype = semantic.integer_promote_impl(start.dtype, stop.dtype)
        dtype = semantic.integer_promote_impl(dtype, step.dtype)
        np_dtype = interpreter._get_np_dtype(dtype)
        for value in range(int(start), int(stop), int(step)):
            data = np.array([value], dtype=np_dtype)
            yield tl.tensor(interpreter.TensorHandle(data, dtype), dtype)

    def visit_For(self: ast.NodeTransformer, node: ast.For) -> ast.For:
        self.generic_visit(node)
        if isinstance(node.iter, ast.Call):
            called = node.iter.func
            if ast.unparse(called).split(".")[-1] == "range":
                name = ast.Name(id=RANGE, ctx=ast.Load())
                node.iter.func = ast.copy_location(name, called)
        return node

    # Rewritten kernels see this module's globals.
    setattr(interpreter, RANGE, scalar_range)
    interpreter.ASTTransformer.visit_For = visit_For
