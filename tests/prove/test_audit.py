"""The audit: what is kept in docs/audit-syncs.md is what engines do now.

The engines boot once for this file, two at a time; everything else is judged on what
they found, or on a result in which something was planted.
"""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vllm_ext import machine
from vllm_ext.patches import SERIES
from vllm_ext.prove import audit, auditrun, cuda, syncs
from vllm_ext.prove.pretend import DEVICE, PretendDevice

pytestmark = pytest.mark.vllm
RESTORED = "min_tokens, stop tokens, JSON schema"
DOCUMENT = Path(__file__).parents[2] / "docs" / "audit-syncs.md"
V2, V1, V2_FROM_BOOT, V2_DRAFTS, V1_DRAFTS = audit.RUNS
# What a step graph leaves to stock, and a runner that is there for it.
LEFT = {"bad words", "JSON schema", "logprobs", "prompt logprobs", RESTORED}


@pytest.fixture(scope="module")
def result():
    return audit.gather(print)


def waits(result, run, side, feature, what="waits"):
    """Of a steady step, or ``first``: the function of each wait."""
    return [wait["function"] for wait in result[run.title][side][feature][what]]


# -- real engines ------------------------------------------------------------------


def test_the_kept_document_is_what_is_found_now(result):
    changed = audit.changes(DOCUMENT.read_text(), audit.document(result))
    assert changed == [], f"read the difference, then: {audit.COMMAND}"


def test_what_a_gpu_is_compared_with_is_what_is_found_now(result):
    assert json.loads(audit.ON_RECORD.read_text()) == audit.waiting(result)


def test_a_machine_with_a_gpu_asks_that_and_needs_no_lane(monkeypatch):
    """No engine is booted: beside vLLM for a GPU there is none of the CPU's."""
    asked = []
    here = {**machine.describe(), "gpu": "NVIDIA H200"}
    monkeypatch.setattr(machine, "describe", lambda: here)
    monkeypatch.setattr(audit, "gather", lambda say: pytest.fail("booted"))
    monkeypatch.setattr(cuda, "verdicts", lambda audited, say: asked.append(audited))
    audit.verdicts(print)
    [[v2, v1, *_]] = asked
    assert (v2["runner"], v1["runner"]) == (2, 1)
    assert v2["stock"].keys() == auditrun.MAIN.keys()
    assert not any(seen["waits"] for seen in v2["stock"].values())
    assert {wait["function"] for wait in v1["stock"][RESTORED]["waits"]} == {
        "_mask_stop_token_logits"
    }


def test_it_was_these_runners(result):
    for run in audit.RUNS:
        name = "vllm.v1.worker.gpu.model_runner"
        expected = name if run.runner == 2 else "vllm.v1.worker.gpu_model_runner"
        assert result[run.title]["runner"] == expected
        assert result[run.title]["asynchronous"] == (run.kind != "drafts")


def test_every_feature_was_watched(result):
    assert list(auditrun.MAIN) == list(audit.MAIN)
    assert list(auditrun.DRAFTS) == list(audit.DRAFTS)
    features = {"asynchronous": audit.MAIN, "drafts": audit.DRAFTS}
    features["from boot"] = audit.STEPPED
    for run in audit.RUNS:
        assert list(result[run.title]["stock"]) == list(features[run.kind])


def test_stock_v2_waits_for_nothing_but_its_output(result):
    for run in (V2, V2_FROM_BOOT, V2_DRAFTS):
        for feature, seen in result[run.title]["stock"].items():
            assert seen["waits"] == [], feature
            events = set(waits(result, run, "stock", feature, "events"))
            grammar = run is V2_DRAFTS and "JSON" in feature
            assert events == {"get_output"} | (
                {"get_draft_tokens"} if grammar else set()
            )


def test_the_stock_samplers_raise_no_alarm(result):
    """Neither runner's sampler waits in a steady step, but for what a patch repairs."""
    for run in (V2, V1):
        for feature, seen in result[run.title]["stock"].items():
            in_sampler = [w for w in seen["waits"] if "/sample/" in w["file"]]
            assert bool(in_sampler) == (run is V1 and feature == RESTORED), feature


