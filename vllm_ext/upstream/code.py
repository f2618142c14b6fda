"""Python code as what it says: compared by syntax tree, names by what they stand for.

Two definitions say the same if their syntax trees are equal once docstrings are gone,
an imported name is written as the place where it is defined, and neither ``self`` nor
a local variable has a type. A name that is defined in the code under comparison
itself, ours or what a patch touches, stands for itself: its definition is compared too.
"""

from __future__ import annotations

import ast
import copy
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
MODULE = "<module>"  # what a module does beside defining names
Read = Callable[[str], str | None]  # module -> its text


@dataclass(frozen=True)
class Module:
    """One file of code under comparison.

    Attributes:
        name: As it is imported.
        text: Its source.
        read: Text of any module that it may import.
        own: Modules whose names stand for themselves; it is one of them itself.
    """

    name: str
    text: str
    read: Read
    own: frozenset[str] = field(default_factory=frozenset)

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def units(self) -> dict[str, list[ast.stmt]]:
        """Each function, method, class body and global, by its qualified name.

        A class's own entry is what it consists of beside its methods. Code of the
        module that defines nothing is under `MODULE`. Imports are left out.
        """
        found: dict[str, list[ast.stmt]] = {}
        for name, node in _units(self.tree.body, ""):
            found.setdefault(name, []).append(node)
        return found

    @cached_property
    def names(self) -> set[str]:
        """Every name that can be taken from the module, imported ones left out."""
        under_conditions = {
            part.name if isinstance(part, Definition) else part.id
            for node in self.units.get(MODULE, ())
            for part in ast.walk(node)
            if isinstance(part, Definition)
            or (isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store))
        }
        return {*self.units, *under_conditions}

    @cached_property
    def imported(self) -> dict[str, str]:
        """Local name -> what it stands for, in full."""
        return imports(self.tree)

    def says(self, unit: str) -> str | None:
        """What a unit says, without its own name; ``None`` where there is none."""
        if unit not in self._said and unit in self.units:
            plain = _Plain(self)
            self._said[unit] = "\n".join(
                _dump(plain.visit(copy.deepcopy(node))) for node in self.units[unit]
            )
        return self._said.get(unit)

    @cached_property
    def _said(self) -> dict[str, str]:
        """What `says` has said: units are compared with many."""
        return {}

    def digest(self, unit: str) -> str:
        """12 hexadecimal digits over what a unit says; of one that is gone, too."""
        return hashlib.sha256((self.says(unit) or "").encode()).hexdigest()[:12]

    def leans_on(self, unit: str) -> list[tuple[str, str] | None]:
        """Each name in a unit, in order: module and name, if of code that is compared.

        Two units that say the same have as many. As `says` writes them they are bare
        names, which may be of different modules.
        """
        plain = _Plain(self)
        for node in self.units.get(unit, ()):
            plain.visit(copy.deepcopy(node))
        return plain.places

    def stands_for(self, dotted: str) -> tuple[str | None, str]:
        """Where the name ``a.b.c`` is defined, through every import on the way.

        Returns:
            The module and the name in it, if that is code under comparison; else no
            module, and the name in full.
        """
        for _ in range(10):  # modules that import each other's names end somewhere
            module, name, rest = self._split(dotted)
            if module is None:
                break
            further = _imports_of(self.read(module) or "").get(name)
            if further is None and module in self.own:
                return module, name + rest
            if further is None or further == dotted:
                break
            dotted = further + rest
        return None, dotted

    def _split(self, dotted: str) -> tuple[str | None, str, str]:
        """Module, name in it, and attributes of that; no module if it is unknown."""
        parts = dotted.split(".")
        for length in range(len(parts) - 1, 0, -1):
            module = ".".join(parts[:length])
            if module in self.own or self.read(module) is not None:
                rest = "".join(f".{part}" for part in parts[length + 1 :])
                return module, parts[length], rest
        return None, dotted, ""


