"""``prep`` and ``post`` against their definitions and vLLM's kernels, bit for bit."""

from __future__ import annotations

import importlib
import random

import numpy as np
import pytest
import torch
from decode_steps import (
    CANARY,
    GROUPS,
    LENGTH,
    ONE,
    SEATS,
    THREE,
    WINDOW,
    Group,
    V,
    World,
    assert_nothing_beyond,
    assert_same_inputs,
    assert_same_state,
    far_step,
    kept,
    stock_modules,
)

from vllm_ext.kernels import decode_inputs as module
from vllm_ext.kernels.decode_inputs import HEADER, pack, words

INTERPRETED = not torch.cuda.is_available()
SIZES = [(1, 0), (1, 1), (2, 1), (4, 4), (8, 5), (16, 16), (16, 3), (16, 0)]


@pytest.fixture(scope="module", params=["installed", "newest"])
def decoding(request):
    """Kernels and state of Model Runner V2; the newest's without an installation."""
    with pytest.MonkeyPatch.context() as patch:
        if INTERPRETED:
            patch.setenv("TRITON_INTERPRET", "1")
        if request.param == "installed":
            return stock_modules()
        try:
            overlay = importlib.import_module("vllm_ext_cpulane.overlay")
            return stock_modules(overlay.make_overlay(overlay.newest_wheel()))
        except (FileNotFoundError, ImportError) as error:
            if INTERPRETED:
                raise
            pytest.skip(f"not run: {error}")


def worlds(decoding, groups, device, lengths, number=2):
    """Worlds in which the seats have requests of these lengths."""
    made = [World(decoding, groups, device) for _ in range(number)]
    for seat, length in lengths.items():
        blocks = range(1000 * seat + 1, 1000 * (seat + 1))
        for world in made:
            world.join(seat, length, (7 * seat + length) % V, blocks)
    return made


def at_boundaries(groups, rows):
    """Lengths on either side of what matters, for as many seats in no order."""
    edges = {1, LENGTH - 2}
    for group in groups:
        size, reach = group.block_size, group.reach
        edges |= {size - 1, size, size + 1, 3 * size}
        if reach:
            edges |= {reach - 1, reach, reach + size - 1, reach + size, 100}
    seats = random.Random(rows).sample(range(SEATS), rows)
    order = sorted(edges)
    return {seat: order[(5 * n) % len(order)] for n, seat in enumerate(seats)}


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize(("padded", "rows"), SIZES)
def test_a_step_is_stocks(padded, rows, groups, decoding, device):
    lengths = at_boundaries(groups, rows)
    seats = list(lengths)
    theirs, ours, plain = worlds(decoding, groups, device, lengths, 3)
    appended = ours.appended(seats, 40_000)
    before = kept(ours)
    theirs.prepare_by_stock(seats, padded, appended)
    tokens = torch.arange(padded, device=device) * 31 % V
    for world, prep in ((ours, module.prep), (plain, module.prep_reference)):
        world.prepare(world.staging(seats, padded, appended), padded, prep)
        assert_same_inputs(world, theirs, seats, padded)
        assert_same_state(world, theirs)
        assert_nothing_beyond(world, before, rows, padded)
    theirs.account_by_stock(seats, tokens)
    for world, post in ((ours, module.post), (plain, module.post_reference)):
        world.account(world.staging(seats, padded, [], 1), padded, tokens, post)
        assert_same_state(world, theirs)
        assert world.ring[1, :rows].tolist() == tokens[:rows].tolist()
        assert (world.ring[1, rows:] == CANARY).all()
        assert (world.ring[[0, 2]] == CANARY).all()


