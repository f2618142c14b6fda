"""From logits to a token: greedy, temperature, min-p, penalties, bias, in one launch.

Stock copies the logits to float32 as soon as one request has a temperature or a
penalty, and goes over the copy once more for each feature. Here each logit is read
once, as the model wrote it, and everything that a row asks for is done in registers.
The token is the one that Model Runner V2 of vLLM 0.32 and 0.33 draws from the same
logits, seed and position.

One launch. A row is cut into tiles, and its tiles are dealt to as many programs as it
takes to fill the chip; each leaves the best token of its tiles, and the last program
of a row to arrive compares them. Nobody waits for anybody. Bytes per row, beside some
80 for each program of it:

=============== ==================================== ================================
row             reads                                writes and reads back
=============== ==================================== ================================
greedy          ``V * itemsize``                     12 per program
temperature     ``V * itemsize``                     12 per program
min-p           and a tile once more if in doubt,    16 per tile
                which is rare
+ penalties     ``V / 4`` more, and 4 for each
                token that was generated
+ bias, minimum ``V / 8`` more, and 10 for each
                token of the list
allowed tokens  10 for each token of the list
=============== ==================================== ================================

Nothing is allocated and nothing that changes from step to step is a number of the
host's, so a launch can be captured in a CUDA graph: how many rows there are and what
each one asks for is read on the device. A launch for more rows than there are leaves
the other rows alone, and so it does with a row whose request is negative.

How few logarithms are needed. A token's score is its logit plus noise, and the noise
``-log(-log(1 - u))`` is never above ``-log(u)``; so a token can only win if ``u`` is
below ``exp(logit - best)``, with the best score so far. Most tiles are told to hold no
winner by their largest logit, most of the others by comparing their hashes with that
bound; what is skipped could not have won, so the token is the same.

How min-p is one pass. A token counts if it is within ``log(min_p)`` of the row's
largest logit, which is known at the end. Each tile leaves its largest logit, and the
winner among its tokens that may count as far as is known. At the end a winner that
counts stands; a tile whose winner does not count, but scored higher than the best that
does, is read again.

Source: Gumbel-max sampling; noise as in vLLM's Model Runner V2 (Murmur3, MIT licence,
Austin Appleby); skipping by bounds is ours.
"""

import dataclasses
import struct
from collections.abc import Iterable, Mapping

import torch
import triton
import triton.language as tl

TILE = 1024
WARPS = 4
# By bytes of a logit; left alone, the compiler takes 80 for 2 bytes, and spills.
REGISTERS = {2: 64, 4: 80}
PROGRAMS_PER_SM = 8  # as many as such registers leave room for
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Words of a request's parameters, 64 bytes; floats by their bits.
WORDS = 16
_FLAGS = tl.constexpr(0)
_TEMPERATURE = tl.constexpr(1)
_MIN_P = tl.constexpr(2)
_REPETITION = tl.constexpr(3)
_FREQUENCY = tl.constexpr(4)
_PRESENCE = tl.constexpr(5)
_SEED = tl.constexpr(6)  # low word, high word
_LISTED = tl.constexpr(8)
_MIN_LENGTH = tl.constexpr(9)
_STRIDE = tl.constexpr(WORDS)
_LAYOUT = struct.Struct("=i5fqii24x")  # the same, from the first to the last

# Bits of the flags.
_SAMPLES = tl.constexpr(1)
_HAS_MIN_P = tl.constexpr(2)
_HAS_PENALTIES = tl.constexpr(4)
_HAS_LIST = tl.constexpr(8)
_ONLY_LIST = tl.constexpr(16)

STOP = 1 << 30  # in an entry of a list: masked until the minimum length
_STOP = tl.constexpr(STOP)
_NOWHERE = tl.constexpr(2**31 - 1)  # above every token
_NEVER = tl.constexpr(float("-inf"))
_NO_SCORE = tl.constexpr(-(2**23))  # its bits
_LOG2E = tl.constexpr(1.4426950408889634)

