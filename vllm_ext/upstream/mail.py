"""A patch as `git am` takes it: header, message, stamps, and a diff for each file.

Between the line ``---`` and the first diff git keeps nothing. That is where a stored
patch carries its stamps (`vllm_ext.upstream.binding`), so that an exported one is the
same mail without them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from vllm_ext.patching.fingerprint import SourceError

AUTHOR = "Your Name <your.email@example.com>"
STAMPS = "Finished by hand; `vllm-ext export --stamp` says that somebody compared both."
_STAMP = re.compile(r"^Stamp: (\S+ \S+) ([0-9a-f]{12})$")
_HUNK = re.compile(r"^@@ -\d+(?:,(\d+))? \+\d+(?:,(\d+))? @@")
_MODES = re.compile(r"^(old mode|new mode|new file mode (?!100644$))", re.MULTILINE)
# What a form may be about: an edit of anything else would be compared with nothing.
_PLACE = re.compile(r"^(vllm/.*\.py|tests/.*|benchmarks/.*)$")
_GIT = re.compile(r"^diff --git a/(\S+) b/(\S+)$")


class BadPatchError(SourceError):
    """One line: which patch or folder, what is wrong with it, what to do."""


@dataclass(frozen=True)
class FileDiff:
    """What a patch does to one file.

    Attributes:
        path: From the root of vLLM's repository, after the change.
        text: From ``diff --git`` to the last line of the last hunk.
    """

    path: str
    text: str

    @property
    def is_new(self) -> bool:
        return "\nnew file mode " in self.text.partition("\n@@")[0]

    @property
    def is_code(self) -> bool:
        """Whether it is part of vLLM, rather than a test or a benchmark of it."""
        return self.path.startswith("vllm/")

    @property
    def added(self) -> list[str]:
        """The lines that it adds."""
        return [line[1:] for line in self._body if line.startswith("+")]

    @property
    def removed(self) -> list[str]:
        """The lines that it removes."""
        return [line[1:] for line in self._body if line.startswith("-")]

    @property
    def _body(self) -> list[str]:
        return self.text.partition("\n@@")[2].split("\n")[1:]


@dataclass(frozen=True)
class Mail:
    """A patch for one version of vLLM.

    Attributes:
        subject: Without ``[PATCH]``.
        message: Below it: what a commit says, and a pull request as its purpose.
        stamps: ``"plugin name"`` or ``"upstream module:name"`` -> digest.
        files: In the order of the mail.
    """

    subject: str
    message: str
    files: tuple[FileDiff, ...]
    stamps: dict[str, str]

    @property
    def size(self) -> int:
        """Lines added and removed in vLLM itself."""
        code = [file for file in self.files if file.is_code]
        return sum(len(file.added) + len(file.removed) for file in code)

    def unstamped(self) -> Mail:
        """As it is sent."""
        return replace(self, stamps={})

    def text(self) -> str:
        """The mail. What it was parsed from, if that was written here."""
        stamps = "".join(f"Stamp: {key} {self.stamps[key]}\n" for key in self.stamps)
        stat = "".join(
            f" {file.path} | +{len(file.added)} -{len(file.removed)}\n"
            for file in self.files
        )
        return (
            f"From {'0' * 40} Mon Sep 17 00:00:00 2001\n"
            f"From: {AUTHOR}\n"
            f"Subject: [PATCH] {self.subject}\n\n{self.message}\n\n---\n"
            + (f"{STAMPS}\n\n{stamps}\n" if stamps else "")
            + f"{stat}\n"
            + "".join(file.text for file in self.files)
            + "-- \nvllm-ext\n"
        )


def read(path: Path) -> Mail:
    """The patch in a file.

    Raises:
        BadPatchError: It is not there, or is no such mail.
    """
    try:
        return parse(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise BadPatchError(f"{path} cannot be read: {error}") from None
    except BadPatchError as error:
        raise BadPatchError(f"{path}: {error}") from None


def parse(text: str) -> Mail:
    """A mail as `git format-patch` or `Mail.text` writes it.

    Raises:
        BadPatchError: It is not one.
    """
    start = re.search(r"^diff --git ", text, re.MULTILINE)
    if start is None:
        raise BadPatchError("holds no `diff --git`")
    head, _, below = text[: start.start()].partition("\n---\n")
    header, _, message = head.partition("\n\n")
    subject = re.search(r"^Subject: (.*(?:\n[ \t].*)*)", header, re.MULTILINE)
    if subject is None:
        raise BadPatchError("has no Subject; store what `git format-patch` writes")
    matches = [_STAMP.match(line) for line in below.splitlines()]
    one_line = re.sub(r"\n[ \t]+", " ", subject[1])
    return Mail(
        subject=one_line.removeprefix("[PATCH] "),
        message=message.strip(),
        files=files(text[start.start() :]),
        stamps={match[1]: match[2] for match in matches if match},
    )


def files(text: str) -> tuple[FileDiff, ...]:
    """Each file's diff, of what ``git diff`` says: every line is accounted for.

    Raises:
        BadPatchError: It is not what git says.
    """
    # Not splitlines(): it ends a line at a form feed, too, and git does not.
    lines = re.findall(r"[^\n]*\n|[^\n]+", text)
    found: list[FileDiff] = []
    at = 0
    while at < len(lines) and lines[at].startswith("diff --git "):
        begin = at
        names = _GIT.match(lines[at].rstrip("\n"))
        if names is None or names[1] != names[2]:
            raise BadPatchError(f"`{lines[at].strip()}`: paths differ or hold a space")
        if ".." in Path(names[1]).parts or names[1].startswith("/"):
            raise BadPatchError(f"{names[1]} lies outside the tree")
        if not _PLACE.match(names[1]):
            raise BadPatchError(
                f"{names[1]} is neither Python of vllm/, nor in tests/ or benchmarks/"
            )
        at += 1
        while at < len(lines) and not lines[at].startswith(("@@ ", "diff --git ")):
            if _MODES.match(lines[at]):
                raise BadPatchError(f"{names[1]}: `{lines[at].strip()}` is not handled")
            if lines[at].startswith(("rename ", "copy ", "GIT binary", "deleted ")):
                raise BadPatchError(f"{names[1]}: `{lines[at].strip()}` is not handled")
            at += 1
        if at == len(lines) or not lines[at].startswith("@@ "):
            raise BadPatchError(f"{names[1]} has no hunk")
        while at < len(lines) and lines[at].startswith("@@ "):
            at = _past_hunk(lines, at, names[1])
        found.append(FileDiff(names[1], "".join(lines[begin:at])))
    if at < len(lines) and lines[at].rstrip("\n") not in ("-- ", ""):
        raise BadPatchError(f"a hunk of {found[-1].path} ends where it should not")
    # Below the signature git goes on looking for diffs, and would apply them.
    if any(line.startswith(("diff ", "--- ", "@@ ")) for line in lines[at:]):
        raise BadPatchError(f"goes on below what ends it, after {found[-1].path}")
    return tuple(found)


def _past_hunk(lines: list[str], at: int, path: str) -> int:
    counts = _HUNK.match(lines[at])
    if counts is None:
        raise BadPatchError(f"{path}: `{lines[at].strip()}` is no hunk")
    old, new = (int(count) if count is not None else 1 for count in counts.groups())
    at += 1
    while old > 0 or new > 0:
        kind = lines[at][0] if at < len(lines) else ""
        if kind not in (" ", "+", "-", "\n", "\\") or not kind:
            raise BadPatchError(f"a hunk of {path} is cut short")
        old -= kind in (" ", "-", "\n")
        new -= kind in (" ", "+", "\n")
        at += 1
    if at < len(lines) and lines[at].startswith("\\"):
        at += 1
    return at
