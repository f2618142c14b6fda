"""``vllm-ext bench engine``: what is compared, in which order, and what is refused."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from vllm_ext.bench import arms, engine, enginerun, legacy, models, turns
from vllm_ext.bench.arms import (
    ALL,
    CONTROL,
    DEFAULTS,
    ENGINE,
    MONO,
    SAMPLING,
    STOCK,
    Arm,
)
from vllm_ext.bench.turns import Case, Group, Lane, Plan
from vllm_ext.patches import SERIES

FAKE = Lane(False, {"PYTHONPATH": str(Path(__file__).parent)}, module="engine_fake")
CASE = Case("tiny", "S0", 16, 8, batch=4)
IN_USE = {"name": "x", "state": "in use", "reason": ""}
STOCKS = (Arm(STOCK, "", against=""), Arm(CONTROL, ""))


def parse(*arguments):
    parser = argparse.ArgumentParser()
    engine.add_arguments(parser)
    return parser.parse_args(arguments)


def measured(
    *others,
    blocks=12,
    cases=(CASE,),
    boots=1,
    stock=STOCKS[0],
    control=STOCKS[1],
    until=math.inf,
):
    """What a run with fake engines finds; what it said."""
    said = []
    chosen = [arm for arm in (stock, control, *others) if arm]
    # Each has noise of its own.
    drawn = [
        replace(arm, arguments={"draw": arm.name, **arm.arguments}) for arm in chosen
    ]
    result = turns.evidence(
        "engine",
        [Group(drawn, cases)],
        Plan(blocks, boots, until=until),
        FAKE,
        say=said.append,
        command=["bench", "engine"],
    )
    return result, said


def verdicts(result):
    compared = result["vllm_ext"]["comparisons"]
    return {(each["arm"], each["metric"]): each["verdict"] for each in compared}


def names(result):
    return [each["params"]["arm"] for each in result["benchmarks"]]


# -- models, arms and sampling are data --------------------------------------------

# Of the models' pages; Qwen3's without the copy of the embedding that its file holds.
PUBLISHED_PARAMETERS = {
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen3-0.6b": 596_049_920,
    "llama-3.2-1b": 1_235_814_400,
}


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_models_have_as_many_weights_as_the_ones_they_are_the_shape_of(name):
    assert models.MODELS[name].parameters == PUBLISHED_PARAMETERS[name]


def test_a_model_is_a_folder_with_a_configuration(tmp_path):
    path = models.write("llama-3.2-1b", tmp_path)
    assert [file.name for file in path.iterdir()] == ["config.json"]
    config = json.loads((path / "config.json").read_text())
    assert config["vocab_size"] == 128256
    assert config["architectures"] == ["LlamaForCausalLM"]


def test_every_patch_is_an_arm_of_its_own_and_all_are_one():
    patches = [patch.name for patch in SERIES]
    assert [*ENGINE] == [STOCK, CONTROL, *patches, DEFAULTS, ALL, MONO]
    for patch in SERIES:
        assert ENGINE[patch.name].variables["VEXT_PATCHES"] == patch.name
    assert ENGINE[ALL].variables == {
        "VEXT": "1",
        "VEXT_PATCHES": ",".join(patches),
    }
    on = ENGINE[DEFAULTS].variables["VEXT_PATCHES"].split(",")
    assert {*patches} - {*on} == {"fused_sampler", "step_graph"}


@pytest.mark.parametrize("name", [STOCK, CONTROL])
def test_stock_runs_without_the_plugin(name):
    assert ENGINE[name].variables == {"VEXT": "0", "VEXT_PATCHES": None}


def test_only_patches_tell_the_arms_of_the_engine_benchmark_apart():
    settings = {name: arm.environment for name, arm in ENGINE.items()}
    assert settings.pop(MONO) == {"VEXT_STEP_GRAPH": "mono"}
    assert not any(settings.values())
    assert ENGINE[MONO].patches == ENGINE[ALL].patches
    assert all(not arm.arguments for arm in ENGINE.values())
    assert all(arm.same_tokens for arm in ENGINE.values())


def test_sampling_sets():
    assert [*SAMPLING] == ["S0", "S1", "S2", "S3", "S4", "S5"]
    repeating = {
        name: [arms.repeats(each.of(index)) for index in range(2)]
        for name, each in SAMPLING.items()
    }
    assert repeating == {
        "S0": [True, True],
        "S1": [False, False],
        "S2": [False, False],
        "S3": [True, True],
        "S4": [True, False],
        "S5": [True, True],
    }
    assert SAMPLING["S3"].of(1)["seed"] != SAMPLING["S3"].of(2)["seed"]


# -- the order of blocks -----------------------------------------------------------


def test_every_second_block_runs_the_one_before_backwards():
    orders = turns.order("abc", 8, seed=5)
    assert all(sorted(each) == ["a", "b", "c"] for each in orders)
    assert all(orders[at] == orders[at + 1][::-1] for at in range(0, 8, 2))
    assert len({tuple(each) for each in orders}) > 2  # drawn, not fixed
    assert orders == turns.order("abc", 8, seed=5) != turns.order("abc", 8, seed=6)


def test_engines_are_asked_in_that_order_one_at_a_time(monkeypatch):
    asked = []
    stock = turns.Child.ask

    def ask(child, what, *args, **details):
        if what == "closed" and details["seed"] >= 0:
            asked.append(child.name.removeprefix("the engine of "))
        return stock(child, what, *args, **details)

    monkeypatch.setattr(turns.Child, "ask", ask)
    measured(Arm("a", ""), blocks=12)
    in_blocks = [asked[at : at + 3] for at in range(0, 36, 3)]
    assert in_blocks == turns.order([STOCK, CONTROL, "a"], 12, seed=0)


# -- verdicts ----------------------------------------------------------------------


def test_a_slowdown_of_5_percent_is_seen_and_none_is_seen_where_there_is_none():
    result, _ = measured(
        Arm("slow", "", {"slow": 1.05}),
        Arm("fast", "", {"slow": 1 / 1.05}),
        Arm("same", "", {"slow": 1.001}),
        blocks=40,
    )
    assert verdicts(result) == {
        (CONTROL, "TPOT"): "SAME",
        ("slow", "TPOT"): "REGRESSED",
        ("fast", "TPOT"): "IMPROVED",
        ("same", "TPOT"): "SAME",
    }
    assert result["vllm_ext"]["label"] == "CPU engine"


def test_of_real_work_too():
    slow = Arm("slow", "", {"works": True, "slow": 1.25})
    same = Arm("same", "", {"works": True})
    stock = Arm(STOCK, "", {"works": True}, against="")
    result, _ = measured(slow, same, blocks=24, boots=4, stock=stock, control=None)
    found = verdicts(result)
    assert found["slow", "TPOT"] == "REGRESSED"
    # What a busy machine leaves open is not decided; it is never called a difference.
    assert found["same", "TPOT"] in ("SAME", "UNDECIDED")


def test_undecided_cases_run_once_more_with_twice_the_blocks():
    loud = Arm("loud", "", {"noise": 0.4})
    quiet = Case("tiny", "S1", 16, 8, batch=2)
    result, said = measured(loud, blocks=8, cases=[CASE])
    assert sum("undecided" in line for line in said) == 1
    [rounds] = {each["stats"]["rounds"] for each in result["benchmarks"]}
    assert rounds == 16  # in the place of the first 8, not beside them
    assert result["vllm_ext"]["rerun"] == [CASE.name]
    result, said = measured(Arm("slow", "", {"slow": 1.2}), blocks=8, cases=[quiet])
    assert not any("undecided" in line for line in said)
    assert result["vllm_ext"]["rerun"] == []


class Warm:
    """A machine gate that saw the card throttle."""

    valid = False

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def throttled(self, start, end):
        self.asked = getattr(self, "asked", 0) + 1
        return self.asked <= 4

    def summary(self):
        return {"valid": self.valid, "reason": "30 % of the samples throttled"}


def test_what_the_machine_gate_rejects_is_invalid(monkeypatch):
    monkeypatch.setattr(turns, "Watch", Warm)
    result, _ = measured(Arm("slow", "", {"slow": 1.5}))
    assert set(verdicts(result).values()) == {"INVALID"}
    assert "30 % of the samples" in engine.table(result | {})


def test_blocks_of_a_throttled_card_are_left_out_for_all_arms(monkeypatch):
    monkeypatch.setattr(turns, "Watch", Warm)
    monkeypatch.setattr(Warm, "valid", True)
    result, _ = measured(Arm("a", ""), blocks=12)
    dropped = result["vllm_ext"]["dropped_blocks"]
    assert (
        dropped == 2
    )  # four throttled samples: of three in the first, one in the next
    assert {each["stats"]["rounds"] for each in result["benchmarks"]} == {10}


def test_a_control_that_differs_makes_the_case_invalid():
    slow = Arm(CONTROL, "", {"slow": 1.05})
    result, _ = measured(Arm("a", ""), control=slow)
    assert set(verdicts(result).values()) == {"INVALID"}


def test_requests_that_arrive_are_judged_by_their_first_token_too():
    arriving = Case("tiny", "S0", 16, 8, rate=50.0, requests=4)
    result, _ = measured(Arm("a", ""), cases=[arriving])
    values = {
        each["metric"]: each["value"]
        for each in result["vllm_ext"]["comparisons"]
        if each["arm"] == "a"
    }
    assert values["TTFT"] == pytest.approx(5 * values["TPOT"])  # as the fake has it


def test_what_arrives_has_arrived_once_before_the_clock_runs(monkeypatch):
    """Batches of every size: what is compiled for one is so before it counts."""
    asked = []
    ask = turns.Bench._ask

    def noted(bench, engines, found, names, what, details):
        asked.append((what, details["seed"]))
        return ask(bench, engines, found, names, what, details)

    monkeypatch.setattr(turns.Bench, "_ask", noted)
    measured(cases=[Case("tiny", "S0", 16, 8, rate=50.0, requests=4)], blocks=2)
    first = [("closed", -1), ("arrivals", -1), ("arrivals", 0), ("arrivals", 1)]
    assert asked[:4] == first


def test_blocks_are_spread_over_the_boots():
    result, said = measured(Arm("a", ""), blocks=12, boots=3)
    booted = [line for line in said if "engine 3 of 3" in line]
    assert len(booted) == 3
    assert {each["stats"]["rounds"] for each in result["benchmarks"]} == {12}


# -- wrong answers have no figures -------------------------------------------------


@pytest.mark.parametrize("block", [-1, 3], ids=["before the clock", "in a block"])
def test_an_arm_with_other_tokens_than_stock_has_no_figure(block):
    result, _ = measured(Arm("wrong", "", {"wrong_in": block}), Arm("right", ""))
    assert names(result) == [STOCK, CONTROL, "right"]
    assert not any(arm == "wrong" for arm, _ in verdicts(result))
    [refused] = result["vllm_ext"]["refused"]
    assert refused["arm"] == "wrong"
    assert refused["why"].startswith("other tokens than stock: request 4, token 3: ")
    assert "no figure: tiny, batch 4, S0: wrong: other tokens" in engine.table(result)


def test_where_stock_does_not_repeat_itself_nobody_has_a_figure():
    wrong = Arm(CONTROL, "", {"wrong_in": 2})
    result, _ = measured(Arm("a", ""), control=wrong)
    assert result["benchmarks"] == []
    assert {each["arm"] for each in result["vllm_ext"]["refused"]} == {
        *(STOCK, CONTROL, "a")
    }


def test_an_arm_that_need_not_repeat_tells_how_many_tokens_it_shares():
    other = Arm("other", "", {"wrong_in": -1}, same_tokens=False)
    result, _ = measured(other)
    figures = {
        each["params"]["arm"]: each["extra_info"] for each in result["benchmarks"]
    }
    assert figures["other"]["token_agreement"] == 1 - 1 / 32
    assert figures[STOCK]["token_agreement"] is None
    assert result["vllm_ext"]["refused"] == []


def test_tokens_that_do_not_repeat_are_not_compared():
    assert turns.agreement([None, [1, 2]], [None, [1, 2]]) == (2, 2, "")
    equal, of, first = turns.agreement([[1, 2]], [[1]])
    assert (equal, of, first) == (1, 2, "request 1, token 2: None, not 2")


# -- engines that are not what they should be --------------------------------------


def test_an_engine_that_cannot_be_built_is_named_and_the_others_go_on():
    result, _ = measured(Arm("broken", "a broken one", {"boots": False}), Arm("a", ""))
    assert names(result) == [STOCK, CONTROL, "a"]
    [lost] = result["vllm_ext"]["not_run"]
    assert lost["why"] == "the engine of broken: no such attention backend"
    assert "not run: broken (a broken one): the engine of" in engine.table(result)


def test_an_arm_whose_patch_does_not_fit_has_no_figure():
    patch = {"name": "late", "state": "skipped", "reason": "copy_to changed"}
    result, _ = measured(Arm("late", "", {"patches": [patch]}), Arm("a", ""))
    assert names(result) == [STOCK, CONTROL, "a"]
    [refused] = result["vllm_ext"]["refused"]
    assert refused["why"] == "late is skipped: copy_to changed"


def test_an_engine_that_is_not_what_was_asked_for_is_left_out():
    asked = {"async_scheduling": False, "says": {"async_scheduling": True}}
    result, _ = measured(Arm("other", "", asked), Arm("a", ""))
    assert names(result) == [STOCK, CONTROL, "a"]
    [lost] = result["vllm_ext"]["not_run"]
    assert "async_scheduling True instead of False" in lost["why"]


def test_what_was_found_stands_when_another_model_does_not_fit(monkeypatch):
    free = [1e12, 1e9]
    monkeypatch.setattr(turns, "free_memory", lambda has_gpu: free.pop(0))
    large = replace(CASE, model="qwen3-0.6b")
    result, _ = measured(Arm("a", ""), cases=[CASE, large])
    assert {each["group"] for each in result["benchmarks"]} == {CASE.name}
    assert verdicts(result)["a", "TPOT"] == "SAME"
    [missing] = result["vllm_ext"]["not_run"]
    assert missing["what"] == large.name
    assert "do not fit into 1.0 GB" in missing["why"]


def interrupted_in(monkeypatch, block):
    """Ctrl-C while the engines are asked for that block."""
    ask = turns.Bench._ask

    def interrupt(bench, engines, found, names, what, details):
        if details.get("seed") == block:
            raise KeyboardInterrupt
        return ask(bench, engines, found, names, what, details)

    monkeypatch.setattr(turns.Bench, "_ask", interrupt)


def test_what_was_measured_before_an_interruption_stands(monkeypatch):
    """Seven whole blocks; the second case is listed as not run."""
    interrupted_in(monkeypatch, block=7)
    killed = []
    monkeypatch.setattr(turns.Child, "kill", lambda child: killed.append(child.name))
    second = replace(CASE, batch=8)
    slow = Arm("slow", "", {"slow": 1.5})
    result, said = measured(slow, cases=(CASE, second))
    ours = result["vllm_ext"]
    assert [each["n"] for each in ours["comparisons"]] == [7, 7]
    assert verdicts(result)["slow", "TPOT"] == "REGRESSED"
    assert ours["rerun"] == []
    [missing] = ours["not_run"]
    assert missing["what"] == f"{CASE.name} after 7 of 12 blocks, {second.name}"
    assert missing["why"] == turns.INTERRUPTED == said[-1]
    assert len(killed) == 3  # rather than waited for


def test_an_interruption_before_the_first_block_is_one_line(monkeypatch):
    interrupted_in(monkeypatch, block=0)
    with pytest.raises(turns.CannotRunError, match="interrupted"):
        measured()


def test_an_interruption_of_the_second_measurement_leaves_the_first(monkeypatch):
    """The rerun's blocks are counted from another seed."""
    interrupted_in(monkeypatch, block=13)
    noisy = Arm("noisy", "", {"noise": 0.3})
    result, _ = measured(noisy)
    [_, compared] = result["vllm_ext"]["comparisons"]
    assert (compared["n"], compared["verdict"]) == (12, "UNDECIDED")
    assert result["vllm_ext"]["rerun"] == []
    [missing] = result["vllm_ext"]["not_run"]
    assert missing["what"] == f"{CASE.name} once more"


