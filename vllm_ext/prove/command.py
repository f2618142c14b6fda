"""``vllm-ext prove``: judge every patch and kernel without a GPU, a line for each."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from vllm_ext import doctor, jsonfile
from vllm_ext.hostbench import CannotRunError
from vllm_ext.patching.fingerprint import SourceError
from vllm_ext.prove.verdict import Verdict, failed, reason

INSTRUMENTS = {
    "syncs": "what makes the host wait for the device, with file and line",
    "graphs": "what a CUDA graph bakes in, and what its replay would read",
    "races": "kernels: accesses out of bounds, and races between programs",
    "kernels": "kernels: registers, spills, shared memory, width of loads",
    "traffic": "launches and bytes from logits to a token, by sampling mode",
    "compiles": "what is compiled while decoding, after warm-up",
    "gpu": "tokens, waits and compilations on a GPU, or the files that tell of them",
    "lag": "tokens on a device that is as far behind the host as code lets it be",
}
KNOWN = ("0.32.", "0.33.")  # versions of vLLM that the instruments were made for
NO_VLLM = "vLLM is not installed here; in a checkout, run make setup"

Say = Callable[[str], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The instruments, and the options of each."""
    kinds = parser.add_subparsers(required=True, metavar="INSTRUMENT")
    texts = {"all": "every instrument over every patch and kernel", **INSTRUMENTS}
    for name, text in texts.items():
        added = kinds.add_parser(name, help=text, description=text)
        added.set_defaults(instrument=name)
        added.add_argument("--json", action="store_true", help="print JSON")
        if name == "syncs":
            added.add_argument(
                "--write", metavar="FILE", help="write the audit, as Markdown"
            )
        if name == "traffic":
            added.add_argument(
                "--write", metavar="FILE", help="write the counts, as Markdown"
            )
        if name == "graphs":
            added.add_argument(
                "--write", metavar="FILE", help="write what moves, as Markdown"
            )
            added.add_argument(
                "--html", metavar="FILE", help="draw the captured step on a page"
            )
            added.add_argument(
                "--steps", metavar="FILE", help="write a step before and after"
            )
        if name == "kernels":
            added.add_argument(
                "--update", action="store_true", help="accept what is found now"
            )
            added.add_argument(
                "--figures", action="store_true", help="print every figure instead"
            )


def run(args: argparse.Namespace) -> int:
    """Judge, print, and write what was asked for; the exit status."""
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started:4.0f} s] {text}", file=sys.stderr)

    written = ("write", "html", "steps")
    files = [getattr(args, name, None) for name in written]
    try:
        for file in filter(None, files):
            jsonfile.check(Path(file))
        if any(files):
            for name in written:
                if getattr(args, name, None):
                    _write(args.instrument, name, getattr(args, name), say)
            return 0
        if getattr(args, "figures", False):
            _print_figures(say, args.json)
            return 0
    except Exception as error:  # whatever it is, one line
        print(f"vllm-ext: {reason(error)}", file=sys.stderr)
        return 1
    names = list(INSTRUMENTS) if args.instrument == "all" else [args.instrument]
    found = [
        verdict
        for name in names
        for verdict in judge(name, say, update=getattr(args, "update", False))
    ]
    print(
        json.dumps([asdict(each) for each in found], indent=1)
        if args.json
        else table(found)
    )
    return 1 if any(each.fault for each in found) else 0


def _write(instrument: str, what: str, file: str, say: Say) -> None:
    getattr(_load(instrument), what)(Path(file), say)
    say(f"wrote {file}")


def _print_figures(say: Say, as_json: bool) -> None:
    kernels = _load("kernels")
    found = kernels.report(say)
    print(json.dumps(found, indent=1) if as_json else kernels.table(found))


def judge(instrument: str, say: Say, *, update: bool = False) -> list[Verdict]:
    """What one instrument says; that it cannot be used is a verdict too."""
    try:
        module = _load(instrument)
        options = {"update": update} if instrument == "kernels" else {}
        answers: list[Verdict] = partial(module.verdicts, **options)(say)
        return answers
    except Exception as error:  # the other instruments go on
        return [failed(instrument, "everything", error)]


def _load(instrument: str) -> Any:
    """The module of an instrument, for a vLLM that it was made for."""
    try:
        version = doctor.open_source(None).version
    except SourceError:
        raise CannotRunError(NO_VLLM) from None
    if not version.startswith(KNOWN):
        raise CannotRunError(
            f"prove knows vLLM {' and '.join(f'{each}x' for each in KNOWN)}, "
            f"here is {version}: install one of them"
        )
    return import_module(f"vllm_ext.prove.{instrument}")


def table(found: Sequence[Verdict]) -> str:
    """A line for each verdict."""
    width = max((len(each.subject) for each in found), default=0) + 2
    lines = []
    for each in found:
        mark = "FAULT" if each.fault else each.outcome
        detail = "; ".join(filter(None, (each.detail, each.evidence)))
        lines.append(f"{each.instrument:<10}{each.subject:<{width}}{mark:<15}{detail}")
    counts = {
        outcome: sum(each.outcome == outcome for each in found)
        for outcome in ("proven on GPU", "proven on CPU", "not proven")
    }
    faults = sum(each.fault for each in found)
    total = ", ".join(f"{number} {outcome}" for outcome, number in counts.items())
    lines.append(f"{total}; {faults} faults" if faults else total)
    return "\n".join(lines)
