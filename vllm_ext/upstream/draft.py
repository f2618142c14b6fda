"""A form drafted from the Python that runs: each replacement spliced over its target.

Only for edits that replace. No upstream form follows from a wrapper: what it does
before and after the call belongs into what it wraps, and a person puts it there.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vllm_ext.patching.declare import Edit, Patch
from vllm_ext.patching.fingerprint import Definition, Source, find
from vllm_ext.upstream import binding, forms, mail
from vllm_ext.upstream.binding import KERNELS, SPDX, WIDTH
from vllm_ext.upstream.code import imports
from vllm_ext.upstream.forms import Changed
from vllm_ext.upstream.mail import BadPatchError, Mail

_TRITON = {"triton": "triton", "triton.language": "tl"}


def draft(patch: Patch, source: Source) -> Mail:
    """The patch that says in vLLM's files what the replacements of ``patch`` say.

    Message, tests and benchmark are those of the stored form, if there is one.

    Raises:
        BadPatchError: It cannot be drafted; what to do instead.
    """
    kept = next(iter(forms.stored(patch).values()), None)
    stored = mail.read(kept) if kept else None
    if any(edit.how != "replace" for edit in patch.edits):
        raise BadPatchError(
            f"{patch.name} wraps stock code, so its upstream form is finished by hand: "
            f"change a copy of vLLM {source.version} and store what `git format-patch` "
            f"writes as patches/{patch.name}/v{source.version}.patch"
        )
    modules: Mapping[str, str]
    try:
        modules = binding.prose(patch).modules
    except BadPatchError:
        modules = {}  # it is not written yet
    changes = [*_edited(patch, source, modules), *_moved(modules, source)]
    rest = [file for file in stored.files if not file.is_code] if stored else []
    code = mail.parse(f"Subject: x\n\n\n---\n{forms.diff(changes)}").files
    drafted = Mail(
        subject=patch.summary,
        message=stored.message if stored else _why(patch),
        files=(*rest, *code),
        stamps={},
    )
    texts = [*changes, *(Changed(file.path, "", "") for file in rest)]
    problems = binding.lint(drafted, texts)
    if problems:
        raise BadPatchError(f"{patch.name} cannot be drafted: {problems[0]}")
    return drafted


def _why(patch: Patch) -> str:
    """``why`` without the paragraph on the ladder, which means nothing upstream."""
    paragraphs = textwrap.dedent(patch.why).strip().split("\n\n")
    said = [text for text in paragraphs if not text.startswith("Rung ")]
    return "\n\n".join(textwrap.fill(text, 72) for text in said)


# -- files that are edited -------------------------------------------------------------


def _edited(patch: Patch, source: Source, modules: Mapping[str, str]) -> list[Changed]:
    by_module: dict[str, list[Edit]] = {}
    for edit in patch.edits:
        by_module.setdefault(edit.module, []).append(edit)
    changes = []
    for module, edits in by_module.items():
        before = source.text(module)
        path = f"{module.replace('.', '/')}.py"
        if before is None or source.text(f"{module}.__init__") is not None:
            raise BadPatchError(f"{module} is no file of vLLM {source.version}")
        after = before
        for edit in edits:
            after = _spliced(after, edit, source, modules)
        changes.append(Changed(path, before, _formatted(before, after)))
    return changes


def _spliced(text: str, edit: Edit, source: Source, modules: Mapping[str, str]) -> str:
    """``text`` with one target replaced, and what the replacement needs added."""
    found = find(source, edit.target)
    if found is None or len(found.nodes) != 1:
        raise BadPatchError(f"{edit.target} is not one definition in {source.path}")
    ours = _Ours(edit)
    target = _definition(ast.parse(text), edit.target.partition(":")[2])
    lines = text.splitlines()
    new = ours.code(ours.name, as_name=target.name)
    head = target.lineno - 1  # decorators of the target stay
    indent = " " * target.col_offset
    lines[head : target.end_lineno] = textwrap.indent(new, indent).splitlines()
    helpers = [ours.code(name) for name in ours.needed() if name != ours.name]
    if helpers:
        top = _top_level(ast.parse(text), target.lineno)
        have = set(imports(ast.parse(text))) | _defined(ast.parse(text))
        taken = have & set(ours.needed()) - {ours.name}
        if taken:
            raise BadPatchError(f"{edit.module} has a {min(taken)} of its own")
        blocks = "\n\n\n".join(helpers).splitlines()
        lines[top:top] = [*blocks, "", ""]
    return _with_imports("\n".join(lines) + "\n", ours, edit.module, modules)


@dataclass
class _Ours:
    """The module of a replacement, seen from the one function that is spliced."""

    edit: Edit

    def __post_init__(self) -> None:
        module, _, self.name = self.edit.by.partition(":")
        file = binding.our_file(module)
        if file is None:
            raise BadPatchError(f"{module} is no module of vllm-ext")
        self.text = file.read_text("utf-8")
        self.tree = ast.parse(self.text)
        self.imported = imports(self.tree)
        self.globals: dict[str, ast.stmt] = {}
        for node in self.tree.body:
            if isinstance(node, Definition):
                self.globals[node.name] = node
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = (
                    node.targets if isinstance(node, ast.Assign) else [node.target]
                )
                self.globals[ast.unparse(targets[0])] = node
        if self.name not in self.globals:
            raise BadPatchError(f"{self.edit.by} is not defined")

    def used(self) -> set[str]:
        """Names that the function and what it needs look up, ``self``'s type apart."""
        return {
            part.id
            for name in self.needed()
            for part in ast.walk(_without_self_type(self.globals[name]))
            if isinstance(part, ast.Name)
        }

    def needed(self) -> list[str]:
        """The function and the globals of its module that it needs, in their order."""
        found, new = {self.name}, [self.name]
        while new:
            for part in ast.walk(_without_self_type(self.globals[new.pop()])):
                if isinstance(part, ast.Name) and part.id in self.globals:
                    if part.id not in found:
                        new.append(part.id)
                    found.add(part.id)
        return [name for name in self.globals if name in found]

    def code(self, name: str, as_name: str | None = None) -> str:
        """A definition as it is written, under another name."""
        node = self.globals[name]
        start = node.lineno
        if isinstance(node, Definition) and node.decorator_list:
            start = min(each.lineno for each in node.decorator_list)
        lines = self.text.splitlines()[start - 1 : node.end_lineno]
        text = "\n".join(lines)
        if as_name is not None:
            text = re.sub(rf"\b(def|class) {name}\b", rf"\1 {as_name}", text, count=1)
            text = re.sub(r"\b(self|cls): [\w.\[\]]+", r"\1", text, count=1)
        return text