def test_the_first_use_of_top_k_waits_once_per_process(result):
    for run in (V2, V2_FROM_BOOT, V1):
        using = [
            feature
            for feature, seen in result[run.title]["stock"].items()
            if "apply_top_k_top_p_triton" in [w["function"] for w in seen["first"]]
        ]
        assert using == ["top-k"]  # the first that uses it


def test_a_lagging_device_gives_the_same_tokens(result):
    for run in audit.RUNS:
        found = result[run.title]
        assert found["tokens"] >= 4 * len(found["stock"])
        assert (found["stock_lags"], found["patched_lags"]) == ([], [])


def test_the_patch_for_v1_takes_four_waits_away(result):
    assert waits(result, V1, "stock", RESTORED) == 4 * ["_mask_stop_token_logits"]
    assert waits(result, V1, "patched", RESTORED) == []


def test_the_patches_for_v1_wait_for_no_last_token(result):
    for feature in ("three penalties", "bad words"):
        events = waits(result, V1, "stock", feature, "events")
        assert "update_async_output_token_ids" in events
        patched = waits(result, V1, "patched", feature, "events")
        assert set(patched) == {"synchronize_input_prep", "get_output"}
    penalties = "three penalties"
    assert launches(result, "patched", penalties) < launches(result, "stock", penalties)


def launches(result, side, feature):
    return result[V1.title][side][feature]["submitted"]["launch"]


def test_the_patches_for_v1_read_drafts_back_in_one_wait(result):
    for feature, number in {"n-gram drafts": 1, "n-gram drafts, logprobs": 10}.items():
        stock = result[V1_DRAFTS.title]["stock"][feature]["waits"]
        assert sum(wait["times"] for wait in stock) == 2 * number
        assert waits(result, V1_DRAFTS, "patched", feature) == []


def test_the_patches_for_v1_pin_the_mask_of_allowed_tokens(result):
    assert "copy_slice" in waits(result, V1, "stock", "allowed ids", "first")
    assert waits(result, V1, "patched", "allowed ids", "first") == []


# A word that hangs on the last token is decided on the device, not waited for.
TRADED = "bad words"


def test_no_patched_step_submits_more(result):
    for run in audit.RUNS:
        for feature, patched in result[run.title]["patched"].items():
            if (run, feature) == (V1, TRADED):
                continue
            stock = result[run.title]["stock"][feature]["submitted"]
            for kind, number in patched["submitted"].items():
                if run is V2_FROM_BOOT and kind == "graph":
                    continue  # three replays for one, and for all the launches
                assert number <= stock[kind], (run.title, feature, kind)


def test_patches_submit_less_for_every_feature_of_v2(result):
    for feature in audit.MAIN:
        stock, patched = (
            sum(result[V2.title][side][feature]["submitted"].values())
            for side in ("stock", "patched")
        )
        assert patched < stock, feature


def test_a_step_graph_is_three_replays_between_two_copies_and_no_memory(result):
    for feature, seen in result[V2_FROM_BOOT.title]["patched"].items():
        expected = {"launch": 0, "triton": 0, "graph": 3, "h2d": 1, "d2h": 1}
        assert (seen["submitted"] == expected) == (feature not in LEFT), feature
        assert seen["waits"] == []
        allocated = seen["allocated"]
        assert (sum(allocated.values()) == 0) == (feature not in LEFT), feature
        stock = result[V2_FROM_BOOT.title]["stock"][feature]["allocated"]
        assert stock["device"] >= 11
        assert stock["pinned"] >= 4


def test_every_patch_has_a_verdict_and_is_proven(result):
    verdicts = audit.judge(result)
    assert {each.subject for each in verdicts} == {
        *(patch.name for patch in SERIES),
        *("stock Model Runner V1", "stock Model Runner V2"),
    }
    assert {each.outcome for each in verdicts} == {"proven on CPU"}
    assert not any(each.fault for each in verdicts)
    by_name = {each.subject: each.detail for each in verdicts}
    assert (
        "0 host waits in 34 steady steps over 17 features" in by_name["repeated_batch"]
    )
    assert f"{RESTORED} 4" in by_name["stock Model Runner V1"]


