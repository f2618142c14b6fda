"""What a decode step needs before its forward pass and leaves after it, a launch each.

Stock prepares a step in which every request has one token with eight launches and
copies, with ten where a block was given, and accounts for its tokens with three more;
the host hands over addresses and numbers that are others in the next step. Here one
launch prepares the inputs of the forward pass and one takes down what was sampled, so
that both can be captured in a CUDA graph: how many requests there are, which ones, and
which blocks they were given is read on the device, from one small tensor that the host
fills with `pack` and copies before the graph is replayed. Nothing is allocated, and no
number of the host's that changes from step to step is an argument.

A graph has as many rows as it was captured for. A row is real if it is one of the
first ``rows`` of the step and has a seat; any other row is padding. Padding rows read
the staging tensor and what the tables are like: their length is 0, their slots are -1,
their rows of the block tables are 0, and no state of any request is touched for them.

Staging, int32, for ``P`` rows and ``G`` groups of KV cache:

======================= ===== =====================================================
word                    size  what
======================= ===== =====================================================
`ROWS`                  1     how many rows are in use
`SLOT`                  1     row of the output ring
2                       6     zero
`HEADER`                P     seats: which request is in each row, -1 for none
``HEADER + P``          G * P column of the block that a row was given, -1 for none
``HEADER + P + G * P``  G * P the block's number
======================= ===== =====================================================

The first word is ``num_rows`` and the seats are ``idx_mapping`` for `sample` and its
kin, see `num_rows` and `seats`.

Bytes: a row reads and writes 4 for each block that it has, in each group, and some 100
more. A row of padding writes 4 for each block that it could have.

Source: what ``prepare_pos_seq_lens``, ``combine_sampled_and_draft_tokens``,
``gather_block_tables``, ``compute_slot_mappings``, ``apply_staged_writes`` and
``post_update`` of vLLM's Model Runner V2 do in such a step.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
import torch
import triton
import triton.language as tl

HEADER = 8
ROWS, SLOT = 0, 1

BLOCK = 1024  # columns of a block table that are looked at together
PREP_WARPS = 4
POST_WARPS = 1

# Words of a group's layout.
_TABLE, _INPUT_TABLE, _WIDTH, _BLOCK_SIZE, _REACH = map(tl.constexpr, range(5))
_WORDS = tl.constexpr(5)

_HEADER = tl.constexpr(HEADER)
_SLOT = tl.constexpr(SLOT)
_PAD = tl.constexpr(-1)  # a slot that is none; vLLM's PAD_SLOT_ID


# -- staging ---------------------------------------------------------------------------


def words(padded: int, groups: int) -> int:
    """How many words of staging a graph of ``padded`` rows reads."""
    return HEADER + padded * (1 + 2 * groups)


def num_rows(staging: torch.Tensor) -> torch.Tensor:
    """``[1]`` int32, a view: the number of rows in use."""
    return staging[ROWS : ROWS + 1]


def seats(staging: torch.Tensor, padded: int) -> torch.Tensor:
    """``[padded]`` int32, a view: the seat of each row, -1 for padding."""
    return staging[HEADER : HEADER + padded]


def pack(
    staging: np.ndarray,
    padded: int,
    groups: int,
    seats: Sequence[int] | np.ndarray,
    slot: int = 0,
    appended: Iterable[tuple[int, int, int, int]] = (),
) -> int:
    """Write a step into ``staging``, on the host.

    Args:
        staging: Of at least `words` int32, as the NumPy view of a pinned tensor. Not
            what a copy that is still under way reads.
        padded: Rows of the graph.
        groups: Groups of KV cache.
        seats: The seat of each request, in the order of the batch.
        slot: Which row of the output ring the tokens are to be written to.
        appended: Row, group, column and number of each block that was added. A row is
            given at most one in each group.

    Returns:
        How many words to copy to the device.

    Raises:
        ValueError: There are more requests than rows.
    """
    rows = len(seats)
    if rows > padded:
        raise ValueError(f"{rows} requests do not fit into {padded} rows")
    staging[:HEADER] = (rows, slot, 0, 0, 0, 0, 0, 0)
    columns = HEADER + padded
    blocks = columns + padded * groups
    staging[HEADER:blocks] = -1
    staging[HEADER : HEADER + rows] = seats
    for row, group, column, block in appended:
        at = group * padded + row
        staging[columns + at] = column
        staging[blocks + at] = block
    return blocks + padded * groups


# -- groups of KV cache ----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Groups:
    """The block tables of one or more groups of KV cache; from `make_groups`.

    Attributes:
        block_tables: For each group ``[N, M]`` int32: the blocks of each seat.
        input_block_tables: Likewise, by row: what attention reads.
        slot_mappings: ``[G, T]`` int64: where attention writes each row's token.
        layout: ``[G, 5]`` int64: addresses of a group's two tables, their width, its
            block size and its reach.
    """

    block_tables: tuple[torch.Tensor, ...]
    input_block_tables: tuple[torch.Tensor, ...]
    slot_mappings: torch.Tensor
    layout: torch.Tensor


def make_groups(
    block_tables: Sequence[torch.Tensor],
    input_block_tables: Sequence[torch.Tensor],
    slot_mappings: torch.Tensor,
    block_sizes: Sequence[int],
    reaches: Sequence[int] | None = None,
) -> Groups:
    """Describe block tables to `prep`; copies addresses to the device, so once.

    Args:
        block_tables: For each group ``[N, M]`` int32, contiguous. ``M`` may differ.
        input_block_tables: For each group ``[>= P, M]`` int32, contiguous.
        slot_mappings: ``[G, >= P]`` int64.
        block_sizes: Of each group, in tokens.
        reaches: For each group how many tokens before the one that is decoded can
            still be attended to; of blocks that are wholly before those the input
            table says 0. 0: all can, nothing is left out. vLLM's
            ``sliding_window_reach``; 0.32 has none, as without ``reaches``.

    Raises:
        ValueError: Arguments do not fit together.
    """
    number = len(block_tables)
    reaches = [0] * number if reaches is None else list(reaches)
    given = (len(input_block_tables), len(block_sizes), len(reaches))
    if not number or set(given) != {number} or slot_mappings.shape[0] != number:
        raise ValueError(
            f"{number} block tables with {given[0]} input tables, {given[1]} block "
            f"sizes, {given[2]} reaches and {slot_mappings.shape[0]} slot mappings"
        )
    layout = []
    for table, input_table, block_size, reach in zip(
        block_tables, input_block_tables, block_sizes, reaches, strict=True
    ):
        for each in (table, input_table):
            if each.dtype != torch.int32 or not each.is_contiguous():
                raise ValueError(
                    f"block tables must be int32 and contiguous; one is {each.dtype} "
                    f"{list(each.shape)} with strides {each.stride()}"
                )
        if table.shape[1] != input_table.shape[1]:
            raise ValueError(
                f"a block table of {table.shape[1]} columns has an input table of "
                f"{input_table.shape[1]}"
            )
        if block_size < 1 or reach < 0:
            raise ValueError(f"block size {block_size}, reach {reach}")
        addresses = (table.data_ptr(), input_table.data_ptr())
        layout.append((*addresses, table.shape[1], block_size, reach))
    return Groups(
        block_tables=tuple(block_tables),
        input_block_tables=tuple(input_block_tables),
        slot_mappings=slot_mappings,
        layout=torch.tensor(layout, dtype=torch.int64, device=slot_mappings.device),
    )


# -- the definitions -------------------------------------------------------------------


def _real(staging: torch.Tensor, padded: int) -> list[tuple[int, int]]:
    """Row and seat of each real row."""
    step = staging.tolist()  # sync: the definition, not the kernel
    given = enumerate(step[HEADER : HEADER + min(step[ROWS], padded)])
    return [(row, seat) for row, seat in given if seat >= 0]


def prep_reference(
    staging: torch.Tensor,
    padded: int,
    num_computed_tokens: torch.Tensor,
    last_sampled_tokens: torch.Tensor,
    groups: Groups,
    input_ids: torch.Tensor,
    positions: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    is_padding: torch.Tensor | None = None,
) -> None:
    """The definition of `prep`."""
    number = len(groups.block_tables)
    step = staging.tolist()  # sync: the definition, not the kernel
    real = dict(_real(staging, padded))
    query_start_loc[: padded + 1] = torch.arange(padded + 1).clamp(max=step[ROWS])
    for row in range(padded):
        seat = real.get(row)
        if is_padding is not None:
            is_padding[row] = seat is None
        if seat is None:
            seq_lens[row] = 0
        else:
            position = int(num_computed_tokens[seat])
            input_ids[row] = last_sampled_tokens.view(-1)[seat]
            positions[row] = position
            seq_lens[row] = position + 1
        for group in range(number):
            _, _, _, block_size, reach = groups.layout[group].tolist()  # sync: as above
            table = groups.block_tables[group]
            input_table = groups.input_block_tables[group]
            if seat is None:
                groups.slot_mappings[group, row] = -1
                input_table[row] = 0
                continue
            at = HEADER + padded + group * padded + row
            if step[at] >= 0:
                table[seat, step[at]] = step[at + number * padded]
            block = int(table[seat, position // block_size])
            slot = block * block_size + position % block_size
            groups.slot_mappings[group, row] = slot
            blocks = position // block_size + 1
            input_table[row, :blocks] = table[seat, :blocks]
            if reach > 0:
                input_table[row, : max(position - reach, 0) // block_size] = 0


def post_reference(
    staging: torch.Tensor,
    padded: int,
    tokens: torch.Tensor,
    ring: torch.Tensor,
    last_sampled_tokens: torch.Tensor,
    all_token_ids: torch.Tensor,
    total_len: torch.Tensor,
    num_computed_tokens: torch.Tensor,
    output_bin_counts: torch.Tensor | None = None,
) -> None:
    """The definition of `post`."""
    for row, seat in _real(staging, padded):
        token = int(tokens[row])
        ring[int(staging[SLOT]), row] = token
        last_sampled_tokens.view(-1)[seat] = token
        all_token_ids[seat, int(total_len[seat])] = token
        total_len[seat] += 1
        num_computed_tokens[seat] += 1
        if output_bin_counts is not None:
            output_bin_counts[seat, token] += 1


# -- the kernels -----------------------------------------------------------------------


@triton.jit(
    do_not_specialize=["slots_stride"],
    do_not_specialize_on_alignment=[
        *("staging_ptr", "num_computed_ptr", "last_sampled_ptr", "layout_ptr"),
        *("input_ids_ptr", "positions_ptr", "seq_lens_ptr", "query_start_ptr"),
        *("slots_ptr", "is_padding_ptr"),
    ],
)
def _prep_kernel(
    staging_ptr,  # [HEADER + P + 2 * G * P] int32
    num_computed_ptr,  # [N] int32, by seat
    last_sampled_ptr,  # [N] int64, by seat
    layout_ptr,  # [G, 5] int64
    input_ids_ptr,  # [>= P] int32
    positions_ptr,  # [>= P] int64
    seq_lens_ptr,  # [>= P] int32
    query_start_ptr,  # [>= P + 1] int32
    slots_ptr,  # [G, >= P] int64
    slots_stride,
    is_padding_ptr,  # [>= P] uint8, or None
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    group = tl.program_id(1)
    padded = tl.num_programs(0)
    rows = tl.load(staging_ptr)
    seat = tl.load(staging_ptr + _HEADER + row).to(tl.int64)
    seat = tl.where(row < rows, seat, -1)

    layout_ptr += group * _WORDS
    width = tl.load(layout_ptr + _WIDTH)
    table_ptr = tl.load(layout_ptr + _TABLE).to(tl.pointer_type(tl.int32))
    table_ptr += seat * width
    input_ptr = tl.load(layout_ptr + _INPUT_TABLE).to(tl.pointer_type(tl.int32))
    input_ptr += row.to(tl.int64) * width
    slot_ptr = slots_ptr + group.to(tl.int64) * slots_stride + row
    lanes = tl.arange(0, BLOCK)

    if group == 0:
        if row == 0:
            tl.store(query_start_ptr, 0)
        tl.store(query_start_ptr + row + 1, tl.minimum(row + 1, rows))
        if is_padding_ptr is not None:
            tl.store(is_padding_ptr + row, (seat < 0).to(tl.uint8))

    if seat < 0:
        if group == 0:
            tl.store(seq_lens_ptr + row, 0)
        tl.store(slot_ptr, _PAD)
        for start in tl.range(0, width, BLOCK):
            columns = start + lanes
            tl.store(input_ptr + columns, 0, mask=columns < width)
        return

    position = tl.load(num_computed_ptr + seat)
    if group == 0:
        tl.store(input_ids_ptr + row, tl.load(last_sampled_ptr + seat).to(tl.int32))
        tl.store(positions_ptr + row, position.to(tl.int64))
        tl.store(seq_lens_ptr + row, position + 1)

    block_size = tl.load(layout_ptr + _BLOCK_SIZE).to(tl.int32)
    reach = tl.load(layout_ptr + _REACH).to(tl.int32)
    at = _HEADER + padded + group * padded + row
    given = tl.load(staging_ptr + at)
    new = tl.load(staging_ptr + at + tl.num_programs(1) * padded)
    if given >= 0:
        tl.store(table_ptr + given, new)
    # Where a block was given, its number is taken from here, not from what another
    # thread has just stored.
    last = position // block_size
    block = tl.load(table_ptr + last, mask=last != given, other=0)
    block = tl.where(last == given, new, block)
    slot = block.to(tl.int64) * block_size + position % block_size
    tl.store(slot_ptr, slot)
    first = tl.where(reach > 0, tl.maximum(position - reach, 0) // block_size, 0)
    for start in tl.range(0, last + 1, BLOCK):
        columns = start + lanes
        there = columns <= last
        read = there & (columns >= first) & (columns != given)
        blocks = tl.load(table_ptr + columns, mask=read, other=0)
        blocks = tl.where((columns == given) & (columns >= first), new, blocks)
        tl.store(input_ptr + columns, blocks, mask=there)


@triton.jit(
    do_not_specialize=[
        *("ring_stride", "all_tokens_stride", "counts_stride"),
    ],
    do_not_specialize_on_alignment=[
        *("staging_ptr", "tokens_ptr", "ring_ptr", "last_sampled_ptr"),
        *("all_tokens_ptr", "total_len_ptr", "num_computed_ptr", "counts_ptr"),
    ],
)
def _post_kernel(
    staging_ptr,  # [HEADER + P + ...] int32
    tokens_ptr,  # [P] int64
    ring_ptr,  # [R, >= P] int32
    ring_stride,
    last_sampled_ptr,  # [N] int64, by seat
    all_tokens_ptr,  # [N, L] int32
    all_tokens_stride,
    total_len_ptr,  # [N] int32
    num_computed_ptr,  # [N] int32
    counts_ptr,  # [N, V] int32, or None
    counts_stride,
):
    row = tl.program_id(0)
    rows = tl.load(staging_ptr)
    seat = tl.load(staging_ptr + _HEADER + row).to(tl.int64)
    seat = tl.where(row < rows, seat, -1)
    if seat < 0:
        return
    token = tl.load(tokens_ptr + row)
    slot = tl.load(staging_ptr + _SLOT).to(tl.int64)
    tl.store(ring_ptr + slot * ring_stride + row, token.to(tl.int32))
    tl.store(last_sampled_ptr + seat, token)
    length = tl.load(total_len_ptr + seat)
    all_tokens_ptr += seat * all_tokens_stride
    tl.store(all_tokens_ptr + length, token.to(tl.int32))
    tl.store(total_len_ptr + seat, length + 1)
    tl.store(num_computed_ptr + seat, tl.load(num_computed_ptr + seat) + 1)
    if counts_ptr is not None:
        count_ptr = counts_ptr + seat * counts_stride + token
        tl.store(count_ptr, tl.load(count_ptr) + 1)


# -- the launchers ---------------------------------------------------------------------


def _check(
    tensor: torch.Tensor, name: str, dtype: torch.dtype, size: int, dims: int = 1
) -> None:
    """Of the type, and its last dimension without gaps and long enough."""
    contiguous = tensor.shape[-1] <= 1 or tensor.stride(-1) == 1
    fits = tensor.dtype == dtype and tensor.ndim == dims and contiguous
    if not fits or tensor.shape[-1] < size:
        raise ValueError(
            f"{name} must be {dtype}, with {dims} dimensions, the last one contiguous "
            f"and of {size} or more; it is {tensor.dtype} {list(tensor.shape)} with "
            f"strides {tensor.stride()}"
        )


def prep(
    staging: torch.Tensor,
    padded: int,
    num_computed_tokens: torch.Tensor,
    last_sampled_tokens: torch.Tensor,
    groups: Groups,
    input_ids: torch.Tensor,
    positions: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    is_padding: torch.Tensor | None = None,
) -> None:
    """Prepare a step in which every request decodes one token.

    Adds the blocks that were given to the tables of ``groups``, and writes the inputs
    of the forward pass for ``padded`` rows, nothing beyond them. A real row's input
    table has the blocks up to its token's; what follows them is left as it is.

    Args:
        staging: ``[>= words(padded, G)]`` int32, as `pack` makes it. What it says is
            not checked: seats, columns and positions must lie within the tensors, and
            no seat may be in two rows.
        padded: Rows of the graph, ``P``.
        num_computed_tokens: ``[N]`` int32, by seat: the position of the next token.
        last_sampled_tokens: ``[N]`` or ``[N, 1]`` int64, contiguous, by seat.
        groups: From `make_groups`; only groups with a slot for each token, as
            attention's have.
        input_ids: ``[>= P]`` int32; padding rows are left alone.
        positions: ``[>= P]`` int64; padding rows are left alone.
        seq_lens: ``[>= P]`` int32.
        query_start_loc: ``[>= P + 1]`` int32.
        is_padding: ``[>= P]`` bool, or ``None``.

    Raises:
        ValueError: Arguments do not fit together.
    """
    number = len(groups.block_tables)
    _check(staging, "staging", torch.int32, words(padded, number))
    _check(num_computed_tokens, "num_computed_tokens", torch.int32, 1)
    _check(last_sampled_tokens.view(-1), "last_sampled_tokens", torch.int64, 1)
    _check(input_ids, "input_ids", torch.int32, padded)
    _check(positions, "positions", torch.int64, padded)
    _check(seq_lens, "seq_lens", torch.int32, padded)
    _check(query_start_loc, "query_start_loc", torch.int32, padded + 1)
    _check(groups.slot_mappings, "slot_mappings", torch.int64, padded, dims=2)
    if is_padding is not None:
        _check(is_padding, "is_padding", torch.bool, padded)
        is_padding = is_padding.view(torch.uint8)
    fewest = min(table.shape[0] for table in groups.input_block_tables)
    if fewest < padded:
        raise ValueError(f"an input table has {fewest} rows, the graph {padded}")
    _prep_kernel[(padded, number)](
        staging,
        num_computed_tokens,
        last_sampled_tokens,
        groups.layout,
        input_ids,
        positions,
        seq_lens,
        query_start_loc,
        groups.slot_mappings,
        groups.slot_mappings.stride(0),
        is_padding,
        BLOCK=BLOCK,
        num_warps=PREP_WARPS,
    )


def post(
    staging: torch.Tensor,
    padded: int,
    tokens: torch.Tensor,
    ring: torch.Tensor,
    last_sampled_tokens: torch.Tensor,
    all_token_ids: torch.Tensor,
    total_len: torch.Tensor,
    num_computed_tokens: torch.Tensor,
    output_bin_counts: torch.Tensor | None = None,
) -> None:
    """Take down the tokens of a step, for its requests and for the host.

    Args:
        staging: The one that `prep` had; see there.
        padded: Rows of the graph, ``P``.
        tokens: ``[>= P]`` int64, by row; those of padding rows are not read.
        ring: ``[R, >= P]`` int32: the row that the staging names gets the tokens;
            where padding is, and in other rows, it is left alone.
        last_sampled_tokens: ``[N]`` or ``[N, 1]`` int64, contiguous, by seat.
        all_token_ids: ``[N, L]`` int32, by seat: a token is added at the end.
        total_len: ``[N]`` int32, where the end is; grows by 1.
        num_computed_tokens: ``[N]`` int32; grows by 1.
        output_bin_counts: ``[N, >= V]`` int32, or ``None``: how often each token was
            generated.

    Raises:
        ValueError: Arguments do not fit together.
    """
    _check(staging, "staging", torch.int32, HEADER + padded)
    _check(tokens, "tokens", torch.int64, padded)
    _check(ring, "ring", torch.int32, padded, dims=2)
    _check(last_sampled_tokens.view(-1), "last_sampled_tokens", torch.int64, 1)
    _check(all_token_ids, "all_token_ids", torch.int32, 1, dims=2)
    _check(total_len, "total_len", torch.int32, 1)
    _check(num_computed_tokens, "num_computed_tokens", torch.int32, 1)
    if output_bin_counts is not None:
        _check(output_bin_counts, "output_bin_counts", torch.int32, 1, dims=2)
    _post_kernel[(padded,)](
        staging,
        tokens,
        ring,
        ring.stride(0),
        last_sampled_tokens,
        all_token_ids,
        all_token_ids.stride(0),
        total_len,
        num_computed_tokens,
        output_bin_counts,
        0 if output_bin_counts is None else output_bin_counts.stride(0),
        num_warps=POST_WARPS,
    )


def warm(max_rows: int, vocab_size: int, device: torch.device) -> None:
    """Compile what serving launches: with and without what is optional.

    No row is in use, so nothing but memory of this function's own is written.
    """

    def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    staging, by_seat = zeros(words(max_rows, 1)), zeros(max_rows + 1)
    tokens, plane = zeros(max_rows, dtype=torch.int64), zeros(1, vocab_size)
    padding = zeros(max_rows, dtype=torch.bool)
    tables = ([zeros(max_rows, 1)], [zeros(max_rows, 1)])
    groups = make_groups(*tables, tokens.view(1, -1), [16])
    for is_padding in (None, padding):
        prep(
            *(staging, max_rows, by_seat, tokens, groups, by_seat, tokens, by_seat),
            *(by_seat, is_padding),
        )
    for counts in (None, plane):
        post(
            *(staging, max_rows, tokens, by_seat.view(1, -1), tokens, plane),
            *(by_seat, by_seat, counts),
        )
