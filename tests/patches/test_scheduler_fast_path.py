"""The scheduler with a fast path does what stock's does, call by call.

Two real schedulers on the same random traffic, compared after every call; and bugs
planted in the fast path, each of which has to be found and made small. `vllm-ext soak`
runs more of it. Then real engines on the CPU, in process and behind `vllm serve`: the
same answers, and metrics that say the same.
"""

import json
import re
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from serving import served

from vllm_ext.patches.scheduler_fast_path import PATCH
from vllm_ext.patching.report import read_states
from vllm_ext.soak.traffic import (
    MIXES,
    Arrival,
    Event,
    Setup,
    Traffic,
    random_traffic,
    smallest,
)
from vllm_ext_cpulane.engine import run_script
from vllm_ext_cpulane.environment import lane_environment
from vllm_ext_cpulane.tinymodel import write_model

SCRIPTS = Path(__file__).parent / "in_engine"
SEEDS = 30
OFF = {"VEXT": "0"}
ON = {"VEXT": "1", "VEXT_STRICT": "1", "VEXT_PATCHES": PATCH.name}
# Stock's own path on a CPU: Model Runner V1, synchronous, compiled kernels.
PLAIN = lane_environment("interpret") | {
    **{"VEXT_CPULANE": "", "TRITON_INTERPRET": "0", "VLLM_USE_V2_MODEL_RUNNER": "0"},
    **{"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR"},
}


