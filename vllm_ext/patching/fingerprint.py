"""Recognise upstream code by its text, in a folder or in a wheel, without importing it.

A fingerprint is a hash of the source lines of one function or class, with
docstring, comment lines and blank lines left out. Only text is hashed, so it is the
same under every Python that can parse the file.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class SourceError(Exception):
    """One line: what cannot be read, and what would be accepted."""


@dataclass
class Source:
    """The Python files of one package: a folder that holds it, or a wheel.

    Attributes:
        path: Folder that holds the package's folder, or the wheel file.
        package: Name of the package.
    """

    path: Path
    package: str = "vllm"
    _texts: dict[str, str | None] = field(default_factory=dict, repr=False)
    _trees: dict[str, ast.Module] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._wheel: zipfile.ZipFile | None = None
        if self.path.is_dir():
            # Either the folder above the package or the package's own folder.
            if (self.path / "__init__.py").is_file() and self.path.name == self.package:
                self.path = self.path.parent
            if not (self.path / self.package / "__init__.py").is_file():
                raise SourceError(f"{self.path} holds no `{self.package}`")
            return
        try:
            self._wheel = zipfile.ZipFile(self.path)
            self._wheel.getinfo(f"{self.package}/__init__.py")
        except FileNotFoundError:
            raise SourceError(
                f"{self.path} does not exist; name a wheel or folder of {self.package}"
            ) from None
        except (zipfile.BadZipFile, OSError) as error:
            raise SourceError(f"{self.path} is not a readable wheel: {error}") from None
        except KeyError:
            raise SourceError(f"{self.path} holds no `{self.package}`") from None

    def _read(self, name: str) -> str | None:
        try:
            if self._wheel is None:
                path = self.path / name
                return path.read_text("utf-8") if path.is_file() else None
            return self._wheel.read(name).decode("utf-8")
        except KeyError:
            return None
        except (OSError, UnicodeDecodeError, zipfile.BadZipFile, zlib.error) as error:
            raise SourceError(f"{name} in {self.path} is damaged: {error}") from None

    def text(self, module: str) -> str | None:
        """Source text of ``module``, or ``None`` where there is no such file."""
        if module not in self._texts:
            stem = module.replace(".", "/")
            text = self._read(f"{stem}.py")
            self._texts[module] = (
                text if text is not None else self._read(f"{stem}/__init__.py")
            )
        return self._texts[module]

    def tree(self, module: str) -> ast.Module | None:
        """Syntax tree of ``module``, parsed once."""
        if module not in self._trees:
            text = self.text(module)
            if text is None:
                return None
            try:
                self._trees[module] = ast.parse(text)
            except SyntaxError as error:
                raise SourceError(
                    f"{module} in {self.path} does not parse: {error}"
                ) from None
        return self._trees[module]

    def forget(self) -> None:
        """Drop what was read and parsed; it is read again if asked for."""
        self._texts.clear()
        self._trees.clear()

    def modules(self) -> Iterator[str]:
        """Every module of the package that is a Python file."""
        if self._wheel is None:
            names: Iterator[str] = (
                path.relative_to(self.path).as_posix()
                for path in sorted((self.path / self.package).rglob("*.py"))
            )
        else:
            names = iter(sorted(self._wheel.namelist()))
        for name in names:
            if name.startswith(f"{self.package}/") and name.endswith(".py"):
                yield name[:-3].replace("/", ".").removesuffix(".__init__")

    @property
    def version(self) -> str:
        """The package's version as its own files state it, or ``unknown``."""
        text = self.text(f"{self.package}._version") or ""
        found = re.search(r"^__version__\b[^'\"\n]*['\"]([^'\"]+)", text, re.MULTILINE)
        return found[1] if found else "unknown"


