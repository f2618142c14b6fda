"""Every sampling feature on vLLM's V2 model runner, judged by what it promises.

The engine's answers come with raw logprobs where a choice has to be checked, so a
test works out by itself which tokens were allowed. Answers to requests that ran
alone and to requests that shared batches have to pass the same tests.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vllm_ext_cpulane.engine import PROMPT, run_script
from vllm_ext_cpulane.environment import lane_environment
from vllm_ext_cpulane.overlay import make_overlay, newest_wheel

pytestmark = pytest.mark.vllm

SCRIPT = Path(__file__).with_name("sampling_script.py")
LANE = lane_environment("interpret") | {"VEXT": "0"}  # stock vLLM
VOCABULARY = 2048
STEP_BUDGET_MS = 50
ROUNDING = 1e-4  # of a probability, between the kernels' float32 and float64 here


@pytest.fixture(
    scope="module",
    params=["installed", pytest.param("newest", marks=pytest.mark.early_warning)],
)
def findings(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What the script reports, from the installed vLLM and from the newest one."""
    if request.param == "installed":
        return run_script(SCRIPT, LANE)
    folder = make_overlay(newest_wheel())
    findings = run_script(SCRIPT, LANE | {"PYTHONPATH": str(folder)})
    assert findings["vllm"].startswith(str(folder))
    return findings


@pytest.fixture(scope="module")
def stock_findings() -> dict[str, Any]:
    """Greedy decoding as vLLM's CPU build does it by itself: V1 runner, no Triton."""
    without_lane = {
        "VEXT_CPULANE": "",
        "TRITON_INTERPRET": "0",
        "VLLM_USE_V2_MODEL_RUNNER": "0",
    }
    return run_script(SCRIPT, LANE | without_lane, "greedy")


@pytest.fixture(params=["alone", "together"])
def answers(findings: dict[str, Any], request: pytest.FixtureRequest) -> dict[str, Any]:
    """Answers by the name of the feature."""
    return findings[request.param]


def only_output(answers: dict[str, Any], name: str) -> dict[str, Any]:
    [output] = answers[name]["outputs"]
    return output


def tokens(answers: dict[str, Any], name: str) -> list[int]:
    return only_output(answers, name)["tokens"]


def choices(answers: dict[str, Any], name: str) -> list[tuple[int, np.ndarray]]:
    """Each token that was chosen, with all raw logprobs it was chosen from."""
    output = only_output(answers, name)
    assert output["tokens"]
    assert len(output["logprobs"]) == len(output["tokens"])
    steps = []
    for token, found in zip(output["tokens"], output["logprobs"], strict=True):
        logprobs = np.array([found[str(i)] for i in range(VOCABULARY)])
        steps.append((token, logprobs))
    return steps


def kept_by_top_k(logprobs: np.ndarray, k: int) -> np.ndarray:
    return logprobs >= np.sort(logprobs)[-k]


def kept_by_top_p(probabilities: np.ndarray, p: float) -> np.ndarray:
    """The likeliest tokens until their sum reaches ``p``."""
    order = np.argsort(-probabilities, kind="stable")
    before = np.cumsum(probabilities[order]) - probabilities[order]
    kept = np.zeros(len(probabilities), dtype=bool)
    kept[order] = before < p + ROUNDING
    return kept | (probabilities >= probabilities[kept].min())  # ties


def kept_by(name: str, logprobs: np.ndarray) -> np.ndarray:
    """Which tokens a drawn request may choose, from the definitions."""
    probabilities = np.exp(logprobs)
    if name == "top_k":
        return kept_by_top_k(logprobs, 5)
    if name == "top_p":
        return kept_by_top_p(probabilities, 0.5)
    if name == "top_k_top_p":
        kept = kept_by_top_k(logprobs, 20)
        left = np.where(kept, probabilities, 0)
        return kept & kept_by_top_p(left / left.sum(), 0.8)
    assert name == "min_p"
    return probabilities >= 0.2 * probabilities.max() - ROUNDING


def test_runs_the_v2_model_runner(findings):
    assert "vllm.v1.worker.gpu.model_runner" in findings["runner"]
    assert findings["has_triton"]


def test_without_the_variable_vllm_is_as_it_was(stock_findings):
    assert not stock_findings["lane_installed"]
    assert not stock_findings["has_triton"]
    assert "vllm.v1.worker.gpu.model_runner" not in stock_findings["runner"]


def test_greedy_matches_the_v1_runner(findings, stock_findings):
    assert tokens(findings["alone"], "greedy") == tokens(
        stock_findings["alone"], "greedy"
    )


