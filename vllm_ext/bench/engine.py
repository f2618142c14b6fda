"""``vllm-ext bench engine``: whole engines, stock against patched, side by side.

How it is measured says `vllm_ext.bench.turns`.
"""

import argparse
import math
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_ext import hostbench, jsonfile
from vllm_ext.bench import models, results
from vllm_ext.bench.arms import ALL, ENGINE, SAMPLING, STOCK, runnable
from vllm_ext.bench.results import CONTROL
from vllm_ext.bench.turns import Case, Group, Lane, Plan, Say, evidence
from vllm_ext.children import ChildError
from vllm_ext.hostbench import CannotRunError
from vllm_ext.patching.engine import IN_USE
from vllm_ext.stats import pairs_needed

BLOCKS = 10


# -- the command -------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``vllm-ext bench engine``."""
    parser.add_argument(
        "--arms",
        type=names_of(ENGINE, "arm"),
        metavar="A,A",
        help="besides stock: patches; those that are on by default (defaults); all; "
        "all with a step as one graph (mono) (default: all; on a GPU each)",
    )
    parser.add_argument(
        "--sync-scheduling",
        action="store_true",
        help="every engine without asynchronous scheduling",
    )
    parser.add_argument(
        "--sampling",
        type=names_of(SAMPLING, "sampling set"),
        metavar="S,S",
        help="; ".join(f"{name} {each.what}" for name, each in SAMPLING.items())
        + " (default: S0; on a GPU S0,S3)",
    )
    add_common_arguments(parser)


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that ``vllm-ext bench linkedin`` has too."""
    parser.add_argument(
        "--models",
        type=names_of(models.MODELS, "model"),
        metavar="M,M",
        help=f"any of {', '.join(models.MODELS)}"
        " (default: tiny; on a GPU qwen2.5-1.5b)",
    )
    parser.add_argument(
        "--batch",
        type=hostbench.parse_batches,
        metavar="N,N",
        help="requests at once (default: 1,4; on a GPU 1,8,32,128)",
    )
    parser.add_argument(
        "--rate",
        type=_rates,
        default=(),
        metavar="R,R",
        help="requests per second that arrive at random, instead of at once",
    )
    parser.add_argument(
        "--requests",
        type=_positive,
        default=20,
        metavar="N",
        help="that arrive in a block of --rate (default: %(default)s)",
    )
    parser.add_argument(
        "--prompt", type=_positive, metavar="N", help="tokens of a prompt"
    )
    parser.add_argument(
        "--output", type=_at_least_two, metavar="N", help="tokens of an answer"
    )
    parser.add_argument(
        "--blocks",
        type=_positive,
        metavar="N",
        help="of each case and arm (default: 10, or as many as a verdict needs)",
    )
    parser.add_argument(
        "--boots",
        type=_positive,
        default=2,
        metavar="N",
        help="boots of the engines over which the blocks are spread; as many as "
        "blocks makes every block a fresh process (default: %(default)s)",
    )
    parser.add_argument(
        "--seconds",
        type=_positive,
        metavar="S",
        help="begin nothing that would end later; what is left is listed as not run",
    )
    parser.add_argument(
        "--control",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="a second stock engine, which has to come out like the first",
    )
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result")
    parser.add_argument(
        "--save", action="store_true", help="keep the result in microbench/results"
    )


def run(args: argparse.Namespace) -> int:
    """Measure, print, write; 1 if an arm regressed, is wrong, invalid or missing."""
    return guarded(args, _bench)


def guarded(
    args: argparse.Namespace, bench: Callable[[argparse.Namespace, Say], int]
) -> int:
    """Run a benchmark; what it cannot do is one line, and exit status 1."""
    started = time.monotonic()

    def say(text: str) -> None:
        print(
            f"[{time.monotonic() - started:4.0f} s] {text}", file=sys.stderr, flush=True
        )

    try:
        if args.json:
            jsonfile.check(args.json)
        return bench(args, say)
    except ChildError as error:
        print(f"vllm-ext: {error.line}", file=sys.stderr)
    except (CannotRunError, jsonfile.CannotWriteError) as error:
        print(f"vllm-ext: {error}", file=sys.stderr)
    return 1


def _bench(args: argparse.Namespace, say: Say) -> int:
    lane = Lane.here()
    gpu = lane.has_gpu
    names = args.arms or ([*ENGINE] if gpu else [ALL])
    wanted = dict.fromkeys((STOCK, CONTROL, *names))
    if not args.control:
        del wanted[CONTROL]
    sampling = args.sampling or (["S0", "S3"] if gpu else ["S0"])
    cases = cases_of(args, sampling, (128, 128) if gpu else (16, 8), gpu)
    arms = [ENGINE[name] for name in wanted]
    if args.sync_scheduling:
        arms = [replace(arm, arguments={"async_scheduling": False}) for arm in arms]
    groups = [Group(arms, cases)]
    result = evidence(
        "engine",
        groups,
        plan_of(args, groups, gpu, say),
        lane,
        say=say,
        command=sys.argv[1:],
    )
    deliver(result, args, say)
    print(table(result))
    ours = result["vllm_ext"]
    verdicts = {each["verdict"] for each in ours["comparisons"]}
    wrong = ours["refused"] or ours["not_run"] or verdicts & {"REGRESSED", "INVALID"}
    return 1 if wrong else 0


def deliver(result: Mapping[str, Any], args: argparse.Namespace, say: Say) -> None:
    """Write the result to where it was asked for."""
    if args.json:
        say(f"wrote {results.save(result, args.json)}")
    if args.save:
        say(f"wrote {results.save(result)}")


def cases_of(
    args: argparse.Namespace,
    sampling: Sequence[str],
    tokens: tuple[int, int],
    has_gpu: bool,
) -> list[Case]:
    """The cases that were asked for, or those for this kind of machine.

    Args:
        args: The options of the command.
        sampling: Names of `SAMPLING`.
        tokens: Of a prompt and of an answer, where the options do not say.
        has_gpu: The kind of machine.

    Raises:
        CannotRunError: They do not fit into the model's context.
    """
    batches = args.batch or (
        () if args.rate else (1, 8, 32, 128) if has_gpu else (1, 4)
    )
    loads: list[dict[str, Any]] = [
        *({"batch": batch} for batch in batches),
        *({"rate": rate, "requests": args.requests} for rate in args.rate),
    ]
    cases = [
        Case(model, name, args.prompt or tokens[0], args.output or tokens[1], **load)
        for model in args.models or (["qwen2.5-1.5b"] if has_gpu else ["tiny"])
        for name in sampling
        for load in loads
    ]
    for case in cases:
        longest = models.MODELS[case.model].config["max_position_embeddings"]
        if case.length > longest:
            raise CannotRunError(
                f"{case.model} has a context of {longest} tokens, and --prompt and "
                f"--output ask for {case.length}"
            )
    return cases


def plan_of(
    args: argparse.Namespace, groups: Sequence[Group], has_gpu: bool, say: Say
) -> Plan:
    """How much to measure; says so when that cannot lead to a verdict."""
    compared = sum(
        bool(arm.against) and arm.name != CONTROL
        for group in groups
        for arm in runnable(group.arms, has_gpu)[0]
        for case in group.cases
        for _ in case.metrics
    )
    needed = pairs_needed(max(1, compared))
    blocks: int = args.blocks or max(BLOCKS, needed)
    if blocks < needed:
        say(f"{blocks} blocks decide nothing here, where it takes {needed} or more")
    until = time.monotonic() + (args.seconds or math.inf)
    return Plan(blocks, min(args.boots, blocks), args.seed, until)


def table(result: Mapping[str, Any]) -> str:
    """The result for a terminal."""
    return "\n".join(_lines(result))


def _lines(result: Mapping[str, Any]) -> Iterator[str]:
    ours = result["vllm_ext"]
    label = ours["label"]
    yield f"{label}: every figure below is of that."
    if label.startswith("CPU"):
        yield "It says nothing about the speed of a GPU; host ms are with all kernels."
    yield from textwrap.wrap(hostbench.describe_machine(ours["machine"]), 79)
    yield from hostbench.busy(ours["load"], ours["machine"])
    if ours["watch"]["reason"]:
        yield f"machine gate: {ours['watch']['reason']}"
    compared = {
        (each["case"], each["metric"], each["arm"]): each
        for each in ours["comparisons"]
    }
    group = None
    for each in result["benchmarks"]:
        if each["group"] != group:
            group = each["group"]
            yield ""
            yield _title(each, group in ours["rerun"])
            yield (
                f"{'arm':<22}{'TPOT ms':>8}{'ITL p99':>9}{'TTFT ms':>9}{'tok/s':>8}"
                f"{'host ms':>9}{'busy':>6}{'subm.':>7}"
            )
        yield _figures(each)
        for metric in ("TPOT", "TTFT"):
            against = compared.get((group, metric, each["params"]["arm"]))
            if against:
                yield f"    {ratio_line(against)}"
    yield ""
    for each in ours["refused"]:
        yield f"no figure: {each['case']}: {each['arm']}: {each['why']}"
    for each in ours["not_run"]:
        yield f"not run: {each['arm']} ({each['what']}): {each['why']}"
    yield f"{ours['tokens_compared']} tokens compared with stock's"
    for each in ours["patches"]:
        if each["state"] != IN_USE:
            why = each["reason"] or "the code that it replaces was not called"
            yield f"patch {each['name']} in {each['arm']}: {each['state']}, {why}"
    whys = {each["extra_info"]["not_measured"] for each in result["benchmarks"]}
    for why in sorted(whys - {""}):
        yield f"not measured where a - stands: {why}"


def _title(each: Mapping[str, Any], again: bool) -> str:
    params, rounds = each["params"], each["stats"]["rounds"]
    return (
        f"{each['group']} ({SAMPLING[params['sampling']].what})\n"
        f"{params['prompt']} tokens in, {params['output']} out; {rounds} blocks"
        f"{', the second run' * again}"
    )


def _figures(each: Mapping[str, Any]) -> str:
    info = each["extra_info"]
    submissions, busy = info["submissions_per_step"], info["busy_share"]
    handed = "-" if submissions is None else f"{sum(submissions.values()):g}"
    return (
        f"{each['params']['arm']:<22}{1e3 * info['tpot_median_s']:>8.2f}"
        f"{1e3 * info['itl_p99_s']:>9.2f}{1e3 * info['ttft_median_s']:>9.2f}"
        f"{info['tokens_per_s']:>8.1f}{1e3 * info['host_median_s']:>9.2f}"
        f"{'-' if busy is None else format(busy, '.0%'):>6}{handed:>7}"
    )


def ratio_line(each: Mapping[str, Any]) -> str:
    """A comparison in one line."""
    low, high = each["ci95"]
    why = f" ({each['reason']})" if each["reason"] else ""
    return (
        f"{each['metric']} {each['ratio']:.3f} of {each['against']}, 95 % "
        f"{low:.3f}-{high:.3f}, tolerance {each['tolerance']:.1%}: "
        f"{each['verdict']}{why}"
    )


# -- arguments ---------------------------------------------------------------------


def names_of(known: Mapping[str, Any], what: str) -> Callable[[str], tuple[str, ...]]:
    """For argparse: ``a,b`` as names, each of which is ``known``."""

    def parse(text: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(text.split(",")))
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(
                f"no {what} {', '.join(unknown)}; there are {', '.join(known)}"
            )
        return names

    return parse


def _rates(text: str) -> tuple[float, ...]:
    try:
        rates = tuple(float(part) for part in text.split(","))
    except ValueError:
        rates = (math.nan,)
    if not all(0 < rate < math.inf for rate in rates):
        raise argparse.ArgumentTypeError(f"{text}: a rate is above 0 requests/s")
    return rates


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number


def _at_least_two(text: str) -> int:
    number = int(text)
    if number < 2:
        raise argparse.ArgumentTypeError(
            f"{text}: a time per token takes two tokens or more"
        )
    return number
