"""How kernels are timed, on a device whose clock stands still but for kernels."""

from __future__ import annotations

import gc
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bench.fakedevice import Buffer, Fake, args_of

from vllm_ext.bench import kernels, results
from vllm_ext.microbench import conftest
from vllm_ext.microbench.measure import (
    GRAPH_CALLS,
    MOST_ROUNDS,
    QUEUED_CALLS,
    ROUNDS,
    NoRoundLeftError,
    Provider,
    Times,
    WrongReplayError,
    measure,
    sets_needed,
)
from vllm_ext.stats import median

HERE = Path(__file__).parent
MICROSECOND = 1e-6


@pytest.fixture(autouse=True)
def _no_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_ext.microbench.measure.WARM_SECONDS", 0.0)


def provider(device: Fake, hot: float, miss: float = 0.0, **more: Any) -> Provider:
    """Of one kernel, whose times are in microseconds."""

    def call(buffer: Buffer) -> None:
        device.kernel(hot * MICROSECOND, miss * MICROSECOND, buffer)

    return Provider(call, **more)


def taken(device: Fake, size: int, **providers: Provider) -> dict[str, Times]:
    return measure(providers, args_of(size), set_bytes=size, device=device)


@pytest.mark.parametrize(
    ("set_bytes", "sets"), [(1, 3001), (100, 31), (999, 4), (1000, 4), (1500, 3)]
)
def test_argument_sets_exceed_three_times_the_cache(set_bytes: int, sets: int):
    assert sets_needed(set_bytes, 1000) == sets
    assert sets * set_bytes > 3000
    assert (sets - 1) * set_bytes <= 3000


def test_two_sets_are_the_least():
    assert sets_needed(10**9, 1000) == 2


@pytest.mark.parametrize("size", [2, 40, 100, 900])
def test_cold_finds_its_arguments_in_memory_and_hot_in_the_cache(size: int):
    device = Fake()
    times = taken(device, size, one=provider(device, 5, 20))["one"]
    assert times.cold == pytest.approx([25 * MICROSECOND] * ROUNDS)
    assert times.hot == pytest.approx([5 * MICROSECOND] * ROUNDS)


@pytest.mark.parametrize("size", [2, 40, 400])
@pytest.mark.parametrize("waits", ["", "reads the host"])
def test_nobody_finds_in_the_cache_what_the_one_before_has_read(size: int, waits: str):
    """They are timed on the same argument sets, one right after the other."""
    device = Fake()
    lanes = {name: provider(device, 5, 20, uncapturable=waits) for name in "abc"}
    for times in taken(device, size, **lanes).values():
        assert times.cold == pytest.approx([25 * MICROSECOND] * ROUNDS)
        assert times.hot == pytest.approx([5 * MICROSECOND] * ROUNDS)


def test_many_small_sets_are_gone_round_in_several_graphs():
    device = Fake()
    times = taken(device, 2, one=provider(device, 5, 20))["one"]
    assert times.sets == 1501
    assert times.calls == 251 <= GRAPH_CALLS  # six graphs alike


def test_few_large_sets_are_gone_round_until_a_round_is_long():
    device = Fake()
    times = taken(device, 2000, one=provider(device, 50, 50))["one"]
    assert times.sets == 2
    assert times.calls == 40  # two milliseconds


def test_what_the_host_pays_is_apart():
    device = Fake()

    def call(buffer: Buffer) -> None:
        device.kernel(2 * MICROSECOND, 0, buffer, host=3 * MICROSECOND)
        device.kernel(2 * MICROSECOND, 0, buffer, host=4 * MICROSECOND)

    times = taken(device, 100, one=Provider(call))["one"]
    assert times.host == pytest.approx([7 * MICROSECOND] * ROUNDS)
    assert times.hot == pytest.approx([4 * MICROSECOND] * ROUNDS)
    assert times.launches == 2


def test_what_cannot_be_captured_is_queued_behind_a_wait():
    """The host is slower than the device here, and not part of the figure."""
    device = Fake()

    def call(buffer: Buffer) -> None:
        device.kernel(2 * MICROSECOND, 10 * MICROSECOND, buffer, host=90 * MICROSECOND)

    times = taken(device, 100, one=Provider(call, "reads the host"))["one"]
    assert device.replays == 0
    assert times.cold == pytest.approx([12 * MICROSECOND] * ROUNDS)
    assert times.hot == pytest.approx([2 * MICROSECOND] * ROUNDS)
    assert times.calls <= QUEUED_CALLS
    assert times.launches == 1
    assert times.uncapturable == "reads the host"