def _without_self_type(node: ast.stmt) -> ast.stmt:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        every = [*node.args.posonlyargs, *node.args.args]
        if every and every[0].arg in ("self", "cls"):
            every[0].annotation = None
    return node


def _definition(tree: ast.Module, qualname: str) -> Definition:
    body: list[ast.stmt] = tree.body
    for name in qualname.split("."):
        node = next(
            each for each in body if isinstance(each, Definition) and each.name == name
        )
        body = node.body
    return node


def _top_level(tree: ast.Module, line: int) -> int:
    """Index of the line where the statement of the module begins that has ``line``."""
    for node in tree.body:
        if node.lineno <= line <= (node.end_lineno or 0):
            decorators = getattr(node, "decorator_list", [])
            return min([node.lineno, *(each.lineno for each in decorators)]) - 1
    return 0


def _defined(tree: ast.Module) -> set[str]:
    return {node.name for node in tree.body if isinstance(node, Definition)}


# -- imports ---------------------------------------------------------------------------


def _with_imports(
    text: str, ours: _Ours, module: str, modules: Mapping[str, str]
) -> str:
    have = imports(ast.parse(text))
    for name in sorted(ours.used() & set(ours.imported)):
        meant = ours.imported[name]
        if meant == module or meant.startswith(f"{module}."):
            if meant != f"{module}.{name}":
                raise BadPatchError(
                    f"{ours.edit.by} calls {module} by the name {name}: finish by hand"
                )
            continue  # it is at home there
        meant = _upstream_name(meant, modules, ours)
        if have.get(name) == meant:
            continue
        if name in have:
            raise BadPatchError(f"{name} means {have[name]} in {module}, not {meant}")
        text = _imported(text, name, meant)
    return text