@pytest.mark.parametrize(
    ("groups", "by_turns"),
    [(ONE, False), (THREE, True)],
    ids=["one group", "three groups, by turns"],
)
def test_a_workload_is_stocks(groups, by_turns, decoding, device):
    """Requests come and go, and seats are used again; some steps may be stock's."""
    chance = random.Random(len(groups))
    theirs, ours = worlds(decoding, groups, device, {})
    running, number = [], 1
    steps = {"appends": 0, "reused": 0, "padded": 0}
    used = set()
    for step in range(30):
        for seat in [s for s in running if chance.random() < 0.1]:
            running.remove(seat)
        for _ in range(chance.choice([0, 0, 1, 3])):
            free = [s for s in range(SEATS) if s not in running]
            if len(running) < 8 and free:
                seat = free[0]
                steps["reused"] += seat in used
                used.add(seat)
                length = chance.choice([1, 15, 16, 17, chance.randrange(1, 140)])
                token, blocks = chance.randrange(V), range(number, number + 999)
                for world in (theirs, ours):
                    world.join(seat, length, token, blocks)
                running.append(seat)
                number += 1000
        chance.shuffle(running)
        seats = list(running)
        padded = next(p for p in (1, 2, 4, 8) if p >= len(seats))
        appended = theirs.appended(seats, number)
        number += 1000
        steps["appends"] += len(appended)
        steps["padded"] += len(seats) < padded
        tokens = torch.tensor([chance.randrange(V) for _ in range(8)], device=device)
        theirs.prepare_by_stock(seats, padded, appended)
        theirs.account_by_stock(seats, tokens)
        if by_turns and step % 3 == 0:
            ours.prepare_by_stock(seats, padded, appended)
            assert_same_inputs(ours, theirs, seats, padded)
            ours.account_by_stock(seats, tokens)
        else:
            staging = ours.staging(seats, padded, appended, step % 3)
            ours.prepare(staging, padded, module.prep)
            assert_same_inputs(ours, theirs, seats, padded)
            ours.account(staging, padded, tokens, module.post)
            assert ours.ring[step % 3, : len(seats)].tolist() == (
                tokens[: len(seats)].tolist()
            )
        assert_same_state(ours, theirs)
    assert min(steps.values()) >= 10


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_rows_of_no_request_touch_no_state(groups, decoding, device):
    """Those behind the last, and those that have no seat, wherever they are."""
    ours, plain = worlds(decoding, groups, device, {4: 31, 0: 47, 9: 16})
    seats = [4, -1, 0, -1, 9]
    appended = ours.appended([4, 4, 0, 0, 9], 40_000)
    appended = [each for each in appended if seats[each[0]] >= 0]
    before = {name: tensor.clone() for name, tensor in ours.state().items()}
    staging = ours.staging(seats, 8, appended, 2)
    tokens = torch.full((8,), 2**40, device=device)  # of padding: nothing is there
    tokens[[0, 2, 4]] = torch.tensor([3, 69, 32], device=device)
    for world, prep, post in (
        (ours, module.prep, module.post),
        (plain, module.prep_reference, module.post_reference),
    ):
        world.prepare(staging, 8, prep)
        world.account(staging, 8, tokens, post)
    for name, tensor in ours.state().items():
        assert torch.equal(tensor, plain.state()[name]), name
        others = [seat for seat in range(SEATS) if seat not in seats]
        assert torch.equal(tensor[others], before[name][others]), name
    for name, tensor in kept(ours).items():
        assert torch.equal(tensor, kept(plain)[name]), name
    assert ours.buffers.seq_lens[:8].tolist() == [32, 0, 48, 0, 17, 0, 0, 0]
    assert ours.buffers.query_start_loc[:9].tolist() == [0, 1, 2, 3, 4, 5, 5, 5, 5]
    assert ours.buffers.is_padding[:8].tolist() == [
        i not in (0, 2, 4) for i in range(8)
    ]
    assert ours.ring[2].tolist()[:8] == [
        *(3, CANARY, 69, CANARY, 32),
        *[CANARY] * 3,
    ]


@pytest.mark.parametrize("block", [2, 4, 16])
@pytest.mark.parametrize("groups", [ONE, WINDOW], ids=["one group", "a window"])
def test_tables_are_longer_than_what_is_looked_at_together(
    groups, block, decoding, device, monkeypatch
):
    monkeypatch.setattr(module, "BLOCK", block)
    lengths = {seat: 8 * seat + 15 for seat in range(0, SEATS, 2)}
    theirs, ours = worlds(decoding, groups, device, lengths)
    appended = ours.appended(list(lengths), 40_000)
    theirs.prepare_by_stock(list(lengths), 16, appended)
    ours.prepare(ours.staging(list(lengths), 16, appended), 16, module.prep)
    assert_same_inputs(ours, theirs, list(lengths), 16)
    assert_same_state(ours, theirs)