def test_greedy_takes_the_likeliest(answers):
    for token, logprobs in choices(answers, "all_logprobs"):
        assert logprobs[token] == logprobs.max()


def test_a_seed_repeats_its_draw(answers):
    assert tokens(answers, "seed_7") == tokens(answers, "seed_7_again")
    assert tokens(answers, "seed_7") != tokens(answers, "seed_8")
    assert tokens(answers, "seed_7") != tokens(answers, "greedy")


@pytest.mark.parametrize("name", ["top_k", "top_p", "top_k_top_p", "min_p"])
def test_only_kept_tokens_are_drawn(answers, name):
    for token, logprobs in choices(answers, name):
        assert kept_by(name, logprobs)[token]


@pytest.mark.parametrize("name", ["top_k", "top_p", "top_k_top_p", "min_p"])
def test_an_unrestricted_draw_leaves_the_kept_tokens(answers, name):
    assert not all(
        kept_by(name, logprobs)[token] for token, logprobs in choices(answers, "drawn")
    )


def test_two_samples_of_one_prompt_differ(answers):
    first, second = answers["two_samples"]["outputs"]
    assert len(first["tokens"]) == len(second["tokens"]) == 6
    assert first["tokens"] != second["tokens"]


def test_presence_and_frequency_are_taken_off_the_logits(answers):
    counts = np.zeros(VOCABULARY)
    for token, logprobs in choices(answers, "presence_frequency"):
        assert token == np.argmax(logprobs - 1.5 * (counts > 0) - 0.5 * counts)
        counts[token] += 1
    assert tokens(answers, "presence_frequency") != tokens(answers, "greedy_long")


def test_repetition_penalty_leaves_fewer_repeats(answers):
    plain, penalized = tokens(answers, "greedy_long"), tokens(answers, "repetition")
    assert plain != penalized
    assert len(set(plain)) < len(set(penalized))


def test_logit_bias_decides(answers):
    assert tokens(answers, "logit_bias") == [77] * 6


def test_only_allowed_tokens_are_drawn(answers):
    drawn = set(tokens(answers, "allowed_token_ids"))
    assert drawn <= {5, 6, 7}
    assert len(drawn) > 1


def test_a_bad_word_is_absent(answers):
    assert only_output(answers, "bad_words_off")["text"] == "aaaaaa"
    assert only_output(answers, "bad_words")["text"] == "bbbbbb"


def test_a_bad_word_of_two_tokens_is_absent(answers):
    assert only_output(answers, "bad_word_of_two")["text"] == "ababab"


def test_min_tokens_holds_a_stop_token_back(answers):
    assert tokens(answers, "stop_token") == [9]
    held_back = only_output(answers, "min_tokens")
    assert held_back["tokens"].index(9) == 3
    assert held_back["finish_reason"] == "stop"


def test_logprobs_are_the_likeliest_tokens(answers):
    output = only_output(answers, "logprobs")
    everything = choices(answers, "all_logprobs")
    for found, (token, logprobs) in zip(output["logprobs"], everything, strict=True):
        assert len(found) == 3
        assert str(token) in found
        assert sorted(found.values()) == pytest.approx(np.sort(logprobs)[-3:], abs=0.1)


def test_all_logprobs_are_a_distribution(answers):
    for _, logprobs in choices(answers, "all_logprobs"):
        assert np.exp(logprobs).sum() == pytest.approx(1, abs=1e-3)


def test_prompt_logprobs_name_each_prompt_token(answers):
    prompt = PROMPT["prompt_token_ids"]
    first, *others = answers["prompt_logprobs"]["prompt_logprobs"]
    assert first is None
    for token, found in zip(prompt[1:], others, strict=True):
        assert str(token) in found
        assert len(found) in (2, 3)  # the prompt's own token may be one of the two
        assert sum(math.exp(logprob) for logprob in found.values()) < 1


def test_json_follows_its_schema(answers):
    parsed = json.loads(only_output(answers, "json")["text"])
    assert parsed.keys() == {"number", "letter"}
    assert parsed["number"] in range(10)
    assert parsed["letter"] in ("x", "y")


def test_a_choice_is_one_of_its_choices(answers):
    assert only_output(answers, "choice")["text"] in ("yes", "no")


@pytest.mark.parametrize("findings", ["installed"], indirect=True)
def test_a_decode_step_fits_its_budget(findings):
    """Processor time, the best of four medians: others only ever make it longer."""
    assert min(findings["step_milliseconds"]) <= STEP_BUDGET_MS
