"""Bugs planted in ``prep`` and ``post``, each found by a check that they pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from decode_steps import (
    CANARY,
    GROUPS,
    THREE,
    World,
    assert_nothing_beyond,
    assert_same_inputs,
    assert_same_state,
    far_step,
    kept,
    loaded,
    stock_modules,
)

from vllm_ext.kernels import decode_inputs
from vllm_ext.prove.sanitizer import KernelFault, Sanitizer

pytestmark = pytest.mark.usefixtures("interpreter")

CPU = torch.device("cpu")
LENGTHS = {7: 16, 2: 15, 11: 44, 0: 3}  # a new block, the last of one, beyond a window
SEATED = list(LENGTHS)
PADDED = 6


@pytest.fixture(scope="module")
def stock():
    from vllm_ext_cpulane.overlay import make_overlay, newest_wheel

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        return stock_modules(make_overlay(newest_wheel()))


def world(stock: Any, groups: Any = THREE) -> World:
    made = World(stock, groups, CPU)
    for seat, length in LENGTHS.items():
        made.join(seat, length, seat + 30, range(100 * seat + 1, 100 * seat + 100))
    return made


@contextmanager
def watched(world: World, reorder: int = 0) -> Iterator[None]:
    """What leaves its tensors, or races, is not done, and an error in the end."""
    with Sanitizer(world.reachable(), reorder=reorder) as sanitizer:
        yield
    sanitizer.check()


def inputs(module: Any, stock: Any) -> None:
    """What the model is given is what vLLM gives it, and nothing beyond."""
    for groups in GROUPS.values():
        theirs, ours = world(stock, groups), world(stock, groups)
        appended = ours.appended(SEATED, 5000)
        before = kept(ours)
        theirs.prepare_by_stock(SEATED, PADDED, appended)
        staging = ours.staging(SEATED, PADDED, appended)
        with watched(ours):
            ours.prepare(staging, PADDED, module.prep)
        assert_same_inputs(ours, theirs, SEATED, PADDED)
        assert_same_state(ours, theirs)
        assert_nothing_beyond(ours, before, len(SEATED), PADDED)


def blocks(module: Any, stock: Any) -> None:
    """More columns than are looked at together."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", 2)
        inputs(module, stock)


def given(module: Any, stock: Any) -> None:
    """A new block is used, whatever the table said in its place."""
    ours = world(stock)
    for table in ours.given.block_tables:
        table[7] = torch.where(table[7] == 0, 999_999, table[7])
    staging = ours.staging(SEATED, PADDED, ours.appended(SEATED, 5000))
    with watched(ours):
        ours.prepare(staging, PADDED, module.prep)
    for group, table in enumerate(ours.tables.input_block_tables):
        columns = 16 // THREE[group].block_size + 1
        assert 5000 <= table[0, columns - 1] < 5010
        assert ours.tables.slot_mappings[group, 0] >= 5000 * THREE[group].block_size
    assert (ours.given.block_tables[0][7, 2:] == 999_999).all()


def state(module: Any, stock: Any) -> None:
    """Requests are as vLLM would leave them, and so are the others."""
    theirs, ours = world(stock), world(stock)
    for number, tokens in enumerate(([9, 8, 31, 69], [9, 9, 32, 0])):
        tokens = torch.tensor([*tokens, 2**40, 2**40])
        theirs.prepare_by_stock(SEATED, PADDED, [])
        theirs.account_by_stock(SEATED, tokens)
        staging = ours.staging(SEATED, PADDED, [], number + 1)
        with watched(ours):
            ours.account(staging, PADDED, tokens, module.post)
        assert_same_state(ours, theirs)
    plain = world(stock)
    for number, tokens in enumerate(([9, 8, 31, 69], [9, 9, 32, 0])):
        plain.account(
            *(plain.staging(SEATED, PADDED, [], number + 1), PADDED),
            *(torch.tensor(tokens), decode_inputs.post_reference),
        )
    assert torch.equal(ours.ring, plain.ring)
    assert (ours.ring[0] == CANARY).all()


def no_request(module: Any, stock: Any) -> None:
    """Padding touches no state: seats that it must not look at lead nowhere."""
    seats = [7, -1, 11]
    ours, plain = world(stock), world(stock)
    staging = ours.staging(seats, PADDED, [(0, 0, 1, 77)])
    tokens = torch.arange(PADDED)
    with watched(ours):
        ours.prepare(staging, PADDED, module.prep)
        ours.account(staging, PADDED, tokens, module.post)
    plain.prepare(staging, PADDED, decode_inputs.prep_reference)
    plain.account(staging, PADDED, tokens, decode_inputs.post_reference)
    assert_same_state(ours, plain)
    assert torch.equal(ours.ring, plain.ring)
    for name, tensor in kept(ours).items():
        assert torch.equal(tensor, kept(plain)[name]), name


def far(module: Any, stock: Any) -> None:
    """Offsets beyond 2**31."""
    far_step(module)