def _upstream_name(meant: str, modules: Mapping[str, str], ours: _Ours) -> str:
    if meant in _TRITON:
        return f"vllm.triton_utils.{_TRITON[meant]}"
    for theirs_from, theirs in modules.items():
        if meant.startswith(f"{theirs_from}."):
            return theirs + meant.removeprefix(theirs_from)
    if meant.startswith(KERNELS):
        raise BadPatchError(
            f"`modules` in upstream.py does not say what {meant.rpartition('.')[0]} "
            "becomes in vLLM"
        )
    if meant.startswith("vllm_ext."):
        raise BadPatchError(f"{ours.edit.by} uses {meant}, which vLLM does not have")
    return meant


def _imported(text: str, name: str, meant: str) -> str:
    """``text`` that imports one name more, where ruff would put it."""
    tree, lines = ast.parse(text), text.splitlines()
    origin, _, original = meant.rpartition(".")
    plain = not origin or name == meant
    statements = [
        node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    alias = ast.alias(original, name if name != original else None)
    for node in statements:
        if isinstance(node, ast.ImportFrom) and node.module == origin and not plain:
            names = sorted([*node.names, alias], key=_order)
            lines[node.lineno - 1 : node.end_lineno] = _from(origin, names)
            return "\n".join(lines) + "\n"
    new = [f"import {meant}"] if plain else _from(origin, [alias])
    key = _place(None if plain else origin, meant)
    before = [node for node in statements if _key(node) < key]
    if before:
        at, same = before[-1].end_lineno or 0, _key(before[-1])[0] == key[0]
        new = new if same else ["", *new]
    else:
        at = statements[0].lineno - 1 if statements else 0
        same = bool(statements) and _key(statements[0])[0] == key[0]
        new = new if same else [*new, ""]
    lines[at:at] = new
    return "\n".join(lines) + "\n"


def _from(origin: str, names: list[ast.alias]) -> list[str]:
    told = [f"{it.name} as {it.asname}" if it.asname else it.name for it in names]
    line = f"from {origin} import {', '.join(told)}"
    if len(line) <= WIDTH:
        return [line]
    return [f"from {origin} import (", *(f"    {each}," for each in told), ")"]


def _order(alias: ast.alias) -> tuple[int, str]:
    """Constants, classes, functions: as ruff sorts what is imported from a module."""
    name = alias.name
    return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)


def _key(node: ast.Import | ast.ImportFrom) -> tuple[int, bool, str]:
    if isinstance(node, ast.ImportFrom):
        return _place(node.module or "", "")
    return _place(None, node.names[0].name)


def _place(origin: str | None, plain: str) -> tuple[int, bool, str]:
    module = plain if origin is None else origin
    top = module.partition(".")[0]
    section = 0 if top in sys.stdlib_module_names else 2 if top == "vllm" else 1
    return (section, origin is not None, module)


# -- kernels ---------------------------------------------------------------------------


def _moved(modules: Mapping[str, str], source: Source) -> list[Changed]:
    """A new file in vLLM for each kernel's module that the form says it becomes."""
    changes = []
    for module, theirs in modules.items():
        file = binding.our_file(module)
        if file is None:
            raise BadPatchError(f"`modules` names {module}, which is not there")
        if source.text(theirs) is not None:
            raise BadPatchError(f"vLLM {source.version} has a {theirs} already")
        text = file.read_text("utf-8")
        for before, after in modules.items():
            text = text.replace(before, after)
        body = [line for line in text.splitlines() if not line.startswith("# SPDX-")]
        moved = "\n".join([*SPDX, *body]) + "\n"
        used = {name for name, it in imports(ast.parse(moved)).items() if it in _TRITON}
        moved = re.sub(r"^import triton(\.language as tl)?\n", "", moved, flags=re.M)
        for name in sorted(used):
            moved = _imported(moved, name, f"vllm.triton_utils.{name}")
        changes.append(Changed(f"{theirs.replace('.', '/')}.py", "", moved))
    return changes


# -- layout ----------------------------------------------------------------------------


def _formatted(before: str, after: str) -> str:
    """``after`` as ruff formats it, where it is at hand and ``before`` is formatted."""
    ruff = shutil.which("ruff", path=Path(sys.executable).parent) or shutil.which(
        "ruff"
    )
    if ruff is None:
        return after

    def formatted(text: str) -> str:
        done = subprocess.run(
            [ruff, "format", "--isolated", "--line-length", str(WIDTH), "-"],
            input=text,
            capture_output=True,
            text=True,
        )
        return done.stdout if done.returncode == 0 else text

    return formatted(after) if formatted(before) == before else after
