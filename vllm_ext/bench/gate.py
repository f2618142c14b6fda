"""``vllm-ext bench gate``: has what we gain become less, since a baseline?

For continuous integration on a GPU. What is compared is the gain, not the time: each
case's ratio of an arm to stock, both measured side by side in one run, against the
same ratio of the baseline. A slower machine slows both sides and changes nothing.

Exit status: 1 if a case REGRESSED; 2 if nothing can be said: a run that is INVALID, a
file that cannot be read, a baseline of another machine, a case of the baseline that the
run has not, since what gives wrong answers has no figures either. UNDECIDED
is printed and passes: the run was too short or too noisy to tell.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_ext import jsonfile, stats
from vllm_ext.bench import results
from vllm_ext.bench.compare import NotComparableError, same_key

REGRESSED, INVALID = 1, 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``vllm-ext bench gate``."""
    parser.add_argument("result", type=Path, metavar="RESULT", help="of this run")
    parser.add_argument(
        "--baseline", type=Path, required=True, metavar="FILE", help="what to hold"
    )
    parser.add_argument(
        "--accept",
        metavar="REASON",
        help="make the result the new baseline, and keep the reason in it",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Judge and print; see the module for the exit status."""
    try:
        result = results.read(args.result)
        if args.accept:
            return _accept(result, args.baseline, args.accept)
        found = judge(results.read(args.baseline), result)
    except (
        results.BadResultError,
        NotComparableError,
        jsonfile.CannotWriteError,
    ) as error:
        print(f"vllm-ext: INVALID: {error}", file=sys.stderr)
        return INVALID
    print(json.dumps(found, indent=1) if args.json else table(found))
    verdicts = {each["verdict"] for each in found}
    if "REGRESSED" in verdicts:
        return REGRESSED
    return INVALID if "INVALID" in verdicts else 0


def judge(
    baseline: Mapping[str, Any], result: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Every comparison of the baseline, controls left out.

    Returns:
        ``case``, ``metric``, ``arm``, ``against``; ``before`` and ``after``, the
        ratios; ``change``, their ratio, with ``ci95``; ``verdict`` and ``reason``. What
        the result has not is INVALID, and ``after``, ``change`` and ``ci95`` are None.

    Raises:
        NotComparableError: They are not of one machine, or have nothing in common.
    """
    same_key(baseline, result)
    old, new = _comparisons(baseline), _comparisons(result)
    common = [each for each in new if each in old]
    if not common:
        raise NotComparableError("cannot be compared: they have no case in common")
    cases = [
        stats.unpaired(
            _ratios(old[each]),
            _ratios(new[each]),
            tolerance=max(old[each]["tolerance"], new[each]["tolerance"]),
        )
        for each in common
    ]
    nothing = {"after": None, "change": None, "ci95": None}
    found: list[dict[str, Any]] = [
        {
            **dict(zip(("case", "metric", "arm", "against"), each, strict=True)),
            "before": old[each]["ratio"],
            **nothing,
            "verdict": "INVALID",
            "reason": "the result has no such case",
        }
        for each in old
        if each not in new
    ]
    for each, case, verdict in zip(common, cases, stats.verdicts(cases), strict=True):
        unfit = [
            f"{which}: {side[each]['reason']}"
            for which, side in (("baseline", old), ("result", new))
            if side[each]["verdict"] == "INVALID"
        ]
        name, metric, arm, against = each
        found.append(
            {
                "case": name,
                "metric": metric,
                "arm": arm,
                "against": against,
                "before": old[each]["ratio"],
                "after": new[each]["ratio"],
                "change": case.ratio.value,
                "ci95": [case.ratio.low, case.ratio.high],
                "verdict": "INVALID" if unfit else verdict,
                "reason": "; ".join(unfit),
            }
        )
    return found


def table(found: list[dict[str, Any]]) -> str:
    """For a terminal: what did not stay the same first."""
    order = ("REGRESSED", "INVALID", "UNDECIDED", "IMPROVED", "SAME")
    lines = []
    for each in sorted(found, key=lambda each: order.index(each["verdict"])):
        reason = f": {each['reason']}" if each["reason"] else ""
        line = (
            f"{each['verdict']:<10} {each['case']}, {each['metric']}, {each['arm']}: "
            f"ratio {each['before']:.3f}"
        )
        if each["ci95"]:
            low, high = each["ci95"]
            line += (
                f" -> {each['after']:.3f}, "
                f"change {each['change']:.3f} ({low:.3f}-{high:.3f})"
            )
        lines.append(line + reason)
    counts = [
        f"{sum(each['verdict'] == verdict for each in found)} {verdict}"
        for verdict in order
        if any(each["verdict"] == verdict for each in found)
    ]
    return "\n".join([*lines, ", ".join(counts)])


def _accept(result: dict[str, Any], baseline: Path, reason: str) -> int:
    ours = result["vllm_ext"]
    watch = ours["watch"]
    whys = [
        each["reason"] for each in ours["comparisons"] if each["verdict"] == "INVALID"
    ]
    if watch and not watch["valid"]:
        whys.append(watch["reason"])
    if not _comparisons(result):
        whys.append("it compares nothing")
    if whys:
        print(
            f"vllm-ext: INVALID: an invalid run is no baseline ({whys[0]})",
            file=sys.stderr,
        )
        return INVALID
    ours["accepted"] = reason
    jsonfile.write(baseline, result)
    print(f"{baseline} is the baseline now: {reason}")
    return 0


def _comparisons(
    result: Mapping[str, Any],
) -> dict[tuple[str, str, str, str], dict[str, Any]]:
    return {
        (each["case"], each["metric"], each["arm"], each["against"]): each
        for each in result["vllm_ext"]["comparisons"]
        if each["arm"] != results.CONTROL
    }


def _ratios(each: Mapping[str, Any]) -> list[float]:
    pairs = each["pairs"]
    return [
        after / before
        for before, after in zip(pairs["before"], pairs["after"], strict=True)
    ]
