"""Logprobs of sampled tokens, their ranks and the likeliest tokens, in one launch.

Stock takes eight launches for this, two of which go over a row with a single program.
Here a row's tiles are dealt to as many programs as fill the chip. Each tile leaves
what is needed of it: the sum of its exponentials, how many of its logits are no less
than the sampled token's, and the largest logit of every 256. The last program of a row
to arrive adds up, in the order of the vocabulary whatever the batch, and picks the
likeliest tokens one after the other, each time from the 256 with the largest rest.

Reads ``V * itemsize`` bytes per row and 512 to 1024 more for each of the likeliest
tokens; writes and reads back 24 per tile. One launch, one pass. Nothing is allocated,
and how many rows there are and what each asks for is read on the device, as in
``sample``.

Source: what vLLM's ``compute_topk_scores`` returns in Model Runner V2.
"""

import dataclasses

import torch
import triton
import triton.language as tl

TILE = 1024
WARPS = 4
PROGRAMS_PER_SM = 8
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_NOWHERE = tl.constexpr(2**31 - 1)  # above every token
_NEVER = tl.constexpr(float("-inf"))  # below every logit that counts
_LOWEST = tl.constexpr(-3.4028234663852886e38)  # stands for a logit of -inf


def logprobs_reference(
    logits: torch.Tensor,
    num_rows: torch.Tensor,
    wanted: torch.Tensor,
    idx_mapping: torch.Tensor,
    sampled: torch.Tensor,
    ids: torch.Tensor,
    logprobs: torch.Tensor,
    ranks: torch.Tensor,
) -> None:
    """The definition of `logprobs`."""
    for row in range(min(int(num_rows), logits.shape[0])):
        seat = int(idx_mapping[row])
        if seat < 0 or wanted[seat] < 0:
            continue
        x = logits[row].float()
        token = sampled[row]
        order = torch.argsort(x.nan_to_num(float("-inf")), descending=True, stable=True)
        order = order[~x[order].isnan()]
        likeliest = order[: min(int(wanted[seat]), ids.shape[1] - 1)]
        chosen = torch.cat((token.view(1), likeliest))
        columns = 1 + min(int(wanted[seat]), ids.shape[1] - 1)
        ids[row, :columns] = 0
        logprobs[row, :columns] = float("-inf")
        ids[row, : len(chosen)] = chosen
        logprobs[row, : len(chosen)] = x.log_softmax(0)[chosen]
        ranks[row] = (x >= x[token]).sum()


@triton.jit
def _keys(x, inside):
    """Logits in their order; what is no logit, or NaN, comes after all of them."""
    return tl.where(inside & (x == x), tl.maximum(x, _LOWEST), _NEVER)


