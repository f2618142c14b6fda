"""Steps by graphs give stock's tokens, touch nobody else, and check themselves.

CUDA graphs are the emulator's (`vllm_ext.prove.graphs`), the engine, its scheduler and
its workloads are real. What they cannot show: that a GPU captures what is recorded
here, which `vllm_ext.prove.cuda` looks at, and anything about time.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vllm_ext.prove import stepdrawing
from vllm_ext_cpulane.engine import run_script

pytestmark = pytest.mark.vllm
SCRIPT = Path(__file__).parent / "in_engine" / "step_graph.py"
ON = {"VEXT": "1", "VEXT_STRICT": "1"}
CASES = {"async": "3", "sync": "3", "lags": "3"}  # seeds
MONO = {f"{case}, mono": case for case in CASES}  # by graphs of whole steps
DECODED = [*CASES, *MONO]
# Alone, with the patches that are on by default, and with the other sampler, too.
PATCHES = {"sync": "+step_graph", "lags": "+step_graph,+fused_sampler"}
# Copy, prep graph, forward graph, sampler graph, copy; or one graph of all three.
SUBMISSIONS = {
    **dict.fromkeys(CASES, "d2h:1 graph:3 h2d:1"),
    **dict.fromkeys(MONO, "d2h:1 graph:1 h2d:1"),
}


@pytest.fixture(scope="module")
def found(lane, tmp_path_factory):
    def run(case):
        settings = ON | {"VEXT_PATCHES": PATCHES.get(case, "step_graph")}
        settings["VEXT_STATE_DIR"] = str(tmp_path_factory.mktemp(case))  # to count
        return run_script(SCRIPT, lane | settings, case, CASES.get(case, "0"))

    cases = [*CASES, "small"]
    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(cases, pool.map(run, cases), strict=True))
    found |= {name: found[case].pop("mono") for name, case in MONO.items()}
    for lagging in ("lags", "lags, mono"):
        found[lagging]["stock"] = found["async"]["stock"]
    return {**found.pop("small"), **found}


def given(answers):
    """What requests were given; without ranks, which stock gets wrong if there are
    fewer tokens than a block of its kernel has, and fused_sampler does not."""
    return {
        name: (
            each["tokens"],
            [[entry[:2] for entry in row] for row in each["logprobs"]],
            each["reason"],
        )
        for name, each in answers.items()
    }


@pytest.mark.parametrize("case", DECODED)
def test_tokens_are_stock_s(found, case):
    assert given(found[case]["answers"]) == given(found[case]["stock"])
    assert found[case]["on"]
    assert found[case]["async"] == (MONO.get(case, case) != "sync")
    assert found[case]["eligible"] > 40
    assert found[case]["checked"] > 5
    assert found[case]["preempted"] > 0
    assert any(each["reason"] == "aborted" for each in found[case]["stock"].values())


def test_over_many_steps(found):
    kinds = ("eligible", "checked", "others")
    for cases in (CASES, MONO):
        assert sum(found[case][kind] for case in cases for kind in kinds) >= 300


@pytest.mark.parametrize("case", DECODED)
def test_a_step_is_few_submissions_no_allocation_and_no_wait(found, case):
    """One more if stock has drawn tokens of requests with penalties before."""
    submissions, usual = dict(found[case]["submissions"]), SUBMISSIONS[case]
    assert submissions.pop(usual) > 30
    assert set(submissions) <= {f"{usual} triton:1"}
    assert found[case]["allocations"] == found[case]["waits"] == 0


@pytest.mark.parametrize("case", DECODED)
def test_the_graphs_read_only_what_was_written(found, case):
    assert found[case]["unwritten"] == []
    assert found[case]["moved"] == []


def test_seats_of_nobody_keep_their_canaries(found):
    assert found["sync"]["canaries"] == found["sync, mono"]["canaries"] == 0


@pytest.mark.parametrize("case", CASES)
def test_what_is_left_to_stock_is_counted(found, case):
    state, calls, aside = found[case]["patches"]["step_graph"]
    assert state == "in use"
    assert calls > 0
    assert aside["a request is new or resumed"] > 5
    assert aside["logprobs"] > 0


def test_an_engine_that_it_is_not_for_is_told_by_one_thing(found):
    engines = dict(found["eligible"]["engines"])
    assert engines.pop("as it is") == engines.pop("FlashAttention 3") == []
    assert len(engines) > 18
    assert {name: len(reasons) for name, reasons in engines.items()} == dict.fromkeys(
        engines, 1
    )
    said = [reason for [reason] in engines.values()]
    other = "FlashAttention other than 3"
    same = {"context parallelism", "not a decoder that generates text", other}
    assert len(set(said)) == len(said) - len(same)
    assert engines["backend"] == ["attention backend FLASHINFER"]
    assert engines["FlashAttention 2"] == [other]


def test_a_step_that_is_not_eligible_is_told_before_anything_changes(found):
    steps = dict(found["eligible"]["steps"])
    assert steps.pop("nothing has changed")
    assert steps == {
        "scheduled_new_reqs": "a request is new or resumed",
        "total_num_scheduled_tokens": "a request has more than one token",
        "scheduled_spec_decode_tokens": "draft tokens",
        "new_block_ids_to_zero": "blocks to be zeroed or copied",
        "has_structured_output_requests": "structured output",
        "kv_cache_block_copies": "blocks to be zeroed or copied",
        "scheduled_encoder_inputs": "encoder inputs",
        "num_scheduled_tokens": "requests in another order",
        "prompt": "a prompt is still being read",
        "two blocks": "a request has more than one new block",
        "aside": "logprobs",
        "asks": "bad words",
        "full": "a block table is full",
        "rows": "more requests than a step graph has rows",
    }


@pytest.mark.parametrize("case", DECODED)
def test_what_capturing_took_is_told(found, case):
    cost = found[case]["cost"]
    assert cost["graphs"] == 12  # prep, and with and without filters, of four sizes
    assert cost["seconds"] > 0
    assert cost["MiB"] >= 0


def test_every_buffer_is_listed(found):
    table = found["async"]["table"]
    assert len(table) > 20
    assert all(entry.count(";") >= 1 for entry in table)


def test_the_drawing_is_what_is_recorded_now(found):
    drawing = found["drawing"]
    assert [kind for kind, _ in drawing["ours"]] == ["h2d", *["graph"] * 3, "d2h"]
    assert [kind for kind, _ in drawing["mono"]] == ["h2d", "graph", "d2h"]
    assert stepdrawing.judge(drawing).outcome == "proven on CPU"
    page = (SCRIPT.parents[3] / "docs" / "step-graph.md").read_text()
    if found["vllm"].startswith("0.32.0"):  # which it is of
        assert page == stepdrawing.draw(drawing)
    else:
        assert len(drawing["stock"]) >= 21


def test_the_check_is_quiet_where_nothing_is_wrong(found):
    sound = {"same": True, "said": [], "on": True}
    assert found["planted"]["sound"] == found["planted"]["sound again"] == sound


def test_the_check_finds_a_bug_in_each_buffer(found):
    planted = {k: v for k, v in found["planted"].items() if "sound" not in k}
    assert len(planted) > 15
    missed = [name for name, each in planted.items() if not each["said"]]
    assert missed == []
    assert [name for name, each in planted.items() if each["on"]] == []
    # And no token was wrong: what is checked is served by stock.
    assert [name for name, each in planted.items() if not each["same"]] == []
    assert all(len(each["said"]) == 1 for each in planted.values())


def test_the_check_finds_what_a_whole_step_lacks(found):
    """Even where what stock made for the step would stand in for it."""
    parts = dict(found["whole"])
    assert parts.pop("sound") == {"same": True, "said": []}
    assert set(parts) == {"inputs", "forward", "hidden states", "draw"}
    assert [name for name, each in parts.items() if not each["said"]] == []
    assert [name for name, each in parts.items() if not each["same"]] == []


def test_the_check_draws_by_stock_s_sampler(found):
    """Although fused_sampler is on, and gives stock's own step the same tokens."""
    kernel = found["lags"]["kernel"]
    assert kernel["sound"] == []
    assert kernel["spoiled"]
    assert all("sampled tokens" in said for said in kernel["spoiled"])


