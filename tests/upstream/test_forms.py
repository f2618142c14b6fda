"""The stored upstream forms, on the vLLMs they are for."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from vllm_ext.patches import SERIES
from vllm_ext.patching.declare import Patch
from vllm_ext.patching.fingerprint import Source
from vllm_ext.upstream import binding, draft, forms, mail, pullrequest
from vllm_ext.upstream.forms import Changed
from vllm_ext.upstream.owners import LINES

RUFF = Path(sys.executable).with_name("ruff")
# vLLM's families; what they leave out there is left out here.
CHECK = ["check", "--select", "E,F,UP,B,SIM,I,G"]
CHECK += ["--ignore", "F403,F405,E731,B905,B007,UP007,UP045"]
LAYOUT = "line-length = 88\nlint.isort.known-first-party = ['vllm']"

REPLACE = [
    patch for patch in SERIES if all(edit.how == "replace" for edit in patch.edits)
]
each_patch = pytest.mark.parametrize("patch", SERIES, ids=lambda patch: patch.name)


@pytest.fixture(scope="module")
def sources() -> list[Source]:
    found = forms.sources()
    assert [source.version for source in found] == ["0.33.0", "0.32.0"]
    return found


def patched(patch: Patch, sources: list[Source]) -> list[Changed]:
    """Every file of every form of a patch."""
    declared = binding.prose(patch)
    by_version = {it.version: binding.beneath(declared, it) for it in sources}
    return [
        change
        for label, path in forms.stored(patch).items()
        for change in forms.apply(mail.read(path), by_version[label], exact=True)
    ]


@each_patch
def test_a_form_applies_and_says_what_the_plugin_runs(
    patch: Patch, sources: list[Source]
):
    assert "0.33.0" in forms.stored(patch)
    assert binding.check(patch, sources) == []


def test_a_patch_without_a_form_says_so(sources: list[Source]):
    (line,) = binding.check(replace(SERIES[0], name="another"), sources)
    assert "another has no upstream form" in line


@each_patch
def test_a_form_brings_its_tests(patch: Patch):
    for path in forms.stored(patch).values():
        new = [file for file in mail.read(path).files if not file.is_code]
        assert all(file.is_new for file in new)
        assert any(Path(file.path).name.startswith("test_") for file in new)


def ruff(command: list[str], text: str, name: str) -> subprocess.CompletedProcess[str]:
    options = ["--isolated", "--config", LAYOUT, "--stdin-filename", name, "-"]
    return subprocess.run(
        [RUFF, *command, *options], input=text, capture_output=True, text=True
    )


@each_patch
def test_what_ruff_says_of_stock_it_says_of_the_form(
    patch: Patch, sources: list[Source]
):
    for change in patched(patch, sources):
        for command in (CHECK, ["format", "--check"]):
            before = ruff(command, change.before, change.path)
            after = ruff(command, change.after, change.path)
            if before.returncode == 0:
                assert after.returncode == 0, after.stdout


@pytest.mark.parametrize("patch", REPLACE, ids=lambda patch: patch.name)
def test_a_replacement_drafts_itself(patch: Patch, sources: list[Source]):
    """Where the form could be spliced, splicing gives code that is bound too."""
    made = draft.draft(patch, sources[0])
    changes = forms.apply(made, sources[0], exact=True)
    bound = binding.bind(patch, binding.prose(patch), changes, sources[0])
    assert bound.problems == ()


@each_patch
def test_a_reviewer_is_told_what_he_asks_for(patch: Patch):
    """The text is about vLLM, complete, and its commands name files of the patch."""
    declared = binding.prose(patch)
    form = mail.read(forms.stored(patch)["0.33.0"])
    text = pullrequest.text(patch, declared, form, "0.33.0")
    for word in ("vllm_ext", "plugin", "Rung", "step_aside", "stub"):
        assert word not in text.replace("results/", ""), word
    assert declared.searches
    commands = " ".join([*declared.tests, declared.benchmark or ""])
    for file in form.files:
        if not file.is_code:
            assert file.path in commands, file.path
    assert len(form.subject) <= 80
    assert all(len(line) <= 80 for line in form.message.splitlines())


def test_owners_are_of_paths_that_exist(sources: list[Source]):
    names = {module.replace(".", "/") for module in sources[0].modules()}
    for line in LINES:
        path = line.partition(" ")[0].removesuffix(".py")
        assert path.startswith("tests/") or path in names, path
