"""The command ``vllm-ext``. Exit 0: all well. 1: attention needed. 2: wrong usage."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from vllm_ext import __version__, bisect, doctor, settings
from vllm_ext.patches import SERIES
from vllm_ext.patching.declare import Patch
from vllm_ext.patching.fingerprint import SourceError, fingerprint


class UserError(Exception):
    """One line for the person at the terminal."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        args = _parser(arguments[:1]).parse_args(arguments)
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except (UserError, SourceError, bisect.CannotBisect) as error:
        print(f"vllm-ext: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("vllm-ext: stopped", file=sys.stderr)
        return 130


def _parser(first: Sequence[str]) -> argparse.ArgumentParser:
    """The parser; commands that measure are loaded only when ``first`` is theirs.

    They need numpy, and ``doctor`` has to work where nothing is installed.
    """
    parser = argparse.ArgumentParser(
        prog="vllm-ext",
        description="Faster decoding of small models on stock vLLM.",
        epilog="Exit status: 0 all well, 1 attention needed, 2 wrong usage.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace], int], text: str
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        return added

    def takes_json(added: argparse.ArgumentParser) -> None:
        added.add_argument("--json", action="store_true", help="print JSON")

    def takes_vllm(added: argparse.ArgumentParser) -> None:
        added.add_argument(
            "--vllm",
            metavar="WHEEL|TREE",
            help="a vLLM wheel, or a folder that holds vllm/ (default: the installed)",
        )

    added = command("doctor", _doctor, "environment and fit of every patch")
    takes_vllm(added)
    added.add_argument(
        "--against", metavar="OLD", help="show what changed since this wheel or folder"
    )
    added.add_argument(
        "--report", action="store_true", help="print a block for a bug report"
    )
    takes_json(added)

    added = command("patches", _patches, "list the patches, or tell all about one")
    added.add_argument("name", nargs="?", metavar="NAME")
    takes_json(added)

    added = command(
        "show-target", _show_target, "an upstream function: source, copies, callers"
    )
    added.add_argument("target", metavar="MODULE:NAME")
    takes_vllm(added)
    takes_json(added)

    added = command("pin", _pin, "record the fingerprints of a vLLM version")
    takes_vllm(added)
    added.add_argument(
        "--accept",
        action="append",
        default=[],
        metavar="PATCH",
        help="record the changed targets of this patch (you have read the difference)",
    )
    takes_json(added)

    text = "real vLLM on this CPU, patched against stock (the main job)"
    added = commands.add_parser("demo", help=text, description=text)
    if [*first] == ["demo"]:
        _load("demo", added)

    text = "measure: host, kernels, engines; compare and show what was measured"
    added = commands.add_parser("bench", help=text, description=text)
    if [*first] == ["bench"]:
        _load("bench.command", added)

    text = "proofs without a GPU: waits, graphs, races, resources, compilations"
    added = commands.add_parser("prove", help=text, description=text)
    if [*first] == ["prove"]:
        _load("prove.command", added)

    text = "long runs: schedulers compared call by call, engines under churn"
    added = commands.add_parser("soak", help=text, description=text)
    if [*first] == ["soak"]:
        _load("soak.command", added)

    text = "a patch as a pull request for vLLM, in files; nothing is sent"
    added = commands.add_parser("export", help=text, description=text)
    if [*first] == ["export"]:
        _load("upstream.export", added)

    text = "how far each patch is from being part of vLLM"
    added = commands.add_parser("upstream", help=text, description=text)
    if [*first] == ["upstream"]:
        _load("upstream.status", added)

    added = command(
        "bisect", _bisect, "find the patch that makes a command fail: bisect -- CMD"
    )
    added.add_argument(
        "--timeout", type=_seconds, metavar="S", help="a longer run counts as failed"
    )
    takes_json(added)
    added.add_argument("command", nargs="+", metavar="CMD")
    return parser


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < float("inf"):
        raise ValueError
    return seconds


def _load(module: str, parser: argparse.ArgumentParser) -> None:
    """Let ``vllm_ext.<module>`` add its options and run the command."""
    try:
        loaded = importlib.import_module(f"vllm_ext.{module}")
    except ModuleNotFoundError as error:
        raise UserError(
            f"this command needs {error.name}, which comes with vLLM; "
            "in a checkout, run make setup"
        ) from None
    loaded.add_arguments(parser)
    if hasattr(loaded, "run"):  # or its own commands have one each
        parser.set_defaults(run=loaded.run)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1))


# -- doctor ------------------------------------------------------------------------


def _doctor(args: argparse.Namespace) -> int:
    if args.against:
        # Read both before anything is printed: a wrong path gets its line alone.
        old, new = doctor.open_source(args.against), doctor.open_source(args.vllm)
    found = doctor.examine(args.vllm)
    if args.json:
        if args.against:
            found["diff"] = doctor.differences(old, new, _changed(old, new))
        _print_json(found)
    elif args.report:
        print(_report(found))
    else:
        print(_health(found, has_old=bool(args.against)))
        if args.against:
            print(doctor.differences(old, new, _changed(old, new)), end="")
    return 1 if found["attention"] else 0


def _changed(old: Any, new: Any) -> list[str]:
    """Watched targets whose code differs between two vLLMs."""
    watched = dict.fromkeys(target for patch in SERIES for target in patch.watched)
    return [
        target
        for target in watched
        if fingerprint(old, target) != fingerprint(new, target)
    ]


def _versions(found: dict[str, Any]) -> str:
    machine = found["machine"]
    parts = [f"vllm {found['vllm']['version']}"]
    parts += [
        f"{name} {machine[name]}" for name in ("torch", "triton") if machine.get(name)
    ]
    return "   ".join([*parts, f"python {machine['python']}", machine["gpu"]])


