"""Result files: what was measured, on what, of which code, and what may be said of it.

A file is the JSON of pytest-benchmark, so that the tools which read that read this:
``benchmarks`` holds one entry for each case and arm, in seconds. A block of our own,
``vllm_ext``, holds what those tools have no word for: the machine and its versions,
the patches and the digests of their code, what the machine gate saw, and the
comparisons with their intervals and verdicts.

`key` says which two files may be compared at all: the same GPU (or CPU), driver, torch,
Triton and vLLM. There is no comparison across machines.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

from vllm_ext import jsonfile, kernels, machine
from vllm_ext.patches import FINGERPRINTS, SERIES
from vllm_ext.stats import (
    Case,
    Verdict,
    holm,
    median,
    paired,
    paired_ratio,
    quartiles,
    verdicts,
)

RESULTS = machine.CHECKOUT / "microbench" / "results"
PATCHES = FINGERPRINTS.parent
KERNELS = Path(kernels.__file__).parent
SCHEMA = 1
CONTROL = "control"  # the arm that is stock once more
MEASURED = ("kernels", "engine", "linkedin")


class BadResultError(Exception):
    """One line: which file, what is wrong with it, and what to do."""


def entry(
    name: str,
    group: str,
    params: Mapping[str, Any],
    seconds: Sequence[float],
    **extra: Any,
) -> dict[str, Any]:
    """One measured case of one arm, as pytest-benchmark writes it.

    Args:
        name: Unique in its file: github-action-benchmark follows it over time.
        group: What it is shown with.
        params: What it was run at.
        seconds: One timing for each block or round, in order, in seconds.
        extra: Other figures; the key ends with the unit.

    Raises:
        ValueError: No timings, or one that is not finite.
    """
    low, high = quartiles(seconds)
    mean = statistics.fmean(seconds)
    return {
        "group": group,
        "name": name,
        "fullname": f"{group}::{name}",
        "params": dict(params),
        "param": None,
        "extra_info": dict(extra),
        "options": {},
        "stats": {
            "min": min(seconds),
            "max": max(seconds),
            "mean": mean,
            "stddev": statistics.stdev(seconds) if len(seconds) > 1 else 0.0,
            "rounds": len(seconds),
            "iterations": 1,
            "median": median(seconds),
            "q1": low,
            "q3": high,
            "iqr": high - low,
            "ops": 1 / mean if mean > 0 else 0.0,
            "total": math.fsum(seconds),
            "data": list(seconds),
        },
    }


def comparison(
    *,
    case: str,
    metric: str,
    unit: str,
    arm: str,
    against: str,
    arm_samples: Sequence[float],
    against_samples: Sequence[float],
    tolerance: float,
    higher_is_better: bool = False,
) -> dict[str, Any]:
    """One arm against another in one case; `document` adds the verdict.

    Args:
        case: What was run: model, batch, sampling.
        metric: ``TPOT``, say.
        unit: Of the samples.
        arm: What was changed; `CONTROL` for stock once more.
        against: What it is compared with.
        arm_samples: One for each block, in order.
        against_samples: Those of the neighbouring blocks.
        tolerance: What is no difference, as a share.
        higher_is_better: For tokens/s. ``ratio`` is a cost all the same: above 1 is
            worse.

    Raises:
        ValueError: The samples cannot be paired.
    """
    before, after = against_samples, arm_samples
    if higher_is_better:
        before, after = after, before
    ratio = paired_ratio(before, after)
    return {
        "case": case,
        "metric": metric,
        "unit": unit,
        "arm": arm,
        "against": against,
        "value": median(arm_samples),
        "against_value": median(against_samples),
        "ratio": ratio.value,
        "ci95": [ratio.low, ratio.high],
        "tolerance": tolerance,
        "n": len(after),
        "pairs": {"before": list(before), "after": list(after)},
    }


def document(
    kind: str,
    entries: Sequence[Mapping[str, Any]],
    comparisons: Sequence[Mapping[str, Any]],
    *,
    patches: Sequence[Mapping[str, Any]],
    watch: Mapping[str, Any] | None,
    command: Sequence[str],
    label: str,
) -> dict[str, Any]:
    """A whole result, with the verdicts.

    The verdicts are given for all comparisons together (`stats.verdicts`). A case
    whose control shows a difference is ``INVALID``, as is everything when the machine
    was not fit to measure on.

    Args:
        kind: One of `MEASURED`.
        entries: Of `entry`.
        comparisons: Of `comparison`.
        patches: State of each patch: at least ``name``, ``state``, ``reason``.
        watch: What the machine gate saw, with ``valid`` and ``reason``.
        command: What was typed.
        label: What kind of figures they are: "CPU engine", "GPU kernels".
    """
    judged = judge(comparisons, watch)
    here = machine.describe()
    return {
        **_frame(here),
        "benchmarks": [dict(each) for each in entries],
        "vllm_ext": block(
            kind,
            judged,
            here=here,
            patches=patches,
            watch=watch,
            command=command,
            label=label,
        ),
    }


def block(
    kind: str,
    judged: Sequence[Mapping[str, Any]],
    *,
    here: Mapping[str, Any],
    patches: Sequence[Mapping[str, Any]],
    watch: Mapping[str, Any] | None,
    command: Sequence[str],
    label: str,
) -> dict[str, Any]:
    """Our own part of a result file, for a file that pytest-benchmark writes."""
    return {
        "schema": SCHEMA,
        "kind": kind,
        "label": label,
        "command": list(command),
        "machine": dict(here),
        "patches": [dict(each) for each in patches],
        "digests": {patch.name: digest(patch.name) for patch in SERIES},
        "kernels": {
            path.stem: _digest([path]) for path in sorted(KERNELS.glob("[!_]*.py"))
        },
        "watch": dict(watch) if watch else None,
        "comparisons": [dict(each) for each in judged],
    }


def judge(
    comparisons: Sequence[Mapping[str, Any]], watch: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """``comparisons`` with a ``verdict`` each, and a ``reason`` where there is one."""
    unfit = "" if watch is None or watch["valid"] else watch["reason"]
    controls = [each for each in comparisons if each["arm"] == CONTROL]
    others = [each for each in comparisons if each["arm"] != CONTROL]
    shifted = holm([_case(each, tolerance=0.0).chance for each in controls])
    biased = {
        (each["case"], each["metric"])
        for each, is_shifted in zip(controls, shifted, strict=True)
        if is_shifted
    }
    said = {
        id(each): verdict
        for group in (controls, others)
        for each, verdict in zip(
            group, verdicts([_case(each) for each in group]), strict=True
        )
    }
    judged = []
    for each in comparisons:
        verdict: Verdict = said[id(each)]
        reason = ""
        if unfit:
            verdict, reason = "INVALID", unfit
        elif (each["case"], each["metric"]) in biased:
            verdict, reason = "INVALID", "stock against stock shows a difference"
        judged.append({**each, "verdict": verdict, "reason": reason})
    return judged


def save(result: Mapping[str, Any], path: Path | None = None) -> Path:
    """Write a result where it was asked for, or among the kept ones; its path.

    Raises:
        CannotWriteError: The folder or the disk does not let it.
    """
    if path is None:
        ours = result["vllm_ext"]
        path = kept_as(ours["kind"], ours["machine"])
        path.parent.mkdir(parents=True, exist_ok=True)
    jsonfile.write(path, result)
    return path


def kept_as(kind: str, here: Mapping[str, Any]) -> Path:
    """Where a result of this kind, machine and minute (UTC) is kept."""
    when = time.strftime("%Y-%m-%dT%H%M", time.gmtime())
    commit = (here["commit"] or "unknown")[:7]
    gpu = here["gpu"]
    folder = "cpu" if gpu == machine.NO_GPU else re.sub(r"\W+", "-", gpu.lower())
    name = f"{when}_{commit}_vllm-{here['vllm']}_{kind}.json"
    return RESULTS / folder.strip("-") / name


def read(path: Path) -> dict[str, Any]:
    """A result file.

    Raises:
        BadResultError: It is not there, not JSON, or not such a file.
    """
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise BadResultError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise BadResultError(
            f"{path} is not JSON ({error}): it is damaged; run the benchmark again"
        ) from None
    ours = found.get("vllm_ext") if isinstance(found, dict) else None
    if not isinstance(ours, dict) or "schema" not in ours:
        raise BadResultError(
            f"{path} is no result of vllm-ext bench {'|'.join(MEASURED)}"
        )
    if ours["schema"] != SCHEMA:
        raise BadResultError(
            f"{path} has schema {ours['schema']}, this vllm-ext reads {SCHEMA}: "
            "run the benchmark again"
        )
    wrong = _misshapen(found)
    if wrong:
        raise BadResultError(f"{path} is damaged: {wrong}; run the benchmark again")
    return cast(dict[str, Any], found)


def key(result: Mapping[str, Any]) -> dict[str, str | None]:
    """What has to be the same for two results to be compared."""
    here = result["vllm_ext"]["machine"]
    has_gpu = here["gpu"] != machine.NO_GPU
    return {
        "kind": result["vllm_ext"]["kind"],
        "machine": here["gpu"] if has_gpu else f"{here['cpu']}, {here['cores']} cores",
        "driver": (here["driver"] or "").partition(".")[0] if has_gpu else None,
        "torch": here["torch"],
        "triton": here["triton"],
        "vllm": here["vllm"],
    }


def digest(patch: str) -> str:
    """Of the code of a patch: 16 digits. What is said of it upstream is none of it."""
    code = (PATCHES / patch).glob("*.py")
    return _digest(sorted(file for file in code if file.name != "upstream.py"))


def _digest(files: Sequence[Path]) -> str:
    code = hashlib.sha256()
    for file in files:
        code.update(file.name.encode() + file.read_bytes())
    return code.hexdigest()[:16]


def shown(path: Path) -> str:
    """A result's path as the pages of the project write it."""
    known = RESULTS in path.parents
    return str(path.relative_to(RESULTS.parent.parent) if known else path)


