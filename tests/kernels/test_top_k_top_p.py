"""Top-k and top-p against the sort in float64, and against vLLM's Triton kernels."""

from __future__ import annotations

import dataclasses
import importlib

import pytest
import torch
from closeness import assert_drawn_from
from filtering_batch import (
    CANDIDATES,
    GROUP,
    TILE,
    Filtered,
    arguments,
    every_filter,
    reference,
    run,
    scratch_for,
    undecided,
)
from sampling_batch import INF, KINDS, WIDTH, logits_of, stock_tokens

from vllm_ext.kernels import top_k_top_p as module

NAN = float("nan")
EDGES = [1, 2, 17, GROUP + 1, TILE - 1, TILE, TILE + 1, 3 * TILE - 8]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Of each way through the kernel one, for tests of something else.
WAYS = [
    Filtered(0.9, 1, top_k=5, top_p=0.8),
    Filtered(0.9, 2, top_k=CANDIDATES + 20, top_p=0.9),
    Filtered(1.1, 3, top_p=0.6),
    Filtered(1.0, 4, min_p=0.3),
    Filtered(1.2, 5, min_p=1e-5, top_p=0.9),
    Filtered(1.0, 6),
    Filtered(),
    Filtered(1.1, 7, top_k=3, logit_bias={3: 9.0, 70: 8.0}),
    Filtered(1.1, 8, top_p=0.9, logit_bias={3: 9.0, 70: 8.0}),
]


@pytest.mark.parametrize("kind", KINDS)
def test_draws_what_the_definition_draws(kind, device, fenced, poisoned):
    """Rows of every kind in one launch."""
    number = KINDS.index(kind)
    batch = every_filter(WIDTH)[number % 5 :: 5]
    logits = logits_of(kind, len(batch), WIDTH, number).to(device)
    if kind not in ("denormal", "largest"):
        logits = logits.to(DTYPES[number % 3])  # it rounds those to 0 and infinity
    tokens = run(logits, batch, fenced)
    assert tokens.tolist() == reference(logits, batch, fenced).tolist()


@pytest.mark.parametrize("vocab_size", EDGES)
def test_at_the_edges_of_groups_and_tiles(vocab_size, device, fenced):
    batch = [
        *(Filtered(1.0, 1, top_k=k) for k in (1, 3, vocab_size)),
        *(Filtered(1.0, 2, top_p=p) for p in (1e-6, 0.7)),
        Filtered(1.0, 3, top_k=4, top_p=0.9),
    ]
    logits = logits_of("normal", len(batch), vocab_size, vocab_size).to(device)
    logits[:, -1] += 3.0  # the last token is often drawn
    tokens = run(logits, batch, fenced)
    assert tokens.tolist() == reference(logits, batch, fenced).tolist()


@pytest.fixture(scope="module")
def stock_mask(stock):
    """vLLM's ``apply_top_k_top_p_triton``."""
    name = "vllm.v1.sample.ops.topk_topp_triton"
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():  # see conftest.py
            patch.setenv("TRITON_INTERPRET", "1")
        return importlib.import_module(name).apply_top_k_top_p_triton


@pytest.mark.parametrize("kind", ["normal", "ties", "one stands out"])
def test_draws_what_stock_draws(kind, device, fenced, stock, stock_mask):
    """Its functions one after the other, as its sampler calls them."""
    batch = [
        Filtered(0.7, 1, top_k=20, top_p=0.8, repetition_penalty=1.1, output=[3, 5]),
        Filtered(0.6, 2, top_k=20, top_p=0.95),
        Filtered(1.0, 3, top_k=7),
        Filtered(1.0, 4, top_p=0.9),
        Filtered(1.3, 5, top_p=0.3, min_p=0.02),
        Filtered(0.9, 6, top_k=50, min_p=0.1, logit_bias={7: 4.0, 300: 3.0}),
        Filtered(1.0, 7),
        Filtered(),
    ]
    logits = logits_of(kind, len(batch), WIDTH, 4).bfloat16().to(device)
    each = torch.arange(len(batch), device=device)
    k = [request.top_k or WIDTH for request in batch]
    k = torch.tensor(k, dtype=torch.int32, device=device)
    p = torch.tensor([request.top_p for request in batch], device=device)

    class Masking:
        """vLLM's functions, with the mask before the draw."""

        def __getattr__(self, name):
            return getattr(stock, name)

        def gumbel_sample(self, x, *rest, **named):
            return stock.gumbel_sample(stock_mask(x, k, p), *rest, **named)

    expected = stock_tokens(Masking(), logits, batch, each, each * 5 + 3)
    assert run(logits, batch, fenced).tolist() == expected.tolist()


