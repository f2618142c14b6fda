"""Top-k and top-p without a sort, and the token that is drawn from what they keep.

The tokens that a row keeps are the first ones of one order: larger logit first, and
of equal logits the lower token. Min-p ends them at a value, top-k after ``k`` of them,
top-p at the first token before which there is enough probability: more exactly, a
token is kept if the probability before it, among those that min-p and top-k keep, is
less than ``p``; the first always is. Of equal logits at the end some are kept, the
lowest tokens. This is the rule of vLLM's Triton kernels, where they apply one: they
leave a row whole, whatever ``p``, if all its probabilities agree to a millionth.
Logits are never written back; `mask_top_k_top_p` is for those who need them.

One launch for rows of any kind: greedy, temperature, min-p, penalties, bias, allowed
tokens, each with ``k``, ``p``, both or neither. A row is dealt to several programs,
and the last one of a row to arrive finishes it. Bytes per row, beside those that
`vllm_ext.kernels.sample` states for what the rows have in common:

=============== ========================================= ==========================
row             reads                                     writes and reads back
=============== ========================================= ==========================
top-k           ``V * itemsize``, and about ``k`` groups  4 per group
top-p           ``V * itemsize``, and once or twice the   8 per group
                groups above the token that is drawn
neither         ``V * itemsize``                          12 per program
=============== ========================================= ==========================

A group is 256 tokens; one that is read again comes from the cache.

Top-k: the programs leave the largest logit of each group. The ``k`` largest of those
are ``k`` tokens, so nothing below the least of them is kept: a group is read again
only if it has a token above that. The few hundred tokens that remain are compared
with each other.

Top-p, without ``k``: the programs leave the mass of each group beside its largest
logit, and draw the row's token as if there was no ``p``. If what lies before that
token is less than ``p``, it is kept, and the draw stands: of the tokens that are kept
it has the largest score. Otherwise so is nothing behind it, and the best of those
before it is the next to be asked. Each round reads the groups above a token; with ``q``
the probability that is kept, ``1 + ln(1/q)`` rounds are to be expected.

Where there are too many to compare (``k`` beyond some hundred, or more tokens above
the bound than fit), one program finds the ``k``-th token byte by byte, from counts of
each value of the byte, and the rounds go on from there. That is slower, and as exact.

As in `vllm_ext.kernels.sample`, nothing is allocated and all that changes from step to
step is read on the device, so that a launch can be captured. How a row is dealt, and
which rows are beside it, changes no bit of what is added up: sums of probability are
over groups, in the order of tokens.

Source: top-p by rejection is in FlashInfer, which draws anew each time; going on with
the noise that is there, and the bound from groups, are ours.
"""

import dataclasses
from typing import Any

import torch
import triton
import triton.language as tl

from vllm_ext.kernels import sample as plain
from vllm_ext.kernels.sample import (
    _FLAGS,
    _HAS_LIST,
    _HAS_MIN_P,
    _HAS_PENALTIES,
    _LISTED,
    _LOG2E,
    _MIN_LENGTH,
    _MIN_P,
    _MOST_NOISE,
    _NEVER,
    _NOWHERE,
    _ONLY_LIST,
    _ROUNDING,
    _SAMPLES,
    _SEED,
    _STRIDE,
    _TEMPERATURE,
    DTYPES,
    Requests,
    _begun,
    _float,
    _give,
    _hash,
    _listed,
    _noise,
    _octets,
    _over,
    _penalized,
    _tile,
    _word,
    gumbel_reference,
)

TILE = 2048
GROUP = 256
CANDIDATES = 512
WARPS = 8
# Left alone, the compiler takes twice as many; with fewer, it spills.
REGISTERS = 80
MASK_REGISTERS = 128
PROGRAMS_PER_SM = 3  # as many as `REGISTERS` leave room for

# Words of a request's parameters, and bits of its flags, beside those of `sample`.
_K = tl.constexpr(10)
_P = tl.constexpr(11)
_HAS_K = tl.constexpr(32)
_HAS_P = tl.constexpr(64)
_NO_FLAGS = tl.constexpr(0)

# An order of tokens is a number below 2**56: 32 bits of the logit, then the token.
_TOKEN_BITS = tl.constexpr(24)
_LAST = tl.constexpr(2**24 - 1)
_PAIRS = tl.constexpr(4)  # candidates that are compared with all at a time
MAX_VOCABULARY = 2**24


def pack(*, top_k: int = 0, top_p: float = 1.0, **others: Any) -> torch.Tensor:
    """One row of ``Requests.params``, on the CPU.

    Args:
        top_k: How many tokens are kept at most; all if less than 1.
        top_p: The probability that is kept at least; all of it from 1 on.
        others: What `vllm_ext.kernels.sample.pack` takes. A greedy request takes the
            likeliest token, which is always kept.

    Returns:
        ``[WORDS]`` int32.
    """
    row = plain.pack(**others)
    if int(row[_FLAGS.value]) & _SAMPLES.value:
        row[_FLAGS.value] |= _HAS_K.value * (top_k > 0)
        row[_FLAGS.value] |= _HAS_P.value * (top_p < 1.0)
    row[_K.value] = top_k
    row.view(torch.float32)[_P.value] = top_p
    return row


# -- the definition ------------------------------------------------------------------


def kept_reference(logits: torch.Tensor, k: int, p: float) -> torch.Tensor:
    """Which tokens of a row are kept: ``[V]`` bool, by a sort in float64.

    ``logits``: ``[V]``, as they are when probabilities are made of them.
    """
    x = logits.double().nan_to_num(float("-inf"), float("inf"), float("-inf"))
    x, order = torch.sort(x, descending=True, stable=True)
    kept = x > float("-inf")
    kept[k:] = False
    weights = torch.where(x == x[0], 1.0, (x - x[0]).exp())
    weights = torch.where(kept, weights, 0.0)
    if p < 1.0:
        before = weights.cumsum(0) - weights
        kept[1:] &= before[1:] < p * weights.sum()
    return torch.zeros_like(kept).scatter_(0, order, kept)