UNFIT = [{"name": "x", "state": "skipped", "reason": "it does not fit"}]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"patches": UNFIT}, "x is skipped: it does not fit"),
        ({"patches_in": 60}, "it did not tell whether it was patched"),
    ],
)
def test_what_is_kept_of_an_interruption_was_patched(monkeypatch, arguments, why):
    """Ctrl-C while an engine works: its answer to the block comes first."""
    monkeypatch.setattr(turns, "HASTE", 0.5)
    hear = turns.Child.hear
    heard = Counter()

    def interrupted(child, timeout=300):
        heard[child.name] += 1
        if heard[child.name] == 10 and "bad" in child.name:
            raise KeyboardInterrupt
        return hear(child, timeout)

    monkeypatch.setattr(turns.Child, "hear", interrupted)
    good = Arm("good", "", {"patches": [IN_USE]}, patches="x")
    result, _ = measured(good, Arm("bad", "", arguments, patches="x"))
    assert set(names(result)) == {STOCK, CONTROL, "good"}
    [refused] = result["vllm_ext"]["refused"]
    assert (refused["arm"], refused["why"]) == ("bad", why)


class Hours:
    """A clock that each question to an engine puts forward."""

    def __init__(self, monkeypatch, **seconds):
        self.now = 0.0
        self.asked = Counter()
        monkeypatch.setattr(turns, "time", SimpleNamespace(monotonic=lambda: self.now))
        ask = turns.Child.ask

        def slow(child, what, timeout=300, **details):
            self.asked[what] += 1
            self.now += seconds.get(what, 0)
            return ask(child, what, timeout, **details)

        monkeypatch.setattr(turns.Child, "ask", slow)


