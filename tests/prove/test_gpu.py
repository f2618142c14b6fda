"""What is proven on a GPU is what a file says of the code as it is; nothing else."""

import json

import pytest

from vllm_ext import machine
from vllm_ext.bench import results
from vllm_ext.children import ChildError
from vllm_ext.patches import SERIES
from vllm_ext.prove import gpu

NAME = SERIES[0].name
ANSWERS = {"greedy": {"tokens": [5, 6, 7], "logprobs": [], "reason": "length"}}
OTHERS = {"greedy": {"tokens": [5, 9, 7], "logprobs": [], "reason": "length"}}


def result(**changes):
    """A result in which every patch was used and all tokens were the same."""
    used = {"state": "in use", "calls": 40, "aside": {}, "reason": ""}
    return {
        "machine": {"gpu": "NVIDIA H200"},
        "tokens": {"compared": 218, "different": 0},
        "stopped": "",
        "patches": {
            patch.name: {"digest": results.digest(patch.name), **used}
            for patch in SERIES
        },
        **changes,
    }


def keep(folder, kept, name="2026-12-01_abcdef0_vllm-0.33.0_prove.json"):
    (folder / "nvidia-h200").mkdir(exist_ok=True)
    (folder / "nvidia-h200" / name).write_text(
        kept if isinstance(kept, str) else json.dumps(kept)
    )


def first(verdicts):
    [verdict] = [each for each in verdicts if each.subject == NAME]
    return verdict


def test_without_a_file_nothing_is_proven(tmp_path):
    found = gpu.from_files(tmp_path)
    assert [each.subject for each in found] == [patch.name for patch in SERIES]
    assert {each.outcome for each in found} == {"not proven"}
    assert not any(each.fault for each in found)
    assert "vllm-ext prove gpu" in found[0].detail


def test_a_file_proves_the_code_that_ran(tmp_path):
    keep(tmp_path, result())
    verdict = first(gpu.from_files(tmp_path))
    assert verdict.outcome == "proven on GPU"
    assert verdict.evidence.endswith("vllm-0.33.0_prove.json")
    assert "218 tokens" in verdict.detail
    assert "NVIDIA H200" in verdict.detail


def test_code_that_changed_since_is_not_proven_by_it(tmp_path):
    kept = result()
    kept["patches"][NAME]["digest"] = "0" * 16
    keep(tmp_path, kept)
    assert first(gpu.from_files(tmp_path)).outcome == "not proven"


def test_the_digest_sees_every_line_of_a_patch(tmp_path, monkeypatch):
    (tmp_path / "p").mkdir()
    for name in ("__init__", "replacement"):
        (tmp_path / "p" / f"{name}.py").write_text("a = 1\n")
    monkeypatch.setattr(results, "PATCHES", tmp_path)
    before = results.digest("p")
    (tmp_path / "p" / "replacement.py").write_text("a = 2\n")
    assert results.digest("p") != before


def test_the_newest_file_counts(tmp_path):
    keep(tmp_path, result(tokens={"compared": 218, "different": 3}))
    keep(tmp_path, result(), "2026-12-02_abcdef1_vllm-0.33.0_prove.json")
    assert first(gpu.from_files(tmp_path)).outcome == "proven on GPU"
    keep(
        tmp_path,
        result(tokens={"compared": 218, "different": 3}),
        "2026-12-03_abcdef2_vllm-0.33.0_prove.json",
    )
    verdict = first(gpu.from_files(tmp_path))
    assert verdict.fault
    assert "3 of 218 tokens differ" in verdict.detail


def test_steps_left_to_stock_prove_nothing_but_are_no_fault(tmp_path):
    kept = result()
    aside = {"the backend computes ahead of the replay": 40}
    kept["patches"][NAME]["aside"] = aside
    keep(tmp_path, kept)
    verdict = first(gpu.from_files(tmp_path))
    assert (verdict.outcome, verdict.fault) == ("not proven", False)
    assert "40 left to stock: the backend computes ahead" in verdict.detail


@pytest.mark.parametrize("text", ["{", "[]", '{"patches": 3}', "{}"])
def test_a_broken_file_is_one_line_that_names_it(tmp_path, text):
    keep(tmp_path, text)
    [verdict] = gpu.from_files(tmp_path)
    assert verdict.fault
    assert verdict.subject.endswith("_prove.json")
    assert "run it again" in verdict.detail


@pytest.fixture
def on_a_gpu(monkeypatch, tmp_path):
    """A machine that says it has a GPU; what its engines answer is given."""
    here = {**machine.describe(), "gpu": "NVIDIA H200", "vllm": "0.33.0"}
    monkeypatch.setattr(machine, "describe", lambda: here)
    monkeypatch.setattr(results, "RESULTS", tmp_path)

    def run(stock, patched):
        def decode(settings):
            answer = stock if settings["VEXT"] == "0" else patched
            if isinstance(answer, Exception):
                raise answer
            return answer

        monkeypatch.setattr(gpu, "_decode", decode)
        used = {"state": "in use", "calls": 9, "aside": {}, "reason": ""}
        states = [{"patches": [{"name": patch.name, **used} for patch in SERIES]}]
        monkeypatch.setattr(gpu, "read_states", lambda folder: states)
        verdicts = gpu.verdicts(lambda text: None)
        [file] = tmp_path.glob("nvidia-h200/*_prove.json")
        return first(verdicts), json.loads(file.read_text())

    return run


def test_what_a_gpu_gives_is_kept(on_a_gpu, tmp_path):
    verdict, kept = on_a_gpu(ANSWERS, ANSWERS)
    assert verdict.outcome == "proven on GPU"
    assert kept["machine"]["gpu"] == "NVIDIA H200"
    assert first(gpu.from_files(tmp_path)) == verdict


def test_other_tokens_are_a_fault(on_a_gpu):
    verdict, kept = on_a_gpu(ANSWERS, OTHERS)
    assert verdict.fault
    assert kept["tokens"]["first"]["position"] == 1


def test_an_engine_that_a_check_stopped_is_a_fault_with_its_last_line(on_a_gpu):
    stopped = ChildError(
        "engine on the GPU ended; its last lines:\n  | RuntimeError: x"
    )
    verdict, _ = on_a_gpu(ANSWERS, stopped)
    assert verdict.fault
    assert "RuntimeError: x" in verdict.detail
