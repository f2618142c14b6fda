"""An installed vLLM with upstream forms applied to it: links, and the patched files."""

import ast
import importlib.util
import os
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vllm_ext.patches import SERIES
from vllm_ext.patching.declare import Patch
from vllm_ext.upstream import binding, forms, mail

VERSION = "0.32.0"


def with_forms() -> tuple[Patch, ...]:
    """The patches that have an upstream form, in order of application."""
    return tuple(patch for patch in SERIES if forms.stored(patch))


def installed() -> Path:
    """The folder of the vLLM that is installed, which is left as it is."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


@dataclass
class Tree:
    """A folder for ``PYTHONPATH``, with the tests that the forms bring beside it.

    Attributes:
        folder: Holds ``vllm`` and ``tests``.
        added: Patch -> file of ``vllm`` -> lines at which its form added a statement
            to a function.
        tests: Patch -> the test files of its form.
    """

    folder: Path
    added: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    tests: dict[str, list[Path]] = field(default_factory=dict)


def make_tree(folder: Path, patches: Iterable[Patch] = ()) -> Tree:
    """Apply the forms of ``patches`` to a copy of vLLM, and merge them.

    Each is written for stock; git brings them together, as it would for vLLM if they
    were merged one after the other. One that needs others is written on top of these.
    Folders without a patched file are links to the installed ones.
    """
    tree = Tree(folder)
    letters = [
        (patch, mail.read(path))
        for patch in patches
        if (path := forms.form_for(patch, VERSION)) is not None
    ]
    paths = {file.path: file.is_new for _, letter in letters for file in letter.files}
    code = {
        Path(path).relative_to("vllm"): is_new
        for path, is_new in paths.items()
        if path.startswith("vllm/")
    }
    _link(installed(), folder / "vllm", code)
    _git(folder, "init", "-q", "-b", "series")
    _git(
        folder, "add", "--", *(f"vllm/{path}" for path, new in code.items() if not new)
    )
    _git(folder, "commit", "-q", "--allow-empty", "-m", "stock")
    _git(folder, "branch", "stock")
    commits = {}
    for patch, letter in letters:
        (folder / f"{patch.name}.patch").write_text(letter.text(), "utf-8")
        before = binding.needed(binding.prose(patch))
        _git(folder, "checkout", "-q", "-B", "form", "stock")
        for each in (*before, patch):
            _git(folder, "am", "-q", "--keep-non-patch", f"{each.name}.patch")
        _git(folder, "checkout", "-q", "series")
        _git(folder, "cherry-pick", "form")
        commits[patch.name] = _git(folder, "rev-parse", "HEAD").strip()
        tree.tests[patch.name] = [
            folder / file.path
            for file in letter.files
            if Path(file.path).name.startswith("test_")
        ]
    for patch, letter in letters:
        tree.added[patch.name] = {
            file.path: _lines_of(commits[patch.name], folder, file.path)
            for file in letter.files
            if file.is_code
        }
    return tree


def plant(tree: Tree, bugs: Mapping[str, tuple[str, str, str]]) -> None:
    """Change one place of the patched text for each patch: file, text, and instead."""
    for name, (path, text, instead) in bugs.items():
        file = tree.folder / path
        lines = file.read_text("utf-8")
        assert lines.count(text) == 1, f"{name}: {lines.count(text)} times {text!r}"
        file.write_text(lines.replace(text, instead), "utf-8")


def _lines_of(commit: str, folder: Path, path: str) -> list[int]:
    """Numbers of the lines that begin a statement of one commit in a function.

    Kernels are left out: the interpreter compiles them anew.
    """
    functions = ast.walk(ast.parse((folder / path).read_text("utf-8")))
    begun = {
        inside.lineno
        for node in functions
        if isinstance(node, ast.FunctionDef)
        if not any("jit" in ast.unparse(each) for each in node.decorator_list)
        for inside in ast.walk(node)
        if isinstance(inside, ast.stmt) and inside is not node
        if not (isinstance(inside, ast.Expr) and isinstance(inside.value, ast.Constant))
    }
    blamed = _git(folder, "blame", "-s", "-l", path).splitlines()
    return [
        number
        for number, line in enumerate(blamed, 1)
        if number in begun and line.startswith(commit)
    ]


def _link(source: Path, target: Path, changed: Mapping[Path, bool]) -> None:
    target.mkdir(parents=True)
    for entry in source.iterdir():
        inside = {
            path.relative_to(entry.name): is_new
            for path, is_new in changed.items()
            if path.parts[0] == entry.name and len(path.parts) > 1
        }
        if inside:
            _link(entry, target / entry.name, inside)
        elif Path(entry.name) in changed:
            (target / entry.name).write_bytes(entry.read_bytes())
        elif entry.name != "__pycache__":  # the patched files' would get in there
            (target / entry.name).symlink_to(entry)


def _git(folder: Path, *arguments: str) -> str:
    nobody = {
        f"GIT_{role}_{what}": value
        for role in ("AUTHOR", "COMMITTER")
        for what, value in (("NAME", "nobody"), ("EMAIL", "nobody@example.com"))
    }
    own = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", **nobody}
    done = subprocess.run(
        ["git", *arguments],
        cwd=folder,
        env=os.environ | own,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"git {' '.join(arguments)}: {done.stderr}"
    return done.stdout
