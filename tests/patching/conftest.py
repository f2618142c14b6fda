"""The toy package as a fixture: none of these tests needs vLLM."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from toypackage import Toy, write_package

from vllm_ext.patching.on_import import _waiting


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Toy]:
    """The toy package, importable; forgotten again after the test."""
    made = Toy(write_package(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield made
    for name in list(_waiting):  # what this test asked for and did not import
        del _waiting[name]
    for name in list(sys.modules):
        if name.partition(".")[0] in ("toy", "ours", "foreign"):
            del sys.modules[name]
    importlib.invalidate_caches()