def test_a_block_that_is_given_is_the_one_that_is_used(decoding, device):
    """Whatever the table said of its column before."""
    [ours] = worlds(decoding, ONE, device, {2: 32}, 1)
    ours.given.block_tables[0][2, 2] = 999_999
    ours.prepare(ours.staging([2], 1, [(0, 0, 2, 77)]), 1, module.prep)
    assert ours.given.block_tables[0][2, :4].tolist() == [2001, 2002, 77, 0]
    assert ours.tables.input_block_tables[0][0, :4].tolist() == [2001, 2002, 77, CANARY]
    assert int(ours.tables.slot_mappings[0, 0]) == 77 * 16


def test_a_block_for_later_waits_in_the_table(decoding, device):
    [ours] = worlds(decoding, ONE, device, {2: 20}, 1)
    ours.prepare(ours.staging([2], 1, [(0, 0, 2, 77)]), 1, module.prep)
    assert ours.given.block_tables[0][2, :4].tolist() == [2001, 2002, 77, 0]
    assert ours.tables.input_block_tables[0][0, 2] == CANARY
    assert int(ours.tables.slot_mappings[0, 0]) == 2002 * 16 + 4


def test_slots_beyond_32_bits(decoding, device):
    """Where vLLM's product of two int32 would overflow."""
    [ours] = worlds(decoding, ONE, device, {2: 20}, 1)
    ours.given.block_tables[0][2, 1] = 2**31 - 1
    ours.prepare(ours.staging([2], 1, []), 1, module.prep)
    assert int(ours.tables.slot_mappings[0, 0]) == (2**31 - 1) * 16 + 4


def test_rows_that_are_gigabytes_apart(device):
    if device.type != "cpu":
        pytest.skip("not run: memory of a GPU is not only reserved")
    far_step(module)


def test_what_is_optional_may_be_left_out(decoding, device):
    theirs, ours = worlds(decoding, ONE, device, {2: 20, 7: 31})
    staging = ours.staging([7, 2], 4, [])
    states, buffers = ours.states, ours.buffers
    module.prep(
        *(staging, 4, states.num_computed_tokens.gpu, states.last_sampled_tokens),
        *(ours.given, buffers.input_ids, buffers.positions, buffers.seq_lens),
        buffers.query_start_loc,
    )
    buffers.is_padding[:2] = False
    theirs.prepare_by_stock([7, 2], 4, [])
    assert_same_inputs(ours, theirs, [7, 2], 4)
    tokens = torch.tensor([6, 66, 5, 5], device=device)
    module.post(
        *(staging, 4, tokens, ours.ring, states.last_sampled_tokens),
        *(states.all_token_ids.gpu, states.total_len.gpu),
        states.num_computed_tokens.gpu,
    )
    theirs.account_by_stock([7, 2], tokens)
    ours.counts.copy_(theirs.counts)
    assert_same_state(ours, theirs)


# -- staging ---------------------------------------------------------------------------


def test_a_step_is_packed_over_what_was_there():
    staging = np.full(40, 9, np.int32)
    size = pack(staging, 4, 2, [7, 3], 5, [(1, 0, 11, 111), (1, 1, 12, 112)])
    assert size == words(4, 2) == 28
    assert staging[:HEADER].tolist() == [2, 5, 0, 0, 0, 0, 0, 0]
    seats, *columns = staging[HEADER:20].reshape(3, 4).tolist()
    assert seats == [7, 3, -1, -1]
    assert columns == [[-1, 11, -1, -1], [-1, 12, -1, -1]]
    assert staging[[21, 25]].tolist() == [111, 112]
    assert (staging[28:] == 9).all()
    pack(staging, 4, 2, np.array([1]))
    assert staging[HEADER:20].tolist() == [1, *[-1] * 11]


def test_its_rows_and_seats_are_views():
    staging = torch.arange(40, dtype=torch.int32)
    assert module.num_rows(staging).tolist() == [0]
    assert module.seats(staging, 4).tolist() == [8, 9, 10, 11]
    assert module.seats(staging, 4).data_ptr() == staging[HEADER:].data_ptr()


def test_more_requests_than_rows_are_refused():
    with pytest.raises(ValueError, match="3 requests do not fit into 2 rows"):
        pack(np.zeros(40, np.int32), 2, 1, [1, 2, 3])


