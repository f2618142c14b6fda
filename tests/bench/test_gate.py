"""Two files of one machine: compared, held to, or refused with a reason."""

import copy
import json
from pathlib import Path

import pytest
from bench.made_up import engine_result

from vllm_ext.bench import compare, gate
from vllm_ext.cli import main


@pytest.fixture
def keep(tmp_path):
    def write(result, name):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(result))
        return str(path)

    return write


def on_another(**changes):
    result = copy.deepcopy(engine_result(seed=1))
    result["vllm_ext"]["machine"].update(changes)
    return result


def test_the_same_again_passes(keep, capsys):
    files = keep(engine_result(1, all=0.9), "new"), keep(engine_result(all=0.9), "old")
    assert main(["bench", "gate", files[0], "--baseline", files[1]]) == 0
    said = capsys.readouterr().out
    assert "2 SAME" in said
    assert "control" not in said


def test_a_gain_that_became_less_exits_1(keep, capsys):
    new, old = (
        keep(engine_result(1, all=0.95), "new"),
        keep(engine_result(all=0.9), "o"),
    )
    assert main(["bench", "gate", new, "--baseline", old]) == 1
    said = capsys.readouterr().out
    assert "REGRESSED  tiny, S0, batch 1, TPOT, all: ratio 0.9" in said


def test_a_slower_machine_changes_nothing(keep):
    """Both sides are slower: the gain is what it was."""
    slower = engine_result(1, all=0.9)
    for each in slower["vllm_ext"]["comparisons"]:
        for side in each["pairs"].values():
            side[:] = [1.4 * value for value in side]
    new, old = keep(slower, "new"), keep(engine_result(all=0.9), "old")
    assert main(["bench", "gate", new, "--baseline", old]) == 0


def test_an_invalid_run_exits_2_whichever_it_is(keep, capsys):
    sound, unfit = (
        keep(engine_result(1), "sound"),
        keep(engine_result(control=1.03), "u"),
    )
    assert main(["bench", "gate", unfit, "--baseline", sound]) == 2
    assert "result: stock against stock" in capsys.readouterr().out
    assert main(["bench", "gate", sound, "--baseline", unfit]) == 2
    assert "baseline: stock against stock" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gpu": "NVIDIA H200", "driver": "580.1"}, "machine"),
        ({"vllm": "0.33.0"}, "vllm"),
        ({"torch": "2.14.0"}, "torch"),
        ({"triton": "3.8.0"}, "triton"),
    ],
)
def test_another_machine_or_version_is_refused(keep, capsys, changes, said):
    new, old = keep(on_another(**changes), "new"), keep(engine_result(), "old")
    assert main(["bench", "gate", new, "--baseline", old]) == 2
    assert main(["bench", "compare", old, new]) == 1
    for line in capsys.readouterr().err.splitlines():
        assert "cannot be compared" in line
        assert said in line


def test_a_minor_driver_is_the_same_driver():
    first, second = (
        on_another(gpu="NVIDIA H200", driver=driver) for driver in ("580.1", "580.95")
    )
    compare.same_key(first, second)


def test_a_broken_file_or_one_without_common_cases_exits_2(keep, tmp_path, capsys):
    old = keep(engine_result(), "old")
    (tmp_path / "broken.json").write_text("{")
    assert (
        main(["bench", "gate", str(tmp_path / "broken.json"), "--baseline", old]) == 2
    )
    assert "INVALID" in capsys.readouterr().err
    other = engine_result(1)
    for each in other["vllm_ext"]["comparisons"]:
        each["case"] = f"another {each['case']}"
    assert main(["bench", "gate", keep(other, "other"), "--baseline", old]) == 2
    assert "no case in common" in capsys.readouterr().err


def test_a_case_that_the_run_has_lost_exits_2(keep, capsys):
    """An arm with wrong tokens has no figures: the rest must not pass for it."""
    new, old = engine_result(1, all=0.9), engine_result(all=0.9)
    ours = new["vllm_ext"]
    ours["comparisons"] = [
        each for each in ours["comparisons"] if "batch 8" not in each["case"]
    ]
    files = keep(new, "new"), keep(old, "old")
    assert main(["bench", "gate", files[0], "--baseline", files[1]]) == 2
    said = capsys.readouterr().out
    assert "INVALID    tiny, S0, batch 8, TPOT, all: ratio 0.89" in said
    assert "the result has no such case" in said
    assert "1 INVALID, 1 SAME" in said
    assert main(["bench", "gate", files[1], "--baseline", files[0]]) == 0


def test_a_baseline_is_replaced_with_a_reason_only(keep, capsys):
    new, old = (
        keep(engine_result(1, all=0.95), "new"),
        keep(engine_result(all=0.9), "o"),
    )
    arguments = ["bench", "gate", new, "--baseline", old]
    assert main([*arguments, "--accept", "the new sampler costs more at S0"]) == 0
    kept = json.loads(Path(old).read_text())
    assert kept["vllm_ext"]["accepted"] == "the new sampler costs more at S0"
    assert main(arguments) == 0


def unfit_watch(result):
    result["vllm_ext"]["watch"] = {"valid": False, "reason": "throttled"}


def no_comparison(result):
    result["vllm_ext"]["comparisons"] = []


@pytest.mark.parametrize(
    ("control", "change", "why"),
    [
        (1.03, lambda result: None, "stock against stock shows a difference"),
        (1.0, unfit_watch, "throttled"),
        (1.0, no_comparison, "it compares nothing"),
    ],
)
def test_an_invalid_run_does_not_become_a_baseline(keep, capsys, control, change, why):
    result = engine_result(control=control)
    change(result)
    unfit, old = keep(result, "unfit"), keep(engine_result(), "old")
    arguments = ["bench", "gate", unfit, "--baseline", old, "--accept", "because"]
    assert main(arguments) == 2
    assert f"is no baseline ({why}" in capsys.readouterr().err
    assert "accepted" not in json.loads(Path(old).read_text())["vllm_ext"]


def test_json_is_what_judge_says(keep, capsys):
    new, old = engine_result(1, all=0.95), engine_result(all=0.9)
    main(["bench", "gate", keep(new, "n"), "--baseline", keep(old, "o"), "--json"])
    assert json.loads(capsys.readouterr().out) == gate.judge(old, new)


# -- compare -------------------------------------------------------------------------


def test_compare_shows_every_common_case_with_a_verdict():
    slower = engine_result(1)
    for each in slower["benchmarks"]:
        each["stats"]["data"] = [2 * value for value in each["stats"]["data"]]
        each["stats"]["median"] *= 2
    found = compare.compare(engine_result(), slower)
    assert len(found) == len(slower["benchmarks"])
    assert {each["verdict"] for each in found} == {"REGRESSED"}
    assert 1.7 < found[0]["ratio"] < 2.3


def test_compare_prints_a_table_with_units(keep, capsys):
    files = keep(engine_result(), "a"), keep(engine_result(1), "b")
    assert main(["bench", "compare", *files]) == 0
    said = capsys.readouterr().out
    assert "tiny, S0, batch 1, TPOT, stock" in said
    assert " ms " in said


@pytest.mark.parametrize(
    ("value", "text"), [(2.5, "2.5 s"), (0.0042, "4.2 ms"), (17.3e-6, "17.3 us")]
)
def test_times_have_the_unit_that_suits_them(value, text):
    assert compare.seconds(value) == text
