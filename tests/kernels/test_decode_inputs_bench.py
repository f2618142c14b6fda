"""The benchmark of a decode step's inputs: cases, and that wrong answers are seen."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from vllm_ext.kernels import decode_inputs
from vllm_ext.microbench import bench_decode_inputs as bench

COMMAND = [sys.executable, "-m", "vllm_ext", "bench", "kernels"]


def a_step(mode):
    case = next(
        case for case in bench.cases(small=True, full=False)
        if (case.mode, case.batch) == (mode, 17)
    )  # fmt: skip
    step = bench._step(case, 3, "cpu")
    bench._reference(case, step)
    return case, step


def test_cases_have_names_of_their_own():
    for small in (False, True):
        every = [*bench.cases(small=small, full=True)]
        assert len({case.id for case in every}) == len(every)
        assert {*bench.cases(small=small, full=False)} <= {*every}


def test_a_step_gives_some_requests_a_block():
    case, step = a_step("prep")
    assert [row for row, *_ in step.appended] == [15]
    positions = step.outputs["positions"]
    starts = (positions % bench.BLOCK_SIZE == 0).nonzero()[:, 0]
    assert starts.tolist() == [15]
    assert positions.max() < bench._context(case)


@pytest.mark.parametrize(
    "name", [*("input_ids", "positions", "seq_lens", "query_start_loc"), "tables"]
)
def test_wrong_inputs_are_seen(name):
    case, step = a_step("prep")
    bench._prepared(case, (step, None), step, "cpu")
    [table] = step.groups.input_block_tables
    (table if name == "tables" else step.outputs[name])[1] += 1
    with pytest.raises(AssertionError, match=f"{name} are others"):
        bench._prepared(case, (step, None), step, "cpu")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda step, history: step.computed.sub_(1), "num_computed_tokens stays"),
        (lambda step, history: step.computed[3].add_(1), "not each grew by one"),
        (lambda step, history: step.total[3].add_(1), "total_len is another"),
        (lambda step, history: step.last[3].add_(1), "another last token"),
        (lambda step, history: history.tokens.zero_(), "another token was added"),
        (lambda step, history: history.counts.zero_(), "a count is wrong"),
    ],
)
def test_wrong_state_is_seen(spoil, said):
    case, step = a_step("post")
    history = bench._history(case, "cpu")
    decode_inputs.post_reference(
        *(step.staging, case.batch, step.tokens, history.ring, step.last),
        *(history.tokens, step.total, step.computed, history.counts),
    )
    bench._accounted(case, (step, None), (step, history), "cpu")
    spoil(step, history)
    with pytest.raises(AssertionError, match=said):
        bench._accounted(case, (step, None), (step, history), "cpu")


def test_all_are_right_and_what_they_submit_is_counted(tmp_path):
    """Stock with a block that is new, as one request of these has it."""
    done = subprocess.run(
        [*COMMAND, "-k", "decode_inputs and b17", "--json", "out.json"],
        cwd=tmp_path,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out.json").read_text())["vllm_ext"]
    counted = {
        (each["case"].split()[1], each["provider"]): each["submissions"]
        for each in found["parity"]
    }
    assert counted == {
        **{("prep", "stock"): 10, ("prep", "stock-kernels"): 5, ("prep", "ours"): 2},
        **{("post", "stock"): 3, ("post", "ours"): 1},
    }


def test_tokens_of_all_requests_are_apart():
    case, _ = a_step("post")
    history = bench._history(case, "cpu")
    history.tokens[:, 90] = torch.arange(case.batch, dtype=torch.int32)
    assert history.tokens[:, 90].tolist() == [*range(case.batch)]
