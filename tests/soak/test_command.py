"""``vllm-ext soak``: what it calls a fault, and two short runs of it."""

import argparse
import json

import pytest

from vllm_ext.soak import command

USED = [{"name": command.PATCH, "state": "in use"}]


def row(**changes):
    usual = {
        "tokens": 1000,
        "seconds": 0.5,
        "answers": "same",
        "left": {"blocks in use": 0, "requests": 0},
        "objects": 10_000,
        "rss": 10**9,
    }
    return usual | changes


def soak(stock, patched, states=USED):
    return command.faults({"stock": stock, "patched": patched}, states, command.PATCH)


def test_all_is_well():
    assert soak([row()] * 8, [row()] * 8) == []


@pytest.mark.parametrize(
    ("patched", "fault"),
    [
        ([row()] * 7 + [row(answers="other")], "block 7: the answers differ"),
        ([row()] * 7 + [row(left={"blocks in use": 3})], "holds 3 blocks in use"),
        ([row(objects=10_000 + 300 * i) for i in range(8)], "objects grew by 5.3%"),
        ([row(rss=10**9 + 3 * 10**7 * i) for i in range(8)], "rss grew by 5.3%"),
    ],
)
def test_a_fault_is_one_line(patched, fault):
    [line] = soak([row()] * 8, patched)
    assert fault in line


def test_growth_that_stock_has_too_is_no_fault_of_the_patch():
    growing = [row(rss=10**9 + 3 * 10**7 * i) for i in range(8)]
    assert soak(growing, growing) == []


def test_a_patch_that_was_not_used_proves_nothing():
    [line] = soak(
        [row()] * 8, [row()] * 8, [{"name": command.PATCH, "state": "applied"}]
    )
    assert "was not in use" in line


def test_tokens_per_second_side_by_side():
    lines = command.engine_lines(
        {"stock": [row()] * 8, "patched": [row(seconds=0.25)] * 8}, 128
    )
    assert "2000" in lines[2]
    assert "4000" in lines[3]
    assert lines[-1] == "tokens/s, patched to stock: 2.000 (2.000-2.000)"


def parse(*arguments):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ("scheduler", "--steps", "0"),
        ("engine", "--minutes", "0"),
        ("engine", "--patches", "no_such_patch"),
        (),
    ],
)
def test_wrong_wishes_are_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        parse(*arguments)
    assert end.value.code == 2


def test_without_the_lane_it_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(
        "vllm_ext.hostbench.importlib.util.find_spec", lambda name: None
    )
    args = parse("scheduler")
    assert args.run(args) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith("needs the CPU lane of a checkout: run make setup")


@pytest.mark.vllm
def test_schedulers_are_compared(tmp_path, capsys):
    path = tmp_path / "soak.json"
    args = parse("scheduler", "--steps", "600", "--seed", "1000", "--json", str(path))
    assert args.run(args) == 0
    result = json.loads(path.read_text())
    assert result["seen"]["steps"] >= 600
    assert result["seen"]["fast"] > 50
    assert result["faults"] == []
    assert "steps, compared after each of" in capsys.readouterr().out


@pytest.mark.vllm
def test_engines_under_churn_answer_alike_and_keep_nothing(tmp_path, capsys):
    path = tmp_path / "soak.json"
    options = ("--minutes", "0.01", "--batch", "16", "--json", str(path))
    args = parse("engine", *options)
    assert args.run(args) == 0, capsys.readouterr().out
    result = json.loads(path.read_text())
    assert {len(rows) for rows in result["blocks"].values()} == {4}
    assert all(row["tokens"] > 100 for row in result["blocks"]["patched"])
    assert "tokens/s, patched to stock" in capsys.readouterr().out
