"""The stored upstream forms, the vLLMs they are for, and what they make of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from vllm_ext import doctor, machine
from vllm_ext.patches import FINGERPRINTS
from vllm_ext.patching.declare import Patch
from vllm_ext.patching.fingerprint import Source, SourceError, read_known, version_key
from vllm_ext.upstream.mail import BadPatchError, FileDiff, Mail, files

PATCHES = FINGERPRINTS.parent
WHEELS = machine.CHECKOUT / ".venv" / "wheels"

# Nothing of the person's own configuration, language or repository (a hook of git's
# says GIT_DIR), and no name: what is made here is thrown away.
_GIT = {
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_NOSYSTEM": "1",
    "LC_ALL": "C.UTF-8",
    **{
        f"GIT_{role}_{what}": value
        for role in ("AUTHOR", "COMMITTER")
        for what, value in (("NAME", "nobody"), ("EMAIL", "nobody@example.com"))
    },
}


def stored(patch: Patch) -> dict[str, Path]:
    """Version -> file, the newest version first."""
    found = {
        path.stem.removeprefix("v"): path
        for path in (PATCHES / patch.name).glob("v*.patch")
    }
    return {label: found[label] for label in sorted(found, key=version_key)[::-1]}


def form_for(patch: Patch, version: str) -> Path | None:
    """The file for a version: its own, or the newest where the two do not differ."""
    forms = stored(patch)
    return forms.get(version) or next(iter(forms.values()), None)


def sources() -> list[Source]:
    """The vLLMs at hand, newest first: the checkout's wheels, the installed one."""
    found = [Source(path) for path in sorted(WHEELS.glob("vllm-*.whl"))]
    try:
        found.append(doctor.open_source(None))
    except SourceError:
        if not found:
            raise SourceError(
                "there is no vLLM here; name a wheel or a folder with --vllm"
            ) from None
    by_version = {source.version: source for source in reversed(found)}
    newest = sorted(by_version, key=version_key, reverse=True)
    return [by_version[label] for label in newest]


def known(source: Source) -> Source:
    """``source``, if it is a vLLM whose code is on record.

    Raises:
        SourceError: It does not say which version it is, or is of another.
    """
    versions = {
        label for labels in read_known(FINGERPRINTS).values() for label in labels
    }
    if source.version not in versions:
        told = ", ".join(sorted(versions, key=version_key))
        raise SourceError(
            f"{source.path} is vLLM {source.version}, which is not on record "
            f"({told}): read `vllm-ext doctor --vllm`, then `vllm-ext pin --vllm`"
        )
    return source


def module_of(path: str) -> str:
    """``vllm/a/b.py`` as a module."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@dataclass(frozen=True)
class Changed:
    """A file before and after a patch; ``before`` is empty if it is new."""

    path: str
    before: str
    after: str

    @property
    def module(self) -> str:
        return module_of(self.path)


def apply(mail: Mail, source: Source, exact: bool) -> list[Changed]:
    """What ``git am`` makes of the files that a patch touches, without fuzz.

    Args:
        mail: The patch.
        source: The vLLM that it is applied to; stays as it is.
        exact: Whether every hunk has to be at the line it says.

    Raises:
        BadPatchError: It does not apply.
    """
    with tempfile.TemporaryDirectory(prefix="vllm-ext-") as folder:
        tree = Path(folder) / "tree"
        before: dict[str, str] = {}
        tree.mkdir()
        for file in mail.files:
            text = source.text(module_of(file.path)) if file.is_code else None
            if text is None and not file.is_new:
                raise BadPatchError(
                    f"{file.path} is not in {source.path}, so that a change of it "
                    "cannot be checked: only files of the package can be changed"
                )
            before[file.path] = text or ""
        _write(tree, {path: text for path, text in before.items() if text})
        written = Path(folder) / "mail.patch"
        written.write_text(mail.unstamped().text(), "utf-8")
        git(tree, "init", "-q")
        git(tree, "add", ".")
        git(tree, "commit", "-q", "--allow-empty", "-m", "stock")
        told = git(tree, "apply", "--check", "--verbose", written)
        if exact and "(offset" in told:
            moved = next(line for line in told.splitlines() if "(offset" in line)
            raise BadPatchError(f"is not for this text: {moved.strip()}")
        git(tree, "am", "-q", "--keep-non-patch", written)
        return [
            Changed(path, text, (tree / path).read_text("utf-8"))
            for path, text in before.items()
        ]


def patched(source: Source, changes: list[Changed]) -> Source:
    """A vLLM in which some files are as they are after these changes."""
    after = {change.module: change.after for change in changes}
    return Source(source.path, source.package, {**source._texts, **after})


def contains(source: Source, mail: Mail) -> bool:
    """Whether a vLLM has what a patch would do to it already: it can be taken back."""
    code = tuple(file for file in mail.files if file.is_code)
    texts = {file.path: source.text(module_of(file.path)) for file in code}
    if None in texts.values():
        return False
    with tempfile.TemporaryDirectory(prefix="vllm-ext-") as folder:
        tree = Path(folder)
        _write(tree, {path: text or "" for path, text in texts.items()})
        (tree / "code.patch").write_text(replace(mail, files=code).text(), "utf-8")
        git(tree, "init", "-q")
        try:
            git(tree, "apply", "--check", "--reverse", "code.patch")
        except BadPatchError:
            return False
        return True


def diff(changes: list[Changed]) -> tuple[FileDiff, ...]:
    """What ``git diff`` says of these changes, with the blobs' whole names."""
    with tempfile.TemporaryDirectory(prefix="vllm-ext-") as folder:
        tree = Path(folder)
        git(tree, "init", "-q")
        for texts in ("before", "after"):
            _write(
                tree,
                {it.path: text for it in changes if (text := getattr(it, texts))},
            )
            git(tree, "add", ".")
            git(tree, "commit", "-q", "--allow-empty", "-m", texts)
        return files(git(tree, "diff", "--full-index", "--no-color", "HEAD~", "HEAD"))


def _write(tree: Path, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")


def git(folder: Path, *arguments: str | Path) -> str:
    """Run git; what it said.

    Raises:
        BadPatchError: It failed; the first line that says why.
    """
    command = shutil.which("git")
    if command is None:
        raise BadPatchError("git is not installed here; the check needs it")
    inherited = {
        name: value for name, value in os.environ.items() if name[:4] != "GIT_"
    }
    done = subprocess.run(
        [command, *map(str, arguments)],
        cwd=folder,
        env={**inherited, **_GIT},
        capture_output=True,
        encoding="utf-8",
    )
    told = done.stdout + done.stderr
    if done.returncode:
        errors = [line for line in told.splitlines() if line.startswith("error: ")]
        line = (errors or told.splitlines() or ["failed"])[0]
        raise BadPatchError(f"git {arguments[0]}: {line.removeprefix('error: ')}")
    return told