def test_all_take_turns_in_each_round_in_changing_order():
    device = Fake()
    turns: list[str] = []
    rounds: list[tuple[str, ...]] = []

    def named(name: str) -> Provider:
        def call(buffer: Buffer) -> None:
            turns.append(name)
            device.kernel(MICROSECOND, 0, buffer)

        return Provider(call, "so that every call is seen")

    def throttled(start: float, end: float) -> bool:
        rounds.append(tuple(name for name, _ in itertools.groupby(turns)))
        turns.clear()
        return False

    lanes = {name: named(name) for name in ("a", "b", "c")}
    measure(lanes, args_of(900), set_bytes=900, device=device, throttled=throttled)
    del rounds[0]  # with warming up
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len(set(rounds)) > 3


def test_a_card_that_slows_down_slows_all_of_them():
    """Why turns: the ratio of the pairs is right though the medians are not."""
    device = Fake()

    def throttled(start: float, end: float) -> bool:
        device.slower *= 1.02
        return False

    times = measure(
        {"a": provider(device, 10), "b": provider(device, 11)},
        args_of(100),
        set_bytes=100,
        device=device,
        throttled=throttled,
    )
    pairs = zip(times["a"].hot, times["b"].hot, strict=True)
    assert [after / before for before, after in pairs] == pytest.approx([1.1] * ROUNDS)
    assert max(times["a"].hot) > 1.5 * min(times["a"].hot)


def test_a_round_in_which_the_card_throttled_is_dropped_for_all():
    device = Fake()
    held_back = iter([False, True, True] + [False] * MOST_ROUNDS)

    def throttled(start: float, end: float) -> bool:
        assert end >= start
        verdict = next(held_back)
        device.slower = 1.0
        return verdict

    def call(buffer: Buffer) -> None:
        device.kernel(MICROSECOND, 0, buffer)

    times = measure(
        {"a": Provider(call), "b": Provider(call, "x")},
        args_of(100),
        set_bytes=100,
        device=device,
        throttled=throttled,
    )
    for lane in times.values():
        assert lane.dropped == 2
        assert len(lane.cold) == len(lane.hot) == len(lane.host) == ROUNDS


def test_rounds_end_although_many_are_dropped():
    device = Fake()
    number = itertools.count()
    times = measure(
        {"a": provider(device, 1)},
        args_of(100),
        set_bytes=100,
        device=device,
        throttled=lambda start, end: next(number) % 2 == 0,
    )["a"]
    assert len(times.cold) == MOST_ROUNDS // 2
    assert times.dropped == MOST_ROUNDS // 2


def test_no_figure_comes_of_a_card_that_throttled_all_the_time():
    device = Fake()
    with pytest.raises(NoRoundLeftError, match="in all of 36 rounds"):
        measure(
            {"a": provider(device, 1)},
            args_of(100),
            set_bytes=100,
            device=device,
            throttled=lambda start, end: True,
        )


def test_the_garbage_collector_waits():
    device = Fake()
    seen = []

    def throttled(start: float, end: float) -> bool:
        seen.append(gc.isenabled())
        return False

    measure(
        {"a": provider(device, 1)},
        args_of(100),
        set_bytes=100,
        device=device,
        throttled=throttled,
    )
    assert gc.isenabled()
    assert not any(seen)


def test_what_a_replay_answers_is_checked_too():
    device = Fake()
    answers = []

    def call(buffer: Buffer) -> Any:
        device.kernel(MICROSECOND, 0, buffer)
        return answers

    def check(args: Any, result: Any) -> None:
        assert result is answers
        assert device.replays, "checked before the graph was replayed"
        raise AssertionError("row 0 is stale")

    with pytest.raises(WrongReplayError, match="in a graph: row 0 is stale") as raised:
        measure(
            {"a": Provider(call)},
            args_of(100),
            set_bytes=100,
            device=device,
            check_replay=check,
        )
    assert raised.value.provider == "a"


# -- the fixture -----------------------------------------------------------------------

PLUGIN = """
import torch
from bench.fakedevice import Fake
from vllm_ext.microbench import conftest, measure

DEVICE = Fake(l2_bytes=10_000)
conftest.make_device = lambda: DEVICE
measure.WARM_SECONDS = 0.0

class Quiet:
    def __enter__(self): return self
    def __exit__(self, *error): pass
    def throttled(self, start, end): return {throttled}
    def summary(self):
        return {{"valid": {valid}, "gpu": "Fake", "reason": "{reason}"}}

conftest.Watch = Quiet
"""