@pytest.mark.parametrize("kind", ["normal", "ties", "one stands out"])
def test_keeps_what_stock_keeps_in_split_rows(kind, device, stock_mask):
    """Its other kernels: those for top-p without top-k in up to 64 rows on CUDA."""
    split = importlib.import_module(stock_mask.__module__)._apply_topp_split
    p = torch.tensor([0.1, 0.5, 0.8, 0.95], device=device)
    logits = logits_of(kind, len(p), WIDTH, 9).to(device)
    masked = logits.clone()
    split(masked, None, p, float("-inf"), 132)
    ours = module.mask_top_k_top_p_reference(logits, None, p)
    shown = [row for row, x in enumerate(logits) if not undecided(x, WIDTH, p[row])]
    assert len(shown) > 2
    assert torch.equal(masked[shown], ours[shown])


MASKED = ["normal", "ties", "all equal", "infinite", "denormal", "all masked"]


@pytest.mark.parametrize("kind", MASKED)
def test_masks_all_but_what_the_sort_keeps(kind, device):
    limits = (1, 20, CANDIDATES + 9, WIDTH - 1, WIDTH + 7, 0, 7)
    shares = (0.5, 0.9, 0.8, 0.97, 0.3, 1.0, 1e-9)
    k = torch.tensor(limits, dtype=torch.int32, device=device)
    p = torch.tensor(shares, device=device)
    logits = logits_of(kind, len(k), WIDTH, 2).to(device)
    shown = [
        row for row, x in enumerate(logits) if not undecided(x, k[row] or WIDTH, p[row])
    ]
    assert len(shown) > len(k) - 2
    scratch = scratch_for(*logits.shape, device)
    k_of = k.where(k > 0, WIDTH)
    for limit, share in ((k, p), (k, None), (None, p)):
        masked = module.mask_top_k_top_p(logits.clone(), limit, share, scratch)
        expected = module.mask_top_k_top_p_reference(
            logits, None if limit is None else k_of, share
        )
        assert torch.equal(masked[shown], expected[shown])
        assert not scratch.arrived.any()


@pytest.mark.parametrize("kind", ["normal", "ties", "one stands out"])
def test_masks_what_stock_masks(kind, device, stock_mask):
    k = torch.tensor([1, 5, 20, 40, WIDTH], dtype=torch.int32, device=device)
    p = torch.tensor([0.5, 0.9, 0.8, 0.95, 0.7], device=device)
    logits = logits_of(kind, len(k), WIDTH, 6).bfloat16().float().to(device)
    scratch = scratch_for(*logits.shape, device)
    for limit, share in ((k, p), (k, None), (None, p)):
        masked = module.mask_top_k_top_p(logits.clone(), limit, share, scratch)
        assert torch.equal(masked, stock_mask(logits.clone(), limit, share))


