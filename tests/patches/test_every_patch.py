"""What holds for any patch: documented, pinned, all or nothing, and reversible."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from vllm_ext.doctor import open_source
from vllm_ext.patches import FINGERPRINTS, SERIES
from vllm_ext.patching.declare import Patch
from vllm_ext.patching.fingerprint import Source, find, fit, read_known
from vllm_ext_cpulane.engine import run_script

ROOT = Path(__file__).resolve().parents[2]
each_patch = pytest.mark.parametrize("patch", SERIES, ids=lambda patch: patch.name)


@pytest.fixture(scope="module")
def newest() -> Source:
    (wheel,) = (ROOT / ".venv" / "wheels").glob("vllm-0.33.0-*.whl")
    return Source(wheel)


@pytest.fixture(scope="module")
def found(lane: dict[str, str]) -> dict:
    script = Path(__file__).parent / "in_engine" / "every_patch.py"
    return run_script(script, {**lane, "VEXT": "0"})


@each_patch
def test_fits_the_versions_it_says(patch: Patch, newest: Source):
    known = read_known(FINGERPRINTS)
    assert patch.tested_with == ("0.32.0", "0.33.0")
    assert fit(open_source(None), patch.watched, known).version
    assert fit(newest, patch.watched, known).version == "0.33.0"


@each_patch
def test_documents_itself(patch: Patch):
    assert patch.summary.startswith("[")
    assert "Rung" in patch.why
    assert len(patch.why.split()) > 30
    assert patch.retire_when.endswith(".")
    assert (ROOT / "patches" / patch.name / "__init__.py").is_file()
    assert (ROOT / "tests" / "patches" / f"test_{patch.name}.py").is_file()


@each_patch
def test_wraps_only_functions_and_names_what_exists(patch: Patch, newest: Source):
    for source in (open_source(None), newest):
        for target in patch.watched:
            assert find(source, target) is not None, target
    for edit in patch.edits:
        module, _, name = edit.by.partition(":")
        path = ROOT / Path(*module.split(".")[1:]).with_suffix(".py")
        tree = ast.parse(path.read_text())
        assert name in [getattr(node, "name", None) for node in tree.body]


@each_patch
def test_carried_lines_are_listed(patch: Patch):
    """A file that keeps vLLM's copyright line is in NOTICE, and no other is."""
    notice = (ROOT / "NOTICE").read_text()
    for path in (ROOT / "patches" / patch.name).glob("*.py"):
        carries = "contributors to the vLLM project" in path.read_text()
        assert (path.relative_to(ROOT).as_posix() in notice) == carries


@each_patch
def test_a_changed_target_or_neighbour_makes_it_step_aside(patch: Patch, found: dict):
    changed = found[patch.name]["changed"]
    assert set(changed) == set(patch.watched)
    for target, (state, reason) in changed.items():
        assert state == "skipped"
        assert reason.startswith(target)
    assert all(found[patch.name]["left_alone"])


@each_patch
def test_applies_and_reverts_object_for_object(patch: Patch, found: dict):
    assert found[patch.name]["state"] == "applied"
    assert all(found[patch.name]["replaced"])
    assert all(found[patch.name]["reverted"])


def test_it_ran_on_the_vllm_it_says(found: dict, lane: dict[str, str]):
    assert "PYTHONPATH" not in lane or found["vllm"] == "0.33.0"


def test_nothing_is_pinned_that_no_patch_watches():
    watched = {target for patch in SERIES for target in patch.watched}
    assert set(read_known(FINGERPRINTS)) == watched
