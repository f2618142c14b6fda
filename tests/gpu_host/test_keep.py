"""What comes back from the GPU host finds its place among the results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_ext.bench import results
from vllm_ext.microbench.gpu_host import keep

MACHINE = {
    **{"gpu": "NVIDIA H200", "gpu_memory_gb": 150.0, "driver": "580.1", "cpu": "CPU"},
    **{"cores": 16, "memory_gb": 128.0, "os": "Linux", "python": "3.12.3"},
    **{"torch": "2.11.0", "triton": "3.6.0", "vllm": "0.33.0", "vllm_ext": "0.1.0"},
    **{"commit": "0123456789ab", "dirty": False},
}


def put(folder: Path, stage: str, status: str = "complete", **tasks: Any) -> None:
    folder.mkdir(exist_ok=True)
    found = {"stage": stage, "machine": MACHINE, "status": status, "tasks": tasks}
    (folder / f"{stage}.json").write_text(json.dumps(found))


@pytest.fixture
def back(tmp_path: Path) -> Path:
    put(tmp_path / "back", "environment", environment={"result": {}})
    return tmp_path / "back"


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.json"))


def test_stages_and_benchmarks_are_filed_under_their_gpu(back: Path, tmp_path: Path):
    document = results.document(
        *("engine", [], []),
        **{"patches": [], "watch": None, "command": [], "label": "GPU engine"},
    )
    document["vllm_ext"]["machine"] = MACHINE
    put(back, "engine", engine={"result": document})
    put(back, "baseline", **{"qwen": {"result": {"cases": {}}}})
    prove = {"nvidia-h200/2026-01-01_0123456_vllm-0.33.0_prove.json": {"patches": {}}}
    put(back, "prove", gpu={"result": [], "files": prove}, syncs={"result": []})
    assert keep.main([str(back), "--results", str(tmp_path / "results")]) == 0
    found = names(tmp_path / "results")
    assert [name.rpartition("_")[2] for name in found] == [
        *("prove.json", "baseline.json", "engine.json", "environment.json")
    ]
    assert all(name.startswith("nvidia-h200/") for name in found)
    assert all("_0123456_vllm-0.33.0_" in name for name in found)
    engine = json.loads((tmp_path / "results" / found[2]).read_text())
    assert engine == document


@pytest.mark.parametrize("stage", ["baseline", "tests", "sanitizer"])
def test_what_a_stopped_stage_had_written_is_kept_and_said(
    back: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str
):
    put(back, stage, "stopped", a={"result": {"passed": 9}}, b={"status": "stopped"})
    assert keep.main([str(back), "--results", str(tmp_path / "results")]) == 1
    said = capsys.readouterr().err
    assert f"kept as far as it came: {stage} is stopped" in said
    [name] = [name for name in names(tmp_path / "results") if stage in name]
    kept = json.loads((tmp_path / "results" / name).read_text())
    assert kept["status"] == "stopped"
    assert kept["tasks"]["a"]["result"] == {"passed": 9}


@pytest.mark.parametrize("stage", ["kernels", "engine", "linkedin"])
@pytest.mark.parametrize("whole", [True, False])
def test_a_stopped_benchmark_is_kept_if_it_wrote_its_result(
    *, back: Path, tmp_path: Path, stage: str, whole: bool
):
    result = {"benchmarks": [], "vllm_ext": {"kind": stage, "machine": MACHINE}}
    task = {"status": "stopped", **({"result": result} if whole else {})}
    put(back, stage, "stopped", **{stage: task})
    assert keep.main([str(back), "--results", str(tmp_path / "results")]) == 1
    found = [name for name in names(tmp_path / "results") if stage in name]
    assert len(found) == whole
    for name in found:
        kept = json.loads((tmp_path / "results" / name).read_text())
        assert kept["vllm_ext"]["status"] == "stopped"


def test_of_a_stopped_stage_that_wrote_nothing_nothing_is_kept(
    back: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    put(back, "tests", "stopped", gpu={"status": "stopped"})
    assert keep.main([str(back), "--results", str(tmp_path / "results")]) == 1
    assert "left out: tests is stopped" in capsys.readouterr().err
    assert len(names(tmp_path / "results")) == 1


def test_a_benchmark_that_failed_is_left_out(
    back: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    result = {"benchmarks": [], "vllm_ext": {"kind": "engine", "machine": MACHINE}}
    put(back, "engine", "failed", engine={"status": "failed", "result": result})
    assert keep.main([str(back), "--results", str(tmp_path / "results")]) == 1
    assert "left out: engine is failed" in capsys.readouterr().err
    assert len(names(tmp_path / "results")) == 1


@pytest.mark.parametrize("stage", ["tests", "sanitizer"])
def test_tests_that_failed_are_a_result(back: Path, tmp_path: Path, stage: str):
    put(back, stage, "failed", pytest={"result": {"failed": 1}})
    assert keep.main([str(back), "--results", str(tmp_path / "results")]) == 0
    assert len(names(tmp_path / "results")) == 2


@pytest.mark.parametrize("text", ["{", "[]", '{"no": "stage"}'])
def test_a_foreign_file_is_one_line(
    back: Path, text: str, capsys: pytest.CaptureFixture[str]
):
    (back / "smoke.json").write_text(text)
    assert keep.main([str(back)]) == 1
    assert "smoke.json is no result of a stage" in capsys.readouterr().err


def test_a_folder_without_results_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert keep.main([str(tmp_path)]) == 1
    assert "holds no result of a stage" in capsys.readouterr().err
