"""A vLLM of two files and a patch of it, to be broken."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import dedent

import pytest

from vllm_ext.patching.declare import Edit, Patch
from vllm_ext.patching.fingerprint import Source
from vllm_ext.upstream import binding, export, forms, mail, status
from vllm_ext.upstream.mail import FileDiff, Mail

SPDX = "\n".join(binding.SPDX)
STOCK = f"""\
{SPDX}
import torch

from vllm.toy.words import WORD, say


class Sampler:
    def __init__(self, size: int):
        self.size = size

    def sample(self, logits: torch.Tensor) -> torch.Tensor:
        say(WORD)
        return torch.argmax(logits, dim=-1)

    def flush(self) -> None:
        for _ in range(self.size):
            say(WORD)
"""
WORDS = f"""\
{SPDX}
WORD = "stock"


def say(word: str) -> None:
    print(word)
"""
REPLACEMENT = '''\
# SPDX-License-Identifier: Apache-2.0
"""Ours."""

import math

import torch as th
from vllm.toy.sampler import Sampler
from vllm.toy.words import say as tell

NAME = "toy"
LIMIT = 4


def _smallest(values: th.Tensor) -> float:
    """Helper."""
    return min(float(values.min()), math.inf)


def sample(self: Sampler, logits: th.Tensor) -> th.Tensor:
    """Ours says so."""
    tell(str(_smallest(logits)))
    return th.argmax(logits[:LIMIT], dim=-1)
'''
DECLARED = '''\
"""What the pull request says."""

from vllm_ext.upstream.declare import Overlap, Upstream

UPSTREAM = Upstream(
    overlaps=(Overlap("#57319", "Another thing; this does\\nsomething else."),),
    searches=("toy sampler",),
    tests=("pytest tests/toy/test_sampler.py",),
    accuracy="none needed: the tokens are the same.",
    trade_offs="A loop more.",
    BY_HAND
)
'''
# What its wrapper is in upstream's terms: finished by hand.
WRAPPED = STOCK.replace("\n\nclass", "\nLIMIT = 4\n\n\nclass").replace(
    "        for _ in",
    "        if self.size >= LIMIT:\n            return\n        for _ in",
)
TEST = f'{SPDX}\n"""Toy."""\n\n\ndef test_toy() -> None:\n    assert True\n'


@dataclass
class Toy:
    """A checkout of a project whose only patch is ``toy``."""

    root: Path
    patch: Patch

    @property
    def tree(self) -> Path:
        return self.root / "tree"

    @property
    def folder(self) -> Path:
        return self.root / "patches" / "toy"

    @property
    def stored(self) -> Path:
        return self.folder / "v0.33.0.patch"

    @property
    def source(self) -> Source:
        return Source(self.tree)

    def says(self, before: str, after: str) -> None:
        """Change our code."""
        changed(self.folder / "replacement.py", before, after)

    def declares(self, by_hand: str = "") -> None:
        """Write ``upstream.py``."""
        text = DECLARED.replace("    BY_HAND\n", by_hand)
        (self.folder / "upstream.py").write_text(text)

    def stores(self, after: str, test: str = TEST) -> None:
        """Store a form that makes ``after`` of the sampler; its stamps stay."""
        texts = {
            "tests/toy/test_sampler.py": ("", test),
            "vllm/toy/sampler.py": (STOCK, after),
        }
        files = tuple(FileDiff(path, diff(path, *them)) for path, them in texts.items())
        stamps = mail.read(self.stored).stamps if self.stored.exists() else {}
        form = Mail(self.patch.summary, "Do it.\n\nSo that it is done.", files, stamps)
        self.stored.write_text(form.text())

    def wraps(self) -> None:
        """Make the patch one of wrappers, with its form finished by hand."""
        edit = Edit(
            "vllm.toy.sampler:Sampler.flush",
            "vllm_ext.patches.toy.replacement:skip",
            how="wrap",
        )
        object.__setattr__(self.patch, "edits", (edit,))
        (self.folder / "replacement.py").write_text(
            dedent("""\
            LIMIT = 4

            def skip(original):
                def flush(self):
                    if self.size < LIMIT:
                        original(self)
                return flush

            def _foreign(sampler):
                return type(sampler).__module__ != "vllm"
            """)
        )
        self.stores(WRAPPED)
        self.declares(
            '    by_hand={"vllm.toy.sampler:Sampler.flush": ("skip",)},\n'
            '    only_here={"_foreign": "upstream has no samplers from elsewhere"},\n'
        )

    def check(self) -> list[str]:
        """All that `vllm-ext export --check` does."""
        return binding.check(self.patch, [self.source])

    def unbound(self, after: str) -> tuple[str, ...]:
        """What does not bind a form that makes ``after`` of the sampler."""
        change = forms.Changed("vllm/toy/sampler.py", STOCK, after)
        declared = binding.prose(self.patch)
        return binding.bind(self.patch, declared, [change], self.source).problems


def diff(path: str, before: str, after: str) -> str:
    """What git says of a file, without git."""
    old, new = (f"a/{path}" if before else "/dev/null"), f"b/{path}"
    lines = [text.splitlines(keepends=True) for text in (before, after)]
    return (
        f"diff --git a/{path} b/{path}\n"
        + ("" if before else "new file mode 100644\n")
        + "".join(difflib.unified_diff(*lines, old, new))
    )


def changed(path: Path, before: str, after: str) -> None:
    """Say something else in a file that says ``before``."""
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    files = {
        "tree/vllm/__init__.py": "",
        "tree/vllm/_version.py": '__version__ = "0.33.0"\n',
        "tree/vllm/toy/__init__.py": "",
        "tree/vllm/toy/sampler.py": STOCK,
        "tree/vllm/toy/words.py": WORDS,
        "patches/toy/__init__.py": "",
        "patches/toy/replacement.py": REPLACEMENT,
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    patch = Patch(
        name="toy",
        summary="[Perf][Toy] Do it",
        why="Stock does not do it.\n\nRung 4 of the ladder: a function.",
        retire_when="Stock does it.",
        edits=(
            Edit(
                "vllm.toy.sampler:Sampler.sample",
                "vllm_ext.patches.toy.replacement:sample",
            ),
        ),
        since="2026-01-01",
    )
    made = Toy(tmp_path, replace(patch))
    monkeypatch.setattr(forms, "PATCHES", tmp_path / "patches")
    for module in (binding, export, status):
        monkeypatch.setattr(module, "SERIES", (made.patch,))
    return made
