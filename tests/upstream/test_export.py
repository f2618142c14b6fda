"""``vllm-ext export`` as a person runs it: what it writes, and what it refuses."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from bench.made_up import engine_result
from upstream.conftest import STOCK, TEST, WRAPPED, Toy, changed

from vllm_ext import machine
from vllm_ext.bench import results
from vllm_ext.cli import main
from vllm_ext.prove import gpu
from vllm_ext.upstream import binding, forms, mail, pullrequest
from vllm_ext.upstream.owners import owners


@pytest.fixture
def ready(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> Toy:
    """A patch whose form is stored, stamped and described; no result is kept."""
    toy.wraps()
    binding.stamp(toy.patch, [toy.source])
    monkeypatch.setattr(results, "RESULTS", toy.root / "results")
    monkeypatch.setattr(results, "PATCHES", toy.root / "patches")
    monkeypatch.setattr(gpu, "SERIES", (toy.patch,))
    return toy


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return status, out, err


def written(capsys, toy: Toy) -> str:
    """PR.md of the toy."""
    folder = toy.root / "out"
    status, _, err = run(capsys, "export", "toy", "-o", folder, "--vllm", toy.tree)
    assert (status, err) == (0, "")
    return (folder / "PR.md").read_text()


# -- what it writes --------------------------------------------------------------------


def test_a_maintainer_can_apply_what_it_writes(capsys, ready: Toy):
    written(capsys, ready)
    patch = ready.root / "out" / "0001-toy.patch"
    repository = ready.tree
    forms.git(repository, "init", "-q")
    forms.git(repository, "add", ".")
    forms.git(repository, "commit", "-q", "-m", "stock")
    forms.git(repository, "am", "--keep-non-patch", patch)
    told = forms.git(repository, "log", "-1", "--format=%an <%ae>%n%B")
    assert told == (
        "Your Name <your.email@example.com>\n"
        "[Perf][Toy] Do it\n\nDo it.\n\nSo that it is done.\n\n"
    )
    assert (repository / "vllm/toy/sampler.py").read_text() == WRAPPED
    assert (repository / "tests/toy/test_sampler.py").read_text() == TEST


def test_without_a_folder_it_prints_the_patch(capsys, ready: Toy):
    status, out, err = run(capsys, "export", "toy", "--vllm", ready.tree)
    assert (status, err) == (0, "")
    assert out == mail.read(ready.stored).unstamped().text()
    _, out_json, _ = run(capsys, "export", "toy", "--vllm", ready.tree, "--json")
    assert json.loads(out_json) == {"patch": out}


def test_another_version_gets_it_at_its_own_lines(capsys, ready: Toy):
    changed(ready.tree / "vllm/_version.py", "0.33.0", "0.32.0")
    sampler = ready.tree / "vllm/toy/sampler.py"
    sampler.write_text(f"# Older.\n{STOCK}\nOLDER = 1\n")
    ready.stores(STOCK.replace("range(self.size)", "range(2 * self.size)"))
    export = ("export", "toy", "--vllm", ready.tree)
    status, out, err = run(capsys, *export)
    assert (status, err) == (0, "")
    (ready.folder / "v0.32.0.patch").write_text(out)
    assert not any("is not for this text" in line for line in ready.check())
    assert mail.parse(out).files != mail.read(ready.stored).files

    (ready.folder / "v0.32.0.patch").unlink()
    changed(sampler, "range(self.size)", "range(self.number)")
    assert "there is no v0.32.0.patch: git apply" in refused(capsys, *export[1:])


def test_what_is_not_known_is_said(capsys, ready: Toy):
    text = written(capsys, ready)
    assert "<!-- Title: [Perf][Toy] Do it -->" in text
    assert "## Purpose\n\nDo it.\n\nSo that it is done.\n" in text
    assert "- #57319: Another thing; this does something else." in text
    assert '--state open --search "toy sampler"' in text
    assert "```bash\npytest tests/toy/test_sampler.py\n```" in text
    assert "Not measured on its own." in text
    assert "Not run on a GPU yet" in text
    assert "**Accuracy:** none needed: the tokens are the same." in text
    assert "A loop more." in text
    assert "| `vllm/toy/sampler.py` | +4 | -0 |" in text
    assert "Lines changed in vLLM itself: 4, low complexity" in text
    assert "nobody on record" in text
    assert "AI assistance was used" in text
    assert "- [x]" not in text
    assert text.count("- [ ]") == 10
    assert "vllm-ext" not in text
    assert "plugin" not in text


def test_figures_come_from_results_of_this_patch_alone(capsys, ready: Toy):
    folder = results.RESULTS / "cpu"
    folder.mkdir(parents=True)
    result = engine_result(toy=0.9, other=0.5)
    result["vllm_ext"]["digests"]["toy"] = results.digest("toy")
    results.save(result, folder / "2026-01-02T0000_a_engine.json")
    text = written(capsys, ready)
    rows = [line for line in text.splitlines() if line.startswith("| tiny, S0")]
    assert len(rows) == 2
    assert all("| 20 | IMPROVED |" in row for row in rows)
    assert "(0.8" in rows[0] or "(0.9" in rows[0]
    assert "2026-01-02T0000_a_engine.json" in text
    assert machine.describe()["cpu"] in text
    assert "earlier state" not in text
    assert "made at run time in an unmodified vLLM" in text


def test_figures_of_other_code_say_so(capsys, ready: Toy):
    (results.RESULTS / "cpu").mkdir(parents=True)
    result = engine_result(toy=0.9)
    result["vllm_ext"]["digests"]["toy"] = "0" * 16
    results.save(result, results.RESULTS / "cpu" / "2026-01-02T0000_a_engine.json")
    assert "Measured with an earlier state of this change." in written(capsys, ready)


def host_result(on: tuple[str, ...]) -> dict:
    row = {
        **{"batch": 8, "mode": "greedy", "part": "step"},
        **{"stock_us": 100.4, "patched_us": 80.1, "ratio": 0.8, "ci95": [0.7, 0.9]},
        "submissions_stock": {"triton": 8, "d2h": 2},
        "submissions_patched": {"triton": 7, "d2h": 2},
        "control_ratio": 1.01,
    }
    names = ("toy", "other")
    return {
        "measured": "CPU time.",
        "machine": machine.describe(),
        "patches": [
            {"name": name, "state": "in use" if name in on else "off"} for name in names
        ],
        "blocks": 40,
        "steps": 15,
        "rows": [row, {**row, "part": "schedule"}],
    }


def test_host_time_is_told_where_the_patch_was_alone(capsys, ready: Toy):
    folder = results.RESULTS / "cpu"
    folder.mkdir(parents=True)
    for number, on in enumerate([("toy",), ("toy", "other"), ("other",)]):
        path = folder / f"2026-01-0{number + 1}_a_host.json"
        path.write_text(json.dumps(host_result(on)))
    text = written(capsys, ready)
    assert "| 8 | greedy | 100 | 80 | 0.800 (0.700-0.900) | 1.010 |\n" in text
    assert "- batch 8, greedy: Triton launches 8 → 7\n" in text
    assert "40 blocks of 15 steps" in text
    assert text.count("result file") == 1
    assert "2026-01-01_a_host.json" in text


def test_a_gpu_that_saw_no_wait_is_quoted(capsys, ready: Toy):
    folder = results.RESULTS / "nvidia-h200"
    folder.mkdir(parents=True)
    state = {
        "state": "in use",
        "calls": 9,
        "aside": {},
        "digest": results.digest("toy"),
    }
    found = {
        "tokens": {"different": 0, "compared": 218},
        "stopped": "",
        "patches": {"toy": state},
        "machine": {**machine.describe(), "gpu": "NVIDIA H200"},
    }
    (folder / "2026-01-01_a_prove.json").write_text(json.dumps(found))
    text = written(capsys, ready)
    assert "218 tokens are stock's, no wait and no compilation in 9 calls" in text
    assert "NVIDIA H200" in text
    assert "Not run on a GPU yet" not in text


def test_prose_is_one_line_per_paragraph():
    said = "One\ntwo.\n\n- three\n  four\n- five\n\n```\na\nb\n```\nsix\nseven"
    assert pullrequest.unwrapped(said) == (
        "One two.\n\n- three four\n- five\n\n```\na\nb\n```\nsix seven"
    )


def test_the_last_line_that_matches_owns():
    assert owners("vllm/v1/worker/gpu/sample/sampler.py").startswith("@WoosukKwon")
    assert owners("vllm/v1/worker/gpu_worker.py") == "@njhill"
    assert owners("vllm/v1/worker_other/x.py") == "nobody on record: look it up"


@pytest.mark.parametrize(
    ("lines", "band"),
    [
        (49, "low complexity (under 50)."),
        (50, "medium complexity (50 to 250)."),
        (250, "medium complexity (50 to 250)."),
        (251, "high complexity (over 250), which the purpose has to justify."),
        (500, "high complexity (over 250), which the purpose has to justify."),
        (501, "justify; over 500 lines need an RFC issue first."),
    ],
)
def test_size_is_in_vllms_bands(capsys, ready: Toy, lines: int, band: str):
    rest = "    # more\n" * (lines - mail.read(ready.stored).size)
    ready.stores(WRAPPED + rest)
    ready.stores(WRAPPED + rest, test=TEST + rest)  # tests do not count
    text = written(capsys, ready)
    told = text.partition(f"\nLines changed in vLLM itself: {lines}, ")[2]
    assert band in told.partition("\n")[0]


# -- what it refuses -------------------------------------------------------------------


def refused(capsys, *arguments: object) -> str:
    status, out, err = run(capsys, "export", *arguments)
    assert (status, out) == (1, "")
    assert err.startswith("vllm-ext: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize("what", ["--check", "--stamp"])
def test_a_folder_is_for_what_is_written(capsys, ready: Toy, what: str):
    folder = ready.root / "out"
    assert "-o is where" in refused(capsys, "toy", what, "-o", folder)
    assert not folder.exists()


def test_a_vllm_without_a_name_is_not_the_newest_one(capsys, ready: Toy):
    refused(capsys, "toy", "--vllm", "")


def test_a_folder_with_anything_in_it_stays_as_it_is(capsys, ready: Toy):
    folder = ready.root / "out"
    folder.mkdir()
    note = folder / "PR.md"
    note.write_text("mine")
    assert "is not empty" in refused(capsys, "toy", "-o", folder, "--vllm", ready.tree)
    assert [path.read_text() for path in folder.iterdir()] == ["mine"]
    assert "cannot be written" in refused(
        capsys, "toy", "-o", note, "--vllm", ready.tree
    )
    assert "cannot be written" in refused(
        capsys, "toy", "-o", ready.root / "no" / "where", "--vllm", ready.tree
    )
    assert note.read_text() == "mine"


def test_an_empty_folder_will_do(capsys, ready: Toy):
    (ready.root / "out").mkdir()
    assert "## Purpose" in written(capsys, ready)


@pytest.mark.parametrize(
    ("prepare", "why"),
    [
        (lambda toy: toy.stored.write_text("nothing\n"), "holds no `diff --git`"),
        (lambda toy: toy.stored.write_bytes(b"\xff\xfe"), "cannot be read"),
        (lambda toy: (toy.folder / "upstream.py").unlink(), "is missing"),
        (lambda toy: toy.stored.unlink(), "finished by hand"),
        (
            lambda toy: changed(toy.tree / "vllm/_version.py", "0.33.0", "9.9.9"),
            "vLLM 9.9.9, which is not on record",
        ),
        (
            lambda toy: (toy.tree / "vllm/_version.py").unlink(),
            "vLLM unknown, which is not on record",
        ),
        (lambda toy: (toy.tree / "vllm/__init__.py").unlink(), "holds no `vllm`"),
    ],
)
def test_bad_input_gets_one_line_and_nothing_is_written(
    capsys, ready: Toy, prepare, why: str
):
    prepare(ready)
    before = {path: path.read_bytes() for path in ready.root.rglob("*.p*")}
    folder = ready.root / "out"
    assert why in refused(capsys, "toy", "-o", folder, "--vllm", ready.tree)
    assert not folder.exists()
    after = {path: path.read_bytes() for path in ready.root.rglob("*.p*")}
    assert after == before


def test_names_are_those_of_the_series(capsys, ready: Toy):
    for options in ([], ["--check"], ["--stamp"], ["--draft"]):
        told = refused(capsys, "nothing", *options, "--vllm", ready.tree)
        assert told == "vllm-ext: unknown patch nothing; known are toy\n"
    for arguments in ([], ["toy", "toy"], ["--stamp"]):
        assert "name a patch" in refused(capsys, *arguments, "--vllm", ready.tree)


def test_git_is_needed_for_the_check_alone(capsys, ready: Toy, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    status, out, _ = run(capsys, "export", "toy", "--check", "--vllm", ready.tree)
    assert status == 1
    assert "git is not installed here" in out
    assert "## Purpose" in written(capsys, ready)


def test_a_hook_of_git_keeps_its_repository(
    capsys, ready: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Git tells its hooks where their repository is; that is not where we commit."""
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    forms.git(theirs, "init", "-q")
    before = {path for path in theirs.rglob("*")}
    hook = tmp_path / "hooks" / "pre-commit"
    hook.parent.mkdir()
    hook.write_text("#!/bin/sh\nexit 1\n")
    hook.chmod(0o755)
    for name, value in {
        "GIT_DIR": str(theirs / ".git"),
        "GIT_INDEX_FILE": str(theirs / ".git" / "index"),
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": "core.hooksPath",
        "GIT_CONFIG_VALUE_0": str(hook.parent),
    }.items():
        monkeypatch.setenv(name, value)
    assert run(capsys, "export", "--check", "--vllm", ready.tree)[0] == 0
    assert {path for path in theirs.rglob("*")} == before