def test_without_vllm_s_graphs_steps_are_stock_s(found):
    life = found["life"]
    assert life["captured"] == {"same": True, "on": True}
    assert life["released"] == {"same": True, "on": False}
    assert life["another"]
    assert life["captured again"] == {"same": True, "on": True}
    assert life["mono"]
    assert life["not mono"]
    assert life["captured as one"] == {"same": True, "on": True}
    assert life["released as one"] == {"same": True, "on": False}
    assert life["another head"] == {"same": True, "on": False}
    assert not life["another KV cache"]


def test_a_tensor_that_was_replaced_is_named(found):
    assert found["life"]["moved"] == ["total_len"]


def test_metadata_is_made_anew_in_the_prep_graph(found):
    assert found["life"]["with metadata"] == {"same": True, "on": True}
    made, of = found["life"]["metadata"]
    assert made == of
    assert max(made) > 15  # of the last step, which nothing has rewritten since


def test_a_profile_leaves_no_graphs(found):
    assert found["life"]["captured for a profile"] == {"same": True, "on": False}


def test_a_capture_that_fails_leaves_stock_code(found):
    assert found["life"]["not captured"] == {"same": True, "on": False}


def test_a_check_that_fails_is_the_last_and_its_step_is_stock_s(found):
    fails = found["life"]["checks that fail"]
    assert len(fails) == 5
    assert all(
        each == {"same": True, "on": False, "times": 1} for each in fails.values()
    )


def test_ranks_agree(found):
    """This rank found nothing, twice; the other one did at its first step."""
    assert found["life"]["of two ranks"]
    differs = {"same": True, "on": False, "asked": [1, 1]}
    assert found["life"]["the other rank differs"] == differs


def test_no_slot_of_the_ring_is_taken_too_early(found):
    assert set(found["ring"]["sound"]) == {0}


def test_and_if_it_were_that_would_show(found):
    assert all(found["ring"]["a slot is taken at once"])
