"""From logits to a token: the kept table is what is found now, and a read too many is.

The engine boots once, for two modes; the others are looked at in the kept table.
"""

import copy
import re
from pathlib import Path

import pytest
import torch

from vllm_ext.prove import traffic, trafficrun
from vllm_ext.prove.pretend import DEVICE, PretendDevice

DOCUMENT = Path(__file__).parents[2] / "docs" / "sampling-traffic.md"
AGAIN = ("greedy", "Qwen2.5's default")


@pytest.fixture(scope="module")
def found():
    return traffic.gather(print, AGAIN)


# -- real engines ------------------------------------------------------------------


@pytest.mark.vllm
def test_the_kept_table_is_what_is_found_now(found):
    kept = DOCUMENT.read_text().splitlines()
    for mode in AGAIN:
        assert traffic.row(mode, found) in kept, f"then: {traffic.COMMAND}"
    launches = set(traffic.document(found).split("## Which launches")[1].splitlines())
    assert launches <= {*kept, ""}
    assert traffic.document(found).split("| mode")[0] in DOCUMENT.read_text()


@pytest.mark.vllm
def test_one_launch_and_hardly_more_than_one_read(found):
    verdict = traffic.judge(found)
    assert (verdict.outcome, verdict.fault) == ("proven on CPU", False)
    assert all(found["calls"][name] for name in ("fused_sampler", "decode_counts"))
    stock = found["stock"]["Qwen2.5's default"]
    assert len(stock["launches"]) > 10
    assert traffic.reads(stock) > 20
    for mode in AGAIN:
        assert traffic.reads(found["patched"][mode]) > 1, "the logits have to be read"


def test_every_mode_of_the_kept_table_is_below_its_limit():
    rows = re.findall(
        r"^\| (.+?) \| (\d+) → (\d+) \| ([\d.]+) → ([\d.]+) \| ([\d.]+) \|$",
        DOCUMENT.read_text(),
        re.MULTILINE,
    )
    assert [mode for mode, *_ in rows] == list(trafficrun.MODES)
    for mode, before, after, reads, fewer, limit in rows:
        assert int(after) == (2 if "logprobs" in mode else 1) < int(before)
        assert float(fewer) <= float(limit)
        assert float(fewer) <= float(reads)


# -- a result in which something was planted ----------------------------------------


def step(launches, reads):
    return {
        **{"rows": 1, "launches": [f"kernel{n}" for n in range(launches)]},
        "bytes": int(reads * traffic.VOCABULARY * 2),
    }


CLEAN = {
    "stock": {"greedy": step(7, 1.02), "top-k": step(11, 15.5)},
    "patched": {
        **{"greedy": step(1, 1.02), "top-k": step(1, 1.2)},
        "greedy, logprobs 5": step(2, 2.1),
    },
    **{"calls": {"fused_sampler": 3}, "aside": {}},
}


@pytest.mark.parametrize(
    ("mode", "planted", "says"),
    [
        ("greedy", step(2, 1.02), "greedy: 2 launches"),
        ("greedy", step(1, 1.06), "greedy: 1.06 reads, of 1.05"),
        ("top-k", step(1, 1.26), "top-k: 1.26 reads, of 1.25"),
        ("greedy, logprobs 5", step(3, 2.1), "greedy, logprobs 5: 3 launches"),
        ("greedy, logprobs 5", step(2, 2.3), "greedy, logprobs 5: 2.30 reads"),
    ],
)
def test_a_launch_or_a_read_too_many_is_a_fault(mode, planted, says):
    assert not traffic.judge(CLEAN).fault
    result = copy.deepcopy(CLEAN)
    result["patched"][mode] = planted
    verdict = traffic.judge(result)
    assert (verdict.outcome, verdict.fault) == ("not proven", True)
    assert verdict.detail.startswith(says)


def test_steps_that_are_left_to_stock_code_are_a_fault():
    verdict = traffic.judge({**CLEAN, "aside": {"drafts": 1}})
    assert verdict.fault
    assert verdict.detail == "left to stock code: drafts"


# -- what an operation moves ---------------------------------------------------------


def moved(work):
    with PretendDevice() as device:
        operations = []
        logits = torch.zeros(4, 100, dtype=torch.bfloat16, device=DEVICE)
        rows = torch.tensor([1, 3]).to(DEVICE)
        device.observers.append(operations.append)
        work(logits, rows)
        device.observers.clear()
        return [trafficrun.bytes_of(each) for each in operations]


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        (lambda x, rows: x.argmax(-1), [800 + 32]),
        (lambda x, rows: x.float(), [800 + 1600]),
        (lambda x, rows: x[rows], [2 * 400 + 16]),
        (lambda x, rows: x.fill_(1.0), [800]),
        (lambda x, rows: x.masked_fill_(x > 0, 1.0), [800 + 400, 2 * 800 + 400]),
        (lambda x, rows: x[:1].expand(4, 100).argmax(-1), [200 + 32]),
        (lambda x, rows: torch.cat([x, x]), [1600 + 1600]),
        (lambda x, rows: x.to("cpu"), [800 + 800]),
        (lambda x, rows: x.view(-1), []),
    ],
    ids=[
        "reduce",
        "convert",
        "pick",
        "fill",
        "mask",
        "expanded",
        "list",
        "copy",
        "view",
    ],
)
def test_each_tensor_counts_once(work, expected):
    assert moved(work) == expected
