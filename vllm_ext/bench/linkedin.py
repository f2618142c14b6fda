"""``vllm-ext bench linkedin``: LinkedIn's two headlines, on this machine.

LinkedIn reported that two of its changes to vLLM made small models decode faster: full
CUDA graphs, 7 % less time per token (#16072), and penalties that no longer make the
host wait for the device, 8 % (#16436). Here each step of that way is an arm
(`arms.GRAPHS`, `arms.PENALTIES`), measured as ``vllm-ext bench engine`` measures. The
old penalties are restated for this purpose alone (`vllm_ext.bench.legacy`).

A headline is reproduced when the time per token fell in every case that was measured
and no 95 % interval reaches 1. By how much is up to the machine: theirs were numbers
of 2025, of another vLLM on another GPU.
"""

import argparse
import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from vllm_ext.bench.arms import GRAPHS, HEADLINES, PENALTIES, Arm, Headline
from vllm_ext.bench.engine import (
    add_common_arguments,
    cases_of,
    deliver,
    guarded,
    names_of,
    plan_of,
    table,
)
from vllm_ext.bench.results import CONTROL
from vllm_ext.bench.turns import Group, Lane, Say, evidence

ARMS = {name: arm for name, arm in {**GRAPHS, **PENALTIES}.items() if name != CONTROL}
REPRODUCED, NOT_REPRODUCED, NOT_MEASURED = "reproduced", "not reproduced", "not run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``vllm-ext bench linkedin``."""
    parser.add_argument(
        "--arms",
        type=names_of(ARMS, "arm"),
        metavar="A,A",
        help=f"these, and what they are compared with: any of {', '.join(ARMS)} "
        "(default: all, of A4 only all patches together)",
    )
    add_common_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print, write; 1 if an arm is wrong or a case is invalid."""
    return guarded(args, _bench)


def _bench(args: argparse.Namespace, say: Say) -> int:
    lane = Lane.here()
    tokens = (1000, 100) if lane.has_gpu else (16, 8)
    groups = [
        Group(chosen(known, args), cases_of(args, [sampling], tokens, lane.has_gpu))
        for known, sampling in ((GRAPHS, "S0"), (PENALTIES, "S2"))
    ]
    groups = [group for group in groups if group.arms]
    plan = plan_of(args, groups, lane.has_gpu, say)
    result = evidence("linkedin", groups, plan, lane, say=say, command=sys.argv[1:])
    result["vllm_ext"]["headlines"] = [judged(each, result) for each in HEADLINES]
    deliver(result, args, say)
    print(table(result))
    print("\n".join(_lines(result)))
    invalid = any(
        each["verdict"] == "INVALID" for each in result["vllm_ext"]["comparisons"]
    )
    return 1 if invalid or result["vllm_ext"]["refused"] else 0


def chosen(known: Mapping[str, Arm], args: argparse.Namespace) -> list[Arm]:
    """The arms of a group that were asked for, and those they are compared with.

    One of them runs once more as the control: the group's own, or the first that is
    compared with none.
    """
    wanted = [
        name
        for name in known
        if (name in args.arms if args.arms else not name.startswith("A4-"))
    ]
    wanted = [name for name in wanted if name != CONTROL]
    names = {*wanted, *(known[name].against for name in wanted)} - {""}
    if not args.control or not names:
        return [arm for name, arm in known.items() if name in names]
    if known[CONTROL].against in names:
        names.add(CONTROL)
        return [arm for name, arm in known.items() if name in names]
    arms = [arm for name, arm in known.items() if name in names]
    first = next(arm for arm in arms if arm.against not in names)
    again = f"{first.name} once more"
    control = replace(
        first, name=CONTROL, what=again, against=first.name, same_tokens=True
    )
    return [*arms, control]


def judged(headline: Headline, result: Mapping[str, Any]) -> dict[str, Any]:
    """What this machine says to a headline.

    Returns:
        ``what``, ``published_percent``, ``found`` (by case and arm, ``percent`` and
        its interval), ``verdict``, and ``why`` for one that could not be run.
    """
    ours = result["vllm_ext"]
    found = [
        {
            **{"case": each["case"], "arm": each["arm"], "against": each["against"]},
            "percent": 100 * (1 - each["ratio"]),
            "ci95": [100 * (1 - bound) for bound in reversed(each["ci95"])],
            "valid": each["verdict"] != "INVALID",
        }
        for each in ours["comparisons"]
        if each["arm"] in headline.arms and each["metric"] == "TPOT"
    ]
    controlled = {
        each["case"] for each in ours["comparisons"] if each["arm"] == CONTROL
    }
    why = next(
        (each["why"] for each in ours["not_run"] if each["arm"] in headline.arms), ""
    )
    if ours["label"].startswith("CPU"):
        verdict = NOT_MEASURED
        why = "nothing waits for a device on a CPU, and it has no CUDA graphs"
    elif not found:
        verdict, why = NOT_MEASURED, why or "not asked for"
    elif not controlled >= {each["case"] for each in found}:
        verdict, why = NOT_MEASURED, "no second stock engine to show what chance does"
    elif all(each["valid"] and each["ci95"][0] > 0 for each in found):
        verdict = REPRODUCED
    else:
        verdict = NOT_REPRODUCED
    return {
        **{"what": headline.what, "published_percent": headline.percent},
        **{"found": found, "verdict": verdict, "why": why},
    }


def _lines(result: Mapping[str, Any]) -> Iterator[str]:
    label = result["vllm_ext"]["label"]
    yield ""
    yield "Reproduced: less time per token in every case, no 95 % interval reaches 0."
    for each in result["vllm_ext"]["headlines"]:
        why = f" ({each['why']})" if each["why"] else ""
        yield from textwrap.wrap(
            f"{each['what']}: LinkedIn {each['published_percent']} %, this machine "
            f"{each['verdict']}{why}",
            79,
        )
        for one in each["found"]:
            low, high = one["ci95"]
            yield (
                f"    {label}, {one['case']}: {one['arm']} against {one['against']} "
                f"{one['percent']:.1f} % less (95 % {low:.1f} to {high:.1f})"
                f"{'' if one['valid'] else ', INVALID'}"
            )