def test_of_equal_logits_at_the_end_the_lowest_tokens_stay(device):
    """Across groups and programs, at the end of ``k`` and at that of ``p``."""
    logits = torch.zeros(3, WIDTH, device=device)
    logits[:, [9, 80, 200]] = 4.0
    logits[:, [3, 70, 90, 300]] = 2.0
    k = torch.tensor([5, 7, 4], dtype=torch.int32, device=device)
    # Of weights 1, 1, 1, then e**-2: p ends before the second of the four.
    share = (3 + 1.1 * 2.718281828**-2) / (3 + 4 * 2.718281828**-2)
    p = torch.tensor([1.0, share, 1.0], device=device)
    scratch = scratch_for(3, WIDTH, device, programs=1000)
    masked = module.mask_top_k_top_p(logits, k, p, scratch)
    kept = [(row > -INF).nonzero().flatten().tolist() for row in masked]
    assert kept == [[3, 9, 70, 80, 200], [3, 9, 70, 80, 200], [3, 9, 80, 200]]


@pytest.mark.parametrize("temperature", [1e-42, 1e-4, 0.01, 1e4, 3e38])
def test_at_any_temperature(temperature, device, fenced):
    batch = [
        *(Filtered(temperature, s, top_k=5) for s in range(2)),
        *(Filtered(temperature, s, top_p=0.7) for s in range(2)),
        Filtered(temperature, 5, top_p=0.5, top_k=40),
    ]
    logits = logits_of("normal", len(batch), WIDTH, 8).to(device)
    tokens = run(logits, batch, fenced)
    assert tokens.tolist() == reference(logits, batch, fenced).tolist()


@pytest.mark.parametrize("kind", ["normal", "ties"])
def test_all_ways_lead_to_the_same_token(kind, device, fenced):
    """However a row is split; with room for all candidates, and with room for few."""
    logits = logits_of(kind, len(WAYS), WIDTH, 5).to(device)
    expected = reference(logits, WAYS, fenced).tolist()
    for programs, candidates in ((1, 512), (20, 8), (10_000, 64)):
        options = {"programs": programs, "candidates": candidates}
        assert run(logits, WAYS, fenced, **options).tolist() == expected


def test_the_sizes_that_serving_uses(device, fenced):
    options = {"tile": module.TILE, "group": module.GROUP}
    options["candidates"] = module.CANDIDATES
    for vocab_size in (2048, 4099):
        logits = logits_of("normal", len(WAYS), vocab_size, 1).bfloat16().to(device)
        tokens = run(logits, WAYS, fenced, **options)
        assert tokens.tolist() == reference(logits, WAYS, fenced).tolist()


def test_nan_is_never_kept(device, fenced):
    logits = logits_of("normal", len(WAYS), WIDTH).to(device)
    logits[:, ::3] = NAN
    logits[2] = NAN
    logits[3] = NAN
    logits[3, 200] = -5.0
    tokens = run(logits, WAYS, fenced)
    assert tokens.tolist() == reference(logits, WAYS, fenced).tolist()
    assert tokens[2:4].tolist() == [0, 200]
    k = torch.full((len(WAYS),), 30, dtype=torch.int32, device=device)
    scratch = scratch_for(*logits.shape, device)
    masked = module.mask_top_k_top_p(logits.clone(), k, None, scratch)
    assert torch.equal(masked, module.mask_top_k_top_p_reference(logits, k, None))


@pytest.mark.parametrize("gap", [1, 8, 700])
def test_rows_at_any_stride(gap, device, fenced):
    storage = logits_of("normal", len(WAYS), WIDTH + gap).to(device)
    storage[:, WIDTH:] = NAN
    logits = storage[:, :WIDTH]
    expected = reference(logits, WAYS, fenced).tolist()
    assert run(logits, WAYS, fenced).tolist() == expected
    k = torch.arange(2, 2 + len(WAYS), dtype=torch.int32, device=device)
    masked = module.mask_top_k_top_p_reference(logits, k, None)
    module.mask_top_k_top_p(logits, k, None, scratch_for(*logits.shape, device))
    assert torch.equal(logits, masked)
    assert storage[:, WIDTH:].isnan().all(), "wrote between rows"


def test_a_row_that_is_repeated(device, fenced):
    """Stride 0: one row of logits, drawn from with several seeds."""
    logits = logits_of("normal", 1, WIDTH).to(device).expand(6, WIDTH)
    batch = [Filtered(1.5, seed, top_k=30, top_p=0.9) for seed in range(6)]
    tokens = run(logits, batch, fenced)
    assert tokens.tolist() == reference(logits, batch, fenced).tolist()
    assert len({*tokens.tolist()}) > 2


