"""``vllm-ext bench host``: what it may print, and what it does without a lane."""

import argparse
import json
import sys

import pytest

from vllm_ext import hostbench, hostloop
from vllm_ext.children import Child, ChildError
from vllm_ext.submissions import KINDS

PARTS = ["schedule", "execute_model", "sample_tokens", "update_from_output"]
PARTS += ["worker", "step"]


def parse(*arguments):
    parser = argparse.ArgumentParser()
    hostbench.add_arguments(parser)
    return parser.parse_args(arguments)


# -- a real run ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VEXT_STEP_GRAPH", "mono")
        return measured(tmp_path_factory)


def measured(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "host.json"
    arguments = ("--batch", "2,5", "--mode", "greedy,filtered", "--blocks", "4")
    arguments += ("--steps", "3", "--patches", "+step_graph", "--control")
    args = parse(*arguments, "--json", str(path))
    assert hostbench.run(args) == 0
    return json.loads(path.read_text())


@pytest.mark.vllm
def test_every_case_and_part_has_a_row(bench):
    cases = [(2, "greedy"), (2, "filtered"), (5, "greedy"), (5, "filtered")]
    parts = [*PARTS, hostbench.ALL_THREADS]
    expected = [(*case, part) for case in cases for part in parts]
    rows = [(row["batch"], row["mode"], row["part"]) for row in bench["rows"]]
    assert rows == expected
    assert bench["machine"]["vllm"]
    assert len(bench["stubbed"]) >= 4


@pytest.mark.vllm
def test_the_result_says_how_to_make_it_again(bench):
    assert bench["command"] == ["vllm-ext", *sys.argv[1:]]
    assert bench["settings"] == {"VEXT_STEP_GRAPH": "mono"}


@pytest.mark.vllm
def test_times_are_positive_and_parts_do_not_exceed_their_step(bench):
    for row in bench["rows"]:
        low, high = row["ci95"]
        assert 0 < low <= row["ratio"] <= high
        assert row["control_ci95"][0] <= row["control_ratio"] <= row["control_ci95"][1]
    for side in ("stock_us", "patched_us"):
        for batch, mode in {(row["batch"], row["mode"]) for row in bench["rows"]}:
            part = {
                row["part"]: row[side]
                for row in bench["rows"]
                if (row["batch"], row["mode"]) == (batch, mode)
            }
            # Medians of a few steps: each part is a good deal less than the whole.
            assert all(0 < part[name] < part["step"] for name in PARTS[:-1])


@pytest.mark.vllm
def test_submissions_are_those_of_a_stock_step_and_no_more_when_patched(bench):
    for row in bench["rows"]:
        stock, patched = row["submissions_stock"], row["submissions_patched"]
        assert list(stock) == list(patched) == list(KINDS)
        assert all(type(number) is int for number in (*stock.values(),))
        assert all(patched[kind] <= stock[kind] for kind in KINDS)
        assert sum(patched.values()) > 0
        # Read in vLLM 0.32's source, one by one. Two requests rarely need a block.
        if (row["batch"], row["mode"]) == (2, "greedy"):
            wanted = {"triton": 7, "aten": 11, "h2d": 2, "d2h": 2, "graph": 1}
            assert stock == wanted
            wanted = {"triton": 0, "aten": 0, "h2d": 1, "d2h": 1, "graph": 1}
            assert patched == wanted
        if (row["batch"], row["mode"]) == (2, "filtered"):
            wanted = {"triton": 9, "aten": 14, "h2d": 2, "d2h": 2, "graph": 1}
            assert stock == wanted


@pytest.mark.vllm
def test_the_screen_says_what_it_is_and_what_it_is_not(bench):
    text = hostbench.table(bench)
    assert "nothing about the speed of a GPU" in text
    assert "Stubbed, on both sides" in text
    assert "batch 2, greedy: 23 ->" in text
    assert "again" in text
    assert max(map(len, text.splitlines())) <= 100


@pytest.fixture(scope="module")
def stock_engine():
    child = Child(
        "vllm_ext.hostloop", {**hostbench.environment("discard"), "VEXT": "0"}, "stock"
    )
    child.ask("boot", cpu=0)
    yield child
    child.close()


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("batch", "mode", "message"),
    [(0, "greedy", "not within 1 to 512"), (1, "lucky", "no mode lucky")],
)
def test_what_cannot_be_decoded_is_refused(stock_engine, batch, mode, message):
    with pytest.raises(ChildError, match=message):
        stock_engine.ask("start", batch=batch, mode=mode)