@dataclass(frozen=True)
class Found:
    """Where a target is defined: every definition of the name, in order."""

    module: str
    lines: tuple[str, ...]
    nodes: tuple[Definition, ...]

    @property
    def source(self) -> str:
        """The definitions as written, decorators included."""
        return "\n\n".join("\n".join(self._span(node)) for node in self.nodes) + "\n"

    @property
    def length(self) -> int:
        """Lines of all definitions, decorators included."""
        return sum(len(self._span(node)) for node in self.nodes)

    @property
    def line(self) -> int:
        """Line of the first definition in its file."""
        return _first_line(self.nodes[0])

    @property
    def decorated(self) -> bool:
        return any(node.decorator_list for node in self.nodes)

    def _span(self, node: Definition) -> tuple[str, ...]:
        return self.lines[_first_line(node) - 1 : node.end_lineno]

    def fingerprint(self) -> str:
        """12 hexadecimal digits over the code of all definitions."""
        code: list[str] = []
        for node in self.nodes:
            code += self._code(node)
        return hashlib.sha256("\n".join(code).encode()).hexdigest()[:12]

    def _code(self, node: Definition) -> Iterator[str]:
        docstring = range(0)
        if ast.get_docstring(node, clean=False) is not None:
            docstring = range(node.body[0].lineno, _end(node.body[0]) + 1)
        inside_strings = {
            number
            for part in ast.walk(node)
            if isinstance(part, ast.Constant | ast.JoinedStr)
            for number in range(part.lineno + 1, _end(part) + 1)
        }
        for number, line in enumerate(self._span(node), start=_first_line(node)):
            if number in docstring:
                continue
            if number in inside_strings:
                yield line
                continue
            indent, line = line[: node.col_offset], line[node.col_offset :].rstrip()
            if line and not line.lstrip().startswith("#"):
                yield indent.strip() + line


def _first_line(node: Definition) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])


def _end(node: ast.expr | ast.stmt) -> int:
    return node.end_lineno or node.lineno


def _definitions(body: list[ast.stmt], name: str) -> Iterator[Definition]:
    """Definitions of ``name`` in ``body``, also those under ``if`` and ``try``."""
    for node in body:
        if isinstance(node, Definition):
            if node.name == name:
                yield node
            continue
        for part in ("body", "orelse", "handlers", "finalbody"):
            inner = getattr(node, part, [])
            for entry in inner if isinstance(inner, list) else []:
                nested = entry.body if isinstance(entry, ast.ExceptHandler) else [entry]
                yield from _definitions(nested, name)


def find(source: Source, target: str) -> Found | None:
    """The definitions of ``"package.module:Qualified.name"``, or ``None``."""
    module, _, qualname = target.partition(":")
    tree = source.tree(module)
    if tree is None or not qualname:
        return None
    bodies = [tree.body]
    nodes: list[Definition] = []
    for name in qualname.split("."):
        nodes = [node for body in bodies for node in _definitions(body, name)]
        bodies = [node.body for node in nodes]
    if not nodes:
        return None
    text = source.text(module) or ""
    return Found(module, tuple(text.splitlines()), tuple(nodes))


def fingerprint(source: Source, target: str) -> str | None:
    """Hash of ``target``'s code, or ``None`` where it is gone."""
    found = find(source, target)
    return found.fingerprint() if found else None


Known = dict[str, dict[str, str]]  # target -> {version: fingerprint}


@dataclass(frozen=True)
class Fit:
    """Whether the code under a patch is code it was written for.

    Attributes:
        version: Known version whose code all watched objects have; ``None`` if none.
        problems: Per object that stands in the way, one clause.
        changed: The targets behind ``problems``.
    """

    version: str | None
    problems: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()


def fit(source: Source, watched: tuple[str, ...], known: Known) -> Fit:
    """Compare ``watched`` with ``known``: all of it must be of one known version."""
    found = {target: fingerprint(source, target) for target in watched}
    versions = [
        {label for label, digest in known.get(target, {}).items() if digest == have}
        for target, have in found.items()
    ]
    common = set.intersection(*versions) if versions else set()
    if common:
        installed = source.version
        return Fit(installed if installed in common else max(common, key=version_key))
    problems, changed = [], []
    for (target, have), labels in zip(found.items(), versions, strict=True):
        if labels:
            continue
        changed.append(target)
        if have is None:
            problems.append(f"{target} is gone")
        elif target not in known:
            problems.append(f"{target} has no recorded fingerprint")
        else:
            problems.append(f"{target} changed ({have})")
    if not problems:  # each is known, but no one version has them all
        newest = max(set.union(*versions), key=version_key)
        changed = [
            target
            for target, labels in zip(found, versions, strict=True)
            if newest not in labels
        ]
        problems = [f"{target} is not the one of {newest}" for target in changed]
    return Fit(None, tuple(problems), tuple(changed))


def read_known(path: Path) -> Known:
    """The recorded fingerprints.

    Raises:
        SourceError: The file is missing or is not what ``vllm-ext pin`` writes.
    """
    try:
        known = json.loads(path.read_text("utf-8"))
        for digests in known.values():
            digests.items()
    except (OSError, ValueError, AttributeError) as error:
        raise SourceError(
            f"{path} cannot be read ({error}); reinstall vllm-ext"
        ) from None
    return dict(known)


def version_key(version: str) -> tuple[int, ...]:
    """Sort key of a release number; what is not a number counts as nothing."""
    release = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in release[0].split(".")) if release else ()