def _health(found: dict[str, Any], has_old: bool) -> str:
    lines = [_versions(found)]
    width = max((len(each["name"]) for each in found["patches"]), default=0) + 2
    for each in found["patches"]:
        what = f"{each['edits']} edits, relies on {each['relies_on']}"
        detail = each["reason"] if each["reason"] else f"{what}, as in {each['as_in']}"
        lines.append(f"{each['name']:<{width}}{each['verdict']:<10}{detail}")
    if any(each["changed"] for each in found["patches"]) and not has_old:
        lines.append(
            "Stock code runs in place of a skipped patch; "
            "--against OLD_WHEEL shows what changed."
        )
    lines += [f"attention: {line}" for line in found["attention"]]
    return "\n".join(lines)


def _report(found: dict[str, Any]) -> str:
    on = [each["name"] for each in found["patches"] if each["verdict"] == doctor.FITS]
    lines = [
        "```",
        f"This vLLM is modified by vllm-ext {found['vllm_ext']} "
        f"(patches: {', '.join(on) or 'none'}).",
        "Before reporting to vLLM, reproduce with VEXT=0 (or VLLM_PLUGINS='').",
        "",
        _health(found, has_old=True),
        "",
        *(f"{name}={value}" for name, value in found["settings"].items()),
        *(
            f"{name}: {value}"
            for name, value in found["machine"].items()
            if value not in (None, "")
        ),
        "```",
    ]
    return "\n".join(lines)


# -- patches, show-target, pin --------------------------------------------------------


def _patch_json(patch: Patch) -> dict[str, Any]:
    return {**asdict(patch), "why": textwrap.dedent(patch.why).strip()}


def _patches(args: argparse.Namespace) -> int:
    if args.name is None:
        if args.json:
            _print_json([_patch_json(patch) for patch in SERIES])
            return 0
        width = max((len(patch.name) for patch in SERIES), default=0) + 2
        for patch in SERIES:
            mark = "on " if patch.default else "off"
            print(f"{patch.name:<{width}}{mark}  {patch.summary}")
        return 0
    by_name = {patch.name: patch for patch in SERIES}
    if args.name not in by_name:
        known = ", ".join(by_name)
        raise UserError(f"unknown patch {args.name}; known are {known}")
    patch = by_name[args.name]
    if args.json:
        _print_json(_patch_json(patch))
        return 0
    print(f"{patch.name}: {patch.summary}\n")
    print(textwrap.indent(textwrap.dedent(patch.why).strip(), "  "), "\n")
    for edit in patch.edits:
        print(f"{edit.how:<10}{edit.target}\n{'by':<10}{edit.by}")
    for target in patch.relies_on:
        print(f"{'relies on':<10}{target}")
    print(f"{'default':<10}{'on' if patch.default else 'off'}")
    print(f"{'tested':<10}{', '.join(patch.tested_with) or 'nowhere'}")
    print(f"{'upstream':<10}{patch.upstream or 'not sent'}")
    print(f"{'until':<10}{patch.merged_in or patch.retire_when}")
    return 0


def _show_target(args: argparse.Namespace) -> int:
    story = doctor.tell(doctor.open_source(args.vllm), args.target)
    if args.json:
        _print_json(asdict(story))
        return 0
    print(story.source)
    print(f"{story.length} lines in vLLM {story.version}, from line {story.line}")
    print(f"fingerprint {story.fingerprint}")
    for version, digest in story.history.items():
        same = "same" if digest == story.fingerprint else "differs"
        print(f"  {version}  {digest}  {same}")
    print(f"copied by {', '.join(story.copies) or 'no module'}")
    print("called at" + "".join(f"\n  {place}" for place in story.callers))
    return 0


def _pin(args: argparse.Namespace) -> int:
    pinned = doctor.pin(doctor.open_source(args.vllm), args.accept)
    if args.json:
        _print_json(asdict(pinned))
    else:
        print(f"vLLM {pinned.version}: {len(pinned.recorded)} fingerprints recorded")
        for name, targets in pinned.refused.items():
            print(f"{name} is not recorded, its targets changed or are gone:")
            for target in targets:
                print(f"  {target}")
        if pinned.refused:
            print("Read `vllm-ext doctor --against OLD`, adapt, test, then --accept.")
    return 1 if pinned.refused else 0


# -- bisect ------------------------------------------------------------------------


def _bisect(args: argparse.Namespace) -> int:
    chosen = settings.parse(os.environ, {patch.name: patch.default for patch in SERIES})
    if chosen.problems:
        raise UserError("; ".join(chosen.problems))
    verdict = bisect.bisect(
        args.command,
        chosen.patches,
        say=lambda line: print(f"bisect: {line}", file=sys.stderr, flush=True),
        timeout=args.timeout,
    )
    if args.json:
        _print_json(asdict(verdict))
    else:
        names = ", ".join(verdict.culprits)
        together = " together" if len(verdict.culprits) > 1 else ""
        culprit = verdict.culprits[0]
        rest = ",".join(name for name in chosen.patches if name != culprit)
        # What was asked for, less the culprit: a "-" would start from the defaults.
        off = f"VEXT_PATCHES={rest}" if rest else "VEXT=0"
        if "VEXT_PATCHES" not in os.environ:
            off = f"VEXT_PATCHES=-{culprit}"
        print(
            f"{names}{together} make{'' if together else 's'} it fail "
            f"({verdict.runs} runs); {off} avoids it"
        )
    return 1