@triton.jit(
    do_not_specialize=[
        *("ids_stride", "logprobs_stride", "columns", "vocab_size"),
        *("tiles_each", "splits"),
    ],
    do_not_specialize_on_alignment=[
        *("ids_ptr", "logprobs_ptr", "ranks_ptr", "num_rows_ptr", "wanted_ptr"),
        *("idx_mapping_ptr", "sampled_ptr"),
    ],
)
def _logprobs_kernel(
    ids_ptr,  # [B, 1 + N] int64
    ids_stride,
    logprobs_ptr,  # [B, 1 + N] float32
    logprobs_stride,
    ranks_ptr,  # [B] int64
    logits_ptr,  # [B, V], any float dtype
    logits_stride,
    num_rows_ptr,  # [1] int32
    wanted_ptr,  # [S] int32, by seat
    idx_mapping_ptr,  # [B] seat of each row, negative: none
    sampled_ptr,  # [B] int64
    maxima_ptr,  # [B, GROUPS] float32
    sums_ptr,  # [B, TILES] float32
    counts_ptr,  # [B, TILES] int32
    arrived_ptr,  # [B] int32, zeros before and after
    columns,
    vocab_size,
    tiles_each,
    splits,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    GROUPS_OF_TILE: tl.constexpr,
):
    GROUP: tl.constexpr = TILE // GROUPS_OF_TILE
    GROUPS: tl.constexpr = TILES * GROUPS_OF_TILE
    row = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    if row >= tl.load(num_rows_ptr):
        return
    seat = tl.load(idx_mapping_ptr + row).to(tl.int64)
    if seat < 0:
        return
    wanted = tl.load(wanted_ptr + seat)
    if wanted < 0:
        return
    row = row.to(tl.int64)
    row_ptr = logits_ptr + row * logits_stride
    maxima_ptr += row * GROUPS
    sums_ptr += row * TILES
    counts_ptr += row * TILES
    token = tl.load(sampled_ptr + row)
    value = tl.load(row_ptr + token).to(tl.float32)

    tiles = tl.cdiv(vocab_size, TILE)
    first = split * tiles_each
    last = tl.minimum(first + tiles_each, tiles)
    lanes = tl.arange(0, TILE)
    whole = vocab_size & -8
    groups = tl.arange(0, GROUPS_OF_TILE)
    for tile in range(first, last):
        at = tile * TILE + lanes
        # Masked by eights, so that loads stay wide; the last few come on their own.
        x = tl.load(row_ptr + at, mask=at // 8 < whole // 8, other=_NEVER)
        x = x.to(tl.float32)
        if (tile + 1) * TILE > whole:
            rest = (at >= whole) & (at < vocab_size)
            few = tl.load(row_ptr + at, mask=rest, other=_NEVER).to(tl.float32)
            x = tl.where(rest, few, x)
        inside = at < vocab_size
        keys = _keys(x, inside)
        maxima = tl.max(tl.reshape(keys, (GROUPS_OF_TILE, GROUP)), axis=1)
        tl.store(maxima_ptr + tile * GROUPS_OF_TILE + groups, maxima)
        top = tl.maximum(tl.max(maxima, axis=0), _LOWEST)
        tl.store(sums_ptr + tile, tl.sum(tl.exp(x - top), axis=0))
        no_less = (x >= value) & inside
        tl.store(counts_ptr + tile, tl.sum(no_less.to(tl.int32), axis=0))

    # The last program of the row to arrive finishes it.
    tl.debug_barrier()
    if splits > 1:
        if tl.atomic_add(arrived_ptr + row, 1, sem="acq_rel") != splits - 1:
            return
        tl.store(arrived_ptr + row, 0)
    each = tl.arange(0, TILES)
    inside = each < tiles
    sums = tl.load(sums_ptr + each, mask=inside, other=0.0, cache_modifier=".cg")
    counts = tl.load(counts_ptr + each, mask=inside, other=0, cache_modifier=".cg")
    at = tl.arange(0, GROUPS)
    maxima = tl.load(
        maxima_ptr + at,
        mask=at < tiles * GROUPS_OF_TILE,
        other=_NEVER,
        cache_modifier=".cg",
    )
    tops = tl.max(tl.reshape(maxima, (TILES, GROUPS_OF_TILE)), axis=1)
    largest = tl.max(tops, axis=0)
    total = tl.sum(tl.where(sums > 0, sums * tl.exp(tops - largest), sums), axis=0)
    log_total = tl.log(total)
    ids_ptr += row * ids_stride
    logprobs_ptr += row * logprobs_stride
    tl.store(ranks_ptr + row, tl.sum(counts, axis=0).to(tl.int64))
    tl.store(ids_ptr, token)
    tl.store(logprobs_ptr, value - largest - log_total)

    members = tl.arange(0, GROUP)
    behind = tl.full((), float("inf"), tl.float32)
    behind_id = tl.full((), -1, tl.int32)
    for column in range(1, tl.minimum(wanted, columns - 1) + 1):
        top = tl.max(maxima, axis=0)
        group = tl.min(tl.where(maxima == top, at, _NOWHERE), axis=0)
        tokens = group * GROUP + members
        mine = tokens < vocab_size
        x = tl.load(row_ptr + tokens, mask=mine, other=_NEVER).to(tl.float32)
        keys = _keys(x, mine)
        left = (keys < behind) | ((keys == behind) & (tokens > behind_id))
        picked = tl.min(tl.where(left & (keys == top), tokens, _NOWHERE), axis=0)
        none = top == _NEVER  # there are fewer tokens than that; ids have to be some
        logprob = tl.where(top == _LOWEST, _NEVER, top) - largest - log_total
        tl.store(ids_ptr + column, tl.where(none, 0, picked).to(tl.int64))
        tl.store(logprobs_ptr + column, tl.where(none, _NEVER, logprob))
        others = tl.where(left & (tokens != picked), keys, _NEVER)
        maxima = tl.where(at == group, tl.max(others, axis=0), maxima)
        behind = top
        behind_id = picked


@dataclasses.dataclass(frozen=True)
class Scratch:
    """What programs of one row leave for the last one; from `make_scratch`."""

    maxima: torch.Tensor
    sums: torch.Tensor
    counts: torch.Tensor
    arrived: torch.Tensor
    vocab_size: int
    tile: int
    groups_of_tile: int
    programs: int


def make_scratch(
    max_rows: int,
    vocab_size: int,
    device: torch.device | str,
    *,
    tile: int = TILE,
    programs: int | None = None,
) -> Scratch:
    """Memory for `logprobs`, to be made once; launches that overlap need one each.

    Args:
        max_rows: The most rows of a launch.
        vocab_size: ``V``.
        device: Where.
        tile: Tokens that are looked at together, a power of two from 32 on.
        programs: About how many are to run at once; by default what fills the device.
    """
    device = torch.device(device)
    if programs is None:
        multiprocessors = 132
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            multiprocessors = properties.multi_processor_count
        programs = multiprocessors * PROGRAMS_PER_SM
    tiles = triton.next_power_of_2(triton.cdiv(vocab_size, tile))
    groups_of_tile = 4

    def empty(width: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(max_rows, width, dtype=dtype, device=device)

    return Scratch(
        maxima=empty(tiles * groups_of_tile, torch.float32),
        sums=empty(tiles, torch.float32),
        counts=empty(tiles, torch.int32),
        arrived=torch.zeros(max_rows, dtype=torch.int32, device=device),
        vocab_size=vocab_size,
        tile=tile,
        groups_of_tile=groups_of_tile,
        programs=programs,
    )


def logprobs(
    logits: torch.Tensor,
    num_rows: torch.Tensor,
    wanted: torch.Tensor,
    idx_mapping: torch.Tensor,
    sampled: torch.Tensor,
    ids: torch.Tensor,
    logprobs: torch.Tensor,
    ranks: torch.Tensor,
    scratch: Scratch,
) -> None:
    """Write what vLLM's ``LogprobsTensors`` hold into ``ids`` and what follows.

    Args:
        logits: ``[B, V]`` float16, bfloat16 or float32, any stride between rows; raw,
            or processed where those are wanted.
        num_rows: ``[1]`` int32: rows from there on are left alone.
        wanted: ``[S]`` int32, by seat: how many of the likeliest tokens, 0 for the
            sampled one alone; a row that wants fewer than 0 is left alone.
        idx_mapping: ``[B]`` int32 or int64, the seat of each row's request; a row
            with a negative one is left alone.
        sampled: ``[B]`` int64, the token of each row.
        ids: ``[B, 1 + N]`` int64: the sampled token, then the likeliest, equal ones
            by token, and 0 where there are fewer of them than wanted; columns that a
            row does not want are left alone.
        logprobs: ``[B, 1 + N]`` float32, of ``ids``; minus infinity beyond them.
        ranks: ``[B]`` int64: how many logits are no less than the sampled token's.
            vLLM's rank of a token that was masked also counts what it reads beyond
            the vocabulary.
        scratch: From `make_scratch`, for at least ``B`` rows and the same ``V``.

    A NaN is not among the likeliest, and makes all logprobs of its row NaN.

    Raises:
        ValueError: Arguments do not fit together.
    """
    rows, vocab_size = logits.shape
    if logits.dtype not in DTYPES or (vocab_size > 1 and logits.stride(1) != 1):
        raise ValueError(
            f"logits must be bfloat16, float16 or float32, contiguous along the "
            f"vocabulary; they are {logits.dtype} with strides {logits.stride()}"
        )
    if vocab_size != scratch.vocab_size or rows > scratch.arrived.shape[0]:
        raise ValueError(
            f"logits are [{rows}, {vocab_size}], the scratch is for "
            f"[<= {scratch.arrived.shape[0]}, {scratch.vocab_size}]"
        )
    if rows == 0:
        return
    tiles = triton.cdiv(vocab_size, scratch.tile)
    tiles_each = min(triton.cdiv(tiles * rows, scratch.programs), tiles)
    splits = triton.cdiv(tiles, tiles_each)
    _logprobs_kernel[(rows * splits,)](
        ids,
        ids.stride(0),
        logprobs,
        logprobs.stride(0),
        ranks,
        logits,
        logits.stride(0),
        num_rows,
        wanted,
        idx_mapping,
        sampled,
        scratch.maxima,
        scratch.sums,
        scratch.counts,
        scratch.arrived,
        ids.shape[1],
        vocab_size,
        tiles_each,
        splits,
        TILE=scratch.tile,
        TILES=scratch.sums.shape[1],
        GROUPS_OF_TILE=scratch.groups_of_tile,
        num_warps=WARPS,
    )


def warm(max_rows: int, vocab_size: int, device: torch.device) -> None:
    """Compile what serving launches: one variant for each dtype of logits.

    Indices are int64, as vLLM's are; others would compile variants of their own.
    """
    scratch = make_scratch(max_rows, vocab_size, device)
    none = torch.zeros(1, dtype=torch.int32, device=device)
    token = torch.zeros(1, dtype=torch.int64, device=device)
    scores = torch.zeros(1, 2, dtype=torch.float32, device=device)
    for dtype in DTYPES:
        logits = torch.zeros(1, vocab_size, dtype=dtype, device=device)
        arguments = (none, none, token, token, scores.long(), scores, token.clone())
        logprobs(logits, *arguments, scratch)
