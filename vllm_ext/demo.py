"""``vllm-ext demo``: real vLLM on this CPU, stock against patched, on one screen.

First the tokens: the same requests, decoded by a stock and by a patched engine, have
to come out the same to the last bit. Then the cost: what the host spends on a decode
step of either, and what it hands to the GPU in it.
"""

import argparse
import itertools
import os
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from vllm_ext import hostbench, jsonfile, machine
from vllm_ext.children import Child, ChildError
from vllm_ext.patching.report import read_states

BATCHES = (1, 8)
MODE = "greedy"
BLOCKS = 40

HONEST = (
    "Nothing ran on a GPU. Host us are CPU time of the engine's thread, its kernels"
    " compiled, counted and discarded, its forward pass stubbed: no GPU speed."
)

# Patch states from most to least telling, for a patch in several processes.
RANKS = ("failed", "skipped", "in use", "applied", "waiting", "upstream", "off")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``vllm-ext demo``."""
    parser.add_argument(
        "--patches",
        type=hostbench.parse_patches,
        default=os.environ.get("VEXT_PATCHES", ""),
        metavar="SPEC",
        help="which patches, as in VEXT_PATCHES (default: that, or the default ones)",
    )
    parser.add_argument(
        "--batch",
        type=hostbench.parse_batches,
        default=BATCHES,
        metavar="N,N",
        help="requests per step for the host cost "
        f"(default: {','.join(map(str, BATCHES))})",
    )
    parser.add_argument(
        "--blocks",
        type=int,
        default=BLOCKS,
        help="pairs of blocks of steps for the host cost (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result")


def run(args: argparse.Namespace) -> int:
    """Compare tokens, measure, print, write; 1 if something is not as it should be."""
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started:4.0f} s] {text}", file=sys.stderr)

    try:
        if args.json:
            jsonfile.check(args.json)
        result = show(args.patches, args.batch, args.blocks, say)
        result["seconds"] = round(time.monotonic() - started, 1)
        if args.json:
            jsonfile.write(args.json, result)
    except (hostbench.CannotRunError, ChildError, jsonfile.CannotWriteError) as error:
        print(f"vllm-ext: {error}", file=sys.stderr)
        return 1
    print(screen(result))
    return 0 if all_is_well(result) else 1


def all_is_well(result: dict[str, Any]) -> bool:
    """Whether nothing differs and every patch that was asked for could be applied."""
    tokens = result["tokens"]
    states = {patch["state"] for patch in result["patches"]}
    return not (
        tokens["different"]
        or tokens["logprobs_different"]
        or states & {"failed", "skipped"}
    )


def show(
    patches: str, batches: Sequence[int], blocks: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Everything that `screen` prints, as data.

    Raises:
        CannotRunError: The CPU lane is not installed.
        ChildError: An engine failed.
    """
    load = os.getloadavg()[0]
    tokens, states = compare_tokens(patches, say)
    say(
        f"{tokens['compared']} tokens compared, {tokens['different']} different; "
        "now the host cost"
    )
    cost = hostbench.measure(
        batches,
        [MODE],
        blocks=blocks,
        steps=hostbench.STEPS,
        patches=patches,
        say=say,
    )
    rows = {(row["batch"], row["part"]): row for row in cost["rows"]}
    first = rows[batches[-1], "step"]
    return {
        "tokens": tokens,
        "host_us_per_step": {
            "batch": first["batch"],
            "mode": first["mode"],
            "stock": first["stock_us"],
            "patched": first["patched_us"],
            "stock_quartiles": first["stock_quartiles_us"],
            "patched_quartiles": first["patched_quartiles_us"],
            "ratio": first["ratio"],
            "ci95": first["ci95"],
        },
        "submissions_per_step": {
            "batch": first["batch"],
            "mode": first["mode"],
            "stock": first["submissions_stock"],
            "patched": first["submissions_patched"],
        },
        "patches": states,
        "rows": cost["rows"],
        "load": round(load, 1),
        "stubbed": cost["stubbed"],
        "machine": machine.describe(),
    }