# Noise is below 22.9: the smallest ``u`` is 2**-33.
_MOST_NOISE = tl.constexpr(23.0)
# What rounding can hide of a difference of logits, relative to what is subtracted:
# some 2**-21; and then a little.
_ROUNDING = tl.constexpr(4e-6)


@dataclasses.dataclass(frozen=True)
class Requests:
    """What requests ask for, by seat; ``N`` seats, on the device.

    Attributes:
        params: ``[N, WORDS]`` int32, rows as `pack` makes them.
        prompt_bits: ``[N, >= ceil(V / 32)]`` int32, bit ``v % 32`` of word ``v // 32``
            set if token ``v`` is in the prompt. vLLM's ``prompt_bin_mask``.
        output_bits: The same of tokens that may have been generated: all whose count
            is not 0, and others if that is simpler. Drawing a token sets its bit.
        output_counts: ``[N, >= V]`` int32, how often each token was generated. vLLM's
            ``output_bin_counts``.
        listed_bits: As ``prompt_bits``, of the tokens in the list.
        listed: ``[N, L]`` int32, token ids, each at most once in a row; plus `STOP` if
            the token is masked until the minimum length.
        bias: ``[N, L]`` float32, added to the logits of ``listed``.

    The planes of bits have rows of one length.

    Bits and counts matter only for requests with penalties, lists only for requests
    with ``listed``.
    """

    params: torch.Tensor
    prompt_bits: torch.Tensor
    output_bits: torch.Tensor
    output_counts: torch.Tensor
    listed_bits: torch.Tensor
    listed: torch.Tensor
    bias: torch.Tensor


