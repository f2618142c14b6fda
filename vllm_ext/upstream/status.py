"""``vllm-ext upstream status``: how far each patch is from being part of vLLM."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime

from vllm_ext import doctor
from vllm_ext.patches import FINGERPRINTS, SERIES
from vllm_ext.patching.declare import Patch
from vllm_ext.patching.fingerprint import (
    Known,
    Source,
    SourceError,
    find,
    fit,
    read_known,
    version_key,
)
from vllm_ext.upstream import forms, mail


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command and its options."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    text = "every patch: age, upstream form, what changed under it, whether it can go"
    added = commands.add_parser("status", help=text, description=text)
    added.add_argument(
        "--vllm",
        metavar="WHEEL|TREE",
        help="a vLLM wheel, or a folder that holds vllm/ (default: the newest at hand)",
    )
    added.add_argument("--json", action="store_true", help="print JSON")
    added.set_defaults(run=_status)


@dataclass(frozen=True)
class Status:
    """Where one patch stands, seen from one vLLM.

    Attributes:
        age: Days since it came; ``None`` if its declaration does not say.
        upstream: Address of the pull request, once there is one.
        forms: Versions of vLLM for which an upstream form is stored.
        size: Lines that the newest form adds to and removes from vLLM.
        changed: What it stands on that is not the code of a version on record.
        retire_when: What has to happen upstream.
        retire: Why it can be retired, or may have to be; empty if there is no reason.
    """

    name: str
    age: int | None
    upstream: str | None
    forms: tuple[str, ...]
    size: int | None
    changed: tuple[str, ...]
    retire_when: str
    retire: str


def _status(args: argparse.Namespace) -> int:
    """Print where every patch stands; 1 if one needs somebody."""
    source = doctor.open_source(args.vllm) if args.vllm else forms.sources()[0]
    if not version_key(source.version):
        raise SourceError(f"{source.path} does not state its version")
    today = datetime.now(UTC).date()
    known = read_known(FINGERPRINTS)
    found = [status(patch, source, known, today) for patch in SERIES]
    if args.json:
        print(json.dumps([asdict(each) for each in found], indent=1))
    else:
        print(f"vllm {source.version}")
        print("\n".join(_lines(found)))
    return 1 if any(each.changed or each.retire for each in found) else 0


def status(patch: Patch, source: Source, known: Known, today: date) -> Status:
    """Where ``patch`` stands on ``today``, seen from ``source``.

    Raises:
        SourceError: Its stored form, or the vLLM, cannot be read.
    """
    stored = forms.stored(patch)
    newest = mail.read(next(iter(stored.values()))) if stored else None
    since = date.fromisoformat(patch.since) if patch.since else None
    version, merged = source.version, patch.merged_in
    changed = fit(source, patch.watched, known).changed
    gone = [edit.target for edit in patch.edits if find(source, edit.target) is None]
    retire = ""
    if merged and version_key(version) >= version_key(merged):
        retire = f"part of vLLM since {merged}"
    elif newest is not None and forms.contains(source, newest):
        retire = f"vLLM {version} has this very change: say so in merged_in"
    elif len(gone) == len(patch.edits):
        retire = f"vLLM {version} has none of what it edits: has it become needless?"
    return Status(
        name=patch.name,
        age=(today - since).days if since else None,
        upstream=patch.upstream,
        forms=tuple(stored),
        size=newest.size if newest else None,
        changed=changed,
        retire_when=" ".join(patch.retire_when.split()),
        retire=retire,
    )


def _lines(found: list[Status]) -> list[str]:
    width = max((len(each.name) for each in found), default=0) + 2
    lines = []
    for each in found:
        age = "no date" if each.age is None else f"{each.age} days"
        form = (
            f"{each.size} lines for {', '.join(each.forms)}" if each.forms else "none"
        )
        lines.append(
            f"{each.name:<{width}}{age:<10}{each.upstream or 'not sent'}; "
            f"upstream form: {form}"
        )
        lines.append(f"{'':<{width}}until: {each.retire_when}")
        lines += [f"{'':<{width}}changed: {target}" for target in each.changed]
        if each.retire:
            lines.append(f"{'':<{width}}can be retired: {each.retire}")
    return lines