def test_it_ends_in_time_and_says_what_was_not_run(monkeypatch):
    """Boots of 3 x 10 s, warm-up and blocks of 3 x 2 s: after 71 s five blocks."""
    clock = Hours(monkeypatch, boot=10, closed=2)
    slow = Arm("slow", "", {"slow": 1.5, "patches": [IN_USE]}, patches="x")
    second = replace(CASE, batch=8)
    result, said = measured(slow, cases=(CASE, second), until=71)
    ours = result["vllm_ext"]
    assert clock.now == 66
    assert {each["stats"]["rounds"] for each in result["benchmarks"]} == {5}
    [missing] = ours["not_run"]
    assert missing["what"] == f"{CASE.name} after 5 of 12 blocks, {second.name}"
    assert missing["why"] == turns.LATE == said[-1]
    assert ours["patches"] == [{"arm": "slow", **IN_USE}]  # it was asked


def test_an_arm_that_was_not_patched_has_no_figure_when_time_ends(monkeypatch):
    Hours(monkeypatch, boot=10, closed=2)
    result, _ = measured(Arm("a", "", {"patches": UNFIT}, patches="x"), until=71)
    assert names(result) == [STOCK, CONTROL]


def test_a_boot_for_which_no_time_is_left_is_not_begun(monkeypatch):
    """Six blocks end after 72 s; boot, warm-up and block would end after 114."""
    clock = Hours(monkeypatch, boot=10, closed=2)
    result, _ = measured(Arm("a", ""), boots=2, until=113)
    assert clock.now == 72
    assert clock.asked["boot"] == 3
    assert {each["stats"]["rounds"] for each in result["benchmarks"]} == {6}


