"""The stages: what each runs on the GPU host, and how long it may take.

All in all they are made for calls of at most ten minutes, thirty together, the time
in which a machine starts included::

    unpack environment smoke baseline      first call, with the bundle
    tests prove kernels                    second
    engine linkedin                        third
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_ext.microbench.gpu_host.environment import find_tool

PYTHON = "{python}"
RESULT = "{result}"
OURS = "vllm_ext.microbench.gpu_host"
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
        fine: Exit statuses of a task that ran to its end.
        kept: Whether files that it adds to ``microbench/results`` are part of it.
    """

    name: str
    command: tuple[str, ...]
    limit_s: float | None = None
    reads: str = "file"
    tool: str = ""
    fine: tuple[int, ...] = (0,)
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
    return python("pytest", "-m", "gpu", *options, *arguments)


def _sanitizer(tool: str) -> Task:
    """NVIDIA's checker over the tests of our kernels, one launch after the other."""
    return Task(
        f"compute-sanitizer {tool}",
        (
            *("{compute-sanitizer}", "--tool", tool, "--error-exitcode", "86"),
            *("--target-processes", "all", "--print-limit", "5"),
            *_pytest("-k", "not random", "tests/kernels"),
        ),
        limit_s=120,
        reads="junit",
        tool="compute-sanitizer",
    )


def _bench(kind: str, *arguments: str) -> Task:
    command = python("vllm_ext", "bench", kind, "--json", RESULT, *arguments)
    return Task(kind, command)


STAGES = {
    stage.name: stage
    for stage in (
        Stage("unpack", "put the bundle together, check and unpack it", 90, stock=True),
        Stage(
            "environment",
            "GPU, versions, tools, which parts of vLLM load",
            90,
            "unpack",
            (Task("environment", python(f"{OURS}.environment", "--json", RESULT)),),
            stock=True,
        ),
        Stage(
            "smoke",
            "stock vLLM boots and decodes; finds the switches that this takes",
            240,
            "environment",
            stock=True,
        ),
        Stage(
            "baseline",
            "time, launches, gaps and kernels of a decode step of stock",
            330,
            "smoke",
            tuple(
                Task(
                    model,
                    python(f"{OURS}.baseline", "--model", model, "--json", RESULT),
                    limit_s=150,
                )
                for model in BASELINE_MODELS
            ),
            stock=True,
        ),
        Stage(
            "tests",
            "pytest -m gpu: parity, waits, graphs; the sanitizer on our kernels",
            300,
            "smoke",
            (
                Task("pytest", _pytest("tests"), limit_s=240, reads="junit"),
                *map(_sanitizer, ("memcheck", "racecheck", "initcheck")),
            ),
        ),
        Stage(
            "prove",
            "vllm-ext prove gpu and prove syncs",
            180,
            "smoke",
            tuple(
                Task(
                    each,
                    python("vllm_ext", "prove", each, "--json"),
                    limit_s=120,
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
            270,
            "smoke",
            (_bench("kernels"),),
        ),
        Stage(
            "engine",
            "vllm-ext bench engine: stock against all patches",
            330,
            "smoke",
            (
                _bench(
                    "engine",
                    *("--arms", "all", "--models", "qwen2.5-0.5b"),
                    *("--sampling", "S0,S2"),
                ),
            ),
        ),
        Stage(
            "linkedin",
            "vllm-ext bench linkedin: the two published gains, on this machine",
            240,
            "smoke",
            (_bench("linkedin"),),
        ),
    )
}


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
