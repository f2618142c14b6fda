"""Apply patches to the installed vLLM for the length of a test."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from vllm_ext.patches import FINGERPRINTS, SERIES
from vllm_ext.patching.declare import Patch
from vllm_ext.patching.engine import APPLIED, Engine, Outcome, resolve
from vllm_ext.patching.fingerprint import Source, read_known
from vllm_ext.plugin import PACKAGE, package_folder


@contextmanager
def applied(patch: Patch) -> Iterator[Outcome]:
    """Apply ``patch`` now; afterwards stock stands again, object for object.

    Raises:
        PatchError: It does not fit the installed vLLM, or could not be reverted.
    """
    modules = {name: importlib.import_module(name) for name in patch.modules}

    def targets() -> list[object]:
        return [resolve(modules[edit.module], edit.target)[2] for edit in patch.edits]

    engine = _engine()
    before = targets()
    outcome = engine.offer(patch)
    assert outcome.state == APPLIED, f"{patch.name}: {outcome.state} {outcome.reason}"
    try:
        yield outcome
    finally:
        engine.revert(patch.name)
        for edit, old, new in zip(patch.edits, before, targets(), strict=True):
            assert old is new, f"{edit.target} is not stock after the revert"


@contextmanager
def all_applied(names: Collection[str]) -> Iterator[list[Outcome]]:
    """Apply patches by name, in the order of `SERIES`; afterwards take them back.

    Raises:
        PatchError: One does not fit the installed vLLM, or could not be reverted.
    """
    engine = _engine()
    chosen = [patch for patch in SERIES if patch.name in names]
    for module in dict.fromkeys(name for patch in chosen for name in patch.modules):
        importlib.import_module(module)
    try:
        yield [engine.offer(patch) for patch in chosen]
    finally:
        for patch in reversed(chosen):
            engine.revert(patch.name)


def _engine() -> Engine:
    return Engine(
        Source(package_folder(), PACKAGE),
        read_known(FINGERPRINTS),
        count=True,
        strict=True,
    )