def test_a_row_never_sees_its_neighbour(device, fenced):
    """Alone and among rows that are all larger, a row has the same token."""
    logits = logits_of("normal", len(WAYS), WIDTH, 9).to(device)
    together = run(logits, WAYS, fenced).tolist()
    crowd = logits.repeat_interleave(2, dim=0)
    crowd[1::2] = 1e6
    seats = torch.arange(2 * len(WAYS)) // 2
    crowded = run(crowd, WAYS, fenced, seats=seats, positions=seats * 5 + 3)
    assert crowded.tolist()[::2] == together
    for row in (0, 2, 4):
        seat = torch.tensor([row])
        alone = run(
            *(logits[row : row + 1], WAYS, fenced), seats=seat, positions=seat * 5 + 3
        )
        assert alone.tolist() == together[row : row + 1]


def test_rows_of_no_request_are_left_alone(device, fenced):
    batch = [Filtered(1.0, 3, top_k=5), Filtered(1.0, 4, top_p=0.5)]
    logits = logits_of("normal", 6, WIDTH).to(device)
    seats = torch.tensor([1, -1, 0, -7, 2**30, 2**30], dtype=torch.int32)
    tokens = run(logits, batch, fenced, seats=seats, rows=4)
    expected = reference(logits[:4], batch, fenced, seats=seats[:4])
    assert tokens[[0, 2]].tolist() == expected[[0, 2]].tolist()
    assert tokens[[1, 3, 4, 5]].tolist() == [-77] * 4


@pytest.mark.parametrize("rows", [0, 1, 40])
def test_batches(rows, device, fenced):
    logits = logits_of("normal", rows, 72).bfloat16().to(device)
    seats = torch.arange(rows) % 4
    tokens = run(logits, WAYS, fenced, seats=seats)
    expected = reference(logits, WAYS, fenced, seats=seats)
    assert tokens.tolist() == expected.tolist()


def test_rows_beyond_two_to_the_31(device, fenced):
    """The memory between the rows is reserved, and only what is touched exists."""
    stride = 2**30 + 24
    storage = torch.empty(3 * stride, dtype=torch.bfloat16, device=device)
    logits = storage.as_strided((3, 100), (stride, 1))
    logits.copy_(logits_of("normal", 3, 100))
    tokens = run(logits, WAYS[:3], fenced)
    assert tokens.tolist() == reference(logits, WAYS[:3], fenced).tolist()


def test_seats_beyond_two_to_the_31(device, fenced):
    """Counts of many seats: the last one's are beyond 32 bits of offset."""
    batch = [
        Filtered(0.9, s, top_k=9, output=[s, 5], frequency_penalty=1.0)
        for s in range(3)
    ]
    logits = logits_of("nearly flat", 1, 100).to(device)
    logits[0, [2, 5]] += 2.0
    seats = torch.tensor([2], dtype=torch.int32)
    x, number, requests, *rest = arguments(logits, batch, seats=seats)
    stride = 2**30 + 24
    counts = torch.empty(3 * stride, dtype=torch.int32, device=device)
    counts = counts.as_strided((3, 100), (stride, 1))
    counts.copy_(requests.output_counts)
    requests = dataclasses.replace(requests, output_counts=counts)
    given = (x, number, requests, *rest)
    scratch = scratch_for(*logits.shape, device)
    tokens = module.sample_top_k_top_p(*given, fenced(1), scratch)
    expected = module.sample_top_k_top_p_reference(*given, fenced(1))
    assert tokens.tolist() == expected.tolist()