def test_a_second_measurement_is_begun_only_if_it_can_end(monkeypatch):
    """The first ends after 108 s; the second is 30 + 2 x 78 s long at most."""
    noisy = Arm("noisy", "", {"noise": 0.3})
    clock = Hours(monkeypatch, boot=10, closed=2)
    result, said = measured(noisy, until=293)
    assert clock.now == 108
    [missing] = result["vllm_ext"]["not_run"]
    assert missing["what"] == f"{CASE.name} once more"
    assert missing["why"] == turns.LATE == said[-1]
    assert result["vllm_ext"]["rerun"] == []
    clock.now = 0
    result, _ = measured(noisy, until=295)
    assert result["vllm_ext"]["rerun"] == [CASE.name]


def test_groups_share_the_time(monkeypatch):
    """Of 160 s each has 80: three boots, and eight rounds of three closed batches."""
    Hours(monkeypatch, boot=10, closed=2)
    second = replace(CASE, batch=8)
    said = []
    noisy = (*STOCKS, Arm("noisy", "", {"noise": 0.3}))
    result = turns.evidence(
        "engine",
        [Group(noisy, [CASE]), Group(noisy, [second])],
        Plan(12, until=160),
        FAKE,
        say=said.append,
        command=[],
    )
    rounds = {each["group"]: each["stats"]["rounds"] for each in result["benchmarks"]}
    assert rounds == {CASE.name: 7, second.name: 7}
    assert said.count(turns.LATE) == 2
    assert result["vllm_ext"]["rerun"] == []
    left = [each["what"] for each in result["vllm_ext"]["not_run"]]
    assert left == [f"{case.name} after 7 of 12 blocks" for case in (CASE, second)]


