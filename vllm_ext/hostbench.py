"""``vllm-ext bench host``: what the host pays for a decode step, without a GPU.

Two engines, stock and patched, each in its own process as the plugin finds it in
serving, take turns: a block of steps of one, the same of the other, then the other
way round. Only one of them works at a time. Switching patches within one engine would
be a closer comparison, but a patch may keep what the last step left (a buffer that
is copied only when it changed, a subclass made at start), and stock steps in between
would make that stale.
"""

import argparse
import importlib.util
import os
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from vllm_ext import jsonfile, machine
from vllm_ext.children import Child, ChildError
from vllm_ext.stats import median, paired_ratio

BATCHES = (1, 8, 32, 128)
MODES = ("greedy", "temperature", "filtered", "penalties", "logprobs")
BLOCKS = 40
STEPS = 15
COUNTED_STEPS = 16  # a block of the KV cache: each request is given one once
SETTLING_STEPS = 5  # of a block, until the caches hold this engine again
LONGEST = 3500  # steps that a request can decode

MEASURED = (
    "CPU time of the engine's own thread in one decode step, in microseconds: real"
    " engine core, scheduler, Model Runner V2, sampler and Triton launch path."
    " It is host time on this machine, and says nothing about the speed of a GPU."
)
ALL_THREADS = "step, all threads"
NEEDS_LANE = "bench host needs the CPU lane of a checkout: run make setup"

Say = Callable[[str], None]


class NotHereError(Exception):
    """One line: what is missing, and how to get it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``vllm-ext bench host``."""
    parser.add_argument(
        "--batch",
        type=parse_batches,
        default=BATCHES,
        metavar="N,N",
        help=f"requests per step (default: {','.join(map(str, BATCHES))})",
    )
    parser.add_argument(
        "--mode",
        type=_modes,
        default=MODES,
        metavar="M,M",
        help=f"sampling: any of {', '.join(MODES)} (default: all)",
    )
    parser.add_argument(
        "--blocks",
        type=int,
        default=BLOCKS,
        help="pairs of blocks, at least 4 (default: %(default)s)",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=STEPS,
        help="steps per block (default: %(default)s)",
    )
    parser.add_argument(
        "--patches",
        default="",
        metavar="SPEC",
        help="which patches, as in VEXT_PATCHES (default: those on by default)",
    )
    parser.add_argument(
        "--control",
        action="store_true",
        help="also run a second stock engine: what no patch at all would show",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result")


def run(args: argparse.Namespace) -> int:
    """Measure, print, and write the file that was asked for; the exit status."""
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started:4.0f} s] {text}", file=sys.stderr)

    try:
        if args.blocks < 4 or args.steps < 1:
            raise NotHereError("needs --blocks of at least 4 and --steps of at least 1")
        if args.blocks * (2 * args.steps + SETTLING_STEPS) > LONGEST:
            raise NotHereError(
                f"--blocks times (twice --steps + {SETTLING_STEPS}) exceeds {LONGEST}, "
                "the tokens of a request"
            )
        if args.json:
            jsonfile.check(args.json)
        result = measure(
            args.batch,
            args.mode,
            blocks=args.blocks,
            steps=args.steps,
            patches=args.patches,
            control=args.control,
            say=say,
        )
        if args.json:
            jsonfile.write(args.json, result)
    except (NotHereError, ChildError, jsonfile.CannotWriteError) as error:
        print(f"vllm-ext: {error}", file=sys.stderr)
        return 1
    print(table(result))
    return 0


