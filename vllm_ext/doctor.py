"""What fits, what is on, and why not: read from files, with no start of vLLM.

Works where neither torch nor vLLM is installed, given a wheel or a folder of vLLM.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_ext import __version__, machine, settings
from vllm_ext.patches import FINGERPRINTS, SERIES
from vllm_ext.patching.declare import Patch
from vllm_ext.patching.fingerprint import (
    Fit,
    Source,
    SourceError,
    find,
    fingerprint,
    fit,
    read_known,
    version_key,
)
from vllm_ext.plugin import PACKAGE, package_folder

ENTRY_POINTS = "vllm.general_plugins"
NAME = "vllm_ext"  # of our entry point: what VLLM_PLUGINS must list

FITS, SKIPPED, OFF, UPSTREAM = "fits", "SKIPPED", "off", "upstream"


def open_source(path: str | None) -> Source:
    """The vLLM at ``path`` (a wheel or a folder), or the installed one.

    Raises:
        SourceError: There is none, or it cannot be read.
    """
    if path is None:
        try:
            return Source(package_folder(), PACKAGE)
        except SourceError:
            raise SourceError(
                "vLLM is not installed here; name a wheel or a folder with --vllm"
            ) from None
    return Source(Path(path), PACKAGE)


@dataclass(frozen=True)
class PatchFit:
    """One patch against one vLLM: whether it would be applied there, and why not."""

    patch: Patch
    verdict: str
    fit: Fit
    reason: str = ""

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.patch.name,
            "verdict": self.verdict,
            "as_in": self.fit.version,
            "reason": self.reason,
            "changed": list(self.fit.changed),
            "edits": len(self.patch.edits),
            "relies_on": len(self.patch.relies_on),
        }


def judge(source: Source, chosen: settings.Settings) -> list[PatchFit]:
    """Every patch of the series against ``source`` under the settings ``chosen``."""
    known = read_known(FINGERPRINTS)
    verdicts = []
    for patch in SERIES:
        found = fit(source, patch.watched, known)
        merged = patch.merged_in
        if merged and version_key(source.version) >= version_key(merged):
            verdict, reason = UPSTREAM, f"part of vLLM {merged}"
        elif found.version is None:
            verdict, reason = SKIPPED, "; ".join(found.problems)
        elif not chosen.enabled:
            verdict, reason = OFF, "VEXT=0"
        elif patch.name not in chosen.patches:
            verdict = OFF
            reason = f"enable with VEXT_PATCHES=+{patch.name}"
        else:
            verdict, reason = FITS, ""
        verdicts.append(PatchFit(patch, verdict, found, reason))
    return verdicts


def examine(vllm: str | None) -> dict[str, Any]:
    """Environment and fit of every patch.

    Returns:
        ``machine``, ``vllm``, ``settings``, ``attention`` (one line per thing that
        keeps a patch from working) and ``patches``.
    """
    source = open_source(vllm)
    chosen = settings.parse(os.environ, {patch.name: patch.default for patch in SERIES})
    verdicts = judge(source, chosen)
    attention = list(chosen.problems)
    if vllm is None:
        attention += _shut_out(chosen)
    attention += [
        f"{each.patch.name} is skipped: {each.reason}"
        for each in verdicts
        if each.verdict == SKIPPED and each.patch.name in chosen.patches
    ]
    return {
        "vllm_ext": __version__,
        "machine": machine.describe(),
        "vllm": {"version": source.version, "path": str(source.path)},
        "settings": {
            name: os.environ[name]
            for name in (*settings.VARIABLES, "VLLM_PLUGINS")
            if name in os.environ
        },
        "attention": attention,
        "patches": [each.as_json() for each in verdicts],
    }


def _shut_out(chosen: settings.Settings) -> Iterator[str]:
    """Why vLLM would not call the plugin at all."""
    registered = importlib.metadata.entry_points(group=ENTRY_POINTS)
    if NAME not in registered.names:
        yield (
            "vllm-ext is not registered as a plugin of this Python; "
            "install it with pip (a checkout on PYTHONPATH is not enough)"
        )
    plugins = os.environ.get("VLLM_PLUGINS")
    if plugins is not None and NAME not in plugins.split(","):  # vLLM strips nothing
        yield (
            f"VLLM_PLUGINS={plugins!r} keeps vLLM from loading vllm-ext; "
            f"add {NAME} to it or unset it"
        )
    if not chosen.enabled:
        yield "VEXT=0 turns the plugin off"


def differences(old: Source, new: Source, targets: list[str]) -> str:
    """Unified diff of each of ``targets`` from ``old`` to ``new``."""
    texts: list[str] = []
    for target in targets:
        before, after = find(old, target), find(new, target)
        texts += difflib.unified_diff(
            before.source.splitlines(keepends=True) if before else [],
            after.source.splitlines(keepends=True) if after else [],
            f"{old.version}/{target}",
            f"{new.version}/{target}",
        )
    return "".join(texts)


# -- one target ------------------------------------------------------------------------


@dataclass(frozen=True)
class TargetStory:
    """A target as a patch author wants to know it.

    Attributes:
        history: Known version -> fingerprint, from ``fingerprints.json``.
        copies: Modules that hold a copy made by ``from x import f``.
        callers: ``module:line`` of what looks like a call.
    """

    target: str
    version: str
    source: str
    line: int
    length: int
    fingerprint: str
    history: dict[str, str]
    copies: list[str]
    callers: list[str]


def tell(source: Source, target: str) -> TargetStory:
    """Everything a patch author asks about ``"module:Qualified.name"``.

    Raises:
        SourceError: There is no such function or class.
    """
    found = find(source, target)
    if found is None:
        raise SourceError(
            f"{target} is not a function or class of vLLM {source.version}; "
            "write it as package.module:Qualified.name"
        )
    module, _, qualname = target.partition(":")
    name = qualname.rpartition(".")[2]
    imports = re.compile(
        rf"^\s*from {re.escape(module)} import (\([^)]*\b{name}\b|.*\b{name}\b)",
        re.MULTILINE,
    )
    call = re.compile(rf"(?<!def )(?<!class )\b{re.escape(name)}[(\[]")
    copies, callers = [], []
    for other in source.modules():
        text = source.text(other) or ""
        if name not in text:
            continue
        if "." not in qualname and imports.search(text):
            copies.append(other)
        callers += [
            f"{other}:{number}"
            for number, line in enumerate(text.splitlines(), start=1)
            if call.search(line)
        ]
    return TargetStory(
        target=target,
        version=source.version,
        source=found.source,
        line=found.line,
        length=found.length,
        fingerprint=found.fingerprint(),
        history=dict(read_known(FINGERPRINTS).get(target, {})),
        copies=copies,
        callers=callers,
    )


# -- recording -------------------------------------------------------------------------


@dataclass(frozen=True)
class Pinned:
    """What ``pin`` did: targets recorded, and patches refused with their targets."""

    version: str
    recorded: list[str]
    refused: dict[str, list[str]]


def pin(source: Source, accept: list[str]) -> Pinned:
    """Record the fingerprints of ``source`` for every watched target.

    A target whose code is not that of the newest version on record is refused, and
    with it nothing of that patch is recorded, until the patch is accepted by name:
    somebody has read the difference and run its tests.

    Raises:
        SourceError: The version is not stated, a patch name is unknown, or the
            record cannot be written.
    """
    version = source.version
    if not version_key(version):
        raise SourceError(f"{source.path} does not state its version")
    names = [patch.name for patch in SERIES]
    for name in accept:
        if name not in names:
            raise SourceError(f"unknown patch {name}; known are {', '.join(names)}")
    old = read_known(FINGERPRINTS)
    watched = {target for patch in SERIES for target in patch.watched}
    known = {target: dict(old.get(target, {})) for target in sorted(watched)}
    recorded: list[str] = []
    refused: dict[str, list[str]] = {}
    for patch in SERIES:
        new = {target: fingerprint(source, target) for target in patch.watched}
        changed = [
            target
            for target, digest in new.items()
            if digest is None
            or (old.get(target) and digest not in old[target].values())
            or old.get(target, {}).get(version, digest) != digest
        ]
        gone = [target for target in changed if new[target] is None]
        if gone or (changed and patch.name not in accept):
            refused[patch.name] = changed
            continue
        for target, digest in new.items():
            if known[target].get(version) != digest:
                known[target][version] = str(digest)
                recorded.append(target)
    for digests in known.values():
        for label in sorted(digests, key=version_key):
            digests[label] = digests.pop(label)
    try:
        FINGERPRINTS.write_text(json.dumps(known, indent=1) + "\n")
    except OSError as error:
        raise SourceError(f"{FINGERPRINTS} cannot be written: {error}") from None
    return Pinned(version, sorted(set(recorded)), refused)