def compare_tokens(
    patches: str, say: Callable[[str], None]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Decode with both engines; what differs, and what became of the patches."""
    lane = hostbench.environment("interpret")
    # The engine's own setting decides how large its KV cache is.
    lane["VLLM_CPU_KVCACHE_SPACE"] = None
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="vllm-ext-"))
        settings: dict[str, dict[str, str | None]] = {
            "stock": {"VEXT": "0"},
            "patched": {
                **{"VEXT": "1", "VEXT_PATCHES": patches},
                "VEXT_STATE_DIR": folder,
            },
        }
        say("starting two engines with a tiny model: stock and patched")
        engines = {}
        for name, extra in settings.items():
            child = Child("vllm_ext.tokenrun", {**lane, **extra}, f"{name} engine")
            stack.callback(child.close)
            child.tell("decode")
            engines[name] = child
        answers = {}
        for name, child in engines.items():
            answers[name] = _hear(child, say)
            boot, decode = answers[name]["seconds"]
            done = f"{len(answers[name]['requests'])} requests decoded"
            say(f"{name}: {done} (boot {boot:.0f} s, run {decode:.0f} s)")
        for child in engines.values():
            child.close()  # the state file is complete when the process has ended
        states = merged(read_states(Path(folder)))
    stock, patched = answers["stock"], answers["patched"]
    tokens = difference(stock["requests"], patched["requests"])
    tokens["requests"] = len(stock["requests"])
    tokens["steps"] = stock["steps"]
    tokens["graph_replays"] = stock["replays"]
    return tokens, states


def _hear(child: Child, say: Callable[[str], None]) -> Any:
    """The child's answer; says that it still works every ten seconds."""
    for waited in range(0, 300, 10):
        if child.ready(10):
            return child.hear()
        say(f"{child.name} is booting or decoding ({waited + 10} s)")
    return child.hear(0)


def difference(stock: dict[str, Any], patched: dict[str, Any]) -> dict[str, Any]:
    """Compare what two engines answered, bit for bit.

    Args:
        stock: By request: ``tokens``, ``logprobs`` and ``reason``.
        patched: The same of the other engine.

    Returns:
        ``compared`` and ``different`` tokens, ``logprobs_compared`` and
        ``logprobs_different`` positions, and ``first``: request, position, stock and
        patched of the first difference, or ``None``. A request or token that only
        one side has, or another reason to finish, counts as a different token.
    """
    found: dict[str, Any] = {"compared": 0, "different": 0}
    found |= {"logprobs_compared": 0, "logprobs_different": 0, "first": None}

    def note(request: str, position: int, what: str, ours: Any, theirs: Any) -> None:
        if found["first"] is None:
            found["first"] = {
                **{"request": request, "position": position, "what": what},
                **{"stock": ours, "patched": theirs},
            }

    nothing: dict[str, Any] = {"tokens": [], "logprobs": [], "reason": "no answer"}
    for request in dict.fromkeys((*stock, *patched)):
        ours, theirs = stock.get(request, nothing), patched.get(request, nothing)
        pairs = itertools.zip_longest(ours["tokens"], theirs["tokens"])
        for position, (left, right) in enumerate(pairs):
            found["compared"] += 1
            if left != right:
                found["different"] += 1
                note(request, position, "token", left, right)
        if ours["reason"] != theirs["reason"]:
            found["different"] += 1
            end = len(ours["tokens"])
            note(request, end, "reason to finish", ours["reason"], theirs["reason"])
        pairs = itertools.zip_longest(ours["logprobs"], theirs["logprobs"])
        for position, (left, right) in enumerate(pairs):
            found["logprobs_compared"] += 1
            if left != right:
                found["logprobs_different"] += 1
                note(request, position, "logprobs", left, right)
    return found


def merged(states: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry per patch, of all processes: the most telling state, summed calls."""
    merged: dict[str, dict[str, Any]] = {}
    for state in states:
        for patch in state["patches"]:
            entry = merged.setdefault(
                patch["name"], {**patch, "calls": 0, "aside": {}, "reason": ""}
            )
            if RANKS.index(patch["state"]) <= RANKS.index(entry["state"]):
                entry["state"] = patch["state"]
                entry["reason"] = patch["reason"] or entry["reason"]
            entry["calls"] += patch["calls"]
            for reason, count in patch["aside"].items():
                entry["aside"][reason] = entry["aside"].get(reason, 0) + count
    return [
        {key: entry[key] for key in ("name", "state", "calls", "reason", "aside")}
        for entry in merged.values()
    ]


def screen(result: dict[str, Any]) -> str:
    """The result for a terminal of 80 columns, in 24 lines or little more."""
    return "\n".join(_screen(result))


def _screen(result: dict[str, Any]) -> Iterator[str]:
    tokens = result["tokens"]
    same = "IDENTICAL" if not tokens["different"] else "DIFFERENT"
    yield (
        f"tokens      {same}: {tokens['different']} of {tokens['compared']} differ, "
        f"and {tokens['logprobs_different']} of {tokens['logprobs_compared']} logprobs"
    )
    yield (
        f"            {tokens['requests']} requests of every kind, {tokens['steps']} "
        f"steps, {tokens['graph_replays']} of them graph replays"
    )
    if tokens["first"]:
        first = tokens["first"]
        yield (
            f"            first: request `{first['request']}`, position "
            f"{first['position']}, {first['what']}:"
        )
        yield f"              stock {first['stock']}, patched {first['patched']}"
    yield (
        f"{'host us per step':<21}{'stock (mid half)':>18}{'patched':>18}"
        f"{'ratio':>7}  95 %"
    )
    rows = result["rows"]
    for row in rows:
        if row["part"] == "step":
            yield f"{'batch ' + str(row['batch']):<21}{hostbench.times(row)}"
    for row in rows:
        shown = row["batch"] == result["host_us_per_step"]["batch"]
        if shown and row["part"] not in ("step", hostbench.ALL_THREADS):
            yield f"{'  ' + row['part']:<21}{hostbench.times(row)}"
    counts = result["submissions_per_step"]
    stock, patched = counts["stock"], counts["patched"]
    kinds = ", ".join(f"{kind} {stock[kind]}->{patched[kind]}" for kind in stock)
    yield (
        f"GPU submissions per step (batch {counts['batch']}, {counts['mode']}): "
        f"{sum(stock.values())} -> {sum(patched.values())}"
    )
    yield f"  {kinds}"
    yield f"{'patch':<24}{'state':<10}{'calls':>7}  note"
    for patch in result["patches"]:
        notes = [patch["reason"]] if patch["reason"] else []
        notes += [f"aside {n}: {why}" for why, n in patch["aside"].items()]
        note = textwrap.shorten("; ".join(notes), 36, placeholder="...")
        line = f"{patch['name']:<24}{patch['state']:<10}{patch['calls']:>7}  {note}"
        yield line.rstrip()
    yield from textwrap.wrap(HONEST, 79)
    yield from hostbench.busy(result["load"], result["machine"])
    yield from textwrap.wrap(hostbench.describe_machine(result["machine"]), 79)
