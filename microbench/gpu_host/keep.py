"""``python -m vllm_ext.microbench.gpu_host.keep DIR``: file what came back.

On the CPU machine: takes the ``STAGE.json`` files of `run` and puts what they hold to
the other results, ``microbench/results/<gpu>/``, under the names that
`vllm_ext.bench.results` gives: the benchmarks' own result files as they are, the other
stages as one file each. Of a stage that was stopped at its limit, what it had written
by then is kept, with the status ``stopped`` in its file or in the ``vllm_ext`` of the
benchmark's; that it was stopped is said. Stages that failed are left out, but for
tests.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vllm_ext import jsonfile
from vllm_ext.bench import results
from vllm_ext.microbench.gpu_host.run import COMPLETE, FAILED, STOPPED
from vllm_ext.microbench.gpu_host.stages import STAGES

Json = dict[str, Any]
# Kept as the stage wrote them.
WHOLE = ("environment", "smoke", "baseline", "tests", "sanitizer")
TESTS = ("tests", "sanitizer")  # one that failed is a result


class CannotKeepError(Exception):
    """One line: which file, and what is wrong with it."""


def main(argv: Sequence[str] | None = None) -> int:
    """File the stages of a folder; 1 if one cannot be read or is not complete."""
    parser = argparse.ArgumentParser(
        prog="python -m vllm_ext.microbench.gpu_host.keep",
        description="File the results of a GPU host.",
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--results", type=Path, default=results.RESULTS)
    args = parser.parse_args(argv)
    try:
        kept, left_out = keep(args.folder, args.results)
    except (CannotKeepError, jsonfile.CannotWriteError) as error:
        sys.stderr.write(f"keep: {error}\n")
        return 1
    for path in kept:
        sys.stdout.write(f"{path}\n")
    for line in left_out:
        sys.stderr.write(f"keep: {line}\n")
    return 1 if left_out else 0


def keep(folder: Path, into: Path) -> tuple[list[Path], list[str]]:
    """What was filed, and a line for each stage that was not, or not all of it.

    Raises:
        CannotKeepError: There are no results in ``folder``, or one is damaged.
    """
    found = {name: _read(folder / f"{name}.json") for name in STAGES}
    stages = {name: stage for name, stage in found.items() if stage}
    if not stages:
        raise CannotKeepError(f"{folder} holds no result of a stage")
    kept: list[Path] = []
    left_out = []
    for name, stage in stages.items():
        status = stage["status"]
        fine = (COMPLETE, STOPPED, *((FAILED,) if name in TESTS else ()))
        files = [*_files(name, stage)] if status in fine else []
        for path, value in files:
            target = into / path.relative_to(results.RESULTS)
            target.parent.mkdir(parents=True, exist_ok=True)
            jsonfile.write(target, value)
            kept.append(target)
        if status == STOPPED or not files and status not in fine:
            how = "kept as far as it came" if files else "left out"
            left_out.append(f"{how}: {name} is {status}: {stage.get('reason', '')}")
    return kept, left_out


def _read(path: Path) -> Json:
    if not path.exists():
        return {}
    try:
        stage = json.loads(path.read_text())
    except ValueError as error:
        raise CannotKeepError(f"{path} is no result of a stage: {error}") from None
    if not isinstance(stage, dict) or not {"status", "machine"} <= stage.keys():
        raise CannotKeepError(f"{path} is no result of a stage: it has no status")
    return stage


def _files(name: str, stage: Json) -> Iterator[tuple[Path, Json]]:
    tasks = stage.get("tasks", {})
    if name in WHOLE and (
        stage["status"] != STOPPED or any("result" in each for each in tasks.values())
    ):
        yield results.kept_as(name, stage["machine"]), stage
    for task in tasks.values():
        result = task.get("result")
        if isinstance(result, dict) and "vllm_ext" in result:
            ours = result["vllm_ext"]
            if task.get("status") == STOPPED:
                result = {**result, "vllm_ext": {**ours, "status": STOPPED}}
            yield results.kept_as(ours["kind"], ours["machine"]), result
        for file, value in (task.get("files") or {}).items():
            yield results.RESULTS / file, value


if __name__ == "__main__":
    sys.exit(main())