@pytest.fixture(scope="module")
def found(lane):
    script = SCRIPTS / "scheduler_twins.py"
    variables = {**lane, "VEXT": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    return run_script(script, variables, "0", str(SEEDS), "40")


@pytest.mark.vllm
def test_no_call_and_no_state_differs(found, lane):
    assert "PYTHONPATH" not in lane or found["vllm"] == "0.33.0"
    assert found["same"]["differs"] is None, found["same"]["differs"]


@pytest.mark.vllm
def test_the_traffic_was_worth_it(found):
    """Both kinds of step, every way to end, preemptions, prefix hits, all setups."""
    seen = found["same"]
    assert seen["fast"] > 0.2 * seen["scheduled"]
    assert seen["scheduled"] - seen["fast"] > 0.2 * seen["scheduled"]
    assert seen["fast_updates"] > 0.2 * seen["updated"]
    assert {"STOP", "LENGTH", "REPETITION"} <= set(seen["finished"])
    assert seen["preempted"] > 10
    assert seen["hits"] > 100
    assert seen["events"] > 100
    assert seen["shapes"] >= 6


@pytest.mark.vllm
def test_no_step_of_traffic_differs_that_is_seldom_drawn(found):
    assert set(found["special"].values()) == {None}, found["special"]


@pytest.mark.vllm
def test_an_error_of_stocks_leaves_everything_in_place(found):
    as_it_was = [["r0"], False]
    assert found["after an error"] == {"steady": as_it_was, "other": as_it_was}


@pytest.mark.vllm
def test_what_is_not_vllms_own_is_refused_before_it_is_looked_at(found):
    assert found["strangers"] == {
        "scheduler": "scheduler from elsewhere",
        "manager": "KV cache manager from elsewhere",
    }


@pytest.mark.vllm
def test_each_unusual_thing_of_a_scheduler_is_enough_to_refuse_it(found):
    encoder, one_group = "encoder connector", "one group of full attention"
    said = {
        "nothing": "",
        "vllm_config": "speculative decoding",
        "num_spec_tokens": "speculative decoding",
        "connector": "KV connector",
        "aux_output_connector": "KV connector",
        "ec_connector": encoder,
        "is_mm_encoder_only": encoder,
        "is_encoder_decoder": "encoder-decoder model",
        "use_pp": "pipeline parallelism",
        "decode_stagger": "pipeline parallelism",
        "num_sampled_tokens_per_step": "not one token per step",
        "perf_metrics": "MFU metrics",
        "return_sampling_mask": "sampling masks or counts of NaN",
        "NaN": "sampling masks or counts of NaN",
        "manager": "KV cache manager from elsewhere",
        "pool": "KV cache manager from elsewhere",
        "coordinator": "KV cache coordinator of another kind",
        "no group": f"KV cache that is not {one_group}",
        "two groups": f"KV cache that is not {one_group}",
        "group": f"KV cache that is not {one_group}",
        "block size": f"KV cache that is not {one_group}",
    }
    assert found["refused schedulers"] == said


@pytest.mark.vllm
def test_each_unusual_thing_of_a_request_is_enough_to_refuse_it(found):
    assert found["refused requests"] == {
        "nothing": "",
        "sampling_params": "pooling",
        "pooling_params": "pooling",
        "structured_output_request": "structured output",
        "mm_features": "multimodal input",
        "resumable": "streaming input",
    }


@pytest.mark.vllm
def test_an_output_with_more_than_tokens_is_left_to_stock(found):
    left = dict(found["left to stock"])
    assert not left.pop("nothing")
    assert len(left) == 8
    assert set(left.values()) == {True}, left


@pytest.mark.vllm
def test_requests_that_have_ended_are_let_go(found):
    assert found["held"] == {"length": 0, "abort": 0}


@pytest.mark.vllm
def test_planted_bugs_are_found_in_traffic_that_a_person_can_read(found):
    assert [name for name, look in found["planted"].items() if look is None] == []
    for name, look in found["planted"].items():
        assert look["requests"] <= 6, (name, look["traffic"])
        assert look["steps"] <= 60, (name, look["traffic"])


# -- real engines ----------------------------------------------------------------------


@pytest.mark.vllm
def test_an_engine_answers_and_counts_as_stock_does(tmp_path):
    """Every look at its metrics on the way, not only the last one."""
    script = SCRIPTS / "scheduler_engine.py"
    on = ON | {"VEXT_STATE_DIR": str(tmp_path)}  # counts calls
    with ThreadPoolExecutor() as both:
        stock, patched = both.map(
            lambda settings: run_script(script, PLAIN | settings, "5"), (OFF, on)
        )
    assert patched["states"][PATCH.name] == "in use"
    assert min(patched["calls"][PATCH.name].values()) > 100
    assert patched["answers"] == stock["answers"]
    reasons = {answer[2] for answer in stock["answers"].values()}
    assert {"stop", "length"} <= reasons
    assert len(stock["metrics"]) > 20
    assert patched["metrics"] == stock["metrics"]
    last = stock["metrics"][-1]
    for counted in ("num_preemptions", "prefix_cache_hits", "generation_tokens"):
        assert sum(
            value for name, value in last.items() if name.startswith(f"vllm:{counted} ")
        )


def ask(url: str) -> dict[str, Any]:
    """Twelve completions at once, and what the server's metrics say after them."""
    body = {
        "model": "tiny",
        "prompt": [[5 + i, *range(40, 50 + 3 * i)] for i in range(12)],
        "max_tokens": 60,
        "temperature": 0,
        "stop_token_ids": list(range(4, 60)),
        "return_token_ids": True,
        "ignore_eos": True,
    }
    request = urllib.request.Request(
        f"{url}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        choices = json.load(answer)["choices"]
    counted = r"vllm:(request_success|prompt_tokens|generation_tokens)_total.*"
    deadline = time.monotonic() + 10
    while True:  # a metric is told a moment after the answer
        with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        metrics = sorted(line for line in lines if re.fullmatch(counted, line))
        done = sum(
            float(line.split()[-1]) for line in metrics if "request_success" in line
        )
        if done == len(choices) or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    return {
        "answers": [(each["token_ids"], each["finish_reason"]) for each in choices],
        "metrics": metrics,
    }


@pytest.mark.vllm
def test_vllm_serve_answers_and_counts_as_stock_does(tmp_path):
    model = write_model(tmp_path / "model", tokenizer=True, weights=True)
    states = tmp_path / "states"

    def run(name: str, settings: dict[str, str]) -> dict[str, Any]:
        environment = PLAIN | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"} | settings
        options = ("--max-num-seqs", "16", "--block-size", "32", "--dtype", "float32")
        printed = tmp_path / f"{name}.log"
        with served(model, printed, *options, environment=environment) as url:
            return ask(url)

    with ThreadPoolExecutor() as both:
        stock, patched = both.map(
            run, ("stock", "patched"), (OFF, ON | {"VEXT_STATE_DIR": str(states)})
        )
    assert patched == stock
    assert len(stock["answers"]) == 12
    assert {reason for _, reason in stock["answers"]} == {"stop", "length"}
    assert sum(float(line.split()[-1]) for line in stock["metrics"]) > 100
    used = [
        patch["calls"]
        for process in read_states(states)
        for patch in process["patches"]
        if patch["name"] == PATCH.name and patch["state"] == "in use"
    ]
    assert len(used) == 1  # the process of the engine core


# -- traffic, without vLLM -------------------------------------------------------------


def test_traffic_follows_from_its_seed():
    assert random_traffic(7, 50) == random_traffic(7, 50)
    assert random_traffic(7, 50) != random_traffic(8, 50)


@pytest.mark.parametrize("mix", MIXES)
def test_every_mix_has_requests_that_fit(mix):
    for seed in range(20):
        traffic = random_traffic(seed, 100, mix)
        setup = traffic.setup
        assert setup.longest <= (setup.blocks - 1) * setup.block_size
        for arrival in traffic.arrivals:
            assert len(arrival.prompt()) == arrival.length < setup.longest


def test_requests_share_a_prefix_within_their_family():
    one, other = Arrival(1, 0, 20, shared=8), Arrival(2, 0, 20, shared=8)
    assert one.prompt()[:8] == other.prompt()[:8]
    assert one.prompt() != other.prompt()


def test_the_smallest_traffic_keeps_what_matters_and_nothing_else():
    whole = random_traffic(3, 200, "churn")
    culprit = [each for each in whole.arrivals if each.max_tokens > 5][7]

    def fails(traffic: Traffic) -> int | None:
        hit = [each for each in traffic.arrivals if each.name == culprit.name]
        resets = [event for event in traffic.events if event.kind == "reset"]
        if hit and resets and hit[0].max_tokens >= 2:
            return max(hit[0].step, resets[0].step)
        return None

    small = smallest(
        Traffic(whole.setup, 200, whole.arrivals, (Event(9, "reset"),)), fails
    )
    assert small == Traffic(
        Setup(), 1, (Arrival(culprit.name, 0, 1, 2),), (Event(0, "reset"),)
    )


def test_traffic_that_does_not_fail_is_refused():
    with pytest.raises(ValueError, match="does not fail"):
        smallest(random_traffic(0, 10), lambda traffic: None)


def test_a_traffic_is_said_by_what_is_unusual_of_it():
    text = str(Traffic(Setup(ahead=False), 3, (Arrival(4, 1, stops=(2,)),)))
    assert (
        text == "3 steps of Setup(ahead=False)\n  Arrival(name=4, step=1, stops=(2,))"
    )