def test_no_time_at_all_is_one_line(fake_lane, monkeypatch, capsys):
    monkeypatch.setattr(engine, "math", SimpleNamespace(inf=-1.0))
    assert engine.run(parse("--batch", "1", "--blocks", "12")) == 1
    assert capsys.readouterr().err.count(turns.LATE) == 1


def test_engines_that_do_not_fit_are_said_once(fake_lane, monkeypatch, capsys):
    monkeypatch.setattr(turns, "free_memory", lambda has_gpu: 1e9)
    assert engine.run(parse("--batch", "1")) == 1
    assert capsys.readouterr().err.count("do not fit") == 1


def test_an_engine_that_ends_loses_its_figures():
    result, _ = measured(Arm("ends", "", {"fails_in": 4}), Arm("a", ""))
    assert names(result) == [STOCK, CONTROL, "a"]
    assert "status 3" in result["vllm_ext"]["not_run"][0]["why"]


def test_an_engine_that_ends_keeps_the_figures_it_has():
    other = replace(CASE, batch=2)
    # Of two boots: it ends in the second block of the second, in the first case.
    ends = Arm("ends", "", {"fails_in": 8})
    result, _ = measured(ends, blocks=14, boots=2, cases=[other, CASE])
    rounds = {
        (each["group"], each["params"]["arm"]): each["stats"]["rounds"]
        for each in result["benchmarks"]
    }
    assert (other.name, "ends") not in rounds
    assert rounds[CASE.name, "ends"] == 7
    assert rounds[CASE.name, STOCK] == 14
    [pairs] = [
        each["n"] for each in result["vllm_ext"]["comparisons"] if each["arm"] == "ends"
    ]
    assert pairs == 7


