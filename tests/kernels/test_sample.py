"""``sample`` against its reference and against vLLM's own functions: equal tokens."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from closeness import assert_drawn_from
from sampling_batch import (
    INF,
    KINDS,
    TILE,
    WIDTH,
    Request,
    every_kind,
    logits_of,
    ours,
    reference,
    run,
    stock_tokens,
)

from vllm_ext.kernels import sample as module

EDGES = [1, 7, 8, 17, TILE - 1, TILE, TILE + 1, 3 * TILE - 8, 5 * TILE + 9]
NAN = float("nan")


def stock_of(stock, logits, batch):
    each = torch.arange(len(logits), device=logits.device)
    return stock_tokens(stock, logits, batch, each, each * 5 + 3)


DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@pytest.mark.parametrize("kind", KINDS)
def test_draws_what_stock_draws(kind, device, fenced, stock, poisoned):
    """Every kind of request in one launch, and what the reference says too."""
    batch = every_kind(WIDTH)
    dtype = [*DTYPES][KINDS.index(kind) % 3]
    if kind in ("denormal", "largest"):
        dtype = torch.float32  # the others round them to 0 and infinity
    logits = logits_of(kind, len(batch), WIDTH).to(dtype).to(device)
    tokens = run(logits, batch, fenced)
    assert tokens.tolist() == stock_of(stock, logits, batch).tolist()
    assert tokens.tolist() == reference(logits, batch, fenced).tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPES.values())
@pytest.mark.parametrize("vocab_size", EDGES)
def test_at_the_edges_of_tiles(vocab_size, dtype, device, fenced):
    batch = every_kind(vocab_size)
    logits = logits_of("normal", len(batch), vocab_size, vocab_size).to(dtype)
    logits = logits.to(device)
    expected = reference(logits, batch, fenced)
    assert run(logits, batch, fenced).tolist() == expected.tolist()


@pytest.mark.parametrize("temperature", [1e-42, 1e-4, 0.01, 100.0, 1e4, 3e38])
@pytest.mark.parametrize("kind", ["normal", "large", "denormal", "infinite"])
def test_at_any_temperature(temperature, kind, device, fenced, stock):
    batch = [
        Request(temperature=temperature, seed=seed, min_p=min_p)
        for seed, min_p in enumerate((0.0, 0.0, 1e-5, 0.5))
    ]
    logits = logits_of(kind, len(batch), WIDTH, 3).to(device)
    tokens = run(logits, batch, fenced, programs=1)
    assert tokens.tolist() == stock_of(stock, logits, batch).tolist()


@pytest.mark.parametrize("programs", [1, 40, 10_000])
def test_however_a_row_is_split(programs, device, fenced):
    batch = every_kind(WIDTH)
    logits = logits_of("normal", len(batch), WIDTH, 5).bfloat16().to(device)
    tokens = run(logits, batch, fenced, programs=programs)
    assert tokens.tolist() == reference(logits, batch, fenced).tolist()


@pytest.mark.parametrize("kind", ["normal", "one stands out", "nearly flat"])
def test_what_is_skipped_could_not_have_won(kind, device, fenced):
    """Long rows for one program: most of a row is skipped by bounds."""
    min_p = (0.0, 0.0, 0.0, 0.02, 0.3, 0.9)
    batch = [Request(0.8, seed, min_p=p) for seed, p in enumerate(min_p)]
    logits = logits_of(kind, len(batch), 40 * TILE).to(device)
    tokens = run(logits, batch, fenced, programs=1)
    assert tokens.tolist() == reference(logits, batch, fenced).tolist()


def test_a_winner_from_the_far_tail(device, fenced):
    """Noise of 19.6 lifts a token that is 19.6 below the best so far, just enough.

    Among 10**8 draws this is the largest; no random row would have it decide.
    """
    token, position = 434, 34000
    noise = module.gumbel_reference(0, position, torch.tensor([0, token]))
    assert noise[1] > 19.57
    logits = torch.full((2, 10 * TILE), -50.0)
    logits[:, 0] = 30.0
    logits[0, token] = 30.0 + noise[0] - noise[1] + 0.001
    logits[1, token] = 30.0 + noise[0] - noise[1] - 0.001
    tokens = run(
        *(logits.to(device), [Request(1.0, 0)], fenced),
        seats=torch.zeros(2, dtype=torch.int32),
        positions=torch.tensor([position] * 2),
        programs=1,
    )
    assert tokens.tolist() == [token, 0]


def test_the_tile_that_serving_uses(device, fenced, stock):
    """And vocabularies that cross its edges."""
    for vocab_size in (1024, 1025, 3079):
        batch = every_kind(vocab_size)
        logits = logits_of("normal", len(batch), vocab_size).bfloat16().to(device)
        tokens = run(logits, batch, fenced, tile=module.TILE)
        assert tokens.tolist() == stock_of(stock, logits, batch).tolist()


def test_noise_is_stocks(device, stock):
    """Of seeds and positions with every bit, the same bits."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.arange(2000)
    for _ in range(4):
        seed, position = torch.randint(-(2**63), 2**63 - 1, (2,), generator=generator)
        mine = module.gumbel_reference(int(seed), int(position), tokens)
        drawn = stock.gumbel_sample(
            torch.zeros(1, 2000, device=device),
            torch.zeros(1, dtype=torch.int32, device=device),
            torch.ones(1, device=device),
            seed.view(1).to(device),
            position.view(1).to(device),
            apply_temperature=False,
            is_drafting=False,
        )
        assert int(drawn) == int(mine.argmax())