def _case(each: Mapping[str, Any], tolerance: float | None = None) -> Case:
    pairs = each["pairs"]
    edge = each["tolerance"] if tolerance is None else tolerance
    return paired(pairs["before"], pairs["after"], edge)


def _frame(here: Mapping[str, Any]) -> dict[str, Any]:
    """What pytest-benchmark writes around its entries."""
    now = datetime.now(UTC).isoformat()
    try:
        writer = version("pytest-benchmark")
    except PackageNotFoundError:
        writer = None
    return {
        "machine_info": {
            "node": here["gpu"],
            "machine": here["cpu"],
            "python_version": here["python"],
            "system": here["os"],
            "cpu": {"brand_raw": here["cpu"], "count": here["cores"]},
        },
        "commit_info": {
            "id": here["commit"] or "unknown",
            "dirty": bool(here["dirty"]),
            "time": now,
        },
        "datetime": now,
        "version": writer,
    }


_TEXTS = ("case", "metric", "unit", "arm", "against", "verdict", "reason")
_ABOVE_ZERO = ("value", "against_value", "ratio")
_MACHINE = (
    *("gpu", "cpu", "cores", "driver", "python", "torch", "triton", "vllm"),
    *("commit", "dirty"),
)


def _misshapen(found: Mapping[str, Any]) -> str:
    """What is wrong with the shape of a file, or nothing."""
    entries = found.get("benchmarks")
    if not isinstance(entries, list):
        return "it has no list of benchmarks"
    for number, each in enumerate(entries, 1):
        wrong = _entry_lacks(each) if isinstance(each, dict) else "anything"
        if wrong:
            return f"benchmark {number} has no {wrong}"
    ours = found["vllm_ext"]
    here, watch = ours.get("machine"), ours.get("watch")
    if not isinstance(here, dict):
        return "it has no machine"
    missing = [name for name in _MACHINE if name not in here]
    if missing:
        return f"its machine lacks {', '.join(missing)}"
    if not isinstance(ours.get("kind"), str) or not isinstance(ours.get("label"), str):
        return "it has no kind or no label"
    if not _list_of(ours.get("command"), lambda each: isinstance(each, str)):
        return "it has no command"
    if watch is not None and not (isinstance(watch, dict) and "valid" in watch):
        return "what the machine gate saw is missing"
    if not isinstance(ours.get("comparisons"), list):
        return "it has no list of comparisons"
    for number, each in enumerate(ours["comparisons"], 1):
        wrong = _lacks(each) if isinstance(each, dict) else "anything"
        if wrong:
            return f"comparison {number} has no {wrong}"
    return ""