def test_without_stock_there_is_nothing_to_compare():
    broken = Arm(STOCK, "", {"boots": False}, against="")
    with pytest.raises(engine.CannotRunError, match="no such attention backend"):
        measured(Arm("a", ""), stock=broken, control=None)


@pytest.mark.parametrize(
    ("arm", "made", "wrong"),
    [
        (Arm("", "", {}, {"VLLM_USE_V2_MODEL_RUNNER": "0"}), {"runner": "V1"}, ""),
        (
            Arm("", "", {}, {"VLLM_USE_V2_MODEL_RUNNER": "0"}),
            {"runner": "V2"},
            "vLLM made an engine with runner V2 instead of V1",
        ),
        (
            Arm("", "", {"compilation_config": {"cudagraph_mode": "FULL"}}),
            {"graphs": "PIECEWISE"},
            "vLLM made an engine with graphs PIECEWISE instead of FULL",
        ),
        (
            Arm("", "", {"async_scheduling": False}),
            {"async_scheduling": True},
            "vLLM made an engine with async_scheduling True instead of False",
        ),
    ],
)
def test_an_engine_has_to_be_what_its_arm_says(arm, made, wrong):
    assert turns.differs(arm, made) == wrong


def test_engines_that_do_not_fit_are_one_line(monkeypatch):
    monkeypatch.setattr(turns, "free_memory", lambda has_gpu: 3e9)
    with pytest.raises(engine.CannotRunError, match="3 engines of about 1.0 GB each"):
        measured(Arm("a", ""))


# -- the child, where there is a GPU -----------------------------------------------


def test_the_child_does_without_the_cpu_lane():
    for module in (enginerun, arms, models, legacy):
        assert "vllm_ext_cpulane" not in Path(module.__file__).read_text()


def built(monkeypatch, has_gpu, **arguments):
    """What the child gives ``vllm.LLM``."""
    given = {}

    class LLM:
        llm_engine = None

        def __init__(self, **options):
            given.update(options)

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=LLM))
    monkeypatch.setattr(enginerun.gpupath, "enable", lambda sizes: None)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    loop = enginerun.EngineLoop.__new__(enginerun.EngineLoop)
    loop._model, loop._has_gpu = models.MODELS["qwen2.5-1.5b"], has_gpu
    loop._build(arguments, seats=128, length=1100)
    return given


def test_on_a_gpu_an_engine_is_stocks_but_for_its_memory(monkeypatch):
    given = built(monkeypatch, has_gpu=True, async_scheduling=False)
    assert given.pop("model").endswith("qwen2.5-1.5b")
    assert given.pop("kv_cache_memory_bytes") > 128 * 1100 * 28672
    assert given == {
        **{"load_format": "dummy", "skip_tokenizer_init": True, "seed": 0},
        **{"max_model_len": 1100, "disable_log_stats": True},
        **{"enable_prefix_caching": False, "gpu_memory_utilization": 0.05},
        "async_scheduling": False,
    }


def test_on_a_cpu_nothing_is_compiled(monkeypatch):
    given = built(monkeypatch, has_gpu=False)
    assert given["enforce_eager"] is True
    assert given["max_num_seqs"] == 128
    assert "gpu_memory_utilization" not in given


class Clock:
    """Stands in for the module `time`: work and sleep take no time."""

    def __init__(self):
        self.now = self.worked = 0.0

    def monotonic(self):
        return self.now

    def thread_time(self):
        return self.worked

    def sleep(self, seconds):
        self.now += seconds


class Slow:
    """A client whose steps take 100 s and give each request a token, three in all."""

    def __init__(self, clock):
        self.clock = clock
        self.running = {}

    def add_request(self, request):
        self.running[request.request_id] = 3

    def get_output(self):
        self.clock.now += 100
        self.clock.worked += 10 * len(self.running)
        outputs = []
        for name in [*self.running]:
            self.running[name] -= 1
            ends = None if self.running[name] else "length"
            if ends:
                del self.running[name]
            outputs.append(
                SimpleNamespace(request_id=name, new_token_ids=[7], finish_reason=ends)
            )
        return SimpleNamespace(outputs=outputs)


