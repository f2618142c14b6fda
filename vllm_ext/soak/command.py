"""``vllm-ext soak scheduler`` and ``vllm-ext soak engine``.

The first puts two schedulers, stock and patched, through the same random traffic and
compares them after every call; a difference is made small before it is shown. The
second lets requests come and go in two engines on the CPU for minutes: the same
answers, tokens per second side by side, and nothing left behind.
"""

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from vllm_ext import jsonfile, machine
from vllm_ext.children import Child, ChildError
from vllm_ext.hostbench import (
    CannotRunError,
    describe_machine,
    environment,
    parse_patches,
)
from vllm_ext.stats import median, paired_ratio, quartiles

PATCH = "scheduler_fast_path"
STEPS = 20_000
TRAFFIC_STEPS = 150  # of one traffic
AT_ONCE = 20  # traffics between two lines of progress
MINUTES = 10.0
SEATS = 128
REQUESTS = 4  # in a block, times the seats
GROWTH = 0.02  # of memory, over the second half of a soak

Say = Callable[[str], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The two soaks, with the options of each."""
    kinds = parser.add_subparsers(required=True, metavar="WHAT")
    text = "two schedulers on the same random traffic, compared after every call"
    added = kinds.add_parser("scheduler", help=text, description=text)
    added.add_argument(
        "--steps", type=_positive, default=STEPS, help="in all (default: %(default)s)"
    )
    added.add_argument("--seed", type=int, default=0, help="of the first traffic")
    _common(added, soak_scheduler)
    text = "requests come and go in two engines: answers, tokens/s, memory"
    added = kinds.add_parser("engine", help=text, description=text)
    added.add_argument(
        "--minutes", type=_minutes, default=MINUTES, help="(default: %(default)s)"
    )
    added.add_argument(
        "--batch", type=_positive, default=SEATS, help="requests at once (%(default)s)"
    )
    added.add_argument(
        "--patches",
        type=parse_patches,
        default=PATCH,
        metavar="SPEC",
        help="which patches, as in VEXT_PATCHES (default: %(default)s)",
    )
    _common(added, soak_engine)


def _common(
    parser: argparse.ArgumentParser,
    soak: Callable[[argparse.Namespace, Say], dict[str, Any]],
) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result")
    parser.set_defaults(run=lambda args: _run(args, soak))


def _run(
    args: argparse.Namespace, soak: Callable[[argparse.Namespace, Say], dict[str, Any]]
) -> int:
    """Soak, print, write; 1 if something was found."""
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started:4.0f} s] {text}", file=sys.stderr)

    load = os.getloadavg()[0]
    try:
        if args.json:
            jsonfile.check(args.json)
        result = soak(args, say)
        result |= {"machine": machine.describe(), "load": round(load, 1)}
        if args.json:
            jsonfile.write(args.json, result)
    except ChildError as error:
        print(f"vllm-ext: {error.line}", file=sys.stderr)
        return 1
    except (CannotRunError, jsonfile.CannotWriteError) as error:
        print(f"vllm-ext: {error}", file=sys.stderr)
        return 1
    print("\n".join([*result["lines"], describe_machine(result["machine"])]))
    if result["faults"]:
        print("\n".join(f"FAULT: {fault}" for fault in result["faults"]))
    return int(bool(result["faults"]))


# -- schedulers ------------------------------------------------------------------------


def soak_scheduler(args: argparse.Namespace, say: Say) -> dict[str, Any]:
    """Random traffic, until ``args.steps`` steps have been compared."""
    child = Child("vllm_ext.soak.twins", {**environment("interpret"), "VEXT": "0"}, "")
    seen: Counter[str] = Counter()
    finished: Counter[str] = Counter()
    seed, fault = args.seed, None
    with ExitStack() as stack:
        stack.callback(child.close)
        while seen["steps"] < args.steps and fault is None:
            # A fault is made small, which takes hundreds of runs.
            more = child.ask(
                *("compare", 600), first=seed, count=AT_ONCE, steps=TRAFFIC_STEPS
            )
            seed += AT_ONCE
            fault = more.pop("differs")
            finished.update(more.pop("finished"))
            seen.update(more)
            say(f"{seen['steps']} of {args.steps} steps, {seen['fast']} of them fast")
    return {
        "measured": "Two schedulers, stock and patched, compared after every call.",
        "seeds": [args.seed, seed],
        "seen": dict(seen),
        "finished": dict(finished),
        "faults": [fault] if fault else [],
        "lines": scheduler_lines(seen, finished),
    }


def scheduler_lines(seen: Counter[str], finished: Counter[str]) -> list[str]:
    """What was compared, for a terminal."""
    ends = ", ".join(f"{number} {name}" for name, number in sorted(finished.items()))
    return [
        f"{seen['steps']} steps, compared after each of {seen['calls']} calls",
        f"schedule             {seen['fast']} of {seen['scheduled']} by the fast path",
        f"update_from_output   {seen['fast_updates']} of {seen['updated']}"
        " by the fast path",
        f"finished             {ends}",
        f"preempted            {seen['preempted']}",
        f"prefix cache         {seen['hits']} tokens found, {seen['events']} events",
    ]


# -- engines ---------------------------------------------------------------------------


def soak_engine(args: argparse.Namespace, say: Say) -> dict[str, Any]:
    """Blocks of requests in two engines that take turns, for ``args.minutes``."""
    # Not the lane: stock's own path on a CPU, with its compiled kernels.
    plain = environment("discard") | {
        "VEXT_CPULANE": None,
        "TRITON_INTERPRET": None,
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    arms: dict[str, dict[str, str | None]] = {
        "stock": {"VEXT": "0"},
        "patched": {"VEXT": "1", "VEXT_PATCHES": args.patches},
    }
    blocks: dict[str, list[dict[str, Any]]] = {name: [] for name in arms}
    with ExitStack() as stack:
        engines: dict[str, Child] = {}
        for name, variables in arms.items():
            engines[name] = Child(
                "vllm_ext.soak.churn", {**plain, **variables}, f"{name} engine"
            )
            stack.callback(engines[name].close)
            engines[name].tell("boot", seats=args.batch)
        for engine in engines.values():
            engine.hear()
        ends = time.monotonic() + 60 * args.minutes
        order = list(engines)
        while time.monotonic() < ends or len(blocks["stock"]) < 4:
            number = len(blocks["stock"])
            for name in order:
                blocks[name].append(
                    engines[name].ask(
                        "block", seed=number, requests=REQUESTS * args.batch
                    )
                )
            order.reverse()
            if number % 10 == 0:
                say(f"block {number}: {_speeds(blocks)}")
        states = engines["patched"].ask("patches")
    return {
        "measured": "Engines on the CPU under churn: processor time of the thread.",
        "batch": args.batch,
        "minutes": args.minutes,
        "patches": states,
        "blocks": blocks,
        "faults": faults(blocks, states, args.patches),
        "lines": engine_lines(blocks, args.batch),
    }


def faults(
    blocks: dict[str, list[dict[str, Any]]],
    states: Sequence[dict[str, Any]],
    patches: str,
) -> list[str]:
    """What is wrong with a soak of engines; nothing if all is well."""
    found = []
    for number, (stock, patched) in enumerate(
        zip(blocks["stock"], blocks["patched"], strict=True)
    ):
        if stock["answers"] != patched["answers"]:
            found.append(f"block {number}: the answers differ from stock's")
            break
    for arm, rows in blocks.items():
        left = {key: n for row in rows for key, n in row["left"].items() if n}
        if left:
            said = ", ".join(f"{n} {key}" for key, n in left.items())
            found.append(f"{arm}: an empty engine still holds {said}")
    for what in ("objects", "rss"):
        grown = {
            arm: growth([row[what] for row in rows]) for arm, rows in blocks.items()
        }
        if grown["patched"] > max(GROWTH, grown["stock"] + GROWTH):
            found.append(
                f"{what} grew by {grown['patched']:.1%} in the second half, "
                f"stock's by {grown['stock']:.1%}"
            )
    used = {state["name"] for state in states if state["state"] == "in use"}
    if PATCH in patches and PATCH not in used:
        found.append(f"{PATCH} was not in use")
    return found


def growth(samples: Sequence[float]) -> float:
    """From the middle of the third quarter to the middle of the last, as a share."""
    quarter = max(len(samples) // 4, 1)
    return median(samples[-quarter:]) / median(samples[-2 * quarter : -quarter]) - 1


def engine_lines(blocks: dict[str, list[dict[str, Any]]], batch: int) -> list[str]:
    """Speed and memory, for a terminal."""
    cost = {arm: [_cost(row) for row in rows] for arm, rows in blocks.items()}
    ratio = paired_ratio(cost["stock"], cost["patched"])
    tokens = sum(row["tokens"] for row in blocks["patched"])
    lines = [
        f"{len(blocks['stock'])} blocks of {REQUESTS * batch} requests, "
        f"{batch} at once; {tokens} tokens per engine",
        f"{'':10}{'tokens/s':>10}  middle half    {'MiB':>6}  growth  {'objects':>8}"
        "  growth",
    ]
    for arm, rows in blocks.items():
        speeds = [1 / each for each in cost[arm]]
        low, high = quartiles(speeds)
        memory, objects = ([row[key] for row in rows] for key in ("rss", "objects"))
        lines.append(
            f"{arm:10}{median(speeds):>10.0f}  {low:.0f}-{high:.0f}".ljust(37)
            + f"{memory[-1] / 2**20:>6.0f}  {growth(memory):>6.2%}  "
            f"{objects[-1]:>8}  {growth(objects):>6.2%}"
        )
    lines.append(
        f"tokens/s, patched to stock: {1 / ratio.value:.3f} "
        f"({1 / ratio.high:.3f}-{1 / ratio.low:.3f})"
    )
    return lines


def _speeds(blocks: dict[str, list[dict[str, Any]]]) -> str:
    return ", ".join(
        f"{arm} {1 / _cost(rows[-1]):.0f} tokens/s, {rows[-1]['rss'] / 2**20:.0f} MiB"
        for arm, rows in blocks.items()
    )


def _cost(row: dict[str, Any]) -> float:
    """Seconds of processor time per token."""
    return float(row["seconds"] / row["tokens"])


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: at least 1")
    return number


def _minutes(text: str) -> float:
    minutes = float(text)
    if not 0 < minutes < 10_000:
        raise argparse.ArgumentTypeError(f"{text}: minutes")
    return minutes
