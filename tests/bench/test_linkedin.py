"""``vllm-ext bench linkedin``: the arms, the old penalties, and what is reproduced."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vllm_ext.bench import legacy, linkedin
from vllm_ext.bench.arms import CUDA, GRAPHS, HEADLINES, PENALTIES, runnable
from vllm_ext.bench.results import CONTROL
from vllm_ext.bench.turns import Lane
from vllm_ext.patches import SERIES
from vllm_ext.prove.pretend import DEVICE, PretendDevice, data_of
from vllm_ext.prove.syncs import watch

FAKE = {"PYTHONPATH": str(Path(__file__).parent)}


def parse(*arguments):
    parser = argparse.ArgumentParser()
    linkedin.add_arguments(parser)
    return parser.parse_args(arguments)


# -- the arms are data -------------------------------------------------------------


def test_arms_are_the_ones_of_the_story():
    patched = [f"A4-{patch.name}" for patch in SERIES]
    assert [*GRAPHS] == ["A0", "A1", "A2", "A3", CONTROL, "A3i", *patched, "A4"]
    with_async = ["B1", "B2", "B3", "B4"]
    without = [f"{name}w" for name in with_async]
    assert [*PENALTIES] == [*with_async, *without, CONTROL, "B5"]


def test_every_arm_is_compared_with_one_that_there_is():
    for group in (GRAPHS, PENALTIES):
        for arm in group.values():
            assert arm.against in {"", *group} - {arm.name}


def test_before_and_after_differ_in_one_thing():
    before, after = GRAPHS["A1"], GRAPHS["A2"]
    assert before.environment == after.environment == {"VLLM_USE_V2_MODEL_RUNNER": "0"}
    assert before.arguments == {"compilation_config": {"cudagraph_mode": "PIECEWISE"}}
    assert after.arguments == {"compilation_config": {"cudagraph_mode": "FULL"}}
    for suffix in ("", "w"):
        before, after = PENALTIES[f"B1{suffix}"], PENALTIES[f"B2{suffix}"]
        assert before.arguments == after.arguments
        assert before.environment == after.environment
        assert (before.legacy, after.legacy) == ("boolean", "where")
    assert PENALTIES["B1"].arguments == {}
    assert PENALTIES["B1w"].arguments == {"async_scheduling": False}


def test_the_old_code_is_no_patch():
    every = [*GRAPHS.values(), *PENALTIES.values()]
    used = {arm.name for arm in every if arm.legacy}
    assert used == {"B1", "B2", "B1w", "B2w", CONTROL}
    assert not any("legacy" in edit.by for patch in SERIES for edit in patch.edits)
    assert "reproduction only" in PENALTIES["B1"].what


def test_a_cpu_says_what_it_cannot_run():
    arms, missing = runnable([*PENALTIES.values()], has_gpu=False)
    assert [arm.name for arm in arms] == ["B1w", "B2w", CONTROL]
    whys = {each["arm"]: each["why"] for each in missing}
    assert whys["B3"] == whys["B1"] == f"needs {CUDA}"
    assert whys["B5"] == f"needs {CUDA}"
    _, missing = runnable([*GRAPHS.values()], has_gpu=False)
    assert [each["arm"] for each in missing] == ["A0", "A1", "A2", "A3i"]
    _, missing = runnable([*PENALTIES.values()], has_gpu=True)
    assert missing == []
    assert PENALTIES["B5"].patches == "fused_sampler"


def test_an_arm_brings_what_it_is_compared_with():
    def names(known, *arguments):
        return [arm.name for arm in linkedin.chosen(known, parse(*arguments))]

    assert names(GRAPHS, "--arms", "A2") == ["A1", "A2", CONTROL]
    assert names(GRAPHS, "--arms", "A2", "--no-control") == ["A1", "A2"]
    assert names(GRAPHS, "--arms", "A4-decode_counts") == [
        *("A3", CONTROL, "A4-decode_counts")
    ]
    assert names(GRAPHS, "--arms", "A4", "--no-control") == ["A3", "A4"]
    assert names(PENALTIES, "--arms", "A4") == []
    assert names(GRAPHS) == ["A0", "A1", "A2", "A3", CONTROL, "A3i", "A4"]


def test_the_control_is_what_it_is_compared_with():
    """A headline of A1 and A2 alone has one too: before, once more."""
    *_, control = linkedin.chosen(GRAPHS, parse("--arms", "A2"))
    assert (control.name, control.against, control.same_tokens) == (CONTROL, "A1", True)
    assert control.arguments == GRAPHS["A1"].arguments
    assert control.environment == GRAPHS["A1"].environment


# -- the old penalties -------------------------------------------------------------


def tensors(device):
    torch.manual_seed(0)
    logits = torch.randn(3, 40)
    logits[0, :3] = torch.tensor([0.0, float("inf"), float("-inf")])
    masks = [torch.rand(3, 40) < 0.3 for _ in range(2)]
    penalties = torch.tensor([1.3, 1.0, 0.7])
    return [each.to(device) for each in (logits, *masks, penalties)]


@pytest.mark.parametrize("form", legacy.FORMS)
def test_seen_tokens_become_less_likely(form):
    logits, prompt, output, penalties = tensors("cpu")
    expected = logits.double()
    for row in range(3):
        for token in range(40):
            if prompt[row, token] or output[row, token]:
                by = float(penalties[row])
                above = expected[row, token] > 0
                expected[row, token] *= 1 / by if above else by
    legacy.FORMS[form](logits, prompt, output, penalties)
    torch.testing.assert_close(logits.double(), expected, rtol=3e-7, atol=0)


@pytest.mark.parametrize(("form", "waits"), [("boolean", 6), ("where", 0)])
def test_boolean_indices_make_the_host_wait_six_times(form, waits):
    with torch.inference_mode(), PretendDevice() as device:
        given = tensors("cpu")
        there = [each.to(DEVICE) for each in given]
        with watch(device) as found:
            legacy.FORMS[form](*there)
        assert len(found.waits) == waits
        legacy.FORMS[form](*given)
        assert torch.equal(data_of(there[0]), given[0])


# -- the headlines -----------------------------------------------------------------


def found(label, *compared, not_run=()):
    comparisons = [
        {
            **{"case": "c", "metric": "TPOT", "arm": arm, "against": "before"},
            **{"ratio": ratio, "ci95": [low, high], "verdict": verdict},
        }
        for arm, ratio, low, high, verdict in compared
    ]
    ours = {"label": label, "comparisons": comparisons, "not_run": [*not_run]}
    return {"vllm_ext": ours}


@pytest.mark.parametrize(
    ("compared", "verdict"),
    [
        ([("A2", 0.90, 0.88, 0.92, "IMPROVED")], "reproduced"),
        ([("A2", 0.99, 0.98, 0.995, "SAME")], "reproduced"),  # small, but it is there
        ([("A2", 0.95, 0.89, 1.01, "UNDECIDED")], "not reproduced"),
        ([("A2", 1.10, 1.05, 1.15, "REGRESSED")], "not reproduced"),
        ([("A2", 0.90, 0.88, 0.92, "INVALID")], "not reproduced"),
        (
            [("A2", 0.9, 0.8, 0.92, "IMPROVED"), ("A2", 1.0, 0.99, 1.01, "SAME")],
            "not reproduced",
        ),
        ([("A4", 0.90, 0.88, 0.92, "IMPROVED")], "not run"),
    ],
)
def test_a_headline_is_reproduced_when_every_interval_is_clear_of_none(
    compared, verdict
):
    graphs, _ = HEADLINES
    control = (CONTROL, 1.0, 0.99, 1.01, "SAME")
    said = linkedin.judged(graphs, found("GPU engine", *compared, control))
    assert said["verdict"] == verdict
    assert said["published_percent"] == 7
    alone = linkedin.judged(graphs, found("GPU engine", *compared))
    assert alone["verdict"] == "not run"
    if verdict != "not run":
        assert "no second stock engine" in alone["why"]


def test_percent_less_has_its_interval_the_right_way_round():
    [one] = linkedin.judged(
        HEADLINES[1], found("GPU engine", ("B2", 0.75, 0.5, 1.0, "UNDECIDED"))
    )["found"]
    assert (one["percent"], one["ci95"]) == (25.0, [0.0, 50.0])


def test_a_cpu_reproduces_nothing():
    said = linkedin.judged(
        HEADLINES[1], found("CPU engine", ("B2w", 0.5, 0.4, 0.6, "IMPROVED"))
    )
    assert said["verdict"] == "not run"
    assert "nothing waits for a device on a CPU" in said["why"]


def test_why_a_headline_could_not_be_run_is_said():
    lost = {"arm": "A2", "what": "", "why": "vLLM made graphs PIECEWISE"}
    said = linkedin.judged(HEADLINES[0], found("GPU engine", not_run=[lost]))
    assert (said["verdict"], said["why"]) == ("not run", "vLLM made graphs PIECEWISE")


# -- the command -------------------------------------------------------------------


@pytest.fixture
def lane(monkeypatch):
    def use(has_gpu):
        made = Lane(has_gpu, FAKE, module="engine_fake")
        monkeypatch.setattr(Lane, "here", classmethod(lambda cls: made))

    return use


def test_on_a_cpu_published_numbers_stand_beside_why_there_are_none(
    lane, tmp_path, capsys
):
    lane(has_gpu=False)
    path = tmp_path / "linkedin.json"
    assert linkedin.run(parse("--batch", "1", "--json", str(path))) == 0
    out = capsys.readouterr().out
    words = " ".join(out.split())
    assert "penalties (#16436): LinkedIn 8 %, this machine not run" in words
    assert "graphs (#16072): LinkedIn 7 %, this machine not run" in words
    for arm in ("A0", "A1", "A2", "A3i", "B1", "B3w", "B5"):
        assert (
            sum(line.startswith(f"not run: {arm} (") for line in out.splitlines()) == 1
        )
    written = json.loads(path.read_text())["vllm_ext"]
    assert (written["kind"], written["label"]) == ("linkedin", "CPU engine")
    assert [each["verdict"] for each in written["headlines"]] == ["not run"] * 2


def test_an_invalid_case_is_exit_1(lane, monkeypatch, capsys):
    lane(has_gpu=False)
    biased = replace(GRAPHS[CONTROL], arguments={"slow": 1.2})
    monkeypatch.setitem(linkedin.GRAPHS, CONTROL, biased)
    assert linkedin.run(parse("--batch", "1", "--arms", "A4")) == 1
    assert "stock against stock shows a difference" in capsys.readouterr().out


def test_what_cannot_be_compared_does_not_take_the_rest_along(
    lane, monkeypatch, capsys
):
    lane(has_gpu=False)
    broken = replace(PENALTIES["B1w"], arguments={"boots": False})
    monkeypatch.setitem(linkedin.PENALTIES, "B1w", broken)
    assert linkedin.run(parse("--batch", "1", "--arms", "A4,B2w")) == 0
    out = capsys.readouterr().out
    assert "TPOT 1.0" in out
    assert "not run: B1w (before: boolean-index penalties" in out
    assert "no such attention backend" in out


def test_arms_that_are_none_are_wrong_usage(capsys):
    with pytest.raises(SystemExit) as end:
        parse("--arms", "A9")
    assert end.value.code == 2
    assert "no arm A9; there are A0, A1" in capsys.readouterr().err


@pytest.mark.vllm
def test_the_old_penalties_run_in_a_real_engine(tmp_path, capsys):
    path = tmp_path / "linkedin.json"
    arguments = ("--arms", "B2w", "--no-control", "--batch", "2", "--output", "4")
    args = parse(*arguments, "--blocks", "2", "--boots", "1", "--json", str(path))
    assert linkedin.run(args) == 0
    result = json.loads(path.read_text())
    ours = result["vllm_ext"]
    assert [each["params"]["arm"] for each in result["benchmarks"]] == ["B1w", "B2w"]
    assert {each["arm"]: (each["name"], each["state"]) for each in ours["patches"]} == {
        "B1w": ("boolean penalties (reproduction only)", "in use"),
        "B2w": ("where penalties (reproduction only)", "in use"),
    }
    assert "CPU engine, tiny, batch 2, S2: B2w against B1w" in capsys.readouterr().out