# -- a result in which something was planted ----------------------------------------

PLANTED = {
    "file": "vllm/v1/sample/new.py",
    "line": 7,
    "function": "greedy",
    "text": "flag = any_greedy.item()",
    "why": "_local_scalar_dense reads a value",
    "times": 2,
}


def planted(result, run, side, feature):
    changed = copy.deepcopy(result)
    changed[run.title][side][feature]["waits"].append(PLANTED)
    return changed


def verdict(result, subject):
    [found] = [each for each in audit.judge(result) if each.subject == subject]
    return found


def test_a_wait_under_a_patch_is_a_fault_with_its_line(result):
    found = verdict(planted(result, V2, "patched", "greedy"), "late_metadata")
    assert (found.outcome, found.fault) == ("not proven", True)
    assert found.detail == (
        "greedy: _local_scalar_dense reads a value at v1/sample/new.py:7 `greedy`"
    )


def test_a_new_wait_in_stock_is_a_fault_with_its_line(result):
    changed = planted(result, V2, "stock", "min-p")
    found = verdict(changed, "stock Model Runner V2")
    assert (found.outcome, found.fault) == ("not proven", True)
    assert "1 waits that are not on record; min-p: _local_scalar_dense" in found.detail
    assert verdict(changed, "stock Model Runner V1").outcome == "proven on CPU"
    assert verdict(changed, "late_metadata").outcome == "proven on CPU"


def test_a_patch_that_was_never_called_is_not_proven(result):
    changed = copy.deepcopy(result)
    changed[V2.title]["patches"]["late_metadata"]["calls"] = 0
    found = verdict(changed, "late_metadata")
    assert (found.outcome, found.fault) == ("not proven", False)
    assert "never called" in found.detail


def test_a_runner_whose_steps_are_all_stock_s_is_not_proven(result):
    """It is called all the same, where it is built."""
    changed = copy.deepcopy(result)
    run = changed[V2_FROM_BOOT.title]
    for feature, seen in run["patched"].items():
        seen["submitted"] = run["stock"][feature]["submitted"]
    assert run["patches"]["step_graph"]["calls"] > 0
    found = verdict(changed, "step_graph")
    assert (found.outcome, found.fault) == ("not proven", False)
    assert "11 of them by its graphs" in verdict(result, "step_graph").detail


def test_another_token_on_a_lagging_device_is_a_fault(result):
    changed = copy.deepcopy(result)
    changed[V2.title]["patched_lags"].append("top-k")
    found = verdict(changed, "repeated_batch")
    assert (found.outcome, found.fault) == ("not proven", True)
    assert found.detail == "on a device that lags, other tokens for top-k"
    assert verdict(changed, "stock Model Runner V2").outcome == "proven on CPU"
    changed[V2.title]["stock_lags"].append("greedy")
    assert verdict(changed, "stock Model Runner V2").fault


def test_what_changed_is_named(result):
    before = audit.document(result)
    after = audit.document(planted(result, V2, "stock", "min-p"))
    changed = audit.changes(before, after)
    assert any(line.startswith("-| min-p | 0 | 1 |") for line in changed)
    assert any(line.startswith("+| min-p | 1 → 0 | 1 |") for line in changed)
    assert any("new.py:7 `greedy` | `flag = any_greedy.item()`" in x for x in changed)
    assert audit.changes(before, before) == []


# -- what a child does with one feature -----------------------------------------------


class Decoding:
    """Stands for an engine: a step adds a token to each request, and may wait."""

    def __init__(self, device, waits_at):
        self.device, self.waits_at = device, waits_at
        self.tokens = {}
        self.steps = 0

    def add_request(self, name, prompt, params):
        self.tokens[name] = []

    def has_unfinished_requests(self):
        return bool(self.tokens)

    def abort_request(self, names):
        self.tokens.clear()

    def step(self):
        self.steps += 1
        number = torch.zeros(1, device=DEVICE)
        if self.steps in self.waits_at:
            number.item()
        if self.steps == 1:  # asynchronous: there is nothing to hand out yet
            return []
        for tokens in self.tokens.values():
            tokens.append(self.steps)
        return [
            SimpleNamespace(
                request_id=name, outputs=[SimpleNamespace(token_ids=[*tokens])]
            )
            for name, tokens in self.tokens.items()
        ]


