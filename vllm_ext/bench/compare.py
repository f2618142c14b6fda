"""``vllm-ext bench compare``: what changed between two result files of one machine.

Two files were made in two runs, so their samples are not paired: what lies between the
runs, a warmer room or another neighbour, is in every ratio here. How much that is shows
in the arm that should not have changed, stock.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_ext import stats
from vllm_ext.bench import results


class NotComparableError(Exception):
    """One line: why two files say nothing of each other."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``vllm-ext bench compare``."""
    parser.add_argument("before", type=Path, metavar="A", help="a result file")
    parser.add_argument("after", type=Path, metavar="B", help="a later one")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Compare and print; 1 if they cannot be compared."""
    try:
        found = compare(results.read(args.before), results.read(args.after))
    except (results.BadResultError, NotComparableError) as error:
        print(f"vllm-ext: {error}", file=sys.stderr)
        return 1
    print(json.dumps(found, indent=1) if args.json else table(found))
    return 0


def same_key(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Make sure that two results may be compared.

    Raises:
        NotComparableError: They are of different machines, versions or kinds.
    """
    first, second = results.key(before), results.key(after)
    differing = [
        f"{name} {first[name]} and {second[name]}"
        for name in first
        if first[name] != second[name]
    ]
    if differing:
        raise NotComparableError(
            f"cannot be compared: {'; '.join(differing)}. "
            "Measure both on one machine with the same versions"
        )


def compare(
    before: Mapping[str, Any], after: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Every case that both results have.

    Returns:
        By ``name``: ``before`` and ``after``, medians in seconds, ``ratio`` with
        ``ci95``, ``verdict``.

    Raises:
        NotComparableError: They are not of one machine, or have no case in common.
    """
    same_key(before, after)
    old, new = (
        {each["name"]: each["stats"] for each in result["benchmarks"]}
        for result in (before, after)
    )
    names = [name for name in new if name in old]
    if not names:
        raise NotComparableError("cannot be compared: they have no case in common")
    cases = [
        stats.unpaired(
            old[name]["data"], new[name]["data"], tolerance=stats.LEAST_TOLERANCE
        )
        for name in names
    ]
    return [
        {
            "name": name,
            "before": old[name]["median"],
            "after": new[name]["median"],
            "ratio": case.ratio.value,
            "ci95": [case.ratio.low, case.ratio.high],
            "verdict": verdict,
        }
        for name, case, verdict in zip(names, cases, stats.verdicts(cases), strict=True)
    ]


def table(found: list[dict[str, Any]]) -> str:
    """For a terminal."""
    width = max(len(each["name"]) for each in found) + 2
    lines = [f"{'':{width}}{'before':>10}{'after':>10}  ratio (95 %)"]
    for each in found:
        low, high = each["ci95"]
        lines.append(
            f"{each['name']:<{width}}{seconds(each['before']):>10}"
            f"{seconds(each['after']):>10}  {each['ratio']:.3f} ({low:.3f}-{high:.3f})"
            f"  {each['verdict']}"
        )
    return "\n".join(lines)


def seconds(value: float) -> str:
    """A time with the unit that suits it."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value * 1e6:.3g} us"