def _entry_lacks(each: Mapping[str, Any]) -> str:
    """The first field that a benchmark has not, or has of the wrong kind."""
    for name in ("name", "group"):
        if not isinstance(each.get(name), str):
            return name
    info, stats = each.get("extra_info"), each.get("stats")
    if not isinstance(info, dict):
        return "extra_info"
    if not isinstance(stats, dict) or not _above_zero(stats.get("median")):
        return "median"
    return "" if _samples(stats.get("data")) else "samples"


def _lacks(each: Mapping[str, Any]) -> str:
    """The first field that a comparison has not, or has of the wrong kind."""
    for name in _TEXTS:
        if not isinstance(each.get(name), str):
            return name
    for name in _ABOVE_ZERO:
        if not _above_zero(each.get(name)):
            return name
    if each.get("tolerance") != 0 and not _above_zero(each.get("tolerance")):
        return "tolerance"
    if not _samples(each.get("ci95")) or len(each["ci95"]) != 2:
        return "ci95"
    pairs = each.get("pairs")
    sides = [
        pairs.get(side) if isinstance(pairs, dict) else None
        for side in ("before", "after")
    ]
    if not all(_samples(side) for side in sides) or len({*map(len, sides)}) != 1:  # type: ignore[arg-type]
        return "pairs"
    return ""


def _samples(found: Any) -> bool:
    """Whether these can be timings, or ratios of some: above zero, and there."""
    return bool(found) and _list_of(found, _above_zero)


def _list_of(found: Any, right: Callable[[Any], bool]) -> bool:
    return isinstance(found, list) and all(right(each) for each in found)


def _above_zero(found: Any) -> bool:
    return type(found) in (int, float) and 0 < found < math.inf
