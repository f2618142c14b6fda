"""What rows of a full batch draw, against the exact probabilities.

Fixed seeds, 255 rows, two requests in turns. Pearson's chi-square, at one false alarm
in a million for each test: of all draws, and of pairs of neighbouring rows, which
share a position and nothing else. What must not be drawn must not be.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import filtering_batch
import pytest
import sampling_batch
import torch
from closeness import assert_drawn_from
from filtering_batch import Filtered
from sampling_batch import INF, Request

from vllm_ext.kernels import sample, top_k_top_p

ROWS = 255
NEVER = -1e4


def one_ahead(others: int, ahead: float, beyond: int = 8) -> torch.Tensor:
    """Logits: one is ``ahead`` of ``others``, and lesser ones behind those."""
    logits = torch.full((others + 1 + beyond,), NEVER)
    logits[: others + 1] = 0.0
    logits[others // 2] = ahead
    logits[others + 1 :] = -1.0
    return logits


# What is asked, the logits, and what is left of them when probabilities are made:
# each as it is at temperature 1, minus infinity for what is not kept.
def equal_ones(asked):
    logits = torch.zeros(8)
    left = logits.clone()
    left[4:] = -INF
    return asked, logits, left


def leading(asked, temperature, kept):
    logits = one_ahead(15, 2.5 * temperature)
    left = logits / temperature
    left[kept:] = -INF
    return {**asked, "temperature": temperature}, logits, left


CASES = {
    "min-p": (sample, *leading({"min_p": 0.06}, 2.0, 16)),
    "temperature": (sample, *leading({}, 0.7, 24)),
    # Half of equal tokens: the next begins exactly where p ends.
    "p, drawn until kept": (top_k_top_p, *equal_ones({"top_p": 0.5})),
    "p, of candidates": (top_k_top_p, *equal_ones({"top_p": 0.5, "top_k": 8})),
    "k": (top_k_top_p, *leading({"top_k": 16}, 2.0, 16)),
    "penalties, bias, p": (
        *(top_k_top_p, {"top_p": 0.999, "repetition_penalty": 2.0, "output": [7]}),
        # The penalty halves what is ahead; the bias lifts one of the lesser ones.
        one_ahead(15, 5.0) + torch.zeros(24).index_fill(0, torch.tensor([20]), -3.0),
        one_ahead(15, 2.5),
    ),
}
CASES["penalties, bias, p"][1]["logit_bias"] = {20: 3.0}


def check(case, fenced, module=None, rows=ROWS):
    kernel, asked, logits, left = CASES[case]
    kind, batch = (
        (Request, sampling_batch) if kernel is sample else (Filtered, filtering_batch)
    )
    asked = {"temperature": 1.0, **asked}
    each = torch.arange(rows)
    tokens = batch.run(
        logits.expand(rows, -1),
        [kind(seed=seed, **asked) for seed in (3, 4)],
        fenced,
        module=module or kernel,
        seats=(each % 2).to(torch.int32),
        positions=each // 2,
    ).cpu()
    probabilities = left.double().softmax(0)
    size = len(probabilities)
    counts = torch.bincount(tokens, minlength=size)
    assert_drawn_from(counts.tolist(), probabilities.tolist())
    pairs = tokens[0:-1:2] * size + tokens[1::2]
    # In few cells, for enough draws in each: which is the likeliest, or the lowest.
    cells = size * size
    both = torch.outer(probabilities, probabilities).flatten()
    same = torch.arange(cells) // size == torch.arange(cells) % size
    of_same = int(same[pairs].sum())
    share = float(both[same].sum())
    assert_drawn_from([of_same, len(pairs) - of_same], [share, 1 - share])


@pytest.mark.parametrize("case", CASES)
def test_follows_the_exact_probabilities(case, fenced):
    check(case, fenced)


SHARED = Path(sample.__file__).read_text()
JOINED = Path(top_k_top_p.__file__).read_text()
SEEDS = "_word(params_ptr, _SEED), "

# What is wrong: the case that finds it, the source, a text of it and what replaces it.
PLANTED = {
    "sample: noise reused between rows": (
        *("temperature", SHARED, "_begun(\n                _word(params_ptr, _SEED), "),
        "_begun(\n                _word(params_ptr, _FLAGS), ",
    ),
    "sample: noise of the wrong tail": (
        *("temperature", SHARED, "tl.where(u < 0.25, -u * series, far))"),
        "tl.where(u < 0.25, -u * series, far)) * -1.0",
    ),
    "noise reused between rows": ("k", JOINED, SEEDS, "_word(params_ptr, _K), "),
    "noise reused between rows, drawn until kept": (
        *("p, drawn until kept", JOINED, SEEDS, "_word(params_ptr, _FLAGS), "),
    ),
    "noise of the wrong tail": (
        *("k", JOINED, "_value(key) + _noise(_hash(begun, ids))"),
        "_value(key) - _noise(_hash(begun, ids))",
    ),
    "p ends one token late": (
        *("p, of candidates", JOINED),
        *("kept &= (mass < p * of)", "kept &= (mass <= p * of)"),
    ),
    "p ends one token late, drawn until kept": (
        *("p, drawn until kept", JOINED),
        *("(mass >= p * total) &", "(mass > p * total) &"),
    ),
    "p ends one token early": (
        *("p, of candidates", JOINED),
        *("kept &= (mass < p * of)", "kept &= (mass < p * of - 1.5)"),
    ),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_found(bug, interpreter, fenced, tmp_path, monkeypatch):
    case, source, text, planted = PLANTED[bug]
    assert text in source
    path = tmp_path / "planted.py"
    path.write_text(source.replace(text, planted))
    spec = importlib.util.spec_from_file_location("planted", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "planted", module)  # for dataclasses
    spec.loader.exec_module(module)
    with pytest.raises(AssertionError, match="chi-square|no probability"):
        check(case, fenced, module, rows=100)