@pytest.mark.vllm
def test_a_request_that_ends_is_no_steady_decode(stock_engine):
    stock_engine.ask("start", batch=1, mode="greedy")
    with pytest.raises(ChildError, match="not a steady decode"):
        stock_engine.ask("time", settling=hostloop.MAX_LENGTH, steps=1)


@pytest.mark.vllm
@pytest.mark.parametrize("batch", [1, 12])
def test_in_a_turnover_requests_come_and_end_in_every_step(stock_engine, batch):
    """It fails by itself in a step that only decodes."""
    stock_engine.ask("start", batch=batch, mode="turnover")
    taken = stock_engine.ask("time", settling=2, steps=20)
    assert all(sample > 0 for samples in taken.values() for sample in samples)
    stock_engine.ask("start", batch=2, mode="greedy")  # and leaves nothing behind
    stock_engine.ask("time", settling=1, steps=2)


# -- without an engine -------------------------------------------------------------


def test_without_the_lane_it_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(hostbench.importlib.util, "find_spec", lambda name: None)
    assert hostbench.run(parse()) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        "vllm-ext: this command needs the CPU lane of a checkout: run make setup"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--blocks", "1"), "--blocks of at least 4"),
        (("--steps", "0"), "--steps of at least 1"),
        (("--blocks", "1000"), "the tokens of a request"),
        (("--json", "/nowhere/there.json"), "/nowhere/there.json cannot be written"),
        (("--json", "/"), "it is a folder"),
    ],
)
def test_wrong_wishes_are_one_line_before_any_work(
    monkeypatch, capsys, arguments, message
):
    monkeypatch.setattr(hostbench, "measure", lambda *args, **kwargs: 1 / 0)
    assert hostbench.run(parse(*arguments)) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize(
    "arguments",
    [("--batch", "0"), ("--mode", "greedy,lucky"), ("--patches", "no_such_patch")],
)
def test_unknown_batches_modes_and_patches_are_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        parse(*arguments)
    assert end.value.code == 2


def test_modes_are_the_ones_that_the_engine_knows():
    assert tuple(hostloop.MODES) == hostbench.MODES
    assert hostbench.ALL_THREADS == hostloop.ALL_THREADS


class Scripted:
    """An engine that answers from a list of times, and notes when it was asked."""

    def __init__(self, name, log, microseconds):
        self.name, self.log, self.microseconds = name, log, microseconds

    def ask(self, what, **details):
        if what == "count":
            return {"kinds": dict.fromkeys(KINDS, 1), "names": {}, "share": 1.0}
        if what == "time":
            self.log.append(self.name)
            return {"step": [self.microseconds] * details["steps"]}
        return None


def test_a_busy_machine_is_said():
    assert hostbench.busy(0.3, {"cores": 2}) == []
    [line] = hostbench.busy(1.7, {"cores": 2})
    assert "load 1.7 on 2 cores" in line


def test_engines_take_turns_and_none_follows_itself_more_often():
    log = []
    engines = {
        "stock": Scripted("s", log, 200.0),
        "patched": Scripted("p", log, 150.0),
    }
    rows = []
    hostbench._case(engines, 1, "greedy", blocks=4, steps=3, rows=rows, names=[])
    [row] = rows
    assert "".join(log) == "sppsspps"
    assert (row["stock_us"], row["patched_us"], row["ratio"]) == (200.0, 150.0, 0.75)


def test_three_engines_rotate():
    log = []
    names = {"stock": "s", "patched": "p", "control": "c"}
    engines = {name: Scripted(letter, log, 100.0) for name, letter in names.items()}
    hostbench._case(engines, 1, "greedy", blocks=6, steps=3, rows=[], names=[])
    follows = [log[i] + log[i + 1] for i in range(len(log) - 1)]
    assert all(log.count(letter) == 6 for letter in "spc")
    assert max(map(follows.count, ("ss", "pp", "cc"))) <= 1 + min(
        map(follows.count, ("ss", "pp", "cc"))
    )
