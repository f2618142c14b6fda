"""README says what the code does: tables, commands, links, the output of the demo."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vllm_ext import settings, tables
from vllm_ext.cli import _parser

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", tables.SECTIONS)
def test_generated_sections_are_current(name: str):
    text = (ROOT / name).read_text()
    assert tables.filled(text, tables.SECTIONS[name]) == text, "run `make docs`"


def test_a_missing_mark_is_noticed():
    with pytest.raises(ValueError, match="marked patches"):
        tables.filled("no marks here", {"patches": tables.patches})


def test_every_command_is_told_and_exists():
    told = set(re.findall(r"^\| `vllm-ext ([a-z-]+(?: host)?)", README, re.MULTILINE))
    (commands,) = (
        action.choices
        for action in _parser([])._actions
        if action.dest == "==SUPPRESS==" and action.choices
    )
    known = {name for name in commands if name != "bench"} | {"bench host"}
    assert told == known


def test_every_link_leads_somewhere():
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "patches/README.md"):
        path = ROOT / name
        for link in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
            if "://" not in link:
                assert (path.parent / link).exists(), f"{name}: {link}"


def test_every_make_target_that_is_told_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for name in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / name).read_text()
        told = re.findall(r"(?:^    |`)make ([a-z-]+)", text, re.MULTILINE)
        assert told
        assert set(told) <= targets, name


def test_only_our_own_variables_are_invented():
    assert all(name.startswith("VEXT") for name in settings.VARIABLES)
    text = "".join(path.read_text() for path in (ROOT / "vllm_ext").rglob("*.py"))
    used = set(re.findall(r"\bVEXT_[A-Z_]+\b", text))
    # What a parent tells its own child, and the CPU lane's switch.
    assert used <= {*settings.VARIABLES, "VEXT_REPLY_FD", "VEXT_CPULANE"}