BENCH = """
import torch
from bench.fakedevice import Buffer
from plugin import DEVICE
from vllm_ext.microbench.measure import NotRun, Provider

MODES, DTYPES = ("greedy",), ("bf16",)
asked = []

def of(microseconds, answer=7):
    def make(case, device):
        assert device == "cuda"
        def call(buffer):
            DEVICE.kernel(microseconds * 1e-6, 1e-6, buffer)
            return answer
        return Provider(call, note="as planted")
    return make

def stale(case, device):
    # Right when called, wrong in what a replay leaves.
    def call(buffer):
        DEVICE.kernel(1e-6, 1e-6, buffer)
        return 7 if DEVICE._recording is None else 8
    return Provider(call)

def missing(case, device):
    raise NotRun("not installed")

def breaks(case, device):
    raise RuntimeError("two\\nlines")

PROVIDERS = {"stock": of(10), "ours": of(5), "wrong": of(1, 8), "missing": missing,
             "breaks": breaks, "stale": stale}

def bench_toy(measure, case, provider):
    def check(prepared):
        found = prepared.call(Buffer(1))
        assert found == 7, f"{found} is not 7"
    def check_replay(args, found):
        if found != 7:
            raise AssertionError(f"{found} is not 7")
    measure(provider, PROVIDERS, case, make_args=lambda number: (Buffer(5_000),),
            check=check, set_bytes=5_000, moved_bytes=6_000_000,
            check_replay=check_replay)
"""


def test_what_turns_out_to_wait_is_queued():
    device = Fake()
    device.refused = "called a synchronizing CUDA operation"
    times = taken(device, 100, one=provider(device, 5, 20))["one"]
    assert device.replays == 0
    assert times.uncapturable == "called a synchronizing CUDA operation"
    assert times.hot == pytest.approx([5 * MICROSECOND] * ROUNDS)


def test_two_ways_of_timing_are_named_in_the_metric():
    graph, queued = Times(), Times(uncapturable="reads the host")
    assert conftest._clocks(graph, graph) == conftest._clocks(queued, queued) == ""
    assert conftest._clocks(graph, queued) == " (graph against queued)"
    assert conftest._clocks(queued, graph) == " (queued against graph)"