@pytest.fixture
def loop(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(enginerun, "time", clock)
    made = enginerun.EngineLoop.__new__(enginerun.EngineLoop)
    made._client = Slow(clock)
    made._drain = lambda: None
    return made


def test_times_are_counted_from_when_a_request_was_due(loop):
    requests = [(SimpleNamespace(request_id=name), name != "b") for name in "abc"]
    # The second is due in the middle of the first step, the third when all is done.
    found = loop._run(requests, [0.0, 20.0, 550.0], every=1)
    assert found["ttft"] == [100, 180, 100]  # 80 of 180 it waited for the step
    assert found["tpot"] == [100, 100, 100]
    assert found["itl"] == [100] * 6
    assert (found["start"], found["end"], found["generated"]) == (0, 850, 9)
    assert found["host"] == [10, 20, 20, 10, 10, 10, 10]
    assert found["tokens"] == [[7, 7, 7], None, [7, 7, 7]]


def test_host_time_of_a_closed_batch_is_of_full_steps(loop):
    requests = [(SimpleNamespace(request_id=name), True) for name in "ab"]
    assert loop._run(requests, [0.0, 150.0], every=2)["host"] == [20]


def test_a_reproduction_that_was_never_called_says_so(monkeypatch):
    monkeypatch.setattr(legacy, "CALLS", Counter())
    [state] = enginerun.patches("boolean")
    assert (state["state"], state["reason"]) == (
        "waiting",
        "the engine never called them",
    )
    legacy.CALLS["boolean"] += 1
    [state] = enginerun.patches("boolean")
    assert (state["state"], state["reason"]) == ("in use", "")


def test_a_profile_is_reduced_to_a_step():
    def call(name, category="cuda_runtime", at=5):
        return {"cat": category, "name": name, "ts": at, "dur": 1}

    def work(start, length, category="kernel"):
        return {"cat": category, "name": "k", "ts": start, "dur": length}

    two_steps = [
        *(call("cudaLaunchKernel"), call("cuLaunchKernelEx", "cuda_driver")),
        *(call("cudaGraphLaunch"), call("cudaMemcpyAsync"), call("cudaMemsetAsync")),
        *(call("cudaEventSynchronize"), call("cudaDeviceSynchronize", at=101)),
        *(call(enginerun.STEPS, "gpu_user_annotation"), call("aten::copy_", "cpu_op")),
        {"cat": "user_annotation", "name": enginerun.STEPS, "ts": 0, "dur": 100},
        # 10 to 30 and 20 to 40 at once, 35 to 38 within, 60 to 65 alone
        *(work(20, 20), work(10, 20), work(35, 3, "gpu_memcpy")),
        *(work(60, 5, "gpu_memset"), {"ph": "M", "name": "process_name"}),
    ]
    assert enginerun.reduced(two_steps, 2) == {
        "steps": 2,
        "submissions": {"graph": 0.5, "launch": 1, "copy": 0.5, "memset": 0.5},
        "waits": 0.5,  # the one after the steps is ours
        "busy_us": 17.5,
        "why": "",
    }


# -- the command -------------------------------------------------------------------


@pytest.fixture
def fake_lane(monkeypatch):
    monkeypatch.setattr(Lane, "here", classmethod(lambda cls: FAKE))


def test_the_command_prints_and_writes(fake_lane, tmp_path, capsys):
    path = tmp_path / "engine.json"
    args = parse("--batch", "1,2", "--rate", "50", "--json", str(path))
    assert engine.run(args) == 0
    seen = capsys.readouterr()
    assert seen.out.startswith("CPU engine: every figure below is of that.\n")
    assert "nothing about the speed of a GPU" in seen.out
    assert "\ntiny, batch 1, S0 (greedy)\n16 tokens in, 8 out; " in seen.out
    assert "\ntiny, 50 requests/s, S0 (greedy)\n" in seen.out
    assert "    TTFT 1.0" in seen.out
    assert max(map(len, seen.out.splitlines())) <= 100
    assert "case 3 of 3: tiny, 50 requests/s, S0" in seen.err
    written = json.loads(path.read_text())
    assert len(written["benchmarks"]) == 3 * 3
    assert written["vllm_ext"]["kind"] == "engine"


@pytest.mark.parametrize("asked", [True, False])
def test_all_engines_schedule_in_the_same_way(fake_lane, monkeypatch, asked):
    seen = []

    def evidence(kind, groups, *args, **kwargs):
        seen.extend(arm.arguments for group in groups for arm in group.arms)
        raise engine.CannotRunError("seen")

    monkeypatch.setattr(engine, "evidence", evidence)
    assert engine.run(parse(*["--sync-scheduling"] * asked)) == 1
    assert len(seen) == 3
    expected = {"async_scheduling": False} if asked else {}
    assert all(each == expected for each in seen)


def test_it_says_where_it_is_and_what_is_left(monkeypatch):
    monkeypatch.setattr(turns, "SAYS_EVERY", 0.0)
    _, said = measured(Arm("a", ""), blocks=10)
    lines = [line for line in said if "block" in line]
    assert lines[4].startswith("case 1 of 1: tiny, batch 4, S0, block 5 of 10, about ")
    assert lines[4].endswith(" left")


def test_a_regression_and_a_wrong_arm_are_exit_1(fake_lane, monkeypatch):
    for arm in (Arm("x", "", {"slow": 1.2}), Arm("x", "", {"wrong_in": 1})):
        monkeypatch.setitem(engine.ENGINE, "x", arm)
        assert engine.run(parse("--arms", "x", "--batch", "1", "--blocks", "12")) == 1


def test_too_few_blocks_for_a_verdict_are_said(fake_lane, capsys):
    engine.run(parse("--batch", "1", "--blocks", "4"))
    assert "4 blocks decide nothing here, where it takes 6" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--json", "/nowhere/there.json"), "/nowhere/there.json cannot be written"),
        (("--json", "/"), "it is a folder"),
        (("--prompt", "5000"), "tiny has a context of 2048 tokens"),
    ],
)
def test_wrong_wishes_are_one_line_before_any_work(
    fake_lane, monkeypatch, capsys, arguments, message
):
    monkeypatch.setattr(engine, "evidence", lambda *args, **kwargs: 1 / 0)
    assert engine.run(parse(*arguments)) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert message in line