@pytest.fixture
def no_parameters(monkeypatch):
    """What a stand-in does not read, and importing vLLM takes seconds."""
    monkeypatch.setattr(auditrun, "_parameters", lambda wanted, index: None)


@pytest.mark.usefixtures("no_parameters")
@pytest.mark.parametrize("waits_at", [(), (1,), (4,), (4, 5), (3, 5)])
def test_steady_steps_are_told_from_the_others(waits_at):
    with PretendDevice() as device:
        engine = Decoding(device, waits_at)
        seen = auditrun.observe(engine, device, {"temperature": 0.0})
    assert engine.steps == 5  # one prefill, two tokens each, and two steady steps
    times = {what: sum(w["times"] for w in seen[what]) for what in ("waits", "first")}
    assert times["waits"] == len({4, 5} & {*waits_at})
    assert times["first"] == len({1, 2, 3} & {*waits_at})
    for wait in seen["waits"]:
        assert wait["text"] == "number.item()"
        assert wait["function"] == "step"
    reads = [(4 in waits_at), (5 in waits_at)]
    expected = reads[0] if reads[0] == reads[1] else [0, 1]
    assert seen["submitted"] == {
        **{"launch": 1, "triton": 0, "graph": 0, "h2d": 0},
        "d2h": int(expected) if isinstance(expected, bool) else expected,
    }


class Reading(Decoding):
    """Reads each token from a copy, and waits for the copy or does not."""

    def __init__(self, device, waits):
        super().__init__(device, ())
        self.waits = waits

    def step(self):
        answers = super().step()
        for name in [*self.tokens]:
            token = torch.tensor([len(self.tokens[name])], pin_memory=True).to(
                DEVICE, non_blocking=True
            )
            copy = (token + 5).to("cpu", non_blocking=True)
            if self.waits:
                torch.cuda.current_stream().record_event().synchronize()
            self.tokens[name][-1:] = [int(copy)]
            if len(self.tokens[name]) == auditrun.LENGTH:
                del self.tokens[name]
        return answers


@pytest.mark.usefixtures("no_parameters")
@pytest.mark.parametrize("waits", [True, False])
def test_a_result_that_is_read_too_early_is_seen_on_a_lagging_device(waits):
    features = {"greedy": {"temperature": 0.0}, "drawn": {"temperature": 1.0}}
    with PretendDevice() as device:
        prompt, lagging = (
            auditrun.decode(Reading(device, waits), device, features, lags=lags)
            for lags in (False, True)
        )
        assert not device.lags
    assert list(prompt) == ["greedy"]  # a draw without a seed is never the same
    assert auditrun.differing(prompt, lagging) == ([] if waits else ["greedy"])


@pytest.mark.usefixtures("no_parameters")
def test_requests_without_end_are_given_up(monkeypatch):
    monkeypatch.setattr(auditrun, "PATIENCE", 0.05)
    with PretendDevice() as device:
        engine = Decoding(device, ())
        tokens = auditrun.decode(
            engine, device, {"greedy": {"temperature": 0.0}}, lags=True
        )
    assert tokens["greedy"]
    assert not engine.has_unfinished_requests()


@pytest.mark.usefixtures("no_parameters")
def test_requests_that_end_too_early_say_so():
    with PretendDevice() as device:
        engine = Decoding(device, ())
        engine.step = lambda: (Decoding.step(engine), engine.tokens.clear())[0]
        with pytest.raises(ValueError, match="done after 0 steady steps"):
            auditrun.observe(engine, device, {"temperature": 0.0})


def test_the_command_asks_here():
    assert syncs.verdicts is audit.verdicts
    assert syncs.write is audit.write
