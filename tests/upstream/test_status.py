"""``vllm-ext upstream status``: age, form, what changed, and when a patch can go."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path

import pytest
from upstream.conftest import STOCK, WRAPPED, Toy, changed

from vllm_ext import cli
from vllm_ext.doctor import open_source
from vllm_ext.patches import SERIES
from vllm_ext.patching.fingerprint import fingerprint
from vllm_ext.upstream import status
from vllm_ext.upstream.mail import read

SAMPLER = "vllm/toy/sampler.py"


@pytest.fixture
def sent(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> Toy:
    """A patch with a form, on code that is on record."""
    toy.wraps()
    known = {
        target: {"0.33.0": fingerprint(toy.source, target)}
        for target in toy.patch.watched
    }
    monkeypatch.setattr(status, "read_known", lambda path: known)
    return toy


def run_json(capsys, toy: Toy) -> tuple[int, dict]:
    code = cli.main(["upstream", "status", "--json", "--vllm", str(toy.tree)])
    (found,) = json.loads(capsys.readouterr().out)
    return code, found


def newer(toy: Toy, sampler: str) -> None:
    (toy.tree / SAMPLER).write_text(sampler)
    changed(toy.tree / "vllm/_version.py", "0.33.0", "0.34.0")


def test_a_patch_that_fits_needs_nobody(capsys, sent: Toy):
    code, found = run_json(capsys, sent)
    assert code == 0
    assert found.pop("age") > 0
    assert found == {
        "name": "toy",
        "upstream": None,
        "forms": ["0.33.0"],
        "size": read(sent.stored).size,
        "changed": [],
        "retire_when": "Stock does it.",
        "retire": "",
    }


def test_age_is_counted_from_the_declaration(sent: Toy):
    on = date(2026, 3, 1)
    assert status.status(sent.patch, sent.source, {}, on).age == 59
    object.__setattr__(sent.patch, "since", None)
    assert status.status(sent.patch, sent.source, {}, on).age is None


def test_a_target_that_changed_is_named(capsys, sent: Toy):
    newer(sent, STOCK.replace("for _ in range(self.size)", "while True"))
    code, found = run_json(capsys, sent)
    assert code == 1
    assert found["changed"] == ["vllm.toy.sampler:Sampler.flush"]
    assert found["retire"] == ""


@pytest.mark.parametrize("moved", ["", "import os\n"])
def test_a_vllm_that_has_the_change_retires_the_patch(capsys, sent: Toy, moved: str):
    newer(sent, moved + WRAPPED)
    code, found = run_json(capsys, sent)
    assert code == 1
    assert found["retire"] == "vLLM 0.34.0 has this very change: say so in merged_in"
    assert cli.main(["upstream", "status", "--vllm", str(sent.tree)]) == 1
    out = capsys.readouterr().out
    assert out.startswith("vllm 0.34.0\ntoy  ")
    assert "until: Stock does it." in out
    assert "can be retired: vLLM 0.34.0 has this very change" in out


def test_a_part_of_the_change_is_not_the_change(capsys, sent: Toy):
    newer(sent, WRAPPED.replace("            return\n", "            pass\n"))
    assert run_json(capsys, sent)[1]["retire"] == ""
    (sent.tree / SAMPLER).unlink()
    assert "has none of what it edits" in run_json(capsys, sent)[1]["retire"]


@pytest.mark.parametrize(
    ("version", "retire"), [("0.34.0", "part of vLLM since 0.34.0"), ("0.34.1", "")]
)
def test_a_merged_patch_is_retired(capsys, sent: Toy, version: str, retire: str):
    object.__setattr__(sent.patch, "merged_in", version)
    newer(sent, STOCK)
    assert run_json(capsys, sent)[1]["retire"] == retire


def test_what_is_no_vllm_gets_one_line(capsys, sent: Toy, tmp_path: Path):
    (sent.tree / "vllm/_version.py").unlink()
    broken = tmp_path / "vllm-0.99.0-py3-none-any.whl"
    broken.write_text("no wheel")
    for path, why in (
        (sent.tree, "does not state its version"),
        (broken, "is not a readable wheel"),
        (tmp_path, "holds no `vllm`"),
    ):
        assert cli.main(["upstream", "status", "--vllm", str(path)]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        assert why in err


def test_every_patch_says_since_when_it_is():
    for patch in SERIES:
        assert patch.since, patch.name
        assert date(2026, 1, 1) < date.fromisoformat(patch.since)


def test_today_no_patch_can_go(capsys):
    """Of the vLLM that is installed; `status` has to say so before anybody asks."""
    path = open_source(None).path
    code = cli.main(["upstream", "status", "--json", "--vllm", str(path)])
    found = json.loads(capsys.readouterr().out)
    assert [each["name"] for each in found] == [patch.name for patch in SERIES]
    assert [each["retire"] for each in found if each["retire"]] == []
    assert code == int(any(each["changed"] for each in found))
