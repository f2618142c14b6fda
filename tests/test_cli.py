"""The command line, where possible as a person runs it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from itertools import combinations
from pathlib import Path

import pytest

from vllm_ext import bisect, doctor
from vllm_ext.cli import main
from vllm_ext.patches import FINGERPRINTS, SERIES
from vllm_ext.patching.fingerprint import Source, read_known

ROOT = Path(__file__).resolve().parents[1]
NAMES = [patch.name for patch in SERIES]
ON = [patch.name for patch in SERIES if patch.default]


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch):
    for name in ("VEXT", "VEXT_PATCHES", "VEXT_STRICT", "VLLM_PLUGINS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def wheel() -> Path:
    (found,) = (ROOT / ".venv" / "wheels").glob("vllm-0.33.0-*.whl")
    return found


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return status, out, err


def run_json(capsys, *arguments: str):
    status, out, _ = run(capsys, *arguments, "--json")
    return status, json.loads(out)


# -- doctor ----------------------------------------------------------------------------


def test_doctor_says_that_all_is_well(capsys):
    status, out, _ = run(capsys, "doctor")
    assert status == 0
    lines = out.splitlines()
    assert lines[0].startswith("vllm 0.32.0")
    for name in NAMES:
        state = "fits" if name in ON else "off"
        assert any(line.split()[:2] == [name, state] for line in lines)


def test_doctor_and_pin_need_neither_torch_nor_vllm(wheel, tmp_path):
    """A Python without site-packages, our sources on its path, and a wheel."""
    code = (
        "import sys; from vllm_ext.cli import main; status = main(sys.argv[1:]);"
        "assert not {'torch', 'vllm', 'numpy'} & set(sys.modules); sys.exit(status)"
    )
    command = [sys.executable, "-S", "-P", "-c", code]
    for arguments in (["doctor", "--vllm", wheel, "--json"], ["pin", "--vllm", wheel]):
        done = subprocess.run(
            [*command, *arguments],
            env={"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr + done.stdout
        if arguments[0] == "doctor":
            found = json.loads(done.stdout)
            assert found["vllm"]["version"] == "0.33.0"
            assert {each["as_in"] for each in found["patches"]} == {"0.33.0"}
        else:
            assert "0 fingerprints recorded" in done.stdout


def test_doctor_without_vllm_says_what_to_name(tmp_path):
    done = subprocess.run(
        [sys.executable, "-S", "-P", "-m", "vllm_ext", "doctor"],
        env={"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr == (
        "vllm-ext: vLLM is not installed here; name a wheel or a folder with --vllm\n"
    )


@pytest.mark.parametrize(
    ("name", "value", "part"),
    [
        ("VLLM_PLUGINS", "other", "keeps vLLM from loading vllm-ext"),
        ("VLLM_PLUGINS", "other, vllm_ext", "keeps vLLM from loading vllm-ext"),
        ("VLLM_PLUGINS", "", "keeps vLLM from loading vllm-ext"),
        ("VEXT", "0", "VEXT=0 turns the plugin off"),
        ("VEXT_PATCHES", "nothing", "unknown patches: nothing"),
    ],
)
def test_doctor_sees_what_shuts_us_out(capsys, monkeypatch, name, value, part):
    monkeypatch.setenv(name, value)
    status, out, _ = run(capsys, "doctor")
    assert status == 1
    assert any(
        line.startswith("attention: ") and part in line for line in out.splitlines()
    )


def test_doctor_lets_another_plugin_beside_us(capsys, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "other,vllm_ext")
    assert run(capsys, "doctor")[0] == 0


CHANGED = "vllm.v1.worker.gpu.sample.sampler:Sampler.apply_staged_writes"
WATCHING = [patch.name for patch in SERIES if CHANGED in patch.watched]
CLASS = CHANGED.rpartition(".")[0]


def changed_vllm(folder: Path, wheel: Path) -> Path:
    """A folder with the files that patches watch, one function of them changed."""
    source = Source(wheel)
    for module in {name.partition(":")[0] for p in SERIES for name in p.watched}:
        path = folder / Path(*module.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source.text(module) or "")
    (folder / "vllm" / "__init__.py").write_text("")
    (folder / "vllm" / "_version.py").write_text("__version__ = '0.34.0'\n")
    sampler = folder / "vllm/v1/worker/gpu/sample/sampler.py"
    old = "    def apply_staged_writes(self) -> None:\n"
    text = sampler.read_text()
    assert text.count(old) == 1
    sampler.write_text(text.replace(old, f"{old}        assert True\n"))
    return folder


def test_doctor_shows_what_changed(capsys, tmp_path, wheel):
    tree = changed_vllm(tmp_path, wheel)
    status, found = run_json(capsys, "doctor", "--vllm", tree)
    assert status == 1
    verdicts = {each["name"]: each for each in found["patches"]}
    assert verdicts["clean_sampler_writes"]["verdict"] == "SKIPPED"
    assert verdicts["clean_sampler_writes"]["changed"] == [CHANGED]
    assert verdicts["min_tokens_restore"]["verdict"] == "fits"
    assert len(found["attention"]) == 1

    status, out, _ = run(capsys, "doctor", "--vllm", tree, "--against", wheel)
    assert status == 1
    assert f"--- 0.33.0/{CHANGED}\n+++ 0.34.0/{CHANGED}" in out
    assert "+        assert True\n" in out
    assert out.count("\n+++ ") == len(WATCHING)


def test_the_report_says_that_this_vllm_is_modified(capsys):
    status, out, _ = run(capsys, "doctor", "--report")
    assert status == 0
    assert out.startswith("```\nThis vLLM is modified by vllm-ext")
    assert "reproduce with VEXT=0" in out
    assert out.endswith("```\n")


@pytest.mark.parametrize("flag", ["--vllm", "--against"])
def test_a_path_that_is_no_vllm_gets_one_line(capsys, tmp_path, flag):
    (tmp_path / "text.whl").write_text("no wheel")
    for path in (tmp_path, tmp_path / "text.whl", tmp_path / "missing.whl"):
        status, out, err = run(capsys, "doctor", flag, path)
        assert (status, out) == (1, "")
        assert err.count("\n") == 1
        assert str(path) in err


# -- patches, show-target --------------------------------------------------------------


def test_patches_lists_and_tells(capsys):
    status, out, _ = run(capsys, "patches")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()] == NAMES
    for patch in SERIES:
        status, out, _ = run(capsys, "patches", patch.name)
        assert status == 0
        assert patch.retire_when in out
        assert all(target in out for target in patch.watched)
        _, found = run_json(capsys, "patches", patch.name)
        assert found["edits"][0]["target"] == patch.edits[0].target


def test_an_unknown_patch_gets_one_line(capsys):
    status, out, err = run(capsys, "patches", "nothing")
    assert (status, out) == (1, "")
    assert err == f"vllm-ext: unknown patch nothing; known are {', '.join(NAMES)}\n"


def test_show_target_finds_copies_and_callers(capsys, wheel):
    target = "vllm.v1.worker.gpu.input_batch:get_num_sampled_and_rejected"
    _, found = run_json(capsys, "show-target", target, "--vllm", wheel)
    assert found["source"].startswith("def get_num_sampled_and_rejected(")
    assert found["history"]["0.33.0"] == found["fingerprint"]
    runner = "vllm.v1.worker.gpu.sample.sampler"
    assert runner in found["copies"]
    (line,) = [at for at in found["callers"] if at.startswith(f"{runner}:")]
    text = (Source(wheel).text(runner) or "").splitlines()
    assert "get_num_sampled_and_rejected(" in text[int(line.rpartition(":")[2]) - 1]
    assert f"{found['length']} lines" in run(capsys, "show-target", target)[1]


def test_show_target_of_nothing_gets_one_line(capsys):
    status, _, err = run(capsys, "show-target", "vllm.nowhere:nothing")
    assert status == 1
    assert "package.module:Qualified.name" in err


# -- pin -------------------------------------------------------------------------------


@pytest.fixture
def record(tmp_path, monkeypatch) -> Path:
    """A copy of the record, to be written."""
    path = tmp_path / "fingerprints.json"
    path.write_text(FINGERPRINTS.read_text())
    monkeypatch.setattr(doctor, "FINGERPRINTS", path)
    return path


def test_pin_records_what_is_missing_and_nothing_else(capsys, record, wheel):
    before = read_known(record)
    without = {
        target: {label: digest for label, digest in labels.items() if label == "0.32.0"}
        for target, labels in before.items()
    }
    record.write_text(json.dumps(without))
    # A function that differs between the two is a change until somebody accepts it.
    changed = {
        target for target, labels in before.items() if len(set(labels.values())) > 1
    }
    hit = {patch.name for patch in SERIES if changed & set(patch.watched)}
    assert hit
    status, found = run_json(capsys, "pin", "--vllm", wheel)
    assert status == 1
    assert set(found["refused"]) == hit
    accept = [part for name in hit for part in ("--accept", name)]
    status, found = run_json(capsys, "pin", "--vllm", wheel, *accept)
    assert status == 0
    assert read_known(record) == before
    assert run_json(capsys, "pin")[1]["recorded"] == []


def test_pin_refuses_a_changed_target_until_it_is_accepted(
    capsys, record, tmp_path, wheel
):
    tree = changed_vllm(tmp_path / "new", wheel)
    status, out, _ = run(capsys, "pin", "--vllm", tree)
    assert status == 1
    refused = re.findall(r"^(\w+) is not recorded", out, re.MULTILINE)
    assert "clean_sampler_writes" in refused
    assert "0.34.0" not in read_known(record)[CHANGED]
    accepted = [word for name in refused for word in ("--accept", name)]
    status, _, _ = run(capsys, "pin", "--vllm", tree, *accepted)
    assert status == 0
    assert "0.34.0" in read_known(record)[CHANGED]


def test_pin_refuses_a_name_it_does_not_know(capsys, record):
    before = record.read_text()
    status, _, err = run(capsys, "pin", "--accept", "nothing")
    assert status == 1
    assert "unknown patch nothing" in err
    assert record.read_text() == before


# -- bisect ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", range(1, 8))
def test_bisect_finds_any_one_or_two_culprits(size):
    names = [f"p{number}" for number in range(size)]
    for count in (1, 2):
        for culprits in combinations(names, count):
            found = bisect.minimise(names, lambda s, c=culprits: set(c) <= set(s))
            assert set(found) == set(culprits)


def fails_with(*names: str) -> list[str]:
    """A command that fails when all of ``names`` are on."""
    code = (
        "import os, sys; on = os.environ.get('VEXT_PATCHES', '').split(',');"
        f"sys.exit(os.environ.get('VEXT') != '0' and set({names!r}) <= set(on))"
    )
    return [sys.executable, "-S", "-c", code]


def test_bisect_names_the_culprit(capsys):
    culprit = ON[2]
    status, out, err = run(capsys, "bisect", "--", *fails_with(culprit))
    assert status == 1
    assert out.startswith(f"{culprit} makes it fail")
    assert f"VEXT_PATCHES=-{culprit}" in out
    assert "run 1: passes with no patch" in err


def test_bisect_names_two_that_fail_together(capsys):
    pair = [ON[0], ON[-1]]
    status, out, _ = run(capsys, "bisect", "--json", "--", *fails_with(*pair))
    assert status == 1
    assert json.loads(out)["culprits"] == pair


def test_bisect_keeps_to_the_patches_that_were_asked_for(capsys, monkeypatch):
    monkeypatch.setenv("VEXT_PATCHES", ",".join(ON[:3]))
    _, out, _ = run(capsys, "bisect", "--", *fails_with(ON[1]))
    assert f"VEXT_PATCHES={ON[0]},{ON[2]} avoids it" in out
    monkeypatch.setenv("VEXT_PATCHES", ON[0])
    assert "VEXT=0 avoids it" in run(capsys, "bisect", "--", *fails_with(ON[0]))[1]
    for value, part in (("typo", "unknown patches: typo"), (f"-{ON[0]},", "")):
        monkeypatch.setenv("VEXT_PATCHES", value)
        status, _, err = run(capsys, "bisect", "--", *fails_with(ON[1]))
        assert status == 1
        assert part in err
    monkeypatch.setenv("VEXT_PATCHES", ",".join(f"-{name}" for name in ON))
    status, _, err = run(capsys, "bisect", "--", *fails_with(ON[1]))
    assert "no patch is on" in err


def test_bisect_prints_json_and_nothing_else(capfd):
    noisy = fails_with(ON[0])
    noisy[-1] = f"print('noise');{noisy[-1]}"
    main(["bisect", "--json", "--", *noisy])
    out, err = capfd.readouterr()
    assert json.loads(out)["culprits"] == [ON[0]]
    assert "noise" in err


def test_bisect_leaves_no_process_behind(capsys, tmp_path):
    """A run's own children, an engine say, end with it."""
    mark = tmp_path / "pid"
    code = (
        "import os, subprocess, time;"
        "child = subprocess.Popen(['sleep', '600']);"
        f"open({str(mark)!r}, 'w').write(str(child.pid));"
        f"time.sleep(60 * ({ON[0]!r} in os.environ.get('VEXT_PATCHES', '')))"
    )
    command = [sys.executable, "-S", "-c", code]
    run(capsys, "bisect", "--timeout", "2", "--", *command)
    state = Path(f"/proc/{mark.read_text()}/stat")
    patience = time.monotonic() + 20  # a killed process takes a moment to die

    def alive() -> bool:
        try:
            return state.read_text().split()[2] != "Z"
        except FileNotFoundError:
            return False

    while alive():
        assert time.monotonic() < patience
        time.sleep(0.01)


