"""The stages: what each runs on the GPU host, and how long it may take.

The limits are made for three calls of ten minutes, thirty minutes together with what a
machine takes to start. They are no forecasts: what a stage has not done when its limit
is reached is done in the next call.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_ext.microbench.gpu_host.environment import find_tool

PYTHON = "{python}"
RESULT = "{result}"
OURS = "vllm_ext.microbench.gpu_host"
KERNEL_PARITY = tuple(
    f"tests/kernels/test_{each}.py"
    for each in ("sample", "top_k_top_p", "logprobs", "decode_inputs")
)
# Each kernel with no row, one and many, with rows to leave alone, and with scratch
# memory that was used before: under a sanitizer every launch takes long.
SANITIZED = "test_batches or rows_of_no_request or same_scratch"
KERNEL_CASES = "v151936 and (llm or ctx1024) and (b1- or b32-)"
BASELINE_MODELS = ("qwen2.5-0.5b", "qwen2.5-1.5b", "qwen3-0.6b", "llama-3.2-1b")


@dataclass(frozen=True)
class Task:
    """One command of a stage.

    Attributes:
        name: As in the result.
        command: With `PYTHON` for the interpreter and `RESULT` for the file to write.
        limit_s: The longest it may take; ``None``: what is left of its stage.
        reads: Where its result is: the ``file`` it was given, as JSON; its ``stdout``,
            as JSON; a ``junit`` file, of which counts and failures are kept.
        tool: What has to be there for it to be run at all; empty if nothing.
        fine: Exit statuses of a task that ran to its end, provided that it left a
            result.
        resumes: Whether it goes on from the result of an earlier call, in `RESULT`.
        kept: Whether files that it adds to ``microbench/results`` are part of it.
    """

    name: str
    command: tuple[str, ...]
    limit_s: float | None = None
    reads: str = "file"
    tool: str = ""
    fine: tuple[int, ...] = (0,)
    resumes: bool = False
    kept: bool = False


@dataclass(frozen=True)
class Stage:
    """Some tasks with one result file.

    Attributes:
        name: As on the command line; ``NAME.json`` is its result.
        what: It in a few words.
        limit_s: The longest it may take, in seconds.
        needs: The stage that must have been completed.
        tasks: In their order. None where `run` has code of its own for it.
        stock: Whether it says the same whatever our code is.
    """

    name: str
    what: str
    limit_s: float
    needs: str = ""
    tasks: tuple[Task, ...] = ()
    stock: bool = False


def python(module: str, *arguments: str) -> tuple[str, ...]:
    """A command that runs a module."""
    return (PYTHON, "-m", module, *arguments)


def _pytest(*arguments: str) -> tuple[str, ...]:
    options = ("-p", "no:cacheprovider", "-q", "--junitxml", RESULT)
    return python("pytest", *options, *arguments)


def _sanitizer(tool: str) -> Task:
    """NVIDIA's checker over the parity tests of our kernels."""
    return Task(
        f"compute-sanitizer {tool}",
        (
            *("{compute-sanitizer}", "--tool", tool, "--error-exitcode", "86"),
            *("--target-processes", "all", "--print-limit", "5"),
            *_pytest(*KERNEL_PARITY, "-k", SANITIZED),
        ),
        reads="junit",
        tool="compute-sanitizer",
    )


def _bench(kind: str, *arguments: str) -> Task:
    """A benchmark of ours; that it found something bad is a result like another."""
    command = python("vllm_ext", "bench", kind, "--json", RESULT, *arguments)
    return Task(kind, command, fine=(0, 1))


STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            "unpack",
            "put the bundle together, check and unpack it",
            60,
            stock=True,
        ),
        Stage(
            "environment",
            "GPU, versions, tools, which parts of vLLM load",
            60,
            "unpack",
            (Task("environment", python(f"{OURS}.environment", "--json", RESULT)),),
            stock=True,
        ),
        Stage(
            "smoke",
            "stock vLLM boots and decodes; finds the switches that this takes",
            150,
            "environment",
            stock=True,
        ),
        Stage(
            "baseline",
            "time, launches, gaps and kernels of a decode step of stock",
            300,
            "smoke",
            tuple(
                Task(
                    model,
                    python(f"{OURS}.baseline", "--model", model, "--json", RESULT),
                    limit_s=150,
                    resumes=True,
                )
                for model in BASELINE_MODELS
            ),
            stock=True,
        ),
        Stage(
            "tests",
            "pytest -m gpu; the kernels' tests on the GPU",
            310,
            "smoke",
            (
                Task("gpu", _pytest("-m", "gpu", "tests"), 220, reads="junit"),
                Task("kernels", _pytest("tests/kernels"), 90, reads="junit"),
            ),
        ),
        Stage(
            "prove",
            "vllm-ext prove gpu and prove syncs",
            120,
            "smoke",
            tuple(
                Task(
                    each,
                    python("vllm_ext", "prove", each, "--json"),
                    reads="stdout",
                    fine=(0, 1),  # 1: it found a fault, which is a result
                    kept=True,
                )
                for each in ("gpu", "syncs")
            ),
        ),
        Stage(
            "kernels",
            "vllm-ext bench kernels",
            140,
            "smoke",
            # The warm-ups of all cases alone would take longer than the stage has.
            (_bench("kernels", "-k", KERNEL_CASES, "--seconds", "100"),),
        ),
        Stage(
            "engine",
            "vllm-ext bench engine: stock against patches, those off by default too",
            300,
            "smoke",
            (
                _bench(
                    "engine",
                    *("--arms", "defaults,all,mono", "--models", "qwen2.5-0.5b"),
                    *("--batch", "1,8,32", "--sampling", "S0"),
                    *("--boots", "1", "--seconds", "260"),
                ),
            ),
        ),
        Stage(
            "linkedin",
            "vllm-ext bench linkedin: the two published gains, on this machine",
            190,
            "smoke",
            (
                _bench(
                    "linkedin",
                    *("--arms", "A2,B2", "--batch", "1,8"),
                    *("--boots", "1", "--seconds", "150"),
                ),
            ),
        ),
        Stage(
            "sanitizer",
            "some of the kernels' tests under compute-sanitizer",
            75,
            "smoke",
            tuple(map(_sanitizer, ("memcheck", "racecheck", "initcheck"))),
        ),
    )
}

CALLS = (
    ("unpack", "environment", "smoke", "baseline"),
    ("tests", "prove", "kernels"),
    ("engine", "linkedin", "sanitizer"),
)
"""Which stages go into one call."""


def missing_tool(task: Task) -> bool:
    """Whether the machine lacks what ``task`` runs."""
    return bool(task.tool) and find_tool(task.tool) is None


def command(task: Task, interpreter: str, result: Path) -> list[str]:
    """What to start."""
    words = {PYTHON: interpreter, RESULT: str(result)}
    if task.tool:
        words[f"{{{task.tool}}}"] = find_tool(task.tool) or task.tool
    return [words.get(word, word) for word in task.command]


def chosen(names: Sequence[str]) -> list[Stage]:
    """The stages of these names, in the order in which they have to be run."""
    return [stage for name, stage in STAGES.items() if name in names]
