"""``vllm-ext demo``: it shows what happened, and fails when a token differs."""

import argparse
import json
import os
import subprocess
import sys

import pytest

from vllm_ext import demo, hostbench, tokenrun
from vllm_ext.submissions import KINDS


def parse(*arguments):
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args(arguments)


def answer(tokens, logprobs=(), reason="length"):
    return {"tokens": tokens, "logprobs": list(logprobs), "reason": reason}


# -- comparing -------------------------------------------------------------------------


def test_equal_answers_do_not_differ():
    answers = {"a": answer([1, 2, 3]), "b": answer([4], [[[4, -0.5]]])}
    found = demo.difference(answers, json.loads(json.dumps(answers)))
    assert (found["compared"], found["different"]) == (4, 0)
    assert (found["logprobs_compared"], found["logprobs_different"]) == (1, 0)
    assert found["first"] is None


@pytest.mark.parametrize(
    ("patched", "different", "first"),
    [
        ({"a": answer([1, 9, 9])}, 2, ("a", 1, "token", 2, 9)),
        ({"a": answer([1, 2])}, 1, ("a", 2, "token", 3, None)),
        ({"a": answer([1, 2, 3, 4])}, 1, ("a", 3, "token", None, 4)),
        ({}, 4, ("a", 0, "token", 1, None)),  # three tokens and the reason
        (
            {"a": answer([1, 2, 3], reason="stop")},
            1,
            ("a", 3, "reason to finish", "length", "stop"),
        ),
    ],
)
def test_a_different_answer_is_counted_and_the_first_place_named(
    patched, different, first
):
    found = demo.difference({"a": answer([1, 2, 3])}, patched)
    assert found["different"] == different
    assert tuple(found["first"].values()) == first


def test_a_logprob_that_differs_in_its_last_bit_differs():
    value = -0.5
    other = -0.5000000000000001
    found = demo.difference(
        {"a": answer([1], [[[1, value]]])}, {"a": answer([1], [[[1, other]]])}
    )
    assert (found["different"], found["logprobs_different"]) == (0, 1)
    assert found["first"]["what"] == "logprobs"


def patch(name, state, calls=0, reason="", aside=None):
    entry = {"name": name, "state": state, "calls": calls, "reason": reason}
    return {**entry, "aside": aside or {}, "targets": {}}


def test_patches_of_several_processes_become_one_line_each():
    states = [
        {"patches": [patch("a", "waiting"), patch("b", "in use", 3, aside={"x": 1})]},
        {"patches": [patch("a", "in use", 5), patch("b", "skipped", 0, "changed")]},
        {"patches": [patch("a", "in use", 2), patch("b", "in use", 4, aside={"x": 2})]},
    ]
    assert demo.merged(states) == [
        {"name": "a", "state": "in use", "calls": 7, "reason": "", "aside": {}},
        {
            **{"name": "b", "state": "skipped", "calls": 7, "reason": "changed"},
            "aside": {"x": 3},
        },
    ]


