"""CUDA beside the pretend device: what agrees, what does not, and what is kept."""

import copy
import json
from contextlib import contextmanager, nullcontext

import pytest

from vllm_ext import machine
from vllm_ext.bench import results
from vllm_ext.prove import auditrun, crossings, cuda
from vllm_ext.prove.crossings import CLEAN, WAITS, marked_line
from vllm_ext.prove.pretend import Where
from vllm_ext.prove.syncs import Found, Wait

GPU = {**machine.describe(), "gpu": "NVIDIA H200", "vllm": "0.33.0"}
AGREES = {
    "machine": GPU,
    "operations": {
        "item": {"pretend": ["9 total.item()"], "cuda": ["9 total.item()"]},
        "arithmetic": {"pretend": [], "cuda": []},
    },
    "features": [
        {"feature": "V2 asynchronous: greedy", "pretend": [], "cuda": []},
        {"feature": "V1 drafts: n", "pretend": ["a.py f"], "cuda": ["a.py f"]},
    ],
    "checked": [
        {"engine": "V2 asynchronous", "passed": ["greedy", "min-p"], "stopped": ""}
    ],
}
WAIT = {"file": "vllm/a.py", "function": "f", "line": 3}
AUDITED = [
    {
        "runner": 2,
        "kind": "asynchronous",
        "stock": {"greedy": {"waits": []}, "min-p": {"waits": [WAIT, WAIT]}},
    }
]


def changed(change):
    found = copy.deepcopy(AGREES)
    change(found)
    return found


def test_what_agrees_is_proven_on_a_gpu_with_its_file():
    verdicts = cuda.judge(AGREES, "results/x.json")
    assert [each.outcome for each in verdicts] == 3 * ["proven on GPU"]
    assert {each.evidence for each in verdicts} == {"results/x.json"}
    assert [each.detail for each in verdicts] == [
        f"2 agree on {GPU['gpu']}" for _ in verdicts
    ]


@pytest.mark.parametrize(
    ("subject", "change", "said"),
    [
        (
            cuda.OPERATIONS,
            lambda found: found["operations"]["item"]["cuda"].clear(),
            "item: pretend device waits at 9 total.item(), CUDA does not wait",
        ),
        (
            cuda.FEATURES,
            lambda found: found["features"][0]["cuda"].append("b.py g"),
            "greedy: pretend device does not wait, CUDA waits at b.py g",
        ),
        (
            cuda.CHECKED,
            lambda found: found["checked"][0].update(stopped="min-p: GPU<->CPU sync"),
            "V2 asynchronous: min-p: GPU<->CPU sync",
        ),
    ],
)
def test_what_does_not_agree_is_a_fault_that_names_it(subject, change, said):
    verdicts = {each.subject: each for each in cuda.judge(changed(change), "x.json")}
    assert verdicts[subject].fault
    assert said in verdicts[subject].detail
    assert sum(each.fault for each in verdicts.values()) == 1


def keep(folder, found, name="2026-12-01_abcdef0_vllm-0.33.0_syncs.json"):
    (folder / "nvidia-h200").mkdir(exist_ok=True)
    text = found if isinstance(found, str) else json.dumps(found)
    (folder / "nvidia-h200" / name).write_text(text)


def test_without_a_file_nothing_is_proven_and_nothing_is_wrong(tmp_path):
    verdicts = cuda.from_files(tmp_path)
    assert len(verdicts) == 3
    assert {(each.outcome, each.fault) for each in verdicts} == {("not proven", False)}
    assert "vllm-ext prove syncs" in verdicts[0].detail


def test_the_newest_file_of_this_code_speaks(tmp_path):
    older = changed(lambda found: found["operations"]["item"]["cuda"].clear())
    keep(tmp_path, {**older, "digest": cuda.digest()})
    newer = "2026-12-02_abcdef1_vllm-0.33.0_syncs.json"
    keep(tmp_path, {**AGREES, "digest": cuda.digest()}, newer)
    assert not any(each.fault for each in cuda.from_files(tmp_path))
    keep(tmp_path, {**AGREES, "digest": "another"}, newer)
    assert any(each.fault for each in cuda.from_files(tmp_path))


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_broken_file_is_one_line_that_names_it(tmp_path, text):
    keep(tmp_path, text)
    [verdict] = cuda.from_files(tmp_path)
    assert verdict.fault
    assert verdict.subject.endswith("_syncs.json")
    assert "run it again" in verdict.detail