def measure(
    batches: Sequence[int],
    modes: Sequence[str],
    *,
    blocks: int,
    steps: int,
    patches: str = "",
    control: bool = False,
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Stock and patched engines in turns; the result as `run` writes it.

    Args:
        batches: Requests per step.
        modes: Names of `MODES`.
        blocks: Pairs of blocks per batch and mode.
        steps: Decode steps per block.
        patches: For ``VEXT_PATCHES``; empty is the default set.
        control: Add a second stock engine, and its ratio to the first.
        say: Told what goes on.

    Raises:
        NotHereError: The CPU lane is not installed.
        ChildError: An engine failed.
    """
    lane = environment("discard")
    chosen = {"VEXT": "1", "VEXT_PATCHES": patches or None}
    kinds: dict[str, dict[str, str | None]] = {
        "stock": {"VEXT": "0"},
        "patched": chosen,
        **({"control": {"VEXT": "0"}} if control else {}),
    }
    with ExitStack() as stack:
        say(f"starting {len(kinds)} engines ({', '.join(kinds)})")
        engines: dict[str, Child] = {}
        for name, settings in kinds.items():
            child = Child("vllm_ext.hostloop", {**lane, **settings}, f"{name} engine")
            stack.callback(child.close)
            engines[name] = child
            # All on one core: what else runs beside it then slows them all alike.
            child.tell("boot", cpu=max(os.sched_getaffinity(0)))
        told = {name: child.hear() for name, child in engines.items()}
        rows = []
        cases = [(batch, mode) for batch in batches for mode in modes]
        for number, (batch, mode) in enumerate(cases, 1):
            say(f"{number} of {len(cases)}: batch {batch}, {mode}")
            rows += _case(engines, batch, mode, blocks, steps)
        states = engines["patched"].ask("patches")
    return {
        "measured": MEASURED,
        "stubbed": told["stock"]["stubbed"],
        "machine": machine.describe(),
        "patches": states,
        "blocks": blocks,
        "steps": steps,
        "rows": rows,
    }


def environment(mode: str) -> dict[str, str | None]:
    """For a child on the CPU lane.

    Args:
        mode: The lane's: ``interpret`` or ``discard``.

    Raises:
        NotHereError: There is no CPU lane to run it in.
    """
    if not importlib.util.find_spec("vllm_ext_cpulane"):
        raise NotHereError(NEEDS_LANE)
    from vllm_ext_cpulane.environment import lane_environment

    return {
        **lane_environment(mode),
        "VLLM_LOGGING_LEVEL": "ERROR",
        # Counting every call of a patch would cost the patched side time.
        "VEXT_STATE_DIR": None,
        "VLLM_PLUGINS": None,
        # Both sides hash alike: the order of a set is no difference between them.
        "PYTHONHASHSEED": "0",
    }


def _case(
    engines: dict[str, Child], batch: int, mode: str, blocks: int, steps: int
) -> list[dict[str, Any]]:
    for child in engines.values():
        child.ask("start", batch=batch, mode=mode)
    counts = {
        name: child.ask("count", steps=COUNTED_STEPS) for name, child in engines.items()
    }
    times: dict[str, dict[str, list[float]]] = {name: {} for name in engines}
    order = list(engines)
    for _ in range(blocks):
        for name in order:
            taken = engines[name].ask("time", settling=SETTLING_STEPS, steps=steps)
            for part, samples in taken.items():
                times[name].setdefault(part, []).append(median(samples))
        order = order[1:] + order[:1]  # no engine runs more often after itself
    rows = []
    for part, stock in times["stock"].items():
        ratio = paired_ratio(stock, times["patched"][part])
        row = {
            "batch": batch,
            "mode": mode,
            "part": part,
            "stock_us": median(stock),
            "patched_us": median(times["patched"][part]),
            "ratio": ratio.value,
            "ci95": [ratio.low, ratio.high],
            "submissions_stock": counts["stock"]["kinds"],
            "submissions_patched": counts["patched"]["kinds"],
            "names_stock": counts["stock"]["names"],
            "names_patched": counts["patched"]["names"],
        }
        if "control" in times:
            same = paired_ratio(stock, times["control"][part])
            row |= {"control_ratio": same.value, "control_ci95": [same.low, same.high]}
        rows.append(row)
    return rows


def table(result: dict[str, Any]) -> str:
    """The result for a terminal, 80 columns wide."""
    on = [each["name"] for each in result["patches"] if each["state"] == "in use"]
    off = [
        f"{each['name']} ({': '.join(filter(None, (each['state'], each['reason'])))})"
        for each in result["patches"]
        if each["state"] != "in use"
    ]
    lines = [
        *textwrap.wrap(MEASURED, 79),
        "Stubbed, on both sides:",
        *(
            textwrap.fill(text, 79, initial_indent="- ", subsequent_indent="  ")
            for text in result["stubbed"]
        ),
        describe_machine(result["machine"]),
        *textwrap.wrap(f"patches in use: {', '.join(on) or 'none'}", 79),
        *(textwrap.wrap(f"not in use: {', '.join(off)}", 79) if off else ()),
    ]
    case = None
    for row in result["rows"]:
        if case != (row["batch"], row["mode"]):
            case = (row["batch"], row["mode"])
            stock, patched = row["submissions_stock"], row["submissions_patched"]
            changes = [
                f"{kind} {stock[kind]}->{patched[kind]}"
                for kind in stock
                if stock[kind] or patched[kind]
            ]
            lines += [
                "",
                f"batch {row['batch']}, {row['mode']}: "
                f"{sum(stock.values())} -> {sum(patched.values())} submissions "
                f"({', '.join(changes)})",
                f"{'':19}{'stock us':>10}{'patched us':>12}{'ratio':>8}  95 % interval"
                + ("   stock again" if "control_ratio" in row else ""),
            ]
        lines.append(
            f"{row['part']:<19}{row['stock_us']:>10.1f}{row['patched_us']:>12.1f}"
            f"{row['ratio']:>8.3f}  {row['ci95'][0]:.3f} - {row['ci95'][1]:.3f}"
            + (f"   {row['control_ratio']:.3f}" if "control_ratio" in row else "")
        )
    return "\n".join(lines)


def describe_machine(found: dict[str, Any]) -> str:
    """One line: what it ran on."""
    commit = found["commit"] or "no checkout"
    return (
        f"{found['cpu']}, {found['cores']} cores, {found['gpu']}; "
        f"vllm {found['vllm']}, torch {found['torch']}, triton {found['triton']}, "
        f"python {found['python']}; {commit}{' with changes' if found['dirty'] else ''}"
    )


def parse_batches(text: str) -> tuple[int, ...]:
    """``1,8`` as numbers, for argparse."""
    numbers = tuple(int(part) for part in text.split(","))
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text}: a batch has at least one request")
    return numbers


def _modes(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    unknown = [name for name in names if name not in MODES]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"no mode {', '.join(unknown)}; there are {', '.join(MODES)}"
        )
    return names
