"""README says what the code does: tables, commands, links, the output of the demo."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from bench.made_up import engine_result

from vllm_ext import machine, settings, tables
from vllm_ext.bench import command as bench
from vllm_ext.bench import results
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
    kinds = "|".join(bench.KINDS)
    pattern = rf"^\| `vllm-ext ([a-z-]+(?<!bench)|bench (?:{kinds}))\b"
    told = set(re.findall(pattern, README, re.MULTILINE))
    (commands,) = (
        action.choices
        for action in _parser([])._actions
        if action.dest == "==SUPPRESS==" and action.choices
    )
    known = {name for name in commands if name != "bench"}
    known |= {f"bench {kind}" for kind in bench.KINDS}
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
    # What a parent tells its own child, the CPU lane's switch, and of which commit a
    # copy without its history is.
    assert used <= {*settings.VARIABLES, "VEXT_REPLY_FD", "VEXT_CPULANE", "VEXT_COMMIT"}


# -- figures -------------------------------------------------------------------------

FIGURE = re.compile(r"\d[\d.,]*\s?(?:us|µs|ms|%|x|×|tokens/s|tok/s|GB/s)(?![\w])")


def figures(text: str) -> list[str]:
    """What looks like a measured figure."""
    return [match[0] for match in FIGURE.finditer(text)]


def test_figures_stand_only_in_what_is_made_from_result_files():
    by_hand = re.sub(r"<!-- \w+: made by .*?<!-- end -->", "", README, flags=re.DOTALL)
    assert by_hand != README
    assert figures(by_hand) == []


def test_a_figure_is_recognized():
    assert figures("7 % less, 1.3x, 455 us; 40GB/s") == [
        "7 %",
        "1.3x",
        "455 us",
        "40GB/s",
    ]
    assert figures("vLLM 0.33.0, Python 3.11, sm_90, Qwen2.5-1.5B, 16 tokens") == []


def test_the_changelog_links_a_result_for_every_figure():
    text = (ROOT / "CHANGELOG.md").read_text()
    for entry in re.split(r"\n- ", text):
        if figures(entry):
            [link] = re.findall(r"\(([^()]*results[^()]*\.json)\)", entry)
            assert (ROOT / link).is_file()


def test_without_a_result_of_a_gpu_nothing_is_said_of_one(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    (tmp_path / "cpu").mkdir()
    results.save(engine_result(), tmp_path / "cpu" / "2026-01-01_a_engine.json")
    assert tables.on_gpus() == "Not yet measured on a GPU.\n"


def test_a_result_of_a_gpu_makes_the_table(tmp_path, monkeypatch):
    here = {**machine.describe(), "gpu": "NVIDIA H200", "vllm": "0.33.0"}
    monkeypatch.setattr(machine, "describe", lambda: here)
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    results.save(engine_result(all=0.9))
    made = tables.on_gpus()
    assert "NVIDIA H200" in made
    assert made.count("| IMPROVED |") == 2
    assert "control" not in made
