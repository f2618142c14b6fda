"""Chunked prefill, prefix caching, LoRA and n-gram speculation on the V2 runner.

One engine cuts the prompt into chunks and another drafts, so each is the other's
reference: in float32 neither may change a token.
"""

from pathlib import Path
from typing import Any

import pytest

from vllm_ext_cpulane.engine import run_script
from vllm_ext_cpulane.environment import lane_environment

pytestmark = pytest.mark.vllm

SCRIPT = Path(__file__).with_name("long_prompt_script.py")
STOCK = {"VEXT": "0"}
PROMPT_TOKENS = 100
STEP_TOKENS = 16


@pytest.fixture(scope="module")
def chunked() -> dict[str, Any]:
    return run_script(SCRIPT, lane_environment("interpret") | STOCK, "chunked")


@pytest.fixture(scope="module")
def speculative() -> dict[str, Any]:
    """The engine core and its worker are processes of their own here."""
    environment = lane_environment("interpret", in_process=False) | STOCK
    return run_script(SCRIPT, environment, "speculative")


def test_a_long_prompt_is_cut_into_chunks(chunked):
    assert max(chunked["step_sizes"]) == STEP_TOKENS
    assert sum(chunked["step_sizes"]) == PROMPT_TOKENS + len(chunked["tokens"]) - 1


def test_chunks_and_drafts_change_no_token(chunked, speculative):
    assert chunked["tokens"] == speculative["tokens"]
    assert len(set(chunked["tokens"])) > 3


def test_a_cached_prefix_changes_no_token(chunked):
    nothing, prefix = chunked["cached_tokens"]
    assert nothing == 0
    assert 0 < prefix < PROMPT_TOKENS
    assert chunked["tokens_from_cache"] == chunked["tokens"]


def test_only_an_adapter_with_weights_changes_tokens(chunked):
    assert chunked["tokens_of_empty_adapter"] == chunked["tokens"]
    assert chunked["tokens_of_adapter"] != chunked["tokens"]


def test_drafts_are_rejected_and_accepted(speculative):
    assert speculative["rejected"] > 0
    assert speculative["tokens_of_forced"] == [77] * 12
    assert speculative["accepted_of_forced"] > 0
