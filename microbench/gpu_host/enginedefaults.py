"""Arguments that every engine of a process gets: how a fall-back switch reaches all.

`host` puts this file on the import path of the stages as ``sitecustomize``, which
Python runs at the start of each process. Tests, proofs and benchmarks then need not
know of the switches that one GPU host turned out to need.
"""

import json
import os
from types import ModuleType
from typing import Any

VARIABLE = "GPU_HOST_ENGINE_ARGUMENTS"


def add_to(arg_utils: ModuleType) -> None:
    """Let every ``EngineArgs`` have the arguments that `VARIABLE` holds, as JSON."""
    arguments = json.loads(os.environ[VARIABLE])
    stock = arg_utils.EngineArgs.__post_init__

    def __post_init__(self: Any) -> None:
        for name, value in arguments.items():
            setattr(self, name, value)
        stock(self)

    arg_utils.EngineArgs.__post_init__ = __post_init__


if __name__ == "sitecustomize" and os.environ.get(VARIABLE, "{}") != "{}":
    from vllm_ext.patching.on_import import on_import

    on_import("vllm.engine.arg_utils", add_to)
