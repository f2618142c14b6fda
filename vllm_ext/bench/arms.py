"""What is compared: the settings of every engine, and the sampling that it does.

All of it is data. An arm is one engine: what vLLM is given to build it, what is in its
environment, which patches are on. Nothing else differs between two arms.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_ext.bench.results import CONTROL
from vllm_ext.patches import SERIES

STOCK = "stock"
DEFAULTS = "defaults"
ALL = "all"
MONO = "mono"
CUDA = "a CUDA GPU"


@dataclass(frozen=True)
class Arm:
    """One engine.

    Attributes:
        name: What commands and results call it.
        what: It in a few words.
        arguments: For ``vllm.LLM``, over what every arm gets.
        environment: Of its process; ``None`` takes a variable away.
        patches: For ``VEXT_PATCHES``; ``None`` is stock, the plugin off.
        against: The arm that it is compared with.
        same_tokens: Whether greedy and seeded requests have to get the tokens that
            they get from ``against``. Otherwise the share of them is only reported.
        legacy: Which of `vllm_ext.bench.legacy` stands in place of stock's penalties.
        needs: What a machine must have to run it; empty if any can.
    """

    name: str
    what: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str | None] = field(default_factory=dict)
    patches: str | None = None
    against: str = STOCK
    same_tokens: bool = True
    legacy: str = ""
    needs: str = ""

    @property
    def variables(self) -> dict[str, str | None]:
        """What its process's environment has for it."""
        if self.patches is None:
            return {"VEXT": "0", "VEXT_PATCHES": None, **self.environment}
        return {"VEXT": "1", "VEXT_PATCHES": self.patches, **self.environment}


# -- vllm-ext bench engine ---------------------------------------------------------

_ALL = ",".join(patch.name for patch in SERIES)
ENGINE = {
    arm.name: arm
    for arm in (
        Arm(STOCK, "vLLM as it is", against=""),
        Arm(CONTROL, "vLLM as it is, once more"),
        *(Arm(patch.name, patch.summary, patches=patch.name) for patch in SERIES),
        Arm(
            DEFAULTS,
            "the patches that are on by default",
            patches=",".join(patch.name for patch in SERIES if patch.default),
        ),
        Arm(ALL, "all patches", patches=_ALL),
        Arm(
            MONO,
            "all patches, a step as one graph",
            environment={"VEXT_STEP_GRAPH": "mono"},
            patches=_ALL,
        ),
    )
}


# -- vllm-ext bench linkedin -------------------------------------------------------

_V1 = {"VLLM_USE_V2_MODEL_RUNNER": "0"}
_WAITING = {"async_scheduling": False}


@dataclass(frozen=True)
class Headline:
    """What LinkedIn published, and which arms show it.

    Attributes:
        what: It in a few words, with vLLM's pull request.
        percent: By how much the time per token fell.
        arms: That are to be faster than the arms they are compared with.
    """

    what: str
    percent: int
    arms: tuple[str, ...]


HEADLINES = (
    Headline("full instead of piecewise CUDA graphs (#16072)", 7, ("A2",)),
    Headline("no waiting in the penalties (#16436)", 8, ("B2", "B2w")),
)

GRAPHS = {
    arm.name: arm
    for arm in (
        Arm(
            "A0",
            "no CUDA graphs (--enforce-eager)",
            {"enforce_eager": True},
            against="A3",
            same_tokens=False,
            needs=CUDA,
        ),
        Arm(
            "A1",
            "before: piecewise CUDA graphs, Model Runner V1",
            {"compilation_config": {"cudagraph_mode": "PIECEWISE"}},
            _V1,
            against="A0",
            same_tokens=False,
            needs=CUDA,
        ),
        Arm(
            "A2",
            "after: full CUDA graphs, Model Runner V1",
            {"compilation_config": {"cudagraph_mode": "FULL"}},
            _V1,
            against="A1",
            same_tokens=False,
            needs=CUDA,
        ),
        Arm("A3", "stock today: Model Runner V2 with its defaults", against=""),
        Arm(CONTROL, "A3 once more", against="A3"),
        Arm(
            "A3i",
            "stock tuned: --performance-mode interactivity",
            {"performance_mode": "interactivity"},
            against="A3",
            same_tokens=False,
            needs=CUDA,
        ),
        *(
            Arm(
                f"A4-{patch.name}",
                f"A3 with {patch.name}",
                patches=patch.name,
                against="A3",
            )
            for patch in SERIES
        ),
        Arm(
            "A4",
            "A3 with all patches",
            patches=_ALL,
            against="A3",
        ),
    )
}


