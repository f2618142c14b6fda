"""Result files: complete, readable by others, and judged all together."""

import copy
import json

import numpy as np
import pytest
from bench.made_up import CASE, engine_result

from vllm_ext import machine
from vllm_ext.bench import results
from vllm_ext.patches import SERIES


def verdicts(found, arm="all"):
    return {
        each["case"]: each["verdict"]
        for each in found["vllm_ext"]["comparisons"]
        if each["arm"] == arm
    }


def test_stock_against_stock_is_the_same():
    found = engine_result()
    assert set(verdicts(found).values()) == {"SAME"}
    assert set(verdicts(found, "control").values()) == {"SAME"}


def test_a_slowdown_of_5_percent_is_a_regression():
    assert set(verdicts(engine_result(all=1.05)).values()) == {"REGRESSED"}


def test_a_gain_of_10_percent_is_an_improvement():
    assert set(verdicts(engine_result(all=0.9)).values()) == {"IMPROVED"}


def test_a_control_that_differs_makes_its_case_invalid():
    found = engine_result(control=1.02)  # within the tolerance, and yet no chance
    assert set(verdicts(found).values()) == {"INVALID"}
    reasons = {each["reason"] for each in found["vllm_ext"]["comparisons"]}
    assert reasons == {"stock against stock shows a difference"}


def test_an_unfit_machine_makes_everything_invalid():
    found = engine_result()
    unfit = {"valid": False, "reason": "throttled: 40 % of the samples"}
    judged = results.judge(found["vllm_ext"]["comparisons"], unfit)
    assert {each["verdict"] for each in judged} == {"INVALID"}
    assert {each["reason"] for each in judged} == {"throttled: 40 % of the samples"}


def test_sound_machines_show_a_difference_as_rarely_as_is_said():
    """100 tables of 10 cases in which nothing differs: at most one in twenty errs.

    The chance that more than 12 of 100 do, if 5 % do, is 0.15 %; the seed is fixed.
    """
    random = np.random.default_rng(7)
    wrong = 0
    for _ in range(100):
        table = []
        for case in range(10):
            before, after = random.lognormal(0, 0.01, (2, 12))
            table.append(
                results.comparison(
                    case=str(case),
                    metric="TPOT",
                    unit="s",
                    arm="control",
                    against="stock",
                    arm_samples=list(after),
                    against_samples=list(before),
                    tolerance=0.03,
                )
            )
        wrong += any(each["verdict"] == "INVALID" for each in results.judge(table))
    assert wrong <= 12


def test_tokens_per_second_are_better_when_higher():
    row = results.comparison(
        case="c",
        metric="throughput",
        unit="tokens/s",
        arm="all",
        against="stock",
        arm_samples=[120.0] * 8,
        against_samples=[100.0] * 8,
        tolerance=0.03,
        higher_is_better=True,
    )
    assert row["ratio"] == pytest.approx(100 / 120)
    assert (row["value"], row["against_value"]) == (120.0, 100.0)
    assert results.judge([row])[0]["verdict"] == "IMPROVED"


def test_a_file_comes_back_as_it_was(tmp_path):
    found = engine_result()
    path = results.save(found, tmp_path / "x.json")
    assert results.read(path) == found