def test_bisect_wants_a_real_timeout(capsys):
    for value in ("0", "-1", "nan", "soon"):
        with pytest.raises(SystemExit) as caught:
            main(["bisect", "--timeout", value, "--", "true"])
        assert caught.value.code == 2
    capsys.readouterr()


def test_bisect_says_when_it_is_not_us(capsys):
    always = [sys.executable, "-S", "-c", "raise SystemExit(3)"]
    for command, part in (
        (always, "vllm-ext is not the cause"),
        ([sys.executable, "-S", "-c", ""], "nothing to find"),
        (["/no/such/program"], "cannot be started"),
    ):
        status, _, err = run(capsys, "bisect", "--", *command)
        assert status == 1
        assert part in err.splitlines()[-1]


def test_bisect_takes_a_hanging_run_for_a_failure(capsys):
    code = (
        "import os, time;"
        f"time.sleep(60 * ({ON[0]!r} in os.environ.get('VEXT_PATCHES', '')))"
    )
    hangs = [sys.executable, "-S", "-c", code]
    status, out, _ = run(capsys, "bisect", "--timeout", "1", "--", *hangs)
    assert status == 1
    assert out.startswith(ON[0])


# -- all -------------------------------------------------------------------------------


def test_wrong_usage_is_exit_2(capsys):
    for arguments in ([], ["nothing"], ["show-target"], ["bench"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
    capsys.readouterr()


def test_a_closed_pipe_is_no_error():
    done = subprocess.run(
        f"{sys.executable} -m vllm_ext patches --json | head -1",
        shell=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "[\n"
    assert done.stderr == ""
