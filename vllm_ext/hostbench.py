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

from vllm_ext import jsonfile, machine, settings
from vllm_ext.children import Child, ChildError
from vllm_ext.patches import SERIES
from vllm_ext.stats import median, paired_ratio, quartiles

BATCHES = (1, 8, 32, 128, 256)
MODES = ("greedy", "temperature", "filtered", "penalties", "logprobs", "turnover")
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
NEEDS_LANE = "this command needs the CPU lane of a checkout: run make setup"

Say = Callable[[str], None]


class CannotRunError(Exception):
    """One line: what is missing or wrong, and what to do."""


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
        help=f"sampling: any of {', '.join(MODES)} (default: all); the last is greedy,"
        " with requests that come and end in every step",
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
        type=parse_patches,
        default=os.environ.get("VEXT_PATCHES", ""),
        metavar="SPEC",
        help="which patches, as in VEXT_PATCHES (default: that, or the default ones)",
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
            raise CannotRunError(
                "needs --blocks of at least 4 and --steps of at least 1"
            )
        if args.blocks * (2 * args.steps + SETTLING_STEPS) > LONGEST:
            raise CannotRunError(
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
        result |= {"command": ["vllm-ext", *sys.argv[1:]], "settings": _settings()}
        if args.json:
            jsonfile.write(args.json, result)
    except (CannotRunError, ChildError, jsonfile.CannotWriteError) as error:
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
        CannotRunError: The CPU lane is not installed.
        ChildError: An engine failed.
    """
    # GiB: enough for 256 requests even if a busy machine makes every block twice as
    # long. Nothing writes there, so it is hardly ever more than addresses.
    lane = environment("discard") | {"VLLM_CPU_KVCACHE_SPACE": "2"}
    load = os.getloadavg()[0]
    kinds: dict[str, dict[str, str | None]] = {
        "stock": {"VEXT": "0"},
        "patched": {"VEXT": "1", "VEXT_PATCHES": patches},
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
        rows: list[dict[str, Any]] = []
        counts: list[dict[str, Any]] = []
        cases = [(batch, mode) for batch in batches for mode in modes]
        for number, (batch, mode) in enumerate(cases, 1):
            say(f"{number} of {len(cases)}: batch {batch}, {mode}")
            _case(engines, batch, mode, blocks, steps, rows, counts)
        states = engines["patched"].ask("patches")
    return {
        "measured": MEASURED,
        "stubbed": told["stock"]["stubbed"],
        "machine": machine.describe(),
        "patches": states,
        "blocks": blocks,
        "steps": steps,
        "load": round(load, 1),
        "rows": rows,
        "submissions_by_name": counts,
    }


def _settings() -> dict[str, str]:
    """The variables of ours that reach the patched engine from outside."""
    ours = {"VEXT", "VEXT_PATCHES", "VEXT_STATE_DIR", "VEXT_STEP_GRAPH_CHECK"}
    names = (settings.VARIABLES.keys() - ours) & os.environ.keys()
    return {name: os.environ[name] for name in sorted(names)}


def environment(mode: str) -> dict[str, str | None]:
    """For a child on the CPU lane.

    Args:
        mode: The lane's: ``interpret`` or ``discard``.

    Raises:
        CannotRunError: There is no CPU lane to run it in.
    """
    if not importlib.util.find_spec("vllm_ext_cpulane"):
        raise CannotRunError(NEEDS_LANE)
    from vllm_ext_cpulane.environment import lane_environment

    return {
        **lane_environment(mode),
        "VLLM_LOGGING_LEVEL": "ERROR",
        # Counting every call of a patch would cost the patched side time.
        "VEXT_STATE_DIR": None,
        "VLLM_PLUGINS": None,
        # What launches nothing computes nothing: there is nothing to compare.
        "VEXT_STEP_GRAPH_CHECK": "0" if mode == "discard" else None,
        # Both sides hash alike: the order of a set is no difference between them.
        "PYTHONHASHSEED": "0",
    }


def _case(
    engines: dict[str, Child],
    batch: int,
    mode: str,
    blocks: int,
    steps: int,
    rows: list[dict[str, Any]],
    names: list[dict[str, Any]],
) -> None:
    """Measure one batch and mode; adds to ``rows`` and ``names``."""
    case: dict[str, Any] = {"batch": batch, "mode": mode}
    for child in engines.values():
        child.ask("start", **case)
    counts = {
        name: child.ask("count", steps=COUNTED_STEPS) for name, child in engines.items()
    }
    names.append(case | {name: count["names"] for name, count in counts.items()})
    times: dict[str, dict[str, list[float]]] = {name: {} for name in engines}
    order = list(engines)
    for _ in range(blocks):
        for name in order:
            taken = engines[name].ask("time", settling=SETTLING_STEPS, steps=steps)
            for part, samples in taken.items():
                times[name].setdefault(part, []).append(median(samples))
        order = order[1:] + order[:1]  # no engine runs more often after itself
    for part, stock in times["stock"].items():
        patched = times["patched"][part]
        ratio = paired_ratio(stock, patched)
        row = {
            **case,
            "part": part,
            "stock_us": median(stock),
            "patched_us": median(patched),
            "stock_quartiles_us": quartiles(stock),
            "patched_quartiles_us": quartiles(patched),
            "ratio": ratio.value,
            "ci95": [ratio.low, ratio.high],
            "submissions_stock": counts["stock"]["kinds"],
            "submissions_patched": counts["patched"]["kinds"],
        }
        if "control" in times:
            same = paired_ratio(stock, times["control"][part])
            row |= {"control_ratio": same.value, "control_ci95": [same.low, same.high]}
        rows.append(row)


def table(result: dict[str, Any]) -> str:
    """The result for a terminal."""
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
        *textwrap.wrap(describe_machine(result["machine"]), 79),
        *textwrap.wrap(f"patches in use: {', '.join(on) or 'none'}", 79),
        *(textwrap.wrap(f"not in use: {', '.join(off)}", 79) if off else ()),
        *busy(result["load"], result["machine"]),
        "Medians of the blocks' medians, in brackets the middle half of them; the",
        "ratio of neighbouring blocks with a bootstrap interval.",
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
                f"{'':19}{'stock us':>18}{'patched us':>18}{'ratio':>7}  95 %"
                + (" " * 11 + "again" if "control_ratio" in row else ""),
            ]
        lines.append(
            f"{row['part']:<19}{times(row)}"
            + (f"  {row['control_ratio']:.3f}" if "control_ratio" in row else "")
        )
    return "\n".join(lines)


def times(row: dict[str, Any]) -> str:
    """Both sides of a row with their spread, the ratio and its interval."""
    sides = (
        f"{row[f'{side}_us']:.0f} ({low:.0f}-{high:.0f})"
        for side in ("stock", "patched")
        for low, high in [row[f"{side}_quartiles_us"]]
    )
    low, high = row["ci95"]
    return (
        f"{next(sides):>18}{next(sides):>18}{row['ratio']:>7.3f}  {low:.3f}-{high:.3f}"
    )


def busy(load: float, found: dict[str, Any]) -> list[str]:
    """A line of warning if others were using the machine when a measurement began."""
    if load < found["cores"] / 2:
        return []
    return [
        f"The machine was busy when this began (load {load:.1f} on {found['cores']} "
        "cores): wide intervals."
    ]


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


def parse_patches(text: str) -> str:
    """A value for ``VEXT_PATCHES``, for argparse; refuses unknown names."""
    known = {patch.name: patch.default for patch in SERIES}
    for problem in settings.parse({"VEXT_PATCHES": text}, known).problems:
        raise argparse.ArgumentTypeError(problem)
    return text


def _modes(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    unknown = [name for name in names if name not in MODES]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"no mode {', '.join(unknown)}; there are {', '.join(MODES)}"
        )
    return names