# -- what does not fit -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"block_sizes": [16]}, "2 block tables with 2 input tables, 1 block sizes"),
        ({"reaches": [0]}, "1 reaches"),
        ({"slots": torch.zeros(1, 8)}, "1 slot mappings"),
        ({"tables": [torch.zeros(2, 4)] * 2}, "must be int32 and contiguous"),
        ({"tables": [torch.zeros(4, 2).int().T] * 2}, r"strides \(1, 2\)"),
        (
            {"tables": [torch.zeros(2, 5).int()] * 2},
            "of 5 columns has an input table",
        ),
        ({"block_sizes": [16, 0]}, "block size 0"),
        ({"reaches": [0, -1]}, "reach -1"),
    ],
)
def test_groups_that_do_not_fit_are_refused(wrong, said):
    table = torch.zeros(2, 4, dtype=torch.int32)
    given = {
        **{"tables": [table] * 2, "slots": torch.zeros(2, 8), "block_sizes": [16, 8]},
        **{"reaches": None, **wrong},
    }
    with pytest.raises(ValueError, match=said):
        module.make_groups(
            *(given["tables"], [table] * 2, given["slots"], given["block_sizes"]),
            given["reaches"],
        )


def arguments(kernel, device):
    """Valid ones, by name."""
    short = torch.zeros(8, dtype=torch.int32, device=device)
    long, plane = short.long(), short.view(4, 2)
    groups = module.make_groups([plane], [plane], long.view(1, 8), [16])
    staging = torch.zeros(words(4, 1), dtype=torch.int32, device=device)
    common = {"staging": staging, "padded": 4, "num_computed_tokens": short}
    common["last_sampled_tokens"] = long.view(8, 1)
    if kernel == "prep":
        return {
            **{**common, "groups": groups, "input_ids": short, "positions": long},
            **{"seq_lens": short, "query_start_loc": short},
            "is_padding": short.bool(),
        }
    return {
        **{**common, "tokens": long, "ring": short.view(2, 4), "total_len": short},
        **{"all_token_ids": plane, "output_bin_counts": plane},
    }


@pytest.mark.parametrize("kernel", ["prep", "post"])
def test_what_does_not_fit_is_refused(kernel, device):
    """Each tensor of another type, with gaps, and too short, where it can be."""
    launch, given = getattr(module, kernel), arguments(kernel, device)
    launch(**given)
    seen = 0
    for name, tensor in given.items():
        if not isinstance(tensor, torch.Tensor):
            continue
        spoilt = [tensor.to(torch.float32), tensor.repeat(1, 2)[:, ::2].squeeze()]
        if name in ("staging", "input_ids", "positions", "tokens", "query_start_loc"):
            spoilt.append(tensor[:4] if name != "staging" else tensor[:11])
            spoilt[-1] = spoilt[-1][:3] if name != "query_start_loc" else spoilt[-1]
        for each in spoilt:
            with pytest.raises(ValueError, match=f"{name} must be"):
                launch(**{**given, name: each})
            seen += 1
    assert seen == {"prep": 20, "post": 18}[kernel]


def test_a_graph_larger_than_the_input_tables_is_refused():
    given = arguments("prep", "cpu")
    table = torch.zeros(3, 2, dtype=torch.int32)
    slots = torch.zeros(1, 8, dtype=torch.int64)
    given["groups"] = module.make_groups([table], [table], slots, [16])
    with pytest.raises(ValueError, match="an input table has 3 rows, the graph 4"):
        module.prep(**given)


def test_a_group_is_named_by_its_numbers(device):
    """What a kernel follows: addresses, width, block size, reach."""
    groups = [Group(16), Group(8, 21)]
    tables = [torch.zeros(3, n, dtype=torch.int32, device=device) for n in (4, 6)]
    made = module.make_groups(
        *(tables, tables[::-1][::-1], torch.zeros(2, 8, dtype=torch.int64)),
        *([group.block_size for group in groups], [group.reach for group in groups]),
    )
    assert made.layout.tolist() == [
        [tables[0].data_ptr(), tables[0].data_ptr(), 4, 16, 0],
        [tables[1].data_ptr(), tables[1].data_ptr(), 6, 8, 21],
    ]