def sample_top_k_top_p_reference(
    logits: torch.Tensor,
    num_rows: torch.Tensor,
    requests: Requests,
    idx_mapping: torch.Tensor,
    positions: torch.Tensor,
    logits_indices: torch.Tensor,
    out: torch.Tensor,
) -> torch.Tensor:
    """The definition of `sample_top_k_top_p`."""
    for row in range(min(int(num_rows), logits.shape[0])):
        seat = int(idx_mapping[row])
        if seat < 0:
            continue
        position = int(positions[logits_indices[row]])
        words = requests.params[seat].cpu()  # sync: the definition
        flags = int(words[_FLAGS.value])
        x = plain.processed_reference(logits[row], requests, seat, position)
        if flags & _SAMPLES.value:
            k = int(words[_K.value]) if flags & _HAS_K.value else x.numel()
            p = float(words.view(torch.float32)[_P.value])
            kept = kept_reference(x, k, p if flags & _HAS_P.value else 1.0)
            x = torch.where(kept, x, float("-inf"))
            seed = int(words.view(torch.int64)[_SEED.value // 2])
            tokens = torch.arange(x.numel(), device=x.device)
            x = x + gumbel_reference(seed, position, tokens)
        out[row] = (x == x.max()).int().argmax()
    return out


def mask_top_k_top_p_reference(
    logits: torch.Tensor, k: torch.Tensor | None, p: torch.Tensor | None
) -> torch.Tensor:
    """The definition of `mask_top_k_top_p`; returns another tensor."""
    out = logits.clone()
    for row, x in enumerate(logits):
        limit = x.numel() if k is None else int(k[row])
        share = 1.0 if p is None else float(p[row])
        out[row, ~kept_reference(x, limit, share)] = float("-inf")
    return out


# -- the parts of the kernels --------------------------------------------------------


@triton.jit
def _upper(y):
    """32 bits in the order of the values, -0.0 being 0.0, as int64."""
    bits = tl.where(y == 0.0, 0.0, y).to(tl.int32, bitcast=True)
    bits ^= (bits >> 31) & 0x7FFFFFFF
    return bits.to(tl.int64) + 2147483648


@triton.jit
def _order(y, ids):
    """A number that is larger the earlier a token comes."""
    return (_upper(y) << _TOKEN_BITS) | (ids ^ _LAST).to(tl.int64)


@triton.jit
def _value(order):
    """The logit of an order; that of none is NaN."""
    bits = ((order >> _TOKEN_BITS) - 2147483648).to(tl.int32)
    bits ^= (bits >> 31) & 0x7FFFFFFF
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _token(order):
    return ((order ^ _LAST) & _LAST).to(tl.int32)


@triton.jit
def _weight(y, peak):
    """Of a token in the mass, 1 for the largest logit, which may be infinite."""
    return tl.where(y == peak, 1.0, tl.exp(y - peak))


@triton.jit
def _mass(y, peak):
    weights = tl.where(y == _NEVER, 0.0, _weight(y, peak))
    return tl.sum(weights, axis=0).to(tl.float64)


@triton.jit
def _raced(y, ids, begun, best):
    """The best score of a block, and its token; or less than ``best``."""
    score = tl.full((), _NEVER, tl.float32)
    winner = tl.full((), _NOWHERE, tl.int32)
    h = _hash(begun, ids)
    # Noise is at most -log(u). As in `sample`: only where u is small enough for a
    # logit are logarithms worth it; comparisons with NaN must not skip.
    u = ((h >> 9) | 0x3F800000).to(tl.float32, bitcast=True)
    offset = (best - tl.abs(best) * _ROUNDING) * _LOG2E - 0.01
    lost = (u >= tl.exp2(y * _LOG2E - offset) + 1.00000012) | (y == _NEVER)
    if tl.min(lost.to(tl.int32), axis=0) == 0:
        scores = y + _noise(h)
        score = tl.max(scores, axis=0)
        winner = tl.min(tl.where(scores == score, ids, _NOWHERE), axis=0)
    return score, winner


@triton.jit
def _witness(tops, weights, need):
    """A bound on the upper bits of all that can be kept.

    The largest logits of groups are tokens themselves. Where those above a bound
    weigh ``need``, what is below it comes too late. 0 if all together weigh less.
    """
    upper = _upper(tops)
    have = tl.sum(weights, axis=0)
    low = tl.full((), 0, tl.int64)
    if have >= need:
        high = tl.max(upper, axis=0) + 1
        low = tl.min(tl.where(tops == _NEVER, high, upper), axis=0)
        while (high - low > 1) & (have != need):
            middle = (low + high) // 2
            above = tl.sum(tl.where(upper >= middle, weights, 0.0), axis=0)
            if above >= need:
                low = middle
                have = above
            else:
                high = middle
    return low


@triton.jit
def _choose(tops, bound, chosen_ptr, GROUPS: tl.constexpr):
    """Leave the groups that have a token from ``bound`` on; return how many."""
    at = tl.arange(0, GROUPS)
    has = (_upper(tops) >= (bound >> _TOKEN_BITS)) & (tops > _NEVER)
    one = has.to(tl.int32)
    place = tl.cumsum(one, axis=0) - one
    tl.debug_barrier()  # a former choice has been read
    tl.store(chosen_ptr + place, at, mask=has)
    tl.debug_barrier()
    return tl.sum(one, axis=0)


@triton.jit
def _chosen(step, number, chosen_ptr, source, GROUP: tl.constexpr, WIDE: tl.constexpr):
    """Logits and tokens of the next groups of a choice."""
    row_ptr, vocab_size, flags, temperature, params_ptr, planes = source
    at = step * (WIDE // GROUP) + tl.arange(0, WIDE // GROUP)
    there = (at < number)[:, None]
    group = tl.load(chosen_ptr + at, mask=at < number, other=0)
    ids = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    whole = vocab_size & -8
    x = tl.load(row_ptr + ids, mask=there & (ids // 8 < whole // 8), other=_NEVER)
    x = x.to(tl.float32)
    inside = there & (ids < vocab_size)
    if whole != vocab_size:
        rest = tl.load(row_ptr + ids, mask=inside & (ids >= whole), other=_NEVER)
        x = tl.where(ids < whole, x, rest.to(tl.float32))
    if flags & (_HAS_LIST | _HAS_PENALTIES):
        prompt_bits_ptr, output_bits_ptr, listed_bits_ptr, counts_ptr = planes
        if flags & _HAS_LIST:
            x = tl.where(_bit(listed_bits_ptr, ids, inside), _NEVER, x)
        if flags & _HAS_PENALTIES:
            output = _bit(output_bits_ptr, ids, inside)
            counts = tl.load(counts_ptr + ids, mask=output & inside, other=0)
            used = _bit(prompt_bits_ptr, ids, inside) | (counts > 0)
            x = _penalized(x, used, counts, params_ptr)
    y = _over(tl.where(inside & (x == x), x, _NEVER), temperature)
    return tl.reshape(y, (WIDE,)), tl.reshape(ids, (WIDE,))


@triton.jit
def _bit(plane_ptr, ids, inside):
    octets_ptr = plane_ptr.to(tl.pointer_type(tl.uint8)) + (ids >> 3)
    octet = tl.load(octets_ptr, mask=inside, other=0).to(tl.int32)
    return ((octet >> (ids & 7)) & 1) != 0


@triton.jit
def _entries(step, source, BLOCK: tl.constexpr):
    """Logits and tokens of a block of the list."""
    row_ptr, flags, temperature, params_ptr, planes, stops = source
    at = step * BLOCK + tl.arange(0, BLOCK)
    x, ids = _listed(at, row_ptr, flags, params_ptr, planes, stops)
    return _over(tl.where(x == x, x, _NEVER), temperature), ids


@triton.jit
def _read(
    step,
    number,
    chosen_ptr,
    source,
    listed_source,
    GROUP: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Logits and tokens of the next groups of a choice, and then of the list."""
    listed_from = tl.cdiv(number, WIDE // GROUP)
    if step < listed_from:
        y, ids = _chosen(step, number, chosen_ptr, source, GROUP, WIDE)
    else:
        y, ids = _entries(step - listed_from, listed_source, WIDE)
    return y, ids


@triton.jit
def _collect(y, ids, bound, peak, count, keys_ptr, weights_ptr, MOST: tl.constexpr):
    """Leave what comes from ``bound`` on beside ``count`` others."""
    key = _order(y, ids)
    inside = (key >= bound) & (y > _NEVER)
    one = inside.to(tl.int32)
    place = count + tl.cumsum(one, axis=0) - one
    inside &= place < MOST
    tl.store(keys_ptr + place, key, mask=inside)
    tl.store(weights_ptr + place, _weight(y, peak), mask=inside)
    return count + tl.sum(one, axis=0)


@triton.jit
def _kept(keys_ptr, weights_ptr, count, k, p, total, has_k, has_p, MOST: tl.constexpr):
    """Of all candidates, their order and whether they are kept.

    ``total``: the mass of which ``p`` counts; negative: of those that ``k`` keeps.
    """
    at = tl.arange(0, MOST)
    inside = at < count
    key = tl.load(keys_ptr + at, mask=inside, other=-1)
    rank = tl.zeros((MOST,), tl.int32)
    mass = tl.zeros((MOST,), tl.float32)
    for j in range(0, count, _PAIRS):
        pair = j + tl.arange(0, _PAIRS)
        its_key = tl.load(keys_ptr + pair, mask=pair < count, other=-1)
        its_weight = tl.load(weights_ptr + pair, mask=pair < count, other=0.0)
        before = its_key[None, :] > key[:, None]
        rank += tl.sum(before.to(tl.int32), axis=1)
        mass += tl.sum(tl.where(before, its_weight[None, :], 0.0), axis=1)
    kept = inside
    if has_k:
        kept &= rank < k
    if has_p:
        weight = tl.load(weights_ptr + at, mask=inside, other=0.0)
        of = tl.where(total < 0.0, tl.sum(tl.where(kept, weight, 0.0), axis=0), total)
        kept &= (mass < p * of) | (rank == 0)
    return key, kept


@triton.jit
def _counted(y, ids, prefix, shift):
    """How many tokens of a prefix have each value in the next byte."""
    key = _order(y, ids)
    inside = ((key >> (shift + 8)) == prefix) & (y > _NEVER)
    return tl.histogram(((key >> shift) & 255).to(tl.int32), 256, mask=inside)


@triton.jit
def _narrowed(counts, prefix, shift, k):
    """The byte of the k-th token of a prefix, and how many remain to be found.

    Returns the longer prefix, what of ``k`` is left in it, and the order of the last
    token if that is known: that is, if all of the prefix is kept, else -1.
    """
    digits = tl.arange(0, 256)
    from_here = tl.sum(counts, axis=0) - tl.cumsum(counts, axis=0) + counts
    digit = tl.max(tl.where(from_here >= k, digits, -1), axis=0)
    left = k - tl.sum(tl.where(digits > digit, counts, 0), axis=0)
    here = tl.sum(tl.where(digits == digit, counts, 0), axis=0)
    prefix = (prefix << 8) | digit.to(tl.int64)
    last = tl.where(left == here, prefix << shift, -1)
    return prefix, left, tl.where(digit < 0, 0, last)


# -- drawing -------------------------------------------------------------------------


@triton.jit(
    do_not_specialize=[
        *("bits_stride", "counts_stride", "list_stride"),
        *("vocab_size", "tiles_each", "splits"),
    ],
    do_not_specialize_on_alignment=[
        *("out_ptr", "num_rows_ptr", "idx_mapping_ptr", "positions_ptr"),
        *("logits_indices_ptr", "prompt_bits_ptr", "output_bits_ptr", "counts_ptr"),
        *("listed_bits_ptr", "listed_ptr", "bias_ptr"),
    ],
)
def _sample_top_k_top_p_kernel(
    out_ptr,  # [B] int64
    logits_ptr,  # [B, V], any float dtype
    logits_stride,
    num_rows_ptr,  # [1] int32
    idx_mapping_ptr,  # [B] seat of each row, negative: none
    positions_ptr,  # [T] int64
    logits_indices_ptr,  # [B] where in positions each row's is
    params_ptr,  # [N, WORDS] int32
    prompt_bits_ptr,  # [N, V / 32] int32
    output_bits_ptr,  # [N, V / 32] int32
    listed_bits_ptr,  # [N, V / 32] int32
    bits_stride,
    counts_ptr,  # [N, V] int32
    counts_stride,
    listed_ptr,  # [N, L] int32
    bias_ptr,  # [N, L] float32
    list_stride,
    tops_ptr,  # [B, GROUPS] float32, the largest logit
    masses_ptr,  # [B, GROUPS] float32, relative to it
    chosen_ptr,  # [B, GROUPS] int32
    scores_ptr,  # [B, SPLITS] float32
    winners_ptr,  # [B, SPLITS] int64, their order
    keys_ptr,  # [B, MOST] int64
    weights_ptr,  # [B, MOST] float32
    arrived_ptr,  # [B] int32, zeros before and after
    vocab_size,
    tiles_each,
    splits,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    SPLITS: tl.constexpr,
    MOST: tl.constexpr,
):
    WIDE: tl.constexpr = TILE // 4  # of what is read again, for fewer registers
    row = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    if row >= tl.load(num_rows_ptr):
        return
    seat = tl.load(idx_mapping_ptr + row).to(tl.int64)
    if seat < 0:
        return
    params_ptr += seat * _STRIDE
    row = row.to(tl.int64)
    row_ptr = logits_ptr + row * logits_stride
    tops_ptr += row * GROUPS
    masses_ptr += row * GROUPS
    chosen_ptr += row * GROUPS
    scores_ptr += row * SPLITS
    winners_ptr += row * SPLITS
    keys_ptr += row * MOST
    weights_ptr += row * MOST

    flags = _word(params_ptr, _FLAGS)
    samples = (flags & _SAMPLES) != 0
    has_k = (flags & _HAS_K) != 0
    has_p = (flags & _HAS_P) != 0
    has_min_p = (flags & _HAS_MIN_P) != 0
    filtered = has_k | has_p | has_min_p
    # A row either draws while it reads, or compares candidates at the end.
    races = ~(has_k | (has_p & has_min_p))
    temperature = 1.0
    begun = tl.full((), 0, tl.uint32)
    stops = 0
    if flags & (_SAMPLES | _HAS_LIST):
        position = tl.load(positions_ptr + tl.load(logits_indices_ptr + row))
        if samples:
            temperature = _float(params_ptr, _TEMPERATURE)
            begun = _begun(
                _word(params_ptr, _SEED), _word(params_ptr, _SEED + 1), position
            )
        if flags & _HAS_LIST:
            stops = (position + 1 < _word(params_ptr, _MIN_LENGTH)).to(tl.int32)

    planes = (
        prompt_bits_ptr + seat * bits_stride,
        output_bits_ptr + seat * bits_stride,
        listed_bits_ptr + seat * bits_stride,
        counts_ptr + seat * counts_stride,
    )
    tiles = tl.cdiv(vocab_size, TILE)
    if flags & _ONLY_LIST:
        tiles = 0
    first = split * tiles_each
    last = tl.minimum(first + tiles_each, tiles)

    best = tl.full((), _NEVER, tl.float32)
    winner = tl.full((), -1, tl.int64)
    lanes = tl.arange(0, TILE)
    end = tl.minimum(last * TILE, vocab_size)
    ahead = _octets(row_ptr, first * TILE + lanes, end)
    for tile in range(first, last):
        ids = tile * TILE + lanes
        x = ahead
        ahead = _octets(row_ptr, ids + TILE, end)
        x = _tile(tile * TILE, x, row_ptr, vocab_size, flags, params_ptr, planes, TILE)
        x = tl.where(x == x, x, _NEVER)
        tops = tl.max(tl.reshape(x, (TILE // GROUP, GROUP)), axis=1)
        tops = _over(tops, temperature)
        group = tile * (TILE // GROUP) + tl.arange(0, TILE // GROUP)
        if filtered:
            tl.store(tops_ptr + group, tops)
            if has_p & races:
                y = tl.reshape(_over(x, temperature), (TILE // GROUP, GROUP))
                tl.store(masses_ptr + group, tl.sum(_weight(y, tops[:, None]), axis=1))
        top = tl.max(tops, axis=0)
        if races & (top > _NEVER):
            if samples:
                if top + _MOST_NOISE > best:
                    y = _over(x, temperature)
                    score, token = _raced(y, ids, begun, best)
                    if score > best:
                        best = score
                        value = tl.max(tl.where(ids == token, y, _NEVER), axis=0)
                        winner = _order(value, token)
            elif top > best:
                best = top
                token = tl.min(tl.where(x == top, ids, _NOWHERE), axis=0)
                winner = _order(top, token)
    if races:
        tl.store(scores_ptr + split, best)
        tl.store(winners_ptr + split, winner)

    # The last program of the row to arrive finishes it.
    tl.debug_barrier()
    if splits > 1:
        if tl.atomic_add(arrived_ptr + row, 1, sem="acq_rel") != splits - 1:
            return
        tl.store(arrived_ptr + row, 0)
    source = (row_ptr, vocab_size, flags, temperature, params_ptr, planes)
    listed_planes = (
        listed_ptr + seat * list_stride,
        bias_ptr + seat * list_stride,
        prompt_bits_ptr + seat * bits_stride,
        counts_ptr + seat * counts_stride,
    )
    listed_source = (row_ptr, flags, temperature, params_ptr, listed_planes, stops)
    blocks = 0
    if flags & _HAS_LIST:
        blocks = tl.cdiv(_word(params_ptr, _LISTED), WIDE)
    peak = tl.full((), _NEVER, tl.float32)
    if races:
        at = tl.arange(0, SPLITS)
        there = at < splits
        scores = tl.load(scores_ptr + at, there, other=_NEVER, cache_modifier=".cg")
        winners = tl.load(winners_ptr + at, there, other=-1, cache_modifier=".cg")
        best = tl.max(scores, axis=0)
        token = tl.min(tl.where(scores == best, _token(winners), _NOWHERE), axis=0)
        winner = tl.max(tl.where(_token(winners) == token, winners, -1), axis=0)
    for step in range(0, blocks):
        y, ids = _entries(step, listed_source, WIDE)
        peak = tl.maximum(peak, tl.max(y, axis=0))
        if races:
            scores = y
            if samples:
                scores = y + _noise(_hash(begun, ids))
            score = tl.max(scores, axis=0)
            token = tl.min(tl.where(scores == score, ids, _NOWHERE), axis=0)
            if (score > best) | ((score == best) & (token < _token(winner))):
                best = score
                winner = tl.max(tl.where(ids == token, _order(y, ids), -1), axis=0)
    if not filtered:
        token = tl.where(best > _NEVER, _token(winner), 0)
        _give(out_ptr + row, token, flags, output_bits_ptr + seat * bits_stride)
        return

    at = tl.arange(0, GROUPS)
    there = at < tiles * (TILE // GROUP)
    tops = tl.load(tops_ptr + at, there, other=_NEVER, cache_modifier=".cg")
    peak = tl.maximum(peak, tl.max(tops, axis=0))
    if peak == _NEVER:
        token = tl.full((), 0, tl.int32)
        _give(out_ptr + row, token, flags, output_bits_ptr + seat * bits_stride)
        return
    k = _word(params_ptr, _K)
    p = _float(params_ptr, _P)
    # What is kept has an order of at least `bound`.
    bound = tl.full((), 0, tl.int64)
    if has_min_p:
        threshold = peak + tl.log(_float(params_ptr, _MIN_P))
        bound = _upper(threshold) << _TOKEN_BITS
    total = tl.full((), -1.0, tl.float64)  # of the mass, once it is known
    searches = True

    if races:
        if has_p:
            masses = tl.load(masses_ptr + at, there, other=0.0, cache_modifier=".cg")
            masses *= tl.where(tops == _NEVER, 0.0, _weight(tops, peak))
            total = tl.sum(masses, axis=0).to(tl.float64)
            for step in range(0, blocks):
                y, ids = _entries(step, listed_source, WIDE)
                total += _mass(y, peak)
            bound = winner + 1
        else:
            searches = winner < bound
    else:
        floor = bound
        if has_k:
            one = (tops > _NEVER).to(tl.float32)
            low = _witness(tops, one, k.to(tl.float32)) << _TOKEN_BITS
            bound = tl.maximum(bound, low)
        number = _choose(tops, bound, chosen_ptr, GROUPS)
        steps = tl.cdiv(number, WIDE // GROUP) + blocks
        count = 0
        if has_k & (k > MOST):
            count = MOST + 1
        step = 0
        while (step < steps) & (count <= MOST):
            y, ids = _read(step, number, chosen_ptr, source, listed_source, GROUP, WIDE)
            count = _collect(y, ids, bound, peak, count, keys_ptr, weights_ptr, MOST)
            step += 1
        tl.debug_barrier()
        if count <= MOST:
            key, kept = _kept(
                keys_ptr, weights_ptr, count, k, p, -1.0, has_k, has_p, MOST
            )
            ids = _token(key)
            scores = _value(key) + _noise(_hash(begun, ids))
            score = tl.max(tl.where(kept, scores, _NEVER), axis=0)
            token = tl.min(tl.where(kept & (scores == score), ids, _NOWHERE), axis=0)
            winner = tl.max(tl.where(ids == token, key, -1), axis=0)
            searches = False
        elif has_k:
            shift = 48
            prefix = tl.full((), 0, tl.int64)
            last_kept = tl.full((), -1, tl.int64)
            while (last_kept < 0) & (shift >= 0):
                counts = tl.zeros((256,), tl.int32)
                for step in range(0, steps):
                    y, ids = _read(
                        step, number, chosen_ptr, source, listed_source, GROUP, WIDE
                    )
                    counts += _counted(y, ids, prefix, shift)
                prefix, k, last_kept = _narrowed(counts, prefix, shift, k)
                shift -= 8
            bound = tl.maximum(floor, last_kept)

    while searches:
        # The mass of what comes from `bound` on, and the best of it.
        number = _choose(tops, bound, chosen_ptr, GROUPS)
        mass = tl.full((), 0.0, tl.float64)
        best = tl.full((), _NEVER, tl.float32)
        follower = tl.full((), -1, tl.int64)
        for step in range(0, tl.cdiv(number, WIDE // GROUP) + blocks):
            y, ids = _read(step, number, chosen_ptr, source, listed_source, GROUP, WIDE)
            key = _order(y, ids)
            y = tl.where(key >= bound, y, _NEVER)
            mass += _mass(y, peak)
            score, token = _raced(y, ids, begun, best)
            if (score > best) | ((score == best) & (token < _token(follower))):
                best = score
                follower = tl.max(tl.where(ids == token, key, -1), axis=0)
        if total < 0:
            total = mass
            winner = follower
            searches = has_p
        else:
            searches = (mass >= p * total) & (follower >= 0)
            if searches:
                winner = follower
        bound = winner + 1
    _give(out_ptr + row, _token(winner), flags, output_bits_ptr + seat * bits_stride)


# -- masking -------------------------------------------------------------------------


@triton.jit(
    do_not_specialize=["k_step", "p_step", "vocab_size", "tiles_each", "splits"],
    do_not_specialize_on_alignment=["k_ptr", "p_ptr"],
)
def _last_kept_kernel(
    logits_ptr,  # [B, V] float32
    logits_stride,
    k_ptr,  # [B] int32, every k_step
    k_step,
    p_ptr,  # [B] float32, every p_step
    p_step,
    bounds_ptr,  # [B] int64, the least order that is kept; 0: of any row
    tops_ptr,  # [B, GROUPS] float32, the largest logit
    masses_ptr,  # [B, GROUPS] float32, relative to it
    chosen_ptr,  # [B, GROUPS] int32
    keys_ptr,  # [B, MOST] int64
    weights_ptr,  # [B, MOST] float32
    arrived_ptr,  # [B] int32, zeros before and after
    vocab_size,
    tiles_each,
    splits,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    MOST: tl.constexpr,
):
    row = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    row = row.to(tl.int64)
    k = tl.load(k_ptr + row * k_step)
    p = tl.load(p_ptr + row * p_step)
    has_k = (k > 0) & (k < vocab_size)
    has_p = p < 1.0
    if ~(has_k | has_p):
        tl.store(bounds_ptr + row, tl.full((), 0, tl.int64))
        return
    row_ptr = logits_ptr + row * logits_stride
    tops_ptr += row * GROUPS
    masses_ptr += row * GROUPS
    chosen_ptr += row * GROUPS
    keys_ptr += row * MOST
    weights_ptr += row * MOST
    no_bits = row_ptr.to(tl.pointer_type(tl.int32))
    none = (no_bits, no_bits, no_bits, no_bits)
    source = (row_ptr, vocab_size, _NO_FLAGS, 1.0, no_bits, none)

    tiles = tl.cdiv(vocab_size, TILE)
    first = split * tiles_each
    last = tl.minimum(first + tiles_each, tiles)
    lanes = tl.arange(0, TILE)
    end = tl.minimum(last * TILE, vocab_size)
    ahead = _octets(row_ptr, first * TILE + lanes, end)
    for tile in range(first, last):
        y = ahead
        ahead = _octets(row_ptr, (tile + 1) * TILE + lanes, end)
        y = _tile(tile * TILE, y, row_ptr, vocab_size, _NO_FLAGS, no_bits, none, TILE)
        y = tl.where(y == y, y, _NEVER)
        y = tl.reshape(y, (TILE // GROUP, GROUP))
        tops = tl.max(y, axis=1)
        group = tile * (TILE // GROUP) + tl.arange(0, TILE // GROUP)
        tl.store(tops_ptr + group, tops)
        if ~has_k:
            tl.store(masses_ptr + group, tl.sum(_weight(y, tops[:, None]), axis=1))

    tl.debug_barrier()
    if splits > 1:
        if tl.atomic_add(arrived_ptr + row, 1, sem="acq_rel") != splits - 1:
            return
        tl.store(arrived_ptr + row, 0)
    at = tl.arange(0, GROUPS)
    inside = at < tiles * (TILE // GROUP)
    tops = tl.load(tops_ptr + at, inside, other=_NEVER, cache_modifier=".cg")
    peak = tl.max(tops, axis=0)
    if peak == _NEVER:
        tl.store(bounds_ptr + row, tl.full((), 1, tl.int64))
        return
    WIDE: tl.constexpr = TILE // 2
    total = tl.full((), 0.0, tl.float64)
    witnesses = (tops > _NEVER).to(tl.float32)
    need = k.to(tl.float32)
    if ~has_k:
        masses = tl.load(masses_ptr + at, inside, other=0.0, cache_modifier=".cg")
        witnesses = tl.where(tops == _NEVER, 0.0, _weight(tops, peak))
        total = tl.sum(masses * witnesses, axis=0).to(tl.float64)
        need = p * total.to(tl.float32) * 1.00001
    bound = _witness(tops, witnesses, need) << _TOKEN_BITS
    number = _choose(tops, bound, chosen_ptr, GROUPS)
    count = 0
    if has_k & (k > MOST):
        count = MOST + 1
    step = 0
    while (step * (WIDE // GROUP) < number) & (count <= MOST):
        y, ids = _chosen(step, number, chosen_ptr, source, GROUP, WIDE)
        count = _collect(y, ids, bound, peak, count, keys_ptr, weights_ptr, MOST)
        step += 1
    tl.debug_barrier()
    if count <= MOST:
        if has_k:
            total = tl.full((), -1.0, tl.float64)
        key, kept = _kept(
            *(keys_ptr, weights_ptr, count, k, p, total.to(tl.float32)),
            *(has_k, has_p, MOST),
        )
        bound = tl.min(tl.where(kept, key, 1 << 62), axis=0)
    else:
        if has_k:
            shift = 48
            prefix = tl.full((), 0, tl.int64)
            last_kept = tl.full((), -1, tl.int64)
            while (last_kept < 0) & (shift >= 0):
                counts = tl.zeros((256,), tl.int32)
                for step in range(0, tl.cdiv(number, WIDE // GROUP)):
                    y, ids = _chosen(step, number, chosen_ptr, source, GROUP, WIDE)
                    counts += _counted(y, ids, prefix, shift)
                prefix, k, last_kept = _narrowed(counts, prefix, shift, k)
                shift -= 8
            bound = last_kept
        if has_p:
            # Between `low`, before which there is enough, and `high`, which is kept.
            low = bound - 1
            high = (_upper(peak) << _TOKEN_BITS) | _LAST
            middle = low
            if ~has_k:
                middle = (low + high) // 2
            while high - low > 1:
                mass = tl.full((), 0.0, tl.float64)
                above = high
                below = low
                number = _choose(tops, bound, chosen_ptr, GROUPS)
                for step in range(0, tl.cdiv(number, WIDE // GROUP)):
                    y, ids = _chosen(step, number, chosen_ptr, source, GROUP, WIDE)
                    key = _order(y, ids)
                    weights = tl.where(
                        (key > middle) & (y > _NEVER), _weight(y, peak), 0.0
                    )
                    mass += tl.sum(weights, axis=0).to(tl.float64)
                    above = tl.minimum(
                        above, tl.min(tl.where(key > middle, key, high), axis=0)
                    )
                    below = tl.maximum(
                        below, tl.max(tl.where(key <= middle, key, low), axis=0)
                    )
                if has_k & (middle == bound - 1):
                    total = mass
                if mass < p * total:
                    high = below
                else:
                    low = above - 1
                middle = (low + high) // 2
            bound = tl.maximum(bound, high)
    tl.store(bounds_ptr + row, tl.maximum(bound, 1))


@triton.jit(do_not_specialize=["vocab_size"])
def _mask_kernel(
    logits_ptr,  # [B, V] float32
    logits_stride,
    bounds_ptr,  # [B] int64
    vocab_size,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    bound = tl.load(bounds_ptr + row)
    if bound == 0:
        return
    start = tl.program_id(1) * TILE
    ids = start + tl.arange(0, TILE)
    row_ptr = logits_ptr + row * logits_stride
    no_bits = row_ptr.to(tl.pointer_type(tl.int32))
    none = (no_bits, no_bits, no_bits, no_bits)
    y = _octets(row_ptr, ids, vocab_size)
    y = _tile(start, y, row_ptr, vocab_size, _NO_FLAGS, no_bits, none, TILE)
    kept = (y == y) & (_order(y, ids) >= bound)
    y = tl.where(kept, y, _NEVER)
    # As for loads: masked by eights, stores stay wide.
    whole = vocab_size & -8
    tl.store(row_ptr + ids, y, mask=(ids // 8) < (whole // 8))
    if start + TILE > whole:
        tl.store(row_ptr + ids, y, mask=(ids >= whole) & (ids < vocab_size))


# -- the launchers -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Scratch:
    """What programs of one row leave for the last one; from `make_scratch`."""

    tops: torch.Tensor
    masses: torch.Tensor
    chosen: torch.Tensor
    scores: torch.Tensor
    winners: torch.Tensor
    keys: torch.Tensor
    weights: torch.Tensor
    arrived: torch.Tensor
    bounds: torch.Tensor
    no_k: torch.Tensor
    no_p: torch.Tensor
    vocab_size: int
    tile: int
    group: int
    warps: int
    programs: int


def make_scratch(
    max_rows: int,
    vocab_size: int,
    device: torch.device | str,
    *,
    tile: int = TILE,
    group: int = GROUP,
    candidates: int = CANDIDATES,
    warps: int = WARPS,
    programs: int | None = None,
) -> Scratch:
    """Memory for the launchers, to be made once; launches that overlap need one each.

    Args:
        max_rows: The most rows of a launch.
        vocab_size: ``V``, at most ``MAX_VOCABULARY``.
        device: Where.
        tile: Tokens that are looked at together, a power of two from 64 on.
        group: Tokens of a group, a power of two, less than ``tile``.
        candidates: How many tokens are compared with each other, a power of two.
        warps: Of a program.
        programs: About how many are to run at once; by default what fills the device.

    Raises:
        ValueError: The vocabulary is too large.
    """
    if vocab_size > MAX_VOCABULARY:
        raise ValueError(
            f"the vocabulary has {vocab_size} tokens; an order of tokens has bits for "
            f"{MAX_VOCABULARY}"
        )
    device = torch.device(device)
    if programs is None:
        multiprocessors = 132
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            multiprocessors = properties.multi_processor_count
        programs = multiprocessors * PROGRAMS_PER_SM
    tiles = triton.cdiv(vocab_size, tile)
    groups = triton.next_power_of_2(tiles * (tile // group))
    splits = triton.next_power_of_2(tiles)

    def room(width: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(max_rows, width, dtype=dtype, device=device)

    return Scratch(
        tops=room(groups, torch.float32),
        masses=room(groups, torch.float32),
        chosen=room(groups, torch.int32),
        scores=room(splits, torch.float32),
        winners=room(splits, torch.int64),
        keys=room(candidates, torch.int64),
        weights=room(candidates, torch.float32),
        arrived=torch.zeros(max_rows, dtype=torch.int32, device=device),
        bounds=torch.empty(max_rows, dtype=torch.int64, device=device),
        no_k=torch.full((1,), vocab_size, dtype=torch.int32, device=device),
        no_p=torch.ones(1, dtype=torch.float32, device=device),
        vocab_size=vocab_size,
        tile=tile,
        group=group,
        warps=warps,
        programs=programs,
    )


def _split(rows: int, scratch: Scratch) -> tuple[int, int]:
    """How many tiles each program of a row reads, and how many programs there are."""
    tiles = triton.cdiv(scratch.vocab_size, scratch.tile)
    each = min(triton.cdiv(tiles * rows, scratch.programs), tiles)
    return each, triton.cdiv(tiles, each)


def _check(
    logits: torch.Tensor, dtypes: tuple[torch.dtype, ...], scratch: Scratch
) -> None:
    rows, vocab_size = logits.shape
    if logits.dtype not in dtypes or (vocab_size > 1 and logits.stride(1) != 1):
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(
            f"logits must be contiguous along the vocabulary, in one of {names}; "
            f"they are {logits.dtype} with strides {logits.stride()}"
        )
    if vocab_size != scratch.vocab_size or rows > scratch.arrived.shape[0]:
        raise ValueError(
            f"logits are [{rows}, {vocab_size}], the scratch is for "
            f"[<= {scratch.arrived.shape[0]}, {scratch.vocab_size}]"
        )


def sample_top_k_top_p(
    logits: torch.Tensor,
    num_rows: torch.Tensor,
    requests: Requests,
    idx_mapping: torch.Tensor,
    positions: torch.Tensor,
    logits_indices: torch.Tensor,
    out: torch.Tensor,
    scratch: Scratch,
) -> torch.Tensor:
    """Write the token of each row into ``out``.

    Args:
        logits: ``[B, V]`` float16, bfloat16 or float32, any stride between rows.
        num_rows: ``[1]`` int32: rows from there on are left alone.
        requests: What the requests ask for; `pack` makes rows of ``params``.
        idx_mapping: ``[B]`` int32 or int64, the seat of each row's request in
            ``requests``; a row with a negative one is left alone.
        positions: ``[T]`` int64, of the tokens of the step.
        logits_indices: ``[B]`` int32 or int64, which of ``positions`` is a row's.
        out: ``[B]`` int64.
        scratch: From `make_scratch`, for at least ``B`` rows and the same ``V``.

    Returns:
        ``out``. NaN never wins. Equal scores go to the lowest token, and a row
        without a finite logit gets token 0, as in vLLM.

    Raises:
        ValueError: Arguments do not fit together.
    """
    _check(logits, DTYPES, scratch)
    planes = (requests.prompt_bits, requests.output_bits, requests.listed_bits)
    if len({plane.stride(0) for plane in planes}) > 1:
        raise ValueError("the planes of bits of the requests differ in their stride")
    rows = logits.shape[0]
    if rows == 0:
        return out
    each, splits = _split(rows, scratch)
    _sample_top_k_top_p_kernel[(rows * splits,)](
        out,
        logits,
        logits.stride(0),
        num_rows,
        idx_mapping,
        positions,
        logits_indices,
        requests.params,
        requests.prompt_bits,
        requests.output_bits,
        requests.listed_bits,
        requests.prompt_bits.stride(0),
        requests.output_counts,
        requests.output_counts.stride(0),
        requests.listed,
        requests.bias,
        requests.listed.stride(0),
        scratch.tops,
        scratch.masses,
        scratch.chosen,
        scratch.scores,
        scratch.winners,
        scratch.keys,
        scratch.weights,
        scratch.arrived,
        scratch.vocab_size,
        each,
        splits,
        TILE=scratch.tile,
        GROUP=scratch.group,
        GROUPS=scratch.tops.shape[1],
        SPLITS=scratch.scores.shape[1],
        MOST=scratch.keys.shape[1],
        num_warps=scratch.warps,
        maxnreg=REGISTERS,
    )
    return out


def mask_top_k_top_p(
    logits: torch.Tensor,
    k: torch.Tensor | None,
    p: torch.Tensor | None,
    scratch: Scratch,
) -> torch.Tensor:
    """Write minus infinity over the logits that are not kept, in two launches.

    Args:
        logits: ``[B, V]`` float32, as probabilities are made of them; any stride
            between rows.
        k: ``[B]`` int32, or None; from ``V`` on, or below 1, all tokens are kept.
        p: ``[B]`` float32, or None; from 1 on all tokens are kept.
        scratch: From `make_scratch`, for at least ``B`` rows and the same ``V``.

    Returns:
        ``logits``. NaN becomes minus infinity in rows that have ``k`` or ``p``.

    Raises:
        ValueError: Arguments do not fit together.
    """
    _check(logits, (torch.float32,), scratch)
    rows = logits.shape[0]
    if rows == 0 or (k is None and p is None):
        return logits
    each, splits = _split(rows, scratch)
    limits = scratch.no_k if k is None else k
    shares = scratch.no_p if p is None else p
    _last_kept_kernel[(rows * splits,)](
        logits,
        logits.stride(0),
        limits,
        0 if k is None else k.stride(0),
        shares,
        0 if p is None else p.stride(0),
        scratch.bounds,
        scratch.tops,
        scratch.masses,
        scratch.chosen,
        scratch.keys,
        scratch.weights,
        scratch.arrived,
        scratch.vocab_size,
        each,
        splits,
        TILE=scratch.tile,
        GROUP=scratch.group,
        GROUPS=scratch.tops.shape[1],
        MOST=scratch.keys.shape[1],
        num_warps=scratch.warps,
        maxnreg=MASK_REGISTERS,
    )
    _mask_kernel[(rows, triton.cdiv(scratch.vocab_size, scratch.tile))](
        logits,
        logits.stride(0),
        scratch.bounds,
        scratch.vocab_size,
        TILE=scratch.tile,
        num_warps=scratch.warps,
    )
    return logits


def warm(max_rows: int, vocab_size: int, device: torch.device) -> None:
    """Compile what serving launches: one variant for each dtype of logits.

    Indices are int64, as vLLM's are; others would compile variants of their own.
    """
    requests = plain.make_requests(1, vocab_size, device)
    scratch = make_scratch(max_rows, vocab_size, device)
    row = torch.zeros(1, dtype=torch.int64, device=device)
    none = torch.zeros(1, dtype=torch.int32, device=device)
    for dtype in DTYPES:
        logits = torch.zeros(1, vocab_size, dtype=dtype, device=device)
        given = (logits, none, requests, row, row, row, row.clone())
        sample_top_k_top_p(*given, scratch)
    logits = torch.zeros(1, vocab_size, dtype=torch.float32, device=device)
    mask_top_k_top_p(logits, scratch.no_k, scratch.no_p, scratch)