@pytest.mark.parametrize("request_kind", [{}, {"temperature": 0.9, "min_p": 0.01}])
@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
def test_nan_never_wins(request_kind, device, fenced):
    logits = logits_of("normal", 4, WIDTH).to(device)
    logits[0, ::3] = NAN
    logits[1] = NAN
    logits[2] = NAN
    logits[2, 200] = -5.0
    logits[3, :TILE] = NAN
    batch = [Request(seed=seed, **request_kind) for seed in range(4)]
    tokens = run(logits, batch, fenced)
    assert tokens.tolist() == reference(logits, batch, fenced).tolist()
    assert tokens[1] == 0
    assert tokens[2] == 200


def test_equal_scores_go_to_the_lowest_token(device, fenced):
    """Within a tile, between tiles and programs, and between list and tile."""
    logits = torch.zeros(4, WIDTH, device=device)
    logits[0, [70, 90, 300]] = 2.0
    logits[1, [5, 300]] = INF
    logits[2, 250] = 2.0
    logits[3, 250] = 2.0
    batch = [
        *(Request(), Request(temperature=1.0)),
        *(Request(logit_bias={100: 2.0}), Request(logit_bias={300: 2.0})),
    ]
    for programs in (1, 1000):
        tokens = run(logits, batch, fenced, programs=programs)
        assert tokens.tolist() == [70, 5, 100, 250]


@pytest.mark.parametrize("gap", [0, 1, 8, 700])
def test_rows_at_any_stride(gap, device, fenced):
    batch = every_kind(WIDTH)
    storage = logits_of("normal", len(batch), WIDTH + gap).bfloat16().to(device)
    storage[:, WIDTH:] = NAN
    logits = storage[:, :WIDTH]
    expected = reference(logits, batch, fenced).tolist()
    assert run(logits, batch, fenced).tolist() == expected


def test_a_row_that_is_repeated(device, fenced):
    """Stride 0: one row of logits, drawn from with several seeds."""
    logits = logits_of("normal", 1, WIDTH).to(device).expand(8, WIDTH)
    batch = [Request(1.0, seed) for seed in range(8)]
    tokens = run(logits, batch, fenced)
    assert tokens.tolist() == reference(logits, batch, fenced).tolist()
    assert len({*tokens.tolist()}) > 2


def test_a_row_never_sees_its_neighbour(device, fenced):
    """Alone and between rows that are all larger, a row has the same token."""
    kinds = every_kind(WIDTH)
    logits = logits_of("normal", len(kinds), WIDTH, 9).to(device)
    together = run(logits, kinds, fenced).tolist()
    crowd = logits.repeat_interleave(2, dim=0)
    crowd[1::2] = 1e6
    seats = torch.arange(2 * len(kinds)) // 2
    crowded = run(crowd, kinds, fenced, seats=seats, positions=seats * 5 + 3)
    assert crowded.tolist()[::2] == together
    for row in (0, 3, 8, 16):
        alone = run(
            *(logits[row : row + 1], kinds, fenced),
            seats=torch.tensor([row]),
            positions=torch.tensor([row * 5 + 3]),
        )
        assert alone.tolist() == together[row : row + 1]