def imports(tree: ast.Module) -> dict[str, str]:
    """Local name -> what it stands for, of every import in a file."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.asname:
                    found[alias.asname] = alias.name
                else:
                    top = alias.name.partition(".")[0]
                    found[top] = top
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                found[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return found


@cache
def _imports_of(text: str) -> dict[str, str]:
    """`imports` of a file, of which every name that goes through it asks."""
    return imports(ast.parse(text))


def _units(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, ast.stmt]]:
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom) or _is_docstring(node):
            continue
        if isinstance(node, ast.ClassDef):
            shell = copy.copy(node)
            shell.body = [
                part
                for part in node.body
                if not isinstance(part, Definition) and not _is_docstring(part)
            ]
            yield f"{prefix}{node.name}", shell
            inner: list[ast.stmt] = [
                part for part in node.body if isinstance(part, Definition)
            ]
            yield from _units(inner, f"{prefix}{node.name}.")
        elif isinstance(node, Definition):
            yield f"{prefix}{node.name}", node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield f"{prefix}{ast.unparse(targets[0])}", node
        elif not _only_imports(node):
            yield MODULE, node


def _is_docstring(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _only_imports(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and all(
        isinstance(part, ast.Import | ast.ImportFrom)
        for part in [*node.body, *node.orelse]
    )


def _dump(node: object) -> str:
    """A syntax tree as text, the same under every Python: what is empty is left out."""
    if isinstance(node, list):
        return f"[{', '.join(map(_dump, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    if isinstance(node, ast.Constant):
        return f"Constant({node.value!r})"
    fields = [(name, getattr(node, name, None)) for name in node._fields]
    told = [f"{name}={_dump(it)}" for name, it in fields if it is not None and it != []]
    return f"{type(node).__name__}({', '.join(told)})"


class _Plain(ast.NodeTransformer):
    """A unit without what is not compared."""

    def __init__(self, module: Module):
        self.module = module
        self.local: set[str] = set()
        self.places: list[tuple[str, str] | None] = []
        self.depth = 0
        self.in_function = False

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        return self._function(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AST:
        return self._function(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        return self._definition(node)

    def _function(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> ast.AST:
        every = [*node.args.posonlyargs, *node.args.args]
        if every and every[0].arg in ("self", "cls"):
            every[0].annotation = None
        inside = {part.arg for part in ast.walk(node) if isinstance(part, ast.arg)}
        inside |= {
            part.id
            for part in ast.walk(node)
            if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)
        }
        before = self.local, self.in_function
        self.local, self.in_function = before[0] | inside, True
        made = self._definition(node)
        self.local, self.in_function = before
        return made

    def _definition(self, node: Definition) -> ast.AST:
        if self.depth == 0:
            node.name = "_"  # the unit's own: it is compared under another, perhaps
        node.body = [
            part
            for part in node.body
            if not _is_docstring(part)
            and not isinstance(part, ast.Import | ast.ImportFrom)
        ]
        self.depth += 1
        made = self.generic_visit(node)
        self.depth -= 1
        return made

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        if not self.in_function:
            self.generic_visit(node)
            return node
        if node.value is None:  # the type of a local variable, and nothing else
            return None
        made: ast.AST = self.visit(ast.Assign([node.target], node.value))
        return made

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        dotted = _dotted(node)
        return self._name(dotted, node.ctx) if dotted else self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return self._name(node.id, node.ctx)

    def _name(self, dotted: str, context: ast.expr_context) -> ast.AST:
        first, _, rest = dotted.partition(".")
        meant = self.module.imported.get(first)
        where: str | None = None
        if meant is not None and first not in self.local:
            full = f"{meant}.{rest}" if rest else meant
            where, dotted = self.module.stands_for(full)
        elif first in self.module.names and first not in self.local:
            where = self.module.name
        self.places.append((where, dotted.partition(".")[0]) if where else None)
        return ast.Name(dotted, context)


def _dotted(node: ast.expr) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = _dotted(node.value)
        return before and f"{before}.{node.attr}"
    return None
