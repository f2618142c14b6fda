"""What to turn off where stock vLLM does not start, and in which order to try it.

The bundle was made for a torch that vLLM's wheel does not declare, so something may
not work on the GPU that worked everywhere else. Each switch gives up one thing that
speed does not hang on, the dearest last. They are tried one by one, and at last all
together; the first that lets the smoke test pass is used by every later stage, and is
part of each result.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Switches:
    """What is turned off.

    Attributes:
        name: As in results.
        variables: For the environment.
        arguments: For every engine.
    """

    name: str
    variables: Mapping[str, str] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def engine(self) -> str:
        """`arguments` as `enginedefaults` takes them."""
        return json.dumps(self.arguments, sort_keys=True)

    def as_dict(self) -> dict[str, Any]:
        """For a result file."""
        return asdict(self)


NONE = Switches("none")
SINGLE = (
    Switches("no FlashInfer autotune", {}, {"enable_flashinfer_autotune": False}),
    Switches("no FlashInfer sampler", {"VLLM_USE_FLASHINFER_SAMPLER": "0"}),
    Switches("Triton attention", {}, {"attention_config": {"backend": "TRITON_ATTN"}}),
    Switches("no AOT compilation", {"VLLM_USE_AOT_COMPILE": "0"}),
    Switches("no compile cache", {"VLLM_DISABLE_COMPILE_CACHE": "1"}),
    Switches("no JIT warm-up", {}, {"kernel_config": {"enable_jit_warmup": False}}),
    Switches("eager", {}, {"enforce_eager": True}),
)


def together(several: tuple[Switches, ...]) -> Switches:
    """One that turns off what each of ``several`` does."""
    variables: dict[str, str] = {}
    arguments: dict[str, Any] = {}
    for each in several:
        variables |= each.variables
        arguments |= each.arguments
    return Switches("all of them", variables, arguments)


ORDER = (NONE, *SINGLE, together(SINGLE))
THEN = (
    "no switch helps: on the CPU machine pack with --no-trim, which leaves all GPU "
    "code in place, and carry that"
)


def read(value: Mapping[str, Any]) -> Switches:
    """What `Switches.as_dict` wrote."""
    return Switches(value["name"], value["variables"], value["arguments"])