def test_rows_of_no_request_are_left_alone(device, fenced):
    """Nothing of theirs is read; their logits, seats and tokens may be anything."""
    batch = [Request(), Request(1.0, 4)]
    logits = logits_of("normal", 6, WIDTH).to(device)
    seats = torch.tensor([1, -1, 0, -7, 2**30, 2**30], dtype=torch.int32)
    tokens = run(logits, batch, fenced, seats=seats, rows=4)
    kept = seats[:4] >= 0
    expected = reference(logits[:4], batch, fenced, seats=seats[:4])
    assert tokens[:4].cpu()[kept].tolist() == expected.cpu()[kept].tolist()
    assert tokens[[1, 3, 4, 5]].tolist() == [-77] * 4


@pytest.mark.parametrize("rows", [0, 1, 255])
def test_batches(rows, device, fenced):
    kinds = every_kind(40)
    logits = logits_of("normal", rows, 40).bfloat16().to(device)
    seats = torch.arange(rows) % len(kinds)
    tokens = run(logits, kinds, fenced, seats=seats)
    expected = reference(logits, kinds, fenced, seats=seats)
    assert tokens.tolist() == expected.tolist()


def test_rows_beyond_two_to_the_31(device, fenced):
    """Rows so far apart that offsets of 32 bits would wrap around.

    The memory is reserved, and only what is touched exists.
    """
    stride = 2**30 + 24
    storage = torch.empty(3 * stride, dtype=torch.bfloat16, device=device)
    logits = storage.as_strided((3, 100), (stride, 1))
    logits.copy_(logits_of("normal", 3, 100))
    batch = [Request(), Request(1.0, 4), Request(1.0, 5)]
    tokens = run(logits, batch, fenced)
    assert tokens.tolist() == reference(logits, batch, fenced).tolist()


def test_seats_beyond_two_to_the_31(device, fenced):
    """Counts of many seats: the last one's are beyond 32 bits of offset."""
    vocab_size, last = 100, 2
    batch = [Request(0.9, s, output=[s, 5], frequency_penalty=1.0) for s in range(3)]
    requests = ours(module, batch, vocab_size, device)
    stride = 2**30 + 24
    counts = torch.empty(3 * stride, dtype=torch.int32, device=device)
    counts = counts.as_strided((3, vocab_size), (stride, 1))
    counts.copy_(requests.output_counts)
    requests = dataclasses.replace(requests, output_counts=counts)
    logits = logits_of("nearly flat", 1, vocab_size).to(device)
    one = torch.ones(1, dtype=torch.int32, device=device)
    arguments = (logits, one, requests, one * last, one.long(), one.long() * 0)
    scratch = module.make_scratch(1, vocab_size, device, tile=TILE)
    tokens = module.sample(*arguments, fenced(1), scratch)
    assert tokens.tolist() == module.sample_reference(*arguments, fenced(1)).tolist()


def test_the_same_scratch_again(device, fenced, poisoned):
    """Counters are as they were, and nothing of the launch before is used."""
    scratch = module.make_scratch(18, WIDTH, device, tile=TILE, programs=50)
    each = torch.arange(18, device=device)
    batch = every_kind(WIDTH)
    requests = ours(module, batch, WIDTH, device)
    for seed, rows in enumerate((18, 5, 18, 1)):
        logits = logits_of("normal", rows, WIDTH, seed).to(device)
        number = torch.tensor([rows], dtype=torch.int32, device=device)
        arguments = (logits, number, requests, each[:rows], each, each[:rows])
        tokens = module.sample(*arguments, fenced(rows), scratch)
        expected = module.sample_reference(*arguments, fenced(rows))
        assert tokens.tolist() == expected.tolist()
        assert not scratch.arrived.any()


def test_follows_the_distribution(device, fenced):
    """False alarms: one in a million."""
    request = Request(1.3, 12, min_p=0.1, logit_bias={3: 1.0, 5: 2.0})
    logits = logits_of("normal", 1, 9, 4)
    exact = logits[0].double()
    for token, bias in request.logit_bias.items():
        exact[token] += bias
    probabilities = (exact / request.temperature).softmax(0)
    probabilities[probabilities < request.min_p * probabilities.max()] = 0
    probabilities /= probabilities.sum()
    draws = 300
    tokens = run(
        *(logits.to(device).expand(draws, 9), [request], fenced),
        seats=torch.zeros(draws, dtype=torch.int32),
        positions=torch.arange(draws),
        programs=draws,
    )
    counts = torch.bincount(tokens.cpu(), minlength=9)
    assert_drawn_from(counts.tolist(), probabilities.tolist())