def test_the_same_scratch_again(device, fenced, poisoned):
    """Counters are as they were, and nothing of the launch before is used."""
    scratch = scratch_for(len(WAYS), WIDTH, device)
    for seed, rows in enumerate((len(WAYS), 3, len(WAYS))):
        kind = ("normal", "nearly flat", "ties")[seed]
        logits = logits_of(kind, rows, WIDTH, seed).to(device)
        given = arguments(logits, WAYS)
        tokens = module.sample_top_k_top_p(*given, fenced(rows), scratch)
        expected = module.sample_top_k_top_p_reference(*given, fenced(rows))
        assert tokens.tolist() == expected.tolist()


@pytest.mark.parametrize(
    "asked", [{"top_k": 6, "top_p": 0.9}, {"top_p": 0.8}], ids=["k and p", "p"]
)
def test_follows_the_distribution(asked, device, fenced):
    """False alarms: one in a million for each."""
    request = Filtered(2.5, 12, **asked)
    logits = logits_of("normal", 1, 9, 4)
    y = logits[0] / request.temperature
    kept = module.kept_reference(y, request.top_k or 9, request.top_p)
    assert 2 < kept.sum() < 9
    probabilities = y.double().masked_fill(~kept, -INF).softmax(0)
    draws = 120
    tokens = run(
        *(logits.to(device).expand(draws, 9), [request], fenced),
        seats=torch.zeros(draws, dtype=torch.int32),
        positions=torch.arange(draws),
        programs=draws,
    )
    counts = torch.bincount(tokens.cpu(), minlength=9)
    assert_drawn_from(counts.tolist(), probabilities.tolist())


def test_greedy_requests_have_no_filters():
    row = module.pack(top_k=5, top_p=0.5)
    plain = module.pack()
    assert row[0] == plain[0] == 0


def test_refuses_what_does_not_fit(device, fenced):
    scratch = scratch_for(2, 72, device)
    given = arguments(torch.zeros(2, 72, device=device), WAYS)
    for logits, says in {
        torch.zeros(2, 72, dtype=torch.int32, device=device): "torch.int32",
        torch.zeros(72, 2, device=device).t(): r"strides \(1, 2\)",
        torch.zeros(3, 72, device=device): r"\[3, 72\]",
        torch.zeros(2, 73, device=device): r"\[2, 73\]",
    }.items():
        with pytest.raises(ValueError, match=says):
            module.sample_top_k_top_p(logits, *given[1:], fenced(2), scratch)
    half = torch.zeros(2, 72, dtype=torch.bfloat16, device=device)
    with pytest.raises(ValueError, match="float32"):
        module.mask_top_k_top_p(half, scratch.no_k, None, scratch)
    with pytest.raises(ValueError, match="has 16777217 tokens"):
        module.make_scratch(1, 2**24 + 1, device)
    requests = dataclasses.replace(given[2], listed_bits=torch.zeros(9, 7))
    with pytest.raises(ValueError, match="stride"):
        module.sample_top_k_top_p(
            *(given[0], given[1], requests), *given[3:], fenced(2), scratch
        )


def test_what_was_drawn_counts_in_the_next_step(device, fenced):
    """By every way through the kernel, and with bits that have no count."""
    penalties = {"repetition_penalty": 1.5, "presence_penalty": 6.0}
    batch = [dataclasses.replace(request, **penalties) for request in WAYS]
    logits = logits_of("normal", len(batch) + 1, WIDTH, 6).to(device)
    batch.append(Filtered(1.0, 9, top_k=3, **penalties))  # nothing is left
    logits[-1] = -INF
    _, number, requests, seats, positions, each = arguments(logits, batch)
    requests.output_bits[2:4] = -1
    scratch = scratch_for(*logits.shape, device)
    for step in range(3):
        given = (logits, number, requests, seats, positions + step, each)
        plain = module.sample_top_k_top_p_reference(*given, fenced(len(batch)))
        tokens = module.sample_top_k_top_p(*given, fenced(len(batch)), scratch)
        assert tokens.tolist() == plain.tolist()
        bits = requests.output_bits[each, tokens // 32] >> tokens % 32
        assert (bits & 1).all()
        requests.output_counts[each, tokens] += 1
