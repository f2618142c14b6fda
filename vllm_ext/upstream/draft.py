"""A form drafted from the Python that runs: each replacement spliced over its target.

Only for edits that replace. No upstream form follows from a wrapper: what it does
before and after the call belongs into what it wraps, and a person puts it there. The
kernels that it calls can be moved all the same, into a form that is stored.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from vllm_ext.patching.declare import Edit, Patch
from vllm_ext.patching.fingerprint import Definition, Source, find
from vllm_ext.upstream import binding, forms, mail
from vllm_ext.upstream.binding import KERNELS, SPDX, WIDTH
from vllm_ext.upstream.code import imports
from vllm_ext.upstream.forms import Changed
from vllm_ext.upstream.mail import BadPatchError, Mail

_LAYOUT = f'line-length = {WIDTH}\nlint.isort.known-first-party = ["vllm"]'
_TRITON = {"triton": "triton", "triton.language": "tl"}


# How a kernel of ours asks for the number of multiprocessors, and how vLLM does.
_MULTIPROCESSORS = re.compile(
    r"properties = torch\.cuda\.get_device_properties\(device\)\n"
    r"\s+(\w+) = properties\.multi_processor_count"
)
_PLATFORM, _COUNT = "vllm.utils.platform_utils", "num_compute_units"


def draft(patch: Patch, source: Source) -> Mail:
    """The patch that says in vLLM's files what the replacements of ``patch`` say.

    Message, tests and benchmark are those of the stored form, if there is one, and so
    is everything but kernels where edits wrap.

    Raises:
        BadPatchError: It cannot be drafted; what to do instead.
    """
    kept = next(iter(forms.stored(patch).values()), None)
    stored = mail.read(kept) if kept else None
    modules: Mapping[str, str]
    try:
        modules = binding.prose(patch).modules
    except BadPatchError:
        modules = {}  # it is not written yet
    splices = all(edit.how == "replace" for edit in patch.edits)
    if not splices and not (stored and modules):
        raise BadPatchError(
            f"{patch.name} wraps stock code, so its upstream form is finished by hand: "
            f"change a copy of vLLM {source.version} and store what `git format-patch` "
            f"writes as patches/{patch.name}/v{source.version}.patch"
        )
    changes = _moved(modules, source)
    if splices:
        changes += _edited(patch, source, modules)
    made = {change.path for change in changes}
    rest = [
        file
        for file in (stored.files if stored else ())
        if file.path not in made and not (splices and file.is_code)
    ]
    drafted = Mail(
        subject=patch.summary,
        message=stored.message if stored else _why(patch),
        files=(*rest, *forms.diff(changes)),
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
    tree = ast.parse(text)
    helpers = [name for name in ours.needed() if name != ours.name]
    taken = ours.taken(tree) & set(helpers)
    if taken:
        raise BadPatchError(f"{edit.module} has a {min(taken)} of its own")
    wanted = [_wanted(name, ours, modules) for name in sorted(ours.used())]
    have = {meant: name for name, meant in imports(tree).items()}
    at_home = {
        each.meant: each.original for each in wanted if each.origin == edit.module
    }
    names = {
        each.name: {**have, **at_home}[each.meant]
        for each in wanted
        if each.meant in have or each.meant in at_home
    }
    missing = [each for each in wanted if each.name not in names]
    for each in missing:
        if each.name in ours.taken(tree):
            raise BadPatchError(f"{edit.module} has a {each.name} of its own")

    target = _definition(tree, edit.target.partition(":")[2])
    lines = text.splitlines()
    new = ours.code(ours.name, names, as_name=target.name)
    indented = textwrap.indent(new, " " * target.col_offset).splitlines()
    lines[target.lineno - 1 : target.end_lineno] = indented  # its decorators stay
    if helpers:
        top = _top_level(tree, target.lineno)
        blocks = "\n\n\n".join(ours.code(name, names) for name in helpers)
        lines[top:top] = [*blocks.splitlines(), "", ""]
    text = "\n".join(lines) + "\n"
    for each in missing:
        text = _imported(text, each)
    return text


@dataclass(frozen=True)
class _Import:
    """One imported name: ``from origin import original as name``, or plain."""

    origin: str | None
    original: str
    name: str

    @property
    def meant(self) -> str:
        return f"{self.origin}.{self.original}" if self.origin else self.original


@dataclass
class _Ours:
    """The module of a replacement, seen from the one function that is spliced."""

    edit: Edit

    def __post_init__(self) -> None:
        module, _, self.name = self.edit.by.partition(":")
        file = binding.our_file(module)
        if file is None:
            raise BadPatchError(f"{module} is no module of vllm-ext")
        self.lines = file.read_text("utf-8").splitlines()
        tree = ast.parse("\n".join(self.lines))
        self.imported = {each.name: each for each in _imports(tree)}
        self.globals = _globals(tree)
        if self.name not in self.globals:
            raise BadPatchError(f"{self.edit.by} is not defined")
        for node in self.globals.values():
            own = _own_argument(node)
            if own is not None:
                own.annotation = None

    def taken(self, tree: ast.Module) -> set[str]:
        """Names that mean something in vLLM's file already."""
        return {*imports(tree), *_globals(tree)}

    def used(self) -> set[str]:
        """Imported names that the function and what it needs look up."""
        found = {
            part.id
            for name in self.needed()
            for part in ast.walk(self.globals[name])
            if isinstance(part, ast.Name)
        }
        return found & set(self.imported)

    def needed(self) -> list[str]:
        """The function and the globals of its module that it needs, in their order."""
        found, new = {self.name}, [self.name]
        while new:
            for part in ast.walk(self.globals[new.pop()]):
                if isinstance(part, ast.Name) and part.id in self.globals:
                    if part.id not in found:
                        new.append(part.id)
                    found.add(part.id)
        return [name for name in self.globals if name in found]

    def code(
        self, name: str, names: Mapping[str, str], as_name: str | None = None
    ) -> str:
        """A definition as it is written, with imported names as they are upstream."""
        node = self.globals[name]
        decorators = node.decorator_list if isinstance(node, Definition) else []
        start = min([node.lineno, *(each.lineno for each in decorators)])
        lines = [line.encode() for line in self.lines]
        parts = [part for part in ast.walk(node) if isinstance(part, ast.Name)]
        for part in sorted(parts, key=lambda part: (part.lineno, -part.col_offset)):
            line, after = (
                lines[part.lineno - 1],
                part.col_offset + len(part.id.encode()),
            )
            new = names.get(part.id, part.id).encode()
            lines[part.lineno - 1] = line[: part.col_offset] + new + line[after:]
        chosen = lines[start - 1 : node.end_lineno]
        text = b"\n".join(chosen).decode()
        if as_name is not None:
            text = re.sub(rf"\b(def|class) {name}\b", rf"\1 {as_name}", text, count=1)
        if _own_argument(node) is not None:
            text = re.sub(r"\b(self|cls): [\w.]+(\[\w.]*\])?", r"\1", text, count=1)
        return text


