"""``vllm-ext export``: a patch as a pull request, in files. It sends nothing."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from vllm_ext import doctor
from vllm_ext.patches import SERIES
from vllm_ext.patching.declare import Patch
from vllm_ext.patching.fingerprint import Source
from vllm_ext.upstream import binding, draft, forms, mail, pullrequest
from vllm_ext.upstream.mail import BadPatchError, Mail


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("name", nargs="*", metavar="NAME", help="a patch")
    parser.add_argument(
        "-o",
        dest="folder",
        metavar="DIR",
        help="write the patch and PR.md there (default: print the patch)",
    )
    parser.add_argument(
        "--vllm",
        metavar="WHEEL|TREE",
        help="a vLLM wheel, or a folder that holds vllm/ (default: the newest at hand)",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--check",
        action="store_true",
        help="whether the stored patches apply and say what the plugin runs",
    )
    what.add_argument(
        "--stamp",
        action="store_true",
        help="record that somebody has compared a stored patch with the plugin's code",
    )
    what.add_argument(
        "--draft",
        action="store_true",
        help="make the patch from the replacements, though one is stored",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Check, stamp, or write a patch; the exit status."""
    named = [patch_named(name) for name in args.name]
    if args.folder is not None and (args.check or args.stamp):
        raise BadPatchError(
            "-o is where a patch is written; --check and --stamp are not"
        )
    if args.check:
        return _check(named or list(SERIES), at_hand(args.vllm), args.json)
    if args.stamp and named:
        stamped = [
            str(path)
            for patch in named
            for path in binding.stamp(patch, at_hand(args.vllm))
        ]
        told = "\n".join(stamped) or "both sides are as they were"
        print(json.dumps(stamped, indent=1) if args.json else told)
        return 0
    if args.stamp or len(named) != 1:
        raise BadPatchError("name a patch; `vllm-ext patches` lists them")
    (patch,) = named
    source = at_hand(args.vllm)[0]
    form = form_of(patch, source, args.draft)
    if args.folder is None:
        text = form.unstamped().text()
        print(json.dumps({"patch": text}, indent=1) if args.json else text, end="")
        return 0
    declared = binding.prose(patch)
    files = {
        f"0001-{patch.name}.patch": form.unstamped().text(),
        "PR.md": pullrequest.text(patch, declared, form, source.version),
    }
    written = _write(Path(args.folder), files)
    print(json.dumps(written, indent=1) if args.json else "\n".join(written))
    return 0


def _write(folder: Path, files: dict[str, str]) -> list[str]:
    """Put ``files`` into a new or empty folder; their paths.

    Raises:
        BadPatchError: There is something in it, or it cannot be made.
    """
    try:
        if folder.is_dir() and any(folder.iterdir()):
            raise BadPatchError(f"{folder} is not empty; name a new folder with -o")
        folder.mkdir(exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text, "utf-8")
    except OSError as error:
        raise BadPatchError(f"{folder} cannot be written: {error.strerror}") from None
    return [str(folder / name) for name in files]


def patch_named(name: str) -> Patch:
    """A patch of the series.

    Raises:
        BadPatchError: There is none of this name.
    """
    by_name = {patch.name: patch for patch in SERIES}
    if name not in by_name:
        raise BadPatchError(f"unknown patch {name}; known are {', '.join(by_name)}")
    return by_name[name]


def at_hand(vllm: str | None) -> list[Source]:
    """The vLLM that was named, or all that are here, newest first.

    Raises:
        SourceError: There is none, or it is of a version that is not on record.
    """
    found = forms.sources() if vllm is None else [doctor.open_source(vllm)]
    return [forms.known(source) for source in found]


def form_of(patch: Patch, source: Source, draft_anew: bool = False) -> Mail:
    """The stored form for a vLLM; that of another one, put on it; or a draft.

    Raises:
        BadPatchError: None of them is possible.
    """
    if draft_anew or not forms.stored(patch):
        return draft.draft(patch, source)
    path = forms.form_for(patch, source.version)
    assert path is not None
    form = mail.read(path)
    if source.version in forms.stored(patch):
        return form
    try:
        source = binding.beneath(binding.prose(patch), source)
        changes = forms.apply(form, source, exact=False)
    except BadPatchError as error:
        raise BadPatchError(
            f"{patch.name}/{path.name} does not fit vLLM {source.version}, and there "
            f"is no v{source.version}.patch: {error}"
        ) from None
    return replace(form, files=forms.diff(changes))


def _check(patches: list[Patch], sources: list[Source], as_json: bool) -> int:
    found = {patch.name: binding.check(patch, sources) for patch in patches}
    if as_json:
        print(json.dumps(found, indent=1))
        return 1 if any(found.values()) else 0
    width = max(map(len, found), default=0) + 2
    for patch in patches:
        problems = found[patch.name]
        told = ", ".join(forms.stored(patch))
        for line in problems or [f"applies, and says what the plugin runs: {told}"]:
            print(f"{patch.name:<{width}}{line}")
    return 1 if any(found.values()) else 0