def test_a_machine_with_a_gpu_asks_it_and_keeps_the_answer(monkeypatch, tmp_path):
    asked = []

    class Engines:
        """Answers as children would whose GPU waits as the pretend device does."""

        def __init__(self, module, environment, name):
            self.environment = environment

        def ask(self, what, timeout, **details):
            asked.append((what, self.environment.get("VLLM_GPU_SYNC_CHECK"), details))
            if what == "operations":
                return {"item": ["9 total.item()"]}
            if what == "waits":
                return AUDITED[0]["stock"]
            return {"stopped": ""}

        def close(self):
            pass

    monkeypatch.setattr(cuda, "Child", Engines)
    monkeypatch.setattr(machine, "describe", lambda: GPU)
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    verdicts = cuda.verdicts(AUDITED, lambda text: None)
    assert [each.outcome for each in verdicts] == 3 * ["proven on GPU"]
    [file] = tmp_path.glob("nvidia-h200/*_vllm-0.33.0_syncs.json")
    kept = json.loads(file.read_text())
    assert kept["features"][1]["pretend"] == ["vllm/a.py f"]
    assert cuda.from_files(tmp_path) == verdicts
    # Only what waits for nothing has to pass vLLM's own check.
    names = {"kind": "asynchronous", "names": ["greedy"]}
    assert ("checked", "error", names) in asked


# -- in the child ------------------------------------------------------------------


def test_the_pretend_device_answers_with_the_marked_lines():
    answers = cuda.operations("pretend")
    assert len(answers) == 2 * len(WAITS | CLEAN)
    for mode in ("plain", "inference"):
        for name, function in WAITS.items():
            [line] = answers[f"{name} ({mode})"]
            assert line.startswith(f"{marked_line(function)} ")
        for name in CLEAN:
            for line in answers[f"{name} ({mode})"]:
                assert line.endswith("(event)")


def test_cuda_is_asked_a_second_time_because_first_uses_may_wait(monkeypatch):
    calls = []

    def tensors(place):
        assert place == "cuda"
        return len(calls)

    @contextmanager
    def watch(device):
        assert device is None
        found = Found()
        watched.append(found)
        yield found
        place = Where(crossings.__file__, 7, "f")
        found.waits.append(Wait("sync", "?", "waits", place))

    watched = []
    monkeypatch.setattr(crossings, "WAITS", {"f": calls.append})
    monkeypatch.setattr(crossings, "CLEAN", {})
    monkeypatch.setattr(crossings, "Tensors", tensors)
    monkeypatch.setattr("vllm_ext.prove.syncs.watch", watch)
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
    answers = cuda.operations("cuda")
    assert list(answers) == ["f (plain)", "f (inference)"]
    assert len(calls) == 4
    assert len(watched) == 2
    assert answers["f (plain)"][0].startswith("7 ")


@pytest.fixture
def engine(monkeypatch):
    monkeypatch.setattr(cuda, "_engine", lambda options: nullcontext("the engine"))


def test_every_feature_of_a_kind_is_watched_on_cuda(engine, monkeypatch):
    def observe(llm_engine, device, wanted):
        assert (llm_engine, device) == ("the engine", None)
        return {"waits": [], "wanted": wanted}

    monkeypatch.setattr(auditrun, "observe", observe)
    seen = cuda.waits("drafts")
    assert list(seen) == list(auditrun.DRAFTS)
    assert seen["n-gram drafts"]["wanted"] == auditrun.ONE_TOKEN


def test_a_check_that_stops_the_engine_names_the_feature(engine, monkeypatch):
    def observe(llm_engine, device, wanted, watching):
        with watching(device) as found:
            assert found.waits == []
        if wanted is auditrun.MAIN["min-p"]:
            raise RuntimeError("GPU<->CPU sync detected - avoid it\nmore")

    monkeypatch.setattr(auditrun, "observe", observe)
    passing, failing = ["greedy", "temperature"], ["greedy", "min-p", "top-k"]
    assert cuda.checked("asynchronous", passing) == {"stopped": ""}
    assert cuda.checked("asynchronous", failing) == {
        "stopped": "min-p: GPU<->CPU sync detected - avoid it"
    }


@pytest.mark.gpu
def test_operations_on_the_gpu_that_is_here():
    assert cuda.operations("cuda") == cuda.operations("pretend")