def test_the_noise_follows_its_distribution():
    """Two million draws, its far tail among them; false alarms: one in a million."""
    positions = torch.arange(1000)[:, None]
    noise = module.gumbel_reference(7, positions, torch.arange(2000)).double()
    edges = torch.tensor([-INF, -2, -1, 0, 1, 2, 4, 6, 8, 10, 11, INF]).double()
    counts = torch.histogram(noise.view(-1), edges[1:-1])[0]
    below, above = (noise < edges[1]).sum(), (noise >= edges[-2]).sum()
    below_edges = torch.exp(-torch.exp(-edges))
    assert_drawn_from(
        [int(below), *map(int, counts), int(above)], below_edges.diff().tolist()
    )


def test_draws_do_not_depend_on_each_other():
    """Winners at neighbouring positions, and with neighbouring seeds, are pairs of
    independent draws; false alarms: one in a million for each."""
    tokens, positions = torch.arange(5), torch.arange(50_000)[:, None]
    one = module.gumbel_reference(3, positions, tokens).argmax(1)
    other = module.gumbel_reference(4, positions, tokens).argmax(1)
    for pairs in (one[:-1] * 5 + one[1:], one * 5 + other):
        counts = torch.bincount(pairs, minlength=25).tolist()
        assert_drawn_from(counts, [1 / 25] * 25)


def test_what_was_drawn_counts_in_the_next_step(device, fenced):
    """Somebody keeps the counts; that they are worth reading is known by the draw."""
    batch = [
        Request(repetition_penalty=3.0, output=[5]),
        Request(1.0, 3, presence_penalty=2.0, frequency_penalty=1.0),
        Request(logit_bias={9: 30.0, 10: 29.0}, frequency_penalty=0.7),
        Request(allowed_token_ids=[3, 5, WIDTH - 1], presence_penalty=40.0),
        Request(),
    ]
    requests = ours(module, batch, WIDTH, device)
    each = torch.arange(len(batch), device=device)
    number = torch.tensor([len(batch)], dtype=torch.int32, device=device)
    logits = logits_of("normal", len(batch), WIDTH, 6).to(device)
    logits[:3, [WIDTH - 1, 31, 32]] += 9.0
    scratch = module.make_scratch(len(batch), WIDTH, device, tile=TILE, programs=20)
    drawn = []
    for step in range(4):
        given = (logits, number, requests, each, each * 5 + step, each)
        expected = module.sample_reference(*given, fenced(len(batch)))
        tokens = module.sample(*given, fenced(len(batch)), scratch)
        assert tokens.tolist() == expected.tolist()
        drawn.append(tokens.tolist())
        requests.output_counts[each, tokens] += 1
    assert len({tokens[0] for tokens in drawn}) == 4
    assert requests.output_bits[4].eq(0).all()
    assert len({tokens[3] for tokens in drawn[:3]}) == 3


def test_a_bit_without_a_count_is_no_token(device, fenced):
    """Of the likeliest token, which a penalty would keep from being drawn."""
    batch = [Request(repetition_penalty=10.0)] * 2
    requests = ours(module, batch, WIDTH, device)
    each = torch.arange(2, device=device)
    logits = logits_of("normal", 2, WIDTH, 8).to(device)
    likeliest = logits.argmax(1)
    requests.output_bits[each, likeliest // 32] = -1
    scratch = module.make_scratch(2, WIDTH, device, tile=TILE)
    number = torch.tensor([2], dtype=torch.int32, device=device)
    tokens = module.sample(
        *(logits, number, requests, each, each, each, fenced(2), scratch)
    )
    assert tokens.tolist() == likeliest.tolist()


def test_refuses_what_does_not_fit(device, fenced):
    batch = [Request()] * 2
    for logits, says in {
        torch.zeros(2, 40, dtype=torch.int32, device=device): "torch.int32",
        torch.zeros(40, 2, device=device).t(): "strides (1, 2)",
    }.items():
        with pytest.raises(ValueError, match="logits must be") as refused:
            run(logits, batch, fenced)
        assert says in str(refused.value)
    scratch = module.make_scratch(1, 50, device)
    requests = ours(module, batch, 40, device)
    each = torch.arange(2, device=device)
    logits = torch.zeros(2, 40, device=device)
    arguments = (logits, each[:1], requests, each, each, each, fenced(2))
    with pytest.raises(ValueError, match=r"the scratch is for \[<= 1, 50\]"):
        module.sample(*arguments, scratch)
    odd = dataclasses.replace(
        requests, listed_bits=torch.zeros(2, 9, dtype=torch.int32, device=device)
    )
    with pytest.raises(ValueError, match="differ in their stride"):
        module.sample(
            *(logits, each[:1], odd, each, each, each, fenced(2)),
            module.make_scratch(2, 40, device),
        )
