"""The table of a trace: by hand for a made-up GPU, and of a real profiler's trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_ext.microbench.gpu_host import trace
from vllm_ext.microbench.gpu_host.trace import MARK, STEP, TraceError, table

ENGINE, COPIER = 1, 2  # threads


def event(cat: str, name: str, ts: float, dur: float, **more: Any) -> dict[str, Any]:
    correlation = more.pop("correlation", None)
    args = {} if correlation is None else {"correlation": correlation}
    thread = {"ph": "X", "pid": 1, "tid": ENGINE}
    return {
        **thread,
        "cat": cat,
        "name": name,
        "ts": ts,
        "dur": dur,
        "args": args,
        **more,
    }


def mark(name: str, ts: float, dur: float, **more: Any) -> dict[str, Any]:
    return event("user_annotation", name, ts, dur, **more)


def one_step(at: float, number: int) -> list[dict[str, Any]]:
    """100 us: two launches and a graph; the GPU runs 20 us behind, across steps."""
    first = 10 * number
    return [
        mark(STEP, at, 90),
        mark(f"{MARK}schedule", at + 2, 10),
        mark(f"{MARK}execute_model", at + 15, 40),
        mark(f"{MARK}inner", at + 40, 10),
        event("cuda_runtime", "cudaMemcpyAsync", at + 20, 5, correlation=first),
        event("cuda_runtime", "cudaGraphLaunch", at + 30, 8, correlation=first + 1),
        event("cuda_driver", "cuLaunchKernelEx", at + 42, 4, correlation=first + 2),
        event("cuda_runtime", "cudaFuncGetAttributes", at + 47, 1),
        event("cuda_runtime", "cudaEventSynchronize", at + 70, 15, tid=COPIER),
        # Copy, 10 us of nothing, two kernels of the graph that overlap by 5, 25 us of
        # nothing, and one that goes on while the host is in the next step.
        event("gpu_memcpy", "Memcpy HtoD", at + 30, 10, tid=7, correlation=first),
        event("kernel", "gemm", at + 50, 20, tid=7, correlation=first + 1),
        event("kernel", "norm", at + 65, 10, tid=8, correlation=first + 1),
        event("kernel", "argmax", at + 95, 20, tid=7, correlation=first + 2),
        mark(f"{MARK}elsewhere", at + 60, 30, tid=COPIER),
        event("gpu_user_annotation", STEP, at + 30, 70, tid=7),
        {"ph": "s", "cat": "ac2g", "name": "ac2g", "ts": at + 20, "id": first},
    ]


def made_up(steps: int) -> dict[str, Any]:
    events = [each for n in range(steps) for each in one_step(1000 + 100 * n, n)]
    events.reverse()  # nothing promises an order
    return {"traceEvents": [*events, {"ph": "M", "name": "process_name", "args": {}}]}


def rows(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in found["kernels"]}


def test_steps_last_until_the_next_one():
    found = table(made_up(5))
    assert found["steps"] == 4
    assert found["periods_us"] == [100.0] * 4
    assert table(made_up(5), skip=2)["steps"] == 2


def test_launches_are_counted_and_other_calls_are_not():
    found = table(made_up(5))
    assert found["launches_per_step"] == 3
    assert found["launches"] == {
        "cudaGraphLaunch": {"per_step": 1, "us": 8},
        "cudaMemcpyAsync": {"per_step": 1, "us": 5},
        "cuLaunchKernelEx": {"per_step": 1, "us": 4},
    }
    assert found["waits"] == {"cudaEventSynchronize": {"per_step": 1, "us": 15}}


def test_a_part_is_charged_for_itself_alone():
    host = table(made_up(5))["host"]
    assert {name: part["us"] for name, part in host.items()} == {
        "step": 90 - 10 - 40,
        "execute_model": 30,
        "schedule": 10,
        "inner": 10,
    }
    # Two calls of execute_model's own; the copier's wait is on another thread.
    assert {name: part["cuda_us"] for name, part in host.items()} == {
        "step": 0,
        "execute_model": 13,
        "schedule": 0,
        "inner": 5,
    }
    assert {part["per_step"] for part in host.values()} == {1}


def test_the_gpu_is_busy_where_anything_runs_and_gaps_have_a_place():
    """Steady steps: 10 copy + 25 kernels + 20 of the step before, in 100 us."""
    gpu = table(made_up(6), skip=1)["gpu"]
    assert gpu["busy_us"] == pytest.approx(55)
    assert gpu["busy_share"] == pytest.approx(0.55)
    assert gpu["idle_us"] == pytest.approx(45)
    gaps = gpu["gaps"]
    assert gaps["largest_us"] == 20
    assert (gaps["per_step"], gaps["us"]) == (3, 45)
    assert gaps["places"][0] == {
        **{"after": "norm", "before": "argmax"},
        **{"per_step": 1, "us": 20},
    }
    places = {(each["after"], each["before"]): each["us"] for each in gaps["places"]}
    assert places["Memcpy HtoD", "gemm"] == 10
    assert places["argmax", "Memcpy HtoD"] == 15


def test_kernels_belong_to_the_step_that_launched_them():
    """``argmax`` ends in the next step, the last one after the last step."""
    found = rows(table(made_up(5)))
    assert {name: row["per_step"] for name, row in found.items()} == {
        "gemm": 1,
        "argmax": 1,
        "norm": 1,
        "Memcpy HtoD": 1,
    }
    assert found["gemm"]["us"] == 20
    assert found["gemm"]["share"] == pytest.approx(20 / 60)
    assert [row["in_graph"] for row in (found["gemm"], found["argmax"])] == [
        True,
        False,
    ]
    assert found["Memcpy HtoD"]["kind"] == "copy"


def test_rare_kernels_are_summed_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(trace, "KERNELS", 2)
    names = [row["name"] for row in table(made_up(3))["kernels"]]
    assert names[-1] == "2 others"
    assert len(names) == 3


def test_a_trace_without_gpu_says_so():
    events = [mark(STEP, 100.0 * number, 50) for number in range(3)]
    found = table({"traceEvents": events})
    assert found["gpu"] is None
    assert found["kernels"] == []
    assert found["launches_per_step"] == 0


@pytest.mark.parametrize(
    ("found", "why"),
    [
        ({}, "no traceEvents"),
        ({"traceEvents": []}, "0 steps are marked"),
        (made_up(1), "1 steps are marked"),
    ],
)
def test_what_is_no_trace_of_steps_is_one_line(found: dict[str, Any], why: str):
    with pytest.raises(TraceError, match=why):
        table(found)


def test_a_real_trace_of_the_cpu(tmp_path: Path):
    """Names, categories and units are those that torch's profiler writes."""
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function

    numbers = torch.ones(64, 64)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(4):
            with record_function(STEP):
                with record_function(f"{MARK}schedule"):
                    numbers.add(1)
                with record_function(f"{MARK}execute_model"):
                    for _ in range(20):
                        numbers @ numbers
    file = tmp_path / "trace.json"
    profiler.export_chrome_trace(str(file))
    found = table(json.loads(file.read_text()), skip=1)
    assert found["steps"] == 2
    assert set(found["host"]) == {"step", "schedule", "execute_model"}
    parts = {name: part["us"] for name, part in found["host"].items()}
    assert all(us > 0 for us in parts.values())
    assert sum(parts.values()) <= sum(found["periods_us"]) / 2
    assert found["gpu"] is None