def make_requests(
    seats: int, vocab_size: int, device: torch.device | str, longest_list: int = 1152
) -> Requests:
    """Zeros for ``seats`` requests, each of which is then greedy.

    ``longest_list``: as long as vLLM's longest, 1024 biases and 128 stop tokens.
    """

    def zeros(width: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.zeros(seats, width, dtype=dtype, device=device)

    words = -(-vocab_size // 32)
    return Requests(
        params=zeros(WORDS),
        prompt_bits=zeros(words),
        output_bits=zeros(words),
        output_counts=zeros(vocab_size),
        listed_bits=zeros(words),
        listed=zeros(longest_list),
        bias=zeros(longest_list, torch.float32),
    )


def pack(
    *,
    temperature: float = 0.0,
    seed: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    frequency_penalty: float = 0.0,
    presence_penalty: float = 0.0,
    listed: int = 0,
    only_listed: bool = False,
    min_length: int = 0,
) -> torch.Tensor:
    """One row of `Requests.params`, on the CPU.

    Args:
        temperature: 0 takes the likeliest token.
        seed: Any 64 bits, signed.
        min_p: Least probability, relative to the likeliest token's.
        repetition_penalty: As vLLM's parameters of these names.
        frequency_penalty:
        presence_penalty:
        listed: How many tokens of the request's list count.
        only_listed: Only tokens of the list can be drawn.
        min_length: Tokens of prompt and output before a stop token may be drawn.

    Returns:
        ``[WORDS]`` int32.
    """
    penalties = (repetition_penalty, frequency_penalty, presence_penalty)
    flags = _SAMPLES.value * (temperature != 0.0)
    flags |= _HAS_MIN_P.value * (temperature != 0.0 and min_p != 0.0)
    flags |= _HAS_PENALTIES.value * (penalties != (1.0, 0.0, 0.0))
    flags |= _HAS_LIST.value * (listed > 0)
    flags |= _ONLY_LIST.value * only_listed
    words = (flags, temperature, min_p, *penalties, seed, listed, min_length)
    return torch.frombuffer(bytearray(_LAYOUT.pack(*words)), dtype=torch.int32)


def entries(
    bias: Mapping[int, float], allowed: Iterable[int] = (), stops: Iterable[int] = ()
) -> tuple[torch.Tensor, torch.Tensor]:
    """A request's list, from what vLLM's ``SamplingParams`` hold.

    Args:
        bias: ``logit_bias``.
        allowed: ``allowed_token_ids``; with any, `pack` needs ``only_listed``.
        stops: Tokens that are masked until the minimum length.

    Returns:
        For ``Requests.listed`` and ``Requests.bias``, on the CPU.
    """
    allowed, stops = dict.fromkeys(allowed), set(stops)
    ids = list(allowed or dict.fromkeys((*bias, *sorted(stops))))
    return (
        torch.tensor([i + STOP * (i in stops) for i in ids], dtype=torch.int32),
        torch.tensor([bias.get(i, 0.0) for i in ids], dtype=torch.float32),
    )


# -- the definition ------------------------------------------------------------------


def gumbel_reference(
    seed: int, position: int | torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    """The noise of ``tokens`` at a position, float32; int64 tensors broadcast."""
    low = 0xFFFFFFFF

    def times(a: torch.Tensor, b: int) -> torch.Tensor:
        # int64 overflows from 2**63 on: multiply the halves.
        return ((a & 0xFFFF) * b + (((a >> 16) * b & 0xFFFF) << 16)) & low

    def rotated(a: torch.Tensor, by: int) -> torch.Tensor:
        return (a << by | a >> (32 - by)) & low

    h = torch.zeros_like(tokens)
    for key in (seed & low, seed >> 32 & low, position & low, None):
        k = tokens & low if key is None else tokens * 0 + key
        h = h ^ times(rotated(times(k, 0xCC9E2D51), 15), 0x1B873593)
        h = times(rotated(h, 13), 5) + 0xE6546B64 & low
    h = h ^ 16
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = times(h ^ h >> shift, factor)
    h = h ^ h >> 16
    u = (h.double() + 0.5).mul(2.0**-32).float()
    series = torch.full_like(u, 1 / 8)
    for n in range(7, 0, -1):
        series = 1 / n + u * series
    far = -torch.log(torch.clamp(1.0 - u, min=2.0**-24))
    return -torch.log(torch.where(u < 0.25, u * series, far))


def processed_reference(
    logits: torch.Tensor, requests: Requests, seat: int, position: int
) -> torch.Tensor:
    """A row as it is when a token is drawn, in the order in which vLLM goes about it.

    Args:
        logits: ``[V]``.
        requests: What the requests ask for.
        seat: The row's request.
        position: The row's.

    Returns:
        ``[V]`` float32, without noise; what min-p drops is minus infinity.
    """
    device = logits.device
    tokens = torch.arange(logits.numel(), device=device)

    def bits(plane: torch.Tensor) -> torch.Tensor:
        return (plane[tokens // 32] >> tokens % 32 & 1).bool()

    words = requests.params[seat].cpu()  # sync: the definition, not the kernel
    floats = words.view(torch.float32)
    flags = int(words[_FLAGS.value])
    x = logits.float().nan_to_num(float("-inf"), float("inf"), float("-inf"))
    if flags & _HAS_LIST.value:
        entries = requests.listed[seat, : int(words[_LISTED.value])].long()
        ids, stops = entries % STOP, entries >= STOP
        values = x[ids] + requests.bias[seat, : len(entries)]
        if position + 1 < int(words[_MIN_LENGTH.value]):
            values[stops] = float("-inf")
        if flags & _ONLY_LIST.value:
            x = torch.full_like(x, float("-inf"))
        x[ids] = values
    if flags & _HAS_PENALTIES.value:
        counts = requests.output_counts[seat, : logits.numel()]
        used = bits(requests.prompt_bits[seat]) | (counts > 0)
        repetition, frequency, presence = (
            floats[word].to(device) for word in range(3, 6)
        )
        scale = torch.where(used, repetition, 1.0)
        x = x * torch.where(x > 0, 1.0 / scale, scale)
        x = x - frequency * counts - presence * (counts > 0)
    if flags & _SAMPLES.value:
        x = x / floats[_TEMPERATURE.value].to(device)
        if flags & _HAS_MIN_P.value:
            floor = x.max() + floats[_MIN_P.value].to(device).log()
            x = torch.where(x < floor, float("-inf"), x)
    return x


def sample_reference(
    logits: torch.Tensor,
    num_rows: torch.Tensor,
    requests: Requests,
    idx_mapping: torch.Tensor,
    positions: torch.Tensor,
    logits_indices: torch.Tensor,
    out: torch.Tensor,
) -> torch.Tensor:
    """The definition of `sample`."""
    tokens = torch.arange(logits.shape[1], device=logits.device)
    for row in range(min(int(num_rows), logits.shape[0])):
        seat = int(idx_mapping[row])
        if seat < 0:
            continue
        position = int(positions[logits_indices[row]])
        x = processed_reference(logits[row], requests, seat, position)
        words = requests.params[seat].cpu()  # sync: the definition
        if int(words[_FLAGS.value]) & _SAMPLES.value:
            seed = int(words.view(torch.int64)[_SEED.value // 2])
            x = x + gumbel_reference(seed, position, tokens)
        out[row] = (x == x.max()).int().argmax()
    return out


# -- the kernel ----------------------------------------------------------------------


@triton.jit
def _word(params_ptr, word):
    return tl.load(params_ptr + word)


@triton.jit
def _float(params_ptr, word):
    return tl.load(params_ptr + word).to(tl.float32, bitcast=True)


@triton.jit
def _mixed(h, key):
    key *= 0xCC9E2D51
    key = (key << 15) | (key >> 17)
    key *= 0x1B873593
    h ^= key
    h = (h << 13) | (h >> 19)
    return h * 5 + 0xE6546B64


@triton.jit
def _begun(seed_low, seed_high, position):
    """The part of a hash that all tokens of a row share."""
    h = _mixed(tl.full((), 0, tl.uint32), seed_low.to(tl.uint32, bitcast=True))
    h = _mixed(h, seed_high.to(tl.uint32, bitcast=True))
    return _mixed(h, (position & 0xFFFFFFFF).to(tl.uint32))


@triton.jit
def _hash(begun, ids):
    h = _mixed(begun, ids.to(tl.uint32)) ^ 16
    h ^= h >> 16
    h *= 0x85EBCA6B
    h ^= h >> 13
    h *= 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def _noise(h):
    """Gumbel noise of a hash, in the very operations of vLLM's."""
    high = (h >> 16).to(tl.int32).to(tl.float32)
    low = (h & 0xFFFF).to(tl.int32).to(tl.float32)
    u = high * 1.52587890625e-05 + (low + 0.5) * 2.3283064365386963e-10
    series = 1.0 / 7.0 + u * (1.0 / 8.0)
    series = 1.0 / 6.0 + u * series
    series = 1.0 / 5.0 + u * series
    series = 1.0 / 4.0 + u * series
    series = 1.0 / 3.0 + u * series
    series = 1.0 / 2.0 + u * series
    series = 1.0 + u * series
    far = tl.log(tl.maximum(1.0 - u, 5.960464477539063e-08))
    return -tl.log(-tl.where(u < 0.25, -u * series, far))


@triton.jit
def _bits(plane_ptr, start, vocab_size, BLOCK: tl.constexpr):
    """Bits of a block of tokens. A thread has a byte's 8 neighbours anyway."""
    at = start // 8 + tl.arange(0, BLOCK // 8)
    octets = tl.load(
        plane_ptr.to(tl.pointer_type(tl.uint8)) + at,
        mask=at * 8 < vocab_size,
        other=0,
    ).to(tl.int32)
    bits = (octets[:, None] >> tl.arange(0, 8)[None, :]) & 1
    return tl.reshape(bits, (BLOCK,)) != 0


@triton.jit
def _penalized(x, used, counts, params_ptr):
    repetition = _float(params_ptr, _REPETITION)
    frequency = _float(params_ptr, _FREQUENCY)
    presence = _float(params_ptr, _PRESENCE)
    # The branch keeps the two products in blocks of their own, as in vLLM's kernel:
    # else the compiler fuses the first one with the subtraction, not the second.
    if repetition != 1.0:
        scale = tl.where(used, repetition, 1.0)
        x *= tl.where(x > 0, 1.0 / scale, scale)
    x -= frequency * counts
    x -= presence * (counts > 0)
    return x


@triton.jit
def _tile(
    start, x, row_ptr, vocab_size, flags, params_ptr, planes, BLOCK: tl.constexpr
):
    """Logits of a block of tokens before the temperature; those of the list are -inf.

    Args:
        start: The first of ``BLOCK`` tokens, a multiple of that.
        x: What `_octets` loaded for them.
    """
    prompt_bits_ptr, output_bits_ptr, listed_bits_ptr, counts_ptr = planes
    x = x.to(tl.float32)
    whole = vocab_size & -8
    ids = start + tl.arange(0, BLOCK)
    if start + BLOCK > whole:
        inside = (ids >= whole) & (ids < vocab_size)
        rest = tl.load(row_ptr + ids, mask=inside, other=_NEVER).to(tl.float32)
        x = tl.where(ids < whole, x, rest)
    if flags & _HAS_LIST:
        x = tl.where(_bits(listed_bits_ptr, start, vocab_size, BLOCK), _NEVER, x)
    if flags & _HAS_PENALTIES:
        prompt = _bits(prompt_bits_ptr, start, vocab_size, BLOCK)
        output = _bits(output_bits_ptr, start, vocab_size, BLOCK)
        counts = tl.load(counts_ptr + ids, mask=output & (ids < vocab_size), other=0)
        x = _penalized(x, prompt | (counts > 0), counts, params_ptr)
    return x


@triton.jit
def _octets(row_ptr, ids, end):
    """Logits of all eights of tokens below ``end``: masked so, loads stay wide."""
    return tl.load(row_ptr + ids, mask=(ids // 8) < (end // 8), other=_NEVER)


@triton.jit
def _listed(at, row_ptr, flags, params_ptr, planes, stops):
    """Logits before the temperature, and tokens, of a block of the list."""
    listed_ptr, bias_ptr, prompt_bits_ptr, counts_ptr = planes
    inside = at < _word(params_ptr, _LISTED)
    entries = tl.load(listed_ptr + at, mask=inside, other=0)
    ids = entries & (_STOP - 1)
    x = tl.load(row_ptr + ids, mask=inside, other=_NEVER).to(tl.float32)
    x += tl.load(bias_ptr + at, mask=inside, other=0.0)
    x = tl.where((entries >= _STOP) & (stops != 0), _NEVER, x)
    if flags & _HAS_PENALTIES:
        word = tl.load(prompt_bits_ptr + (ids >> 5), mask=inside, other=0)
        counts = tl.load(counts_ptr + ids, mask=inside, other=0)
        prompt = ((word >> (ids & 31)) & 1) != 0
        x = _penalized(x, prompt | (counts > 0), counts, params_ptr)
    return tl.where(inside, x, _NEVER), ids


@triton.jit
def _leave(record_ptr, first, second, RECORDS: tl.constexpr):
    """Two words of a record, floats by their bits."""
    tl.store(record_ptr, first.to(tl.int32, bitcast=True))
    tl.store(record_ptr + RECORDS, second.to(tl.int32, bitcast=True))


@triton.jit
def _left(record_ptr, inside):
    """A word of all records; where there is none, that of minus infinity."""
    return tl.load(record_ptr, mask=inside, other=_NO_SCORE, cache_modifier=".cg")


@triton.jit
def _scored(x, ids, flags, temperature, begun, threshold):
    """Score and token of the best of a block that is not below the threshold."""
    if flags & _SAMPLES:
        x = _over(x, temperature)
        x = tl.where(x < threshold, _NEVER, x + _noise(_hash(begun, ids)))
    score = tl.max(x, axis=0)
    return score, tl.min(tl.where(x == score, ids, _NOWHERE), axis=0)


@triton.jit
def _give(out_ptr, token, flags, output_bits_ptr):
    """The row's token; its count, which others keep, is worth reading from now on."""
    tl.store(out_ptr, token.to(tl.int64))
    if flags & _HAS_PENALTIES:
        octet_ptr = output_bits_ptr.to(tl.pointer_type(tl.uint8)) + (token >> 3)
        octet = tl.load(octet_ptr).to(tl.int32) | (1 << (token & 7))
        tl.store(octet_ptr, octet.to(tl.uint8))


@triton.jit
def _over(x, temperature):
    """A logit at a temperature; vLLM leaves those at 1 alone."""
    if temperature != 1.0:
        x = x / temperature
    return x


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
def _sample_kernel(
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
    records_ptr,  # [B, 4, RECORDS] int32: score, token, its logit, largest logit
    arrived_ptr,  # [B] int32, zeros before and after
    vocab_size,
    tiles_each,
    splits,
    TILE: tl.constexpr,
    RECORDS: tl.constexpr,
):
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
    records_ptr += row * (4 * RECORDS)

    flags = _word(params_ptr, _FLAGS)
    samples = (flags & _SAMPLES) != 0
    has_min_p = (flags & _HAS_MIN_P) != 0
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
    range_of_min_p = 0.0  # of logits, before the temperature
    if has_min_p:
        range_of_min_p = tl.log(_float(params_ptr, _MIN_P)) * temperature
    # Bounds are worth computing where their rounding is understood.
    ordinary = (temperature > 1e-30) & (temperature < 1e30)
    slope = _LOG2E / temperature

    planes = (
        prompt_bits_ptr + seat * bits_stride,
        output_bits_ptr + seat * bits_stride,
        listed_bits_ptr + seat * bits_stride,
        counts_ptr + seat * counts_stride,
    )
    tiles = tl.cdiv(vocab_size, TILE)
    first = split * tiles_each
    last = tl.minimum(first + tiles_each, tiles)
    if flags & _ONLY_LIST:
        last = first

    best = tl.full((), _NEVER, tl.float32)
    token = tl.full((), _NOWHERE, tl.int32)
    # Nothing below `floor` counts; nothing that is below `reach` and no more than
    # `value` can win, nor what is no more than `value` and whose hash says so.
    floor = tl.full((), _NEVER, tl.float32)
    reach = tl.full((), _NEVER, tl.float32)
    value = tl.full((), float("inf"), tl.float32)
    offset = tl.full((), _NEVER, tl.float32)
    peak = tl.full((), _NEVER, tl.float32)
    lanes = tl.arange(0, TILE)
    end = tl.minimum(last * TILE, vocab_size)
    ahead = _octets(row_ptr, first * TILE + lanes, end)
    for tile in range(first, last):
        ids = tile * TILE + lanes
        x = ahead
        ahead = _octets(row_ptr, ids + TILE, end)
        x = _tile(tile * TILE, x, row_ptr, vocab_size, flags, params_ptr, planes, TILE)
        top = tl.max(x, axis=0)  # NaN is dropped, here and wherever scores are compared
        score = tl.full((), _NEVER, tl.float32)
        winner = tl.full((), _NOWHERE, tl.int32)
        its_value = tl.full((), _NEVER, tl.float32)
        if has_min_p:
            peak = tl.maximum(peak, top)
            floor = peak + range_of_min_p
            floor -= (tl.abs(peak) + tl.abs(range_of_min_p)) * _ROUNDING
            # Where logits overflow at their temperature, different ones are equal.
            if (not ordinary) | (tl.abs(peak) > temperature * 1e38):
                floor = _NEVER
        # Comparisons with NaN, which infinities make of bounds, must not skip.
        hopeless = (top < floor) | ((top <= value) & (top < reach)) | (top == _NEVER)
        if not hopeless:
            if samples:
                h = _hash(begun, ids)
                # The hash as a float from 1 on is at most 2**-23 below 1 + u.
                u = ((h >> 9) | 0x3F800000).to(tl.float32, bitcast=True)
                bound = tl.exp2(x * slope - offset) + 1.00000012
                lost = ((u >= bound) & (x <= value)) | (x < floor)
                if tl.min(lost.to(tl.int32), axis=0) == 0:
                    scores = _over(x, temperature) + _noise(h)
                    scores = tl.where(x < floor, _NEVER, scores)
                    score = tl.max(scores, axis=0)
                    at_top = scores == score
                    winner = tl.min(tl.where(at_top, ids, _NOWHERE), axis=0)
                    if has_min_p:
                        its_value = tl.max(tl.where(ids == winner, x, _NEVER), axis=0)
            else:
                score = top
                winner = tl.min(tl.where(x == top, ids, _NOWHERE), axis=0)
            # With min-p, what holds others back has to count itself.
            if (score > best) | ((score > _NEVER) & (value < floor)):
                best = score
                token = winner
                if has_min_p:
                    value = its_value
                if samples:
                    slack = tl.abs(best) * _ROUNDING
                    reach = (best - _MOST_NOISE - slack) * temperature
                    reach -= tl.abs(reach) * _ROUNDING
                    offset = (best - slack) * _LOG2E - 0.01
                    if not ordinary:
                        reach = _NEVER
                        offset = _NEVER
                else:
                    reach = best
        if has_min_p:
            _leave(records_ptr + tile, score, winner, RECORDS)
            _leave(records_ptr + 2 * RECORDS + tile, its_value, top, RECORDS)
    if not has_min_p:
        _leave(records_ptr + split, best, token, RECORDS)

    # The last program of the row to arrive finishes it.
    tl.debug_barrier()
    if splits > 1:
        if tl.atomic_add(arrived_ptr + row, 1, sem="acq_rel") != splits - 1:
            return
        tl.store(arrived_ptr + row, 0)
    at = tl.arange(0, RECORDS)
    block = tl.arange(0, TILE // 8)
    list_planes = (
        listed_ptr + seat * list_stride,
        bias_ptr + seat * list_stride,
        prompt_bits_ptr + seat * bits_stride,
        counts_ptr + seat * counts_stride,
    )
    listed = 0
    if flags & _HAS_LIST:
        listed = _word(params_ptr, _LISTED)
    records = splits
    if has_min_p:
        records = tiles
    if flags & _ONLY_LIST:
        records = 0
    inside = at < records
    scores = _left(records_ptr + at, inside).to(tl.float32, bitcast=True)
    tokens = _left(records_ptr + RECORDS + at, inside)
    stands = inside
    doubt = inside
    threshold = tl.full((), _NEVER, tl.float32)
    if has_min_p:
        values = _left(records_ptr + 2 * RECORDS + at, inside)
        maxima = _left(records_ptr + 3 * RECORDS + at, inside)
        values = values.to(tl.float32, bitcast=True)
        maxima = maxima.to(tl.float32, bitcast=True)
        peak = tl.max(maxima, axis=0)
        for j in range(0, listed, TILE // 8):
            x, ids = _listed(j + block, row_ptr, flags, params_ptr, list_planes, stops)
            peak = tl.maximum(peak, tl.max(x, axis=0))
        threshold = _over(peak, temperature) + tl.log(_float(params_ptr, _MIN_P))
        stands = ~(_over(values, temperature) < threshold)
        doubt = ~stands & ~(_over(maxima, temperature) < threshold)
    best = tl.max(tl.where(stands, scores, _NEVER), axis=0)
    token = tl.min(tl.where(stands & (scores == best), tokens, _NOWHERE), axis=0)
    for j in range(0, listed, TILE // 8):
        x, ids = _listed(j + block, row_ptr, flags, params_ptr, list_planes, stops)
        score, winner = _scored(x, ids, flags, temperature, begun, threshold)
        if (score > best) | ((score == best) & (winner < token)):
            best = score
            token = winner
    if has_min_p:
        doubt &= scores > _NEVER
        tile = tl.min(tl.where(doubt & (scores >= best), at, RECORDS), axis=0)
        while tile < RECORDS:
            for j in range(0, TILE, TILE // 8):
                start = tile * TILE + j
                ids = start + block
                x = _octets(row_ptr, ids, vocab_size)
                x = _tile(
                    *(start, x, row_ptr, vocab_size, flags, params_ptr, planes),
                    TILE // 8,
                )
                score, winner = _scored(x, ids, flags, temperature, begun, threshold)
                if (score > best) | ((score == best) & (winner < token)):
                    best = score
                    token = winner
            left = doubt & (scores >= best) & (at > tile)
            tile = tl.min(tl.where(left, at, RECORDS), axis=0)
    if best == _NEVER:
        token = 0
    _give(out_ptr + row, token, flags, output_bits_ptr + seat * bits_stride)


# -- the launcher --------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Scratch:
    """What programs of one row leave for the last one; from `make_scratch`."""

    records: torch.Tensor
    arrived: torch.Tensor
    vocab_size: int
    tile: int
    warps: int
    programs: int


def make_scratch(
    max_rows: int,
    vocab_size: int,
    device: torch.device | str,
    *,
    tile: int = TILE,
    warps: int = WARPS,
    programs: int | None = None,
) -> Scratch:
    """Memory for `sample`, to be made once; launches that overlap need one each.

    Args:
        max_rows: The most rows of a launch.
        vocab_size: ``V``.
        device: Where.
        tile: Tokens that are looked at together, a power of two from 64 on.
        warps: Of a program.
        programs: About how many are to run at once; by default what fills the device.
    """
    device = torch.device(device)
    if programs is None:
        multiprocessors = 132
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            multiprocessors = properties.multi_processor_count
        programs = multiprocessors * PROGRAMS_PER_SM
    records = triton.next_power_of_2(triton.cdiv(vocab_size, tile))

    return Scratch(
        records=torch.empty(max_rows, 4, records, dtype=torch.int32, device=device),
        arrived=torch.zeros(max_rows, dtype=torch.int32, device=device),
        vocab_size=vocab_size,
        tile=tile,
        warps=warps,
        programs=programs,
    )


def sample(
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
        requests: What the requests ask for.
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
    planes = (requests.prompt_bits, requests.output_bits, requests.listed_bits)
    if len({plane.stride(0) for plane in planes}) > 1:
        raise ValueError("the planes of bits of the requests differ in their stride")
    if rows == 0:
        return out
    tiles = triton.cdiv(vocab_size, scratch.tile)
    tiles_each = triton.cdiv(tiles * rows, scratch.programs)
    splits = triton.cdiv(tiles, tiles_each)
    _sample_kernel[(rows * splits,)](
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
        scratch.records,
        scratch.arrived,
        vocab_size,
        min(tiles_each, tiles),
        splits,
        TILE=scratch.tile,
        RECORDS=scratch.records.shape[2],
        num_warps=scratch.warps,
        maxnreg=REGISTERS[logits.dtype.itemsize],
    )
    return out


def warm(max_rows: int, vocab_size: int, device: torch.device) -> None:
    """Compile what serving launches: one variant for each dtype of logits.

    Indices are int64, as vLLM's are; others would compile variants of their own.
    """
    requests = make_requests(1, vocab_size, device)
    scratch = make_scratch(max_rows, vocab_size, device)
    row = torch.zeros(1, dtype=torch.int64, device=device)
    none = torch.zeros(1, dtype=torch.int32, device=device)
    for dtype in DTYPES:
        logits = torch.zeros(1, vocab_size, dtype=dtype, device=device)
        sample(logits, none, requests, row, row, row, row.clone(), scratch)