def any_order(module: Any, stock: Any) -> None:
    """And races."""
    ours = world(stock)
    appended = ours.appended(SEATED, 5000)
    staging = ours.staging(SEATED, PADDED, appended)
    with watched(ours, reorder=9):
        ours.prepare(staging, PADDED, module.prep)
        ours.account(staging, PADDED, torch.arange(PADDED), module.post)


def packed(module: Any, stock: Any) -> None:
    """What is staged for a step is of that step."""
    import numpy as np

    staging = np.full(40, 9, np.int32)
    module.pack(staging, 4, 2, [7, 3], 2, [(1, 1, 12, 112)])
    words = [2, 2, *[0] * 6, 7, 3, -1, -1, *[-1] * 4, -1, 12, -1, -1]
    assert staging[:20].tolist() == words
    assert staging[25] == 112


Check = Callable[[Any, Any], None]
CHECKS: tuple[Check, ...] = (
    *(inputs, blocks, given, state, no_request, far, any_order, packed),
)

# What is wrong: who finds it, the line of the kernel, the line in its place.
PLANTED: dict[str, tuple[Check, str, str]] = {
    # Each buffer's store, by prep.
    "query_start_loc has no beginning": (
        *(inputs, "        if row == 0:\n            tl.store(query_start_ptr, 0)\n"),
        "",
    ),
    "query_start_loc counts padding": (
        *(inputs, "tl.minimum(row + 1, rows)", "row + 1"),
    ),
    "query_start_loc ends a row early": (
        *(inputs, "query_start_ptr + row + 1", "query_start_ptr + row"),
    ),
    "is_padding is not of this step": (
        *(inputs, "(seat < 0).to(tl.uint8)", "(seat < -1).to(tl.uint8)"),
    ),
    "input_ids are of the row's seat": (
        inputs,
        "tl.load(last_sampled_ptr + seat)",
        "tl.load(last_sampled_ptr + row)",
    ),
    "input_ids are not written": (
        inputs,
        "tl.store(input_ids_ptr + row, tl.load(last_sampled_ptr + seat).to(tl.int32))",
        "pass",
    ),
    "positions are those of the next token": (
        *(inputs, "position.to(tl.int64))", "position.to(tl.int64) + 1)"),
    ),
    "seq_lens leave the new token out": (
        *(inputs, "tl.store(seq_lens_ptr + row, position + 1)"),
        "tl.store(seq_lens_ptr + row, position)",
    ),
    "seq_lens of padding are stale": (
        *(inputs, "            tl.store(seq_lens_ptr + row, 0)", "            pass"),
    ),
    "slots of padding are stale": (
        *(inputs, "        tl.store(slot_ptr, _PAD)\n", ""),
    ),
    "slots of padding are 0": (
        *(inputs, "tl.store(slot_ptr, _PAD)", "tl.store(slot_ptr, 0)"),
    ),
    "slots are of the first group": (
        *(inputs, "slots_ptr + group.to(tl.int64) * slots_stride", "slots_ptr"),
    ),
    "slots are blocks": (*(inputs, "+ position % block_size", ""),),
    "input tables of padding are stale": (
        inputs,
        "            tl.store(input_ptr + columns, 0, mask=columns < width)",
        "            pass",
    ),
    "input tables of padding are cleared into the next row": (
        *(inputs, "0, mask=columns < width)", "0, mask=columns < width + 1)"),
    ),
    "only the first columns of padding are cleared": (
        *(blocks, "for start in tl.range(0, width, BLOCK):"),
        "for start in tl.range(0, BLOCK, BLOCK):",
    ),
    "input tables lack their last block": (
        *(inputs, "there = columns <= last", "there = columns < last"),
    ),
    "only the first columns are gathered": (
        *(blocks, "tl.range(0, last + 1, BLOCK)", "tl.range(0, 1, BLOCK)"),
    ),
    "the last columns are not gathered": (
        *(blocks, "tl.range(0, last + 1, BLOCK)", "tl.range(0, last, BLOCK)"),
    ),
    "a new block is not in the table": (
        *(inputs, "    if given >= 0:\n        tl.store(table_ptr + given, new)\n", ""),
    ),
    "a new block is another group's": (
        *(inputs, "tl.num_programs(1) * padded", "padded"),
    ),
    "no new block is one all the same": (
        *(inputs, "    if given >= 0:\n", "    if given >= -1:\n"),
    ),
    "a slot is in the block that was there before": (
        *(given, "block = tl.where(last == given, new, block)", "pass"),
    ),
    "an input table has the block that was there before": (
        given,
        "tl.where((columns == given) & (columns >= first), new, blocks)",
        "tl.where(columns < 0, new, blocks)",
    ),
    "the window is forgotten": (
        *(inputs, "tl.where(reach > 0, ", "tl.where(reach > 1000, "),
    ),
    "the window ends a token early": (
        *(
            inputs,
            "tl.maximum(position - reach, 0)",
            "tl.maximum(position + 1 - reach, 0)",
        ),
    ),
    "the window is of every group": (
        *(inputs, "tl.where(reach > 0, ", "tl.where(reach >= 0, "),
    ),
    "block sizes are of the first group": (
        inputs,
        "tl.load(layout_ptr + _BLOCK_SIZE)",
        "tl.load(layout_ptr - group * _WORDS + _BLOCK_SIZE)",
    ),
    # And by post.
    "the ring's row is always the first": (
        *(state, "ring_ptr + slot * ring_stride", "ring_ptr"),
    ),
    "the ring has seats": (
        *(state, "slot * ring_stride + row, token", "slot * ring_stride + seat, token"),
    ),
    "the last token is not kept": (
        *(state, "tl.store(last_sampled_ptr + seat, token)", "pass"),
    ),
    "a token is written over the last one": (
        *(state, "all_tokens_ptr + length,", "all_tokens_ptr + length - 1,"),
    ),
    "total_len stays": (*(state, "length + 1)", "length)"),),
    "num_computed_tokens stays": (
        *(state, "tl.load(num_computed_ptr + seat) + 1)"),
        "tl.load(num_computed_ptr + seat))",
    ),
    "counts are set": (*(state, "tl.load(count_ptr) + 1", "1"),),
    "counts are of rows": (
        *(
            state,
            "counts_ptr + seat * counts_stride",
            "counts_ptr + row * counts_stride",
        ),
    ),
    # Padding, offsets, order.
    "rows behind the last are prepared": (
        *(no_request, "    seat = tl.where(row < rows, seat, -1)\n\n", "\n"),
    ),
    "rows behind the last are accounted for": (
        no_request,
        "    seat = tl.where(row < rows, seat, -1)\n    if",
        "    if",
    ),
    "a row without a seat is prepared": (
        no_request,
        "    if seat < 0:\n        if group == 0:",
        "    if seat < -1:\n        if group == 0:",
    ),
    "a row without a seat is accounted for": (
        *(
            no_request,
            "    if seat < 0:\n        return",
            "    if seat < -1:\n        return",
        ),
    ),
    "offsets of seats have 32 bits": (
        far,
        "    seat = tl.load(staging_ptr + _HEADER + row).to(tl.int64)\n"
        "    seat = tl.where(row < rows, seat, -1)\n    if",
        "    seat = tl.load(staging_ptr + _HEADER + row)\n"
        "    seat = tl.where(row < rows, seat, -1)\n    if",
    ),
    "offsets in tables have 32 bits": (
        *(far, "table_ptr += seat * width"),
        "table_ptr += (seat * width).to(tl.int32)",
    ),
    "offsets in input tables have 32 bits": (
        *(far, "input_ptr += row.to(tl.int64) * width"),
        "input_ptr += row * width.to(tl.int32)",
    ),
    "offsets of slots have 32 bits": (
        *(far, "group.to(tl.int64) * slots_stride", "group * slots_stride"),
    ),
    "all rows are accounted for in one": (
        *(any_order, "ring_ptr + slot * ring_stride + row,"),
        "ring_ptr + slot * ring_stride,",
    ),
    "each group writes the lengths": (
        *(any_order, "        tl.store(seq_lens_ptr + row, position + 1)\n"),
        "    tl.store(seq_lens_ptr + row, position + group)\n",
    ),
    "a step is packed over the last one": (
        *(packed, "    staging[HEADER:blocks] = -1\n", ""),
    ),
    "blocks are packed by row": (
        *(packed, "at = group * padded + row", "at = row * groups + group"),
    ),
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_kernel_passes(check, stock):
    check(decode_inputs, stock)


@pytest.mark.parametrize("bug", PLANTED)
def test_is_found(bug, stock, tmp_path):
    check, line, planted = PLANTED[bug]
    source = Path(decode_inputs.__file__).read_text()
    assert source.count(line) >= 1
    path = tmp_path / "planted.py"
    path.write_text(source.replace(line, planted))
    module = loaded("planted", path)
    with pytest.raises((AssertionError, KernelFault)):
        check(module, stock)


STORE = "tl.store("
STORES = Path(decode_inputs.__file__).read_text().count(STORE)


@pytest.mark.parametrize("number", range(STORES))
def test_a_store_that_is_left_out_is_found(number, stock, tmp_path):
    """Whichever: what is not written, of any buffer, shows."""
    before, *after = Path(decode_inputs.__file__).read_text().split(STORE)
    rest = STORE.join(after[number:])
    source = STORE.join((before, *after[:number])) + "_forget(" + rest
    source = source.replace("# -- the kernels -", FORGET + "# -- the kernels -", 1)
    path = tmp_path / "planted.py"
    path.write_text(source)
    module = loaded("planted", path)
    with pytest.raises((AssertionError, KernelFault)):
        _whole_step(module, stock)


def _whole_step(module: Any, stock: Any) -> None:
    inputs(module, stock)
    state(module, stock)


FORGET = """
@triton.jit
def _forget(pointer, value, mask=None):
    pass


"""