def _penalties(
    suffix: str, addition: str, arguments: Mapping[str, Any], needs: str
) -> tuple[Arm, ...]:
    """B1 to B4 with or without asynchronous scheduling."""
    return (
        Arm(
            f"B1{suffix}",
            f"before: boolean-index penalties (reproduction only), V1{addition}",
            arguments,
            _V1,
            against="",
            legacy="boolean",
            needs=needs,
        ),
        Arm(
            f"B2{suffix}",
            f"after: torch.where penalties, V1{addition}",
            arguments,
            _V1,
            against=f"B1{suffix}",
            same_tokens=False,  # a reciprocal's rounding
            legacy="where",
            needs=needs,
        ),
        Arm(
            f"B3{suffix}",
            f"stock V1: the CUDA kernel of penalties{addition}",
            arguments,
            _V1,
            against=f"B2{suffix}",
            same_tokens=False,
            needs=CUDA,
        ),
        Arm(
            f"B4{suffix}",
            f"stock V2: the Triton kernel of penalties{addition}",
            arguments,
            against=f"B2{suffix}",
            same_tokens=False,  # V2 draws other random numbers than V1
            needs=CUDA,
        ),
    )


PENALTIES = {
    arm.name: arm
    for arm in (
        *_penalties("", "", {}, CUDA),
        *_penalties("w", ", without asynchronous scheduling", _WAITING, ""),
        Arm(CONTROL, "B2w once more", _WAITING, _V1, against="B2w", legacy="where"),
        Arm(
            "B5",
            "ours: the fused sampler, V2",
            patches="fused_sampler",
            against="B4",
            needs=CUDA,
        ),
    )
}


# -- sampling ----------------------------------------------------------------------

_QWEN = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1}


@dataclass(frozen=True)
class Sampling:
    """How the requests of a batch are sampled.

    Attributes:
        what: It in a few words.
        rows: Parameters of the requests; the first one's, the second one's and so on,
            again from the start when there are more requests.
        seeded: Give each request a seed of its own.
    """

    what: str
    rows: tuple[Mapping[str, Any], ...]
    seeded: bool = False

    def of(self, index: int) -> dict[str, Any]:
        """For ``vllm.SamplingParams``, of the request number ``index``."""
        row = dict(self.rows[index % len(self.rows)])
        return row | {"seed": 1000 + index} if self.seeded else row


SAMPLING = {
    "S0": Sampling("greedy", ({"temperature": 0.0},)),
    "S1": Sampling("temperature 1", ({"temperature": 1.0},)),
    "S2": Sampling("what Qwen2.5-Instruct asks for: filters and penalties", (_QWEN,)),
    "S3": Sampling("S2 with a seed per request", (_QWEN,), seeded=True),
    "S4": Sampling("greedy and S2 in turn", ({"temperature": 0.0}, _QWEN)),
    "S5": Sampling("greedy with 5 logprobs", ({"temperature": 0.0, "logprobs": 5},)),
}


def repeats(parameters: Mapping[str, Any]) -> bool:
    """Whether a request with these parameters gets the same tokens every time."""
    return parameters["temperature"] == 0 or "seed" in parameters


def runnable(
    chosen: Sequence[Arm], has_gpu: bool
) -> tuple[list[Arm], list[dict[str, str]]]:
    """Which of ``chosen`` this machine can run, and for the others why not.

    An arm whose partner cannot run is run all the same: its own figures stand.
    """
    missing: list[dict[str, str]] = []
    arms = []
    for arm in chosen:
        if arm.needs and not has_gpu:
            why = f"needs {arm.needs}"
            missing.append({"arm": arm.name, "what": arm.what, "why": why})
        else:
            arms.append(arm)
    return arms, missing