def test_without_vllm_it_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(turns.importlib.util, "find_spec", lambda name: None)
    assert engine.run(parse()) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line == "vllm-ext: this command needs vLLM: install it beside vllm-ext"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--models", "gpt-5"), "no model gpt-5; there are tiny, qwen2.5-0.5b"),
        (("--arms", "stock,faster"), "no arm faster; there are stock, control"),
        (("--sampling", "S9"), "no sampling set S9; there are S0, S1"),
        (("--rate", "0"), "a rate is above 0 requests/s"),
        (("--rate", "nan"), "a rate is above 0 requests/s"),
        (("--rate", "1,abc"), "1,abc: a rate is above 0 requests/s"),
        (("--seconds", "0"), "0 is not 1 or more"),
        (("--batch", "0"), "a batch has at least one request"),
        (("--output", "1"), "two tokens or more"),
        (("--blocks", "0"), "0 is not 1 or more"),
    ],
)
def test_unknown_names_and_numbers_are_wrong_usage(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        parse(*arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


# -- a real engine -----------------------------------------------------------------


@pytest.mark.vllm
def test_real_engines_on_the_cpu(tmp_path, capsys):
    path = tmp_path / "engine.json"
    args = parse("--batch", "2", "--rate", "40", "--requests", "3", "--sampling", "S4")
    args.json, args.blocks, args.boots, args.control, args.output = path, 2, 1, False, 4
    assert engine.run(args) == 0
    result = json.loads(path.read_text())
    ours = result["vllm_ext"]
    assert ours["label"] == "CPU engine"
    assert ours["refused"] == ours["not_run"] == []
    # Of two requests, and three in the check before the arrivals, the greedy ones.
    assert ours["tokens_compared"] >= 4 * (1 + 2) + 4 * 2
    figures = {each["name"]: each for each in result["benchmarks"]}
    assert [*figures] == [
        "tiny, batch 2, S4, stock",
        "tiny, batch 2, S4, all",
        "tiny, 40 requests/s, S4, stock",
        "tiny, 40 requests/s, S4, all",
    ]
    for each in figures.values():
        info = each["extra_info"]
        assert 0 < info["host_median_s"] < info["ttft_p99_s"]
        assert 0 < info["itl_median_s"] <= info["itl_p99_s"]
        assert info["tokens_per_s"] > 0
        assert info["busy_share"] is None
    stock, patched = (
        figures[f"tiny, batch 2, S4, {arm}"]["extra_info"]["submissions_per_step"]
        for arm in (STOCK, ALL)
    )
    assert stock["graph"] == patched["graph"] == 1
    assert sum(patched.values()) < sum(stock.values())
    states = {each["name"]: each["state"] for each in ours["patches"]}
    assert states["repeated_batch"] == "in use"
    assert "there is no device" in capsys.readouterr().out