# -- real runs -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The command as a newcomer runs it, with a short measurement."""
    path = tmp_path_factory.mktemp("demo") / "demo.json"
    command = [sys.executable, "-m", "vllm_ext", "demo", "--json", str(path)]
    done = subprocess.run(
        [*command, "--batch", "2", "--blocks", "4"],
        capture_output=True,
        text=True,
        timeout=600,
        env={name: value for name, value in os.environ.items() if name[:4] != "VEXT"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done, json.loads(path.read_text())


@pytest.mark.vllm
def test_every_token_is_the_same(whole):
    _, result = whole
    tokens = result["tokens"]
    assert tokens["compared"] >= 150
    assert tokens["logprobs_compared"] >= 20
    assert (tokens["different"], tokens["logprobs_different"]) == (0, 0)
    assert tokens["requests"] == len(tokenrun.REQUESTS)
    assert tokens["graph_replays"] > 20  # the patches' own path, not only prefills


@pytest.mark.vllm
def test_costs_and_counts_are_there(whole):
    _, result = whole
    cost, counts = result["host_us_per_step"], result["submissions_per_step"]
    assert cost["stock"] > 0
    assert cost["patched"] > 0
    assert cost["ci95"][0] <= cost["ratio"] <= cost["ci95"][1]
    assert list(counts["stock"]) == list(counts["patched"]) == list(KINDS)
    assert sum(counts["stock"].values()) >= sum(counts["patched"].values()) > 0
    assert result["machine"]["python"]


@pytest.mark.vllm
def test_each_patch_has_a_state_and_calls_if_it_was_used(whole):
    _, result = whole
    assert result["patches"]
    for entry in result["patches"]:
        assert entry.keys() >= {"name", "state", "calls", "reason"}
        assert (entry["calls"] > 0) == (entry["state"] == "in use")


@pytest.mark.vllm
def test_it_fits_a_screen_and_is_honest(whole):
    done, result = whole
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 18 + len(result["patches"])
    assert "Nothing ran on a GPU" in done.stdout
    assert "IDENTICAL" in done.stdout
    assert "stock: 18 requests decoded" in done.stderr


# A plugin beside ours, installed as any plugin is, that gets one token wrong.
WRONG = """
import os

from vllm_ext.patching.on_import import on_import


def register():
    if os.environ.get("VEXT") != "0":
        on_import("vllm.v1.worker.gpu.sample.sampler", spoil)


def spoil(module):
    stock = module.Sampler.sample
    calls = 0

    def sample(self, *args, **kwargs):
        nonlocal calls
        calls += 1
        sampled, logits = stock(self, *args, **kwargs)
        if calls == 8:
            sampled[0] = (sampled[0] + 1) % 2048
        return sampled, logits

    module.Sampler.sample = sample
"""


@pytest.mark.vllm
def test_one_wrong_token_fails_the_demo(tmp_path, monkeypatch, capsys):
    (tmp_path / "wrong_patch.py").write_text(WRONG)
    info = tmp_path / "wrong_patch-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: wrong-patch\nVersion: 1\n"
    )
    (info / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nwrong_patch = wrong_patch:register\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(hostbench, "measure", lambda *args, **kwargs: MEASURED)
    assert demo.run(parse("--json", str(tmp_path / "demo.json"))) == 1
    result = json.loads((tmp_path / "demo.json").read_text())
    first = result["tokens"]["first"]
    assert result["tokens"]["different"] >= 1
    assert first["patched"] == (first["stock"] + 1) % 2048
    text = capsys.readouterr().out
    assert "DIFFERENT" in text
    assert f"request `{first['request']}`, position {first['position']}" in text


COUNTS = dict.fromkeys(KINDS, 2)
MEASURED = {
    "rows": [
        {
            **{"batch": batch, "mode": "greedy", "part": "step"},
            **{"stock_us": 2.0, "patched_us": 1.0, "ratio": 0.5, "ci95": [0.4, 0.6]},
            **{"stock_quartiles_us": [2, 3], "patched_quartiles_us": [1, 2]},
            **{"submissions_stock": COUNTS, "submissions_patched": COUNTS},
        }
        for batch in demo.BATCHES
    ],
    "stubbed": [],
}


# -- when it cannot run ----------------------------------------------------------------


def test_without_the_lane_it_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(hostbench.importlib.util, "find_spec", lambda name: None)
    assert demo.run(parse()) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        "vllm-ext: this command needs the CPU lane of a checkout: run make setup"
    )


def test_a_file_that_cannot_be_written_is_one_line_before_any_work(capsys, monkeypatch):
    monkeypatch.setattr(demo, "show", lambda *args: 1 / 0)
    assert demo.run(parse("--json", "/nowhere/demo.json")) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "/nowhere/demo.json cannot be written" in line


def test_an_engine_that_dies_shows_its_last_lines(monkeypatch, capsys, tmp_path):
    (tmp_path / "vllm.py").write_text("raise SystemExit('no vllm today')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert demo.run(parse()) == 1
    error = capsys.readouterr().err
    assert "stock engine ended with status 1" in error
    assert "no vllm today" in error


@pytest.mark.parametrize(
    ("tokens", "logprobs", "state", "well"),
    [
        (0, 0, "in use", True),
        (0, 0, "off", True),
        (1, 0, "in use", False),
        (0, 1, "in use", False),
        (0, 0, "failed", False),
        (0, 0, "skipped", False),
    ],
)
def test_a_difference_or_a_patch_that_did_not_apply_is_exit_1(
    tokens, logprobs, state, well
):
    result = {
        "tokens": {"different": tokens, "logprobs_different": logprobs},
        "patches": [{"state": state}],
    }
    assert demo.all_is_well(result) is well