def _imports(tree: ast.Module) -> Iterator[_Import]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                name = alias.asname or alias.name
                yield _Import(None, alias.name, name)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield _Import(node.module, alias.name, alias.asname or alias.name)


def _globals(tree: ast.Module) -> dict[str, ast.stmt]:
    found: dict[str, ast.stmt] = {}
    for node in tree.body:
        if isinstance(node, Definition):
            found[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            found[ast.unparse(target)] = node
    return found


def _own_argument(node: ast.stmt) -> ast.arg | None:
    """``self`` or ``cls``, whose type is what upstream's class is."""
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return None
    first = [*node.args.posonlyargs, *node.args.args][:1]
    return first[0] if first and first[0].arg in ("self", "cls") else None


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
            decorators = node.decorator_list if isinstance(node, Definition) else []
            return min([node.lineno, *(each.lineno for each in decorators)]) - 1
    return 0


# -- imports ---------------------------------------------------------------------------


def _wanted(name: str, ours: _Ours, modules: Mapping[str, str]) -> _Import:
    """What has to be imported upstream for one of our imported names."""
    have = ours.imported[name]
    if have.meant in _TRITON:
        return _Import("vllm.triton_utils", _TRITON[have.meant], name)
    theirs = modules.get(have.origin or have.meant)
    if theirs is not None and have.origin:
        return _Import(theirs, have.original, name)
    if have.meant in modules:
        parent, _, last = modules[have.meant].rpartition(".")
        return _Import(parent, last, name)
    if have.meant.startswith(KERNELS):
        raise BadPatchError(
            f"`modules` in upstream.py does not say what {have.origin} becomes in vLLM"
        )
    if have.meant.startswith("vllm_ext."):
        raise BadPatchError(f"{ours.edit.by} uses {have.meant}, which vLLM has not")
    if have.meant == ours.edit.module:
        raise BadPatchError(f"{ours.edit.by} imports {have.meant}: finish it by hand")
    return have


def _imported(text: str, wanted: _Import) -> str:
    """``text`` that imports one name more, where ruff would put it."""
    tree, lines = ast.parse(text), text.splitlines()
    alias = _alias(wanted)
    statements = [
        node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    for node in statements:
        if isinstance(node, ast.ImportFrom) and node.module == wanted.origin:
            names = sorted([*node.names, alias], key=_order)
            lines[node.lineno - 1 : node.end_lineno] = _from(str(node.module), names)
            return "\n".join(lines) + "\n"
    new = [f"import {ast.unparse(alias)}"]
    if wanted.origin:
        new = _from(wanted.origin, [alias])
    key = _place(wanted.origin, wanted.original)
    before = [node for node in statements if _key(node) < key]
    after = [node for node in statements if _key(node) > key]
    if after and _key(after[0])[0] == key[0]:
        at = after[0].lineno - 1
    elif before:
        at = before[-1].end_lineno or 0
        new = new if _key(before[-1])[0] == key[0] else ["", *new]
    elif after:
        at, new = after[0].lineno - 1, [*new, ""]
    else:
        first = tree.body[0]
        has_docstring = ast.get_docstring(tree) is not None
        at = first.end_lineno or 0 if has_docstring else first.lineno - 1
        new = ["", *new] if has_docstring else [*new, "", ""]
    lines[at:at] = new
    return "\n".join(lines) + "\n"


def _alias(wanted: _Import) -> ast.alias:
    other = None if wanted.name == wanted.original else wanted.name
    return ast.alias(wanted.original, other)


def _named(wanted: _Import) -> str:
    return ast.unparse(_alias(wanted))


def _from(origin: str, names: list[ast.alias]) -> list[str]:
    told = [ast.unparse(each) for each in names]
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
    texts: dict[str, str] = {}
    for module, theirs in modules.items():
        file = binding.our_file(module)
        if file is None:
            raise BadPatchError(f"`modules` names {module}, which is not there")
        if source.text(theirs) is not None:
            raise BadPatchError(f"vLLM {source.version} has a {theirs} already")
        texts[module] = file.read_text("utf-8")
    changes = []
    for module, text in _without_references(texts).items():
        theirs = modules[module]
        for wanted in _imports(ast.parse(text)):
            moved_to = modules.get(wanted.meant)
            if moved_to is not None and wanted.origin:  # a module by its name
                parent, _, last = moved_to.rpartition(".")
                there = _Import(parent, last, wanted.name)
                line = f"from {wanted.origin} import {_named(wanted)}"
                text = text.replace(line, _from(parent, [_alias(there)])[0])
        for before, after in modules.items():
            # In prose the last name will do; the whole one may be too long.
            text = text.replace(f"`{before}", f"`{after.rpartition('.')[2]}")
            text = text.replace(before, after)
        body = [line for line in text.splitlines() if not line.startswith("# SPDX-")]
        moved = "\n".join([*SPDX, *body]) + "\n"
        used = {name for name, it in imports(ast.parse(moved)).items() if it in _TRITON}
        moved = re.sub(r"^import triton(\.language as tl)?\n", "", moved, flags=re.M)
        for name in sorted(used):
            moved = _imported(moved, _Import("vllm.triton_utils", name, name))
        moved, asks = _MULTIPROCESSORS.subn(rf"\1 = {_COUNT}(device.index or 0)", moved)
        if asks:
            moved = _imported(moved, _Import(_PLATFORM, _COUNT, _COUNT))
        path = f"{theirs.replace('.', '/')}.py"
        changes.append(Changed(path, "", _formatted("", moved)))
    return changes


def _without_references(texts: dict[str, str]) -> dict[str, str]:
    """Kernels' modules without references, nor what only these need.

    What a kernel has to give is tested upstream against the code that it takes the
    place of.
    """
    trees = {module: ast.parse(text) for module, text in texts.items()}
    gone: set[tuple[str, str]] = set()
    for module, tree in trees.items():
        gone |= {(module, it) for it in _globals(tree) if it.endswith("_reference")}
    while True:
        names = {
            part.id if isinstance(part, ast.Name) else part.attr
            for module, tree in trees.items()
            for name, node in _globals(tree).items()
            if (module, name) not in gone
            for part in ast.walk(node)
            if isinstance(part, ast.Name | ast.Attribute)
            and isinstance(part.ctx, ast.Load)
        }
        more = {
            (module, name)
            for module, tree in trees.items()
            for name in _globals(tree)
            if name.startswith("_") and name not in names
        } - gone
        if not more:
            break
        gone |= more
    kept = {}
    for module, tree in trees.items():
        lines = texts[module].splitlines()
        for name, node in reversed(_globals(tree).items()):
            if (module, name) in gone:
                decorators = node.decorator_list if isinstance(node, Definition) else []
                first = min([node.lineno, *(each.lineno for each in decorators)])
                del lines[first - 1 : node.end_lineno]
        kept[module] = "\n".join(lines) + "\n"
    return kept


# -- layout ----------------------------------------------------------------------------


def _formatted(before: str, after: str) -> str:
    """``after`` as ruff formats it, where it is at hand and ``before`` is formatted."""
    ruff = shutil.which("ruff", path=Path(sys.executable).parent) or shutil.which(
        "ruff"
    )
    if ruff is None:
        return after

    def formatted(text: str) -> str:
        for command in (["check", "--select", "I,F401", "--fix"], ["format"]):
            done = subprocess.run(
                [ruff, *command, "--isolated", "--quiet", "--config", _LAYOUT, "-"],
                input=text,
                capture_output=True,
                text=True,
            )
            text = done.stdout if done.returncode == 0 else text
        return text

    return formatted(after) if formatted(before) == before else after
