"""What ``prep`` and ``post`` do to memory, how much, and what they ask of the host."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from decode_steps import GROUPS, LENGTH, SEATS, THREE, World, stock_modules

from vllm_ext.kernels import decode_inputs as module
from vllm_ext.prove.sanitizer import Sanitizer
from vllm_ext.prove.trafficrun import bytes_moved
from vllm_ext_cpulane.engine import run_script
from vllm_ext_cpulane.environment import lane_environment

SCRIPT = Path(__file__).with_name("decode_inputs_script.py")
KERNELS = ("_prep_kernel", "_post_kernel")


@pytest.fixture(scope="module")
def decoding():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        return stock_modules()


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("padded", [1, 8, 24])
def test_touches_only_what_it_may_and_in_any_order(
    padded, groups, decoding, device, interpreter
):
    """Requests at the edges of their memory, and seats of padding that lead nowhere."""
    ours = World(decoding, groups, device)
    lengths = {SEATS - 1: LENGTH - 2, 0: 0, 7: 64, 3: 15}
    for seat, length in lengths.items():
        ours.join(seat, length, 69, range(1, 200))
    ours.tables.input_block_tables = [
        torch.zeros(padded, table.gpu.shape[1], dtype=torch.int32)
        for table in ours.tables.block_tables
    ]
    ours.given = module.make_groups(
        *([table.gpu for table in ours.tables.block_tables],),
        *(ours.tables.input_block_tables, ours.tables.slot_mappings[:, :padded]),
        *([group.block_size for group in groups], [group.reach for group in groups]),
    )
    for name in ("input_ids", "positions", "seq_lens", "is_padding"):
        whole = getattr(ours.buffers, name)
        setattr(ours.buffers, name, whole.new_zeros(padded))
    ours.buffers.query_start_loc = ours.buffers.query_start_loc.new_zeros(padded + 1)
    ours.ring = ours.ring[:, :padded]
    seats = list(lengths)[:padded]
    appended = ours.appended(seats, 500)
    staging = ours.staging(seats, padded, appended, 2)
    tokens = torch.tensor([0, 31, 69, 5] + [2**40] * padded)[:padded]
    with Sanitizer(ours.reachable()) as sanitizer:
        ours.prepare(staging, padded, module.prep)
        ours.account(staging, padded, tokens, module.post)
    sanitizer.check()
    for name in KERNELS:
        assert sanitizer.kernels[name].launches == 1
        programs = padded * len(groups) if name == "_prep_kernel" else padded
        assert sanitizer.kernels[name].reordered == (programs > 1)


def test_bytes_of_a_row(decoding, device, interpreter):
    """Of a request 4 for each block are read and written, and some 100 more."""
    for length in (1, 150):
        ours = World(decoding, THREE, device)
        ours.join(3, length, 5, range(1, 200))
        staging = ours.staging([3], 1, [])
        with bytes_moved() as moved:
            ours.prepare(staging, 1, module.prep)
        blocks = sum(length // group.block_size + 1 for group in THREE)
        null = sum(
            max(length - group.reach, 0) // group.block_size
            for group in THREE
            if group.reach
        )
        reads = moved["load"] - 4 * (blocks - null * ours.nulls)
        writes = moved["store"] - 4 * blocks
        assert 0 < reads <= 100 * len(THREE)
        assert 0 < writes <= 60
        with bytes_moved() as moved:
            ours.account(staging, 1, torch.tensor([5]), module.post)
        assert 0 < moved.total() <= 100


def test_padding_reads_a_few_words(decoding, device, interpreter):
    """Of the staging and the layout: nothing that belongs to anybody."""
    ours = World(decoding, THREE, device)
    staging = ours.staging([], 1, [])
    with bytes_moved() as moved:
        ours.prepare(staging, 1, module.prep)
        ours.account(staging, 1, torch.tensor([5]), module.post)
    columns = sum(table.shape[1] for table in ours.tables.input_block_tables)
    assert moved["load"] <= 32 * len(THREE) + 8
    assert moved["store"] == 4 * columns + 8 * len(THREE) + 4 + 2 * 4 + 1


@pytest.fixture(scope="module")
def on_the_pretend_device():
    return run_script(SCRIPT, lane_environment("interpret"))


def test_the_host_never_waits_and_launches_once_for_each(
    on_the_pretend_device, interpreter
):
    found = on_the_pretend_device
    assert found["waits"] == []
    assert {name: n for name, n in found["counts"].items() if n} == {"triton": 2}


def test_a_graph_replays_it_with_other_requests(on_the_pretend_device, interpreter):
    """Captured before there was any; each step is then staged in place."""
    found = on_the_pretend_device
    assert found["differences"] == []
    assert found["replays"] == [[]] * 4  # which memory is not as defined
    assert found["computed"] == [24, 0, 0, 18, 0, 6, 44]


def test_warm_launches_every_variant_of_serving(device, variants_of):
    """Whatever the batch and the groups: variants are what is left out."""
    variants = variants_of(module, *KERNELS)
    module.warm(8, 3000, device)
    warmed = variants()
    assert len(warmed) == 2 + 2
    stock = stock_modules()
    for groups in GROUPS.values():
        world = World(stock, groups, device)
        for padded in (1, 3, 8):
            staging = world.staging([], padded, [])
            world.prepare(staging, padded, module.prep)
            tokens = torch.zeros(padded, dtype=torch.int64, device=device)
            world.account(staging, padded, tokens, module.post)
    assert variants() < warmed