def test_without_a_path_it_is_kept_by_machine_day_commit_and_version(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    here = {**machine.describe(), "gpu": "NVIDIA H200", "vllm": "0.33.0"}
    monkeypatch.setattr(machine, "describe", lambda: here)
    path = results.save(engine_result())
    assert path.parent == tmp_path / "nvidia-h200"
    assert path.name.endswith("_vllm-0.33.0_engine.json")
    assert results.key(results.read(path))["machine"] == "NVIDIA H200"


def test_pytest_benchmarks_readers_find_what_they_look_for():
    """What github-action-benchmark takes of a file, and pytest-benchmark's compare."""
    found = engine_result()
    assert {"datetime", "version", "machine_info", "commit_info"} <= found.keys()
    assert found["commit_info"]["id"]
    assert found["machine_info"]["cpu"]
    names = [each["fullname"] for each in found["benchmarks"]]
    assert len(set(names)) == len(names)
    for each in found["benchmarks"]:
        stats = each["stats"]
        assert stats["ops"] == pytest.approx(1 / stats["mean"])
        assert stats["q1"] <= stats["median"] <= stats["q3"]
        assert {"stddev", "rounds", "min", "max"} <= stats.keys()


def test_it_says_of_which_code_it_is():
    ours = engine_result()["vllm_ext"]
    assert set(ours["digests"]) == {patch.name for patch in SERIES}
    assert {"sample", "logprobs", "top_k_top_p"} <= ours["kernels"].keys()
    assert len({*ours["digests"].values(), *ours["kernels"].values()}) == len(
        [*ours["digests"], *ours["kernels"]]
    )
    assert ours["machine"].keys() == machine.describe().keys()
    assert ours["command"] == ["vllm-ext", "bench", "engine"]


def spoilt(change):
    found = copy.deepcopy(engine_result())
    change(found)
    return json.dumps(found)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON"),
        ("[1]", "is no result of vllm-ext bench"),
        ('{"benchmarks": []}', "is no result of vllm-ext bench"),
        (spoilt(lambda f: f["vllm_ext"].update(schema=99)), "has schema 99"),
        (spoilt(lambda f: f.pop("benchmarks")), "no list of benchmarks"),
        (
            spoilt(lambda f: f["benchmarks"][1]["stats"].pop("median")),
            "benchmark 2 has no median",
        ),
        (spoilt(lambda f: f["benchmarks"][0]["stats"].pop("data")), "no samples"),
        *(
            (
                spoilt(
                    lambda f, wrong=wrong: f["benchmarks"][0]["stats"].update(wrong)
                ),
                said,
            )
            for wrong, said in (
                ({"median": None}, "benchmark 1 has no median"),
                ({"data": [1e-3, 0.0]}, "benchmark 1 has no samples"),
                ({"data": [1e-3, float("nan")]}, "benchmark 1 has no samples"),
            )
        ),
        (spoilt(lambda f: f["benchmarks"][0].pop("group")), "benchmark 1 has no group"),
        (spoilt(lambda f: f["vllm_ext"].update(machine=None)), "it has no machine"),
        (spoilt(lambda f: f["vllm_ext"].pop("command")), "it has no command"),
        (
            spoilt(lambda f: f["vllm_ext"].update(watch=1)),
            "machine gate saw is missing",
        ),
        (
            spoilt(lambda f: f["vllm_ext"]["comparisons"][0].update(ratio=0)),
            "comparison 1 has no ratio",
        ),
        (
            spoilt(lambda f: f["vllm_ext"]["machine"].pop("driver")),
            "its machine lacks driver",
        ),
        (
            spoilt(lambda f: f["vllm_ext"]["comparisons"][2].update(ratio="1")),
            "comparison 3 has no ratio",
        ),
        (
            spoilt(lambda f: f["vllm_ext"]["comparisons"][0]["pairs"].pop("after")),
            "comparison 1 has no pairs",
        ),
        (
            spoilt(lambda f: f["vllm_ext"]["comparisons"][0].update(ci95=[1])),
            "comparison 1 has no ci95",
        ),
    ],
)
def test_a_spoilt_file_is_one_line_that_names_it(tmp_path, text, said):
    path = tmp_path / "spoilt.json"
    path.write_text(text)
    with pytest.raises(results.BadResultError, match=said) as error:
        results.read(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_a_file_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(results.BadResultError, match="No such file"):
        results.read(tmp_path / "none.json")


def test_no_timings_are_no_entry():
    with pytest.raises(ValueError, match="finite numbers"):
        results.entry("n", "g", {}, [])


def test_the_case_names_its_batch():
    assert CASE.format(8) in verdicts(engine_result())
