"""The competitor torch.compile: compiled, however many cases there are."""

from collections.abc import Callable

import torch

from vllm_ext.microbench.compiling import compiled

Function = Callable[[torch.Tensor], torch.Tensor]


def adding(word: str) -> Function:
    def add(values: torch.Tensor) -> torch.Tensor:
        # What runs uncompiled says so.
        return values + (len(word) if torch.compiler.is_compiling() else -1)

    return add


def test_functions_of_one_factory_are_all_compiled():
    """More of them than Dynamo compiles of one piece of code before it gives up."""
    found = [
        int(compiled(adding("x" * number), "cpu")(torch.zeros(1)))
        for number in range(12)
    ]
    assert found == list(range(12))