# -- check and stamp -------------------------------------------------------------------


def test_check_and_stamp_from_the_command_line(capsys, ready: Toy):
    check = ("export", "--check", "--vllm", ready.tree)
    status, out, _ = run(capsys, *check)
    assert (status, out) == (0, "toy  applies, and says what the plugin runs: 0.33.0\n")
    ready.says("self.size < LIMIT", "self.size <= LIMIT")
    status, out, _ = run(capsys, *check, "--json")
    assert status == 1
    assert "skip (plugin) is not what it was" in json.loads(out)["toy"][0]
    status, out, _ = run(capsys, "export", "--stamp", "toy", "--vllm", ready.tree)
    assert (status, out) == (0, f"{ready.stored}\n")
    assert run(capsys, *check)[0] == 0


def test_nothing_is_sent(monkeypatch: pytest.MonkeyPatch, capsys, ready: Toy):
    """The only program that it starts is git, and not to push."""
    started: list[list[str]] = []
    real = subprocess.run

    def watched(command, *args, **kwargs):
        started.append([str(part) for part in command])
        return real(command, *args, **kwargs)

    monkeypatch.setattr(subprocess, "run", watched)
    written(capsys, ready)
    run(capsys, "export", "--check", "--vllm", ready.tree)
    ours = [command for command in started if Path(command[0]).name == "git"]
    used = {command[1] for command in ours}
    assert used <= {"init", "add", "commit", "apply", "am"}