def run_bench(folder: Path, *options: str, **plugin: Any) -> tuple[str, dict[str, Any]]:
    """What pytest said, and the result file."""
    plugin = {"throttled": False, "valid": True, "reason": "", **plugin}
    (folder / "plugin.py").write_text(PLUGIN.format(**plugin))
    (folder / "bench_toy.py").write_text(BENCH)
    (folder / "pytest.ini").write_text(kernels.SETTINGS)
    path = folder / "result.json"
    command = [sys.executable, "-m", "pytest", "-c", "pytest.ini", "-rs", "."]
    command += ["-p", "vllm_ext.microbench.conftest", "-p", "plugin", *options]
    done = subprocess.run(
        [*command, "--benchmark-json", path],
        cwd=folder,
        env={
            **{
                name: os.environ[name]
                for name in ("PATH", "HOME")
                if name in os.environ
            },
            "PYTHONPATH": f"{folder}:{HERE.parent}",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "CUDA_VISIBLE_DEVICES": "",
        },
        capture_output=True,
        text=True,
    )
    said = done.stdout + done.stderr
    assert path.is_file(), said
    return said, results.read(path)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    return run_bench(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def entry(found: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    """Of ``ours`` in the first case."""
    return next(
        each
        for each in found[1]["benchmarks"]
        if each["params"]["provider"] == "ours" and each["params"]["batch"] == 1
    )


def test_rounds_of_the_device_are_in_seconds_in_pytest_benchmarks_statistics(
    entry: dict[str, Any],
):
    stats = entry["stats"]
    assert stats["rounds"] == len(stats["data"]) == ROUNDS
    assert stats["median"] == pytest.approx(6e-6)
    assert median(stats["data"]) == pytest.approx(6e-6)


def test_figures_stand_beside_them(entry: dict[str, Any]):
    info = entry["extra_info"]
    assert info["cold_us"] == pytest.approx(6)
    assert info["hot_us"] == pytest.approx(5)
    assert info["host_us"] == pytest.approx(1)
    assert info["cold_iqr_us"] == pytest.approx(0)
    assert info["launches"] == 1
    assert info["moved_bytes"] == 6_000_000
    assert info["cold_gbs"] == pytest.approx(1000)
    assert info["copy_gbs"] == pytest.approx(4000)
    assert info["cold_share_of_copy"] == pytest.approx(0.25)
    assert info["hot_share_of_copy"] == pytest.approx(0.30)
    assert info["argument_sets"] == 7
    assert info["clock"] == "graph"
    assert info["note"] == "as planted"


def test_entries_name_their_case(entry: dict[str, Any]):
    assert entry["group"] == "toy"
    assert entry["fullname"].startswith("toy::bench_toy[")
    assert entry["params"] == {
        "mode": "greedy",
        "batch": 1,
        "vocabulary": 2048,
        "dtype": "bf16",
        "kind": "llm",
        "provider": "ours",
    }


def test_a_wrong_answer_fails_and_is_not_timed(found: tuple[str, dict[str, Any]]):
    said, result = found
    assert "8 is not 7" in said
    assert {each["params"]["provider"] for each in result["benchmarks"]} == {
        "stock",
        "ours",
    }
    wrong = result["vllm_ext"]["wrong"]
    assert wrong[0] == {
        "case": "toy greedy B=1 V=2048 bf16 llm",
        "provider": "wrong",
        "why": "AssertionError: 8 is not 7",
    }
    assert wrong[1]["why"] == "RuntimeError: two"


def test_who_is_wrong_in_a_graph_only_leaves_the_others_their_times(
    found: tuple[str, dict[str, Any]],
):
    wrong = found[1]["vllm_ext"]["wrong"]
    assert wrong[2] == {
        "case": "toy greedy B=1 V=2048 bf16 llm",
        "provider": "stale",
        "why": "WrongReplayError: replayed in a graph: 8 is not 7",
    }
    assert len(wrong) == 3 * 6


def test_who_is_missing_says_so_and_is_in_the_result(
    found: tuple[str, dict[str, Any]],
):
    said, result = found
    assert "not run: not installed" in said
    noted = result["vllm_ext"]["not_run"]
    assert {(each["provider"], each["why"]) for each in noted} == {
        ("missing", "not installed")
    }
    assert len(noted) == 6


def test_ours_is_compared_in_pairs_and_stock_with_itself(
    found: tuple[str, dict[str, Any]],
):
    compared = found[1]["vllm_ext"]["comparisons"]
    by = {
        (each["arm"], each["metric"]): each
        for each in compared
        if "B=1 V=2048" in each["case"]
    }
    assert set(by) == set(
        itertools.product(
            ("ours", results.CONTROL), ("device time, cold", "device time, hot")
        )
    )
    ours = by["ours", "device time, hot"]
    assert ours["ratio"] == pytest.approx(0.5)
    assert ours["against"] == "stock"
    assert ours["verdict"] == "IMPROVED"
    assert by[results.CONTROL, "device time, hot"]["verdict"] == "SAME"


def test_the_table_shows_the_figures(found: tuple[str, dict[str, Any]]):
    text = kernels.table(found[1])
    assert "toy greedy B=1 V=2048 bf16 llm" in text
    assert (
        "  ours                  6.0 (0.0)      5.0        1        1   1000    25%"
        in text
    )
    assert (
        "  ours against stock, device time, hot: 0.500 (0.500-0.500) IMPROVED" in text
    )
    assert "not run: missing, 6 cases: not installed" in text
    assert "WRONG: wrong, toy greedy B=1 V=2048 bf16 llm: AssertionError: 8 is" in text
    assert text.endswith("12 timings, 18 parity checks")


def test_all_throttled_leaves_no_timings(tmp_path: Path):
    plugin = {"throttled": True, "valid": False, "reason": "too warm"}
    report = tmp_path / "report.json"
    with pytest.raises(AssertionError, match="throttled in all of 36 rounds"):
        run_bench(tmp_path, "--vext-report", str(report), "-k", "b1-v2048", **plugin)
    result = json.loads(report.read_text())
    assert result["benchmarks"] == []
    assert result["vllm_ext"]["timed"]
    assert "INVALID: too warm" in kernels.table(result)


def test_an_unfit_machine_makes_every_verdict_invalid(tmp_path: Path):
    _, result = run_bench(
        tmp_path, "-k", "b1-v2048 and not wrong", valid=False, reason="somebody else"
    )
    verdicts = {each["verdict"] for each in result["vllm_ext"]["comparisons"]}
    assert verdicts == {"INVALID"}
    assert "INVALID: somebody else" in kernels.table(result)
