"""Which tokens a request has had, and how often: what penalties and biases look at.

Stock counts the tokens of requests that join with a copy of their seats to the device,
two fills and a kernel. Here it is two launches: one clears the rows of the requests,
and one goes over their tokens. `count_tokens` also sets the bits of generated tokens,
which tell `vllm_ext.kernels.sample` what counts are worth reading.

While a request decodes nothing is to be done: whoever takes its tokens down counts
them, as stock's ``post_update`` does, and drawing one sets its bit. Where somebody else
drew tokens, `bits_of_counts` sets the bits anew; where a request brings a list of
tokens, `bits_of_lists` sets theirs. A launch each.

=================== ============================== ==========================
launch              reads per request              writes
=================== ============================== ==========================
`count_tokens`      4 for each token it has had    ``V * 17 / 4``, and 4 to 8
                                                   for each token
`bits_of_counts`    ``V * 4``                      ``V / 8``
`bits_of_lists`     4 for each token of the list   ``V / 8``, 4 for each
=================== ============================== ==========================

Nothing is allocated and nothing read back; `bits_of_counts` reads on the device how
many rows there are, whose they are and which of them have penalties, so that it can be
captured.

Source: vLLM's ``bincount`` in Model Runner V2.
"""

import torch
import triton
import triton.language as tl

from vllm_ext.kernels.sample import (
    _FLAGS,
    _HAS_LIST,
    _HAS_PENALTIES,
    _LISTED,
    _STOP,
    _STRIDE,
    STOP,
    Requests,
    _word,
    make_requests,
)

BLOCK = 4096  # tokens of the vocabulary that a program looks at
TOKENS = 1024  # tokens of a request that a program looks at
WARPS = 4


# -- the definition ------------------------------------------------------------------


def _set_bits(plane: torch.Tensor, tokens: torch.Tensor) -> None:
    """Set the bits of ``tokens`` in one row of a plane."""
    for token in set(tokens.tolist()):  # sync: the definition
        bit = 1 << token % 32
        plane[token // 32] |= bit - 2**32 if bit == 2**31 else bit


def count_tokens_reference(
    seats: torch.Tensor,
    tokens: torch.Tensor,
    prompt_lengths: torch.Tensor,
    lengths: torch.Tensor,
    longest: int,
    requests: Requests,
    vocab_size: int,
) -> None:
    """The definition of `count_tokens`."""
    for seat in seats.tolist():  # sync: the definition
        had = tokens[seat, : int(lengths[seat])].long()
        known = (had >= 0) & (had < vocab_size)
        prompt = torch.arange(len(had), device=had.device) < prompt_lengths[seat]
        generated = had[known & ~prompt]
        requests.output_counts[seat, :vocab_size] = torch.bincount(
            generated, minlength=vocab_size
        ).to(torch.int32)
        for plane, those in (
            (requests.prompt_bits, had[known & prompt]),
            (requests.output_bits, generated),
        ):
            plane[seat, : -(-vocab_size // 32)] = 0
            _set_bits(plane[seat], those)


def bits_of_counts_reference(
    num_rows: torch.Tensor,
    idx_mapping: torch.Tensor,
    requests: Requests,
    vocab_size: int,
) -> None:
    """The definition of `bits_of_counts`."""
    for seat in idx_mapping[: int(num_rows)].tolist():  # sync: the definition
        if seat < 0 or not requests.params[seat, _FLAGS.value] & _HAS_PENALTIES.value:
            continue
        requests.output_bits[seat, : -(-vocab_size // 32)] = 0
        counts = requests.output_counts[seat, :vocab_size]
        counted = (counts > 0).nonzero()[:, 0]  # sync: the definition
        _set_bits(requests.output_bits[seat], counted)


def bits_of_lists_reference(
    seats: torch.Tensor, requests: Requests, vocab_size: int
) -> None:
    """The definition of `bits_of_lists`."""
    for seat in seats.tolist():  # sync: the definition
        requests.listed_bits[seat, : -(-vocab_size // 32)] = 0
        count = int(requests.params[seat, _LISTED.value])
        if requests.params[seat, _FLAGS.value] & _HAS_LIST.value:
            entries = requests.listed[seat, :count]
            _set_bits(requests.listed_bits[seat], entries % STOP)


# -- the kernels ---------------------------------------------------------------------


@triton.jit(do_not_specialize=["bits_stride", "counts_stride", "vocab_size"])
def _clear_kernel(
    seats_ptr,  # [n] int64
    prompt_bits_ptr,  # [N, V / 32] int32
    output_bits_ptr,  # [N, V / 32] int32
    bits_stride,
    counts_ptr,  # [N, V] int32
    counts_stride,
    vocab_size,
    BLOCK: tl.constexpr,
):
    seat = tl.load(seats_ptr + tl.program_id(0)).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    ids = start + tl.arange(0, BLOCK)
    counts_ptr += seat * counts_stride
    tl.store(counts_ptr + ids, tl.zeros((BLOCK,), tl.int32), mask=ids < vocab_size)
    words = start // 32 + tl.arange(0, BLOCK // 32)
    none = tl.zeros((BLOCK // 32,), tl.int32)
    inside = words * 32 < vocab_size
    tl.store(prompt_bits_ptr + seat * bits_stride + words, none, mask=inside)
    tl.store(output_bits_ptr + seat * bits_stride + words, none, mask=inside)


@triton.jit
def _set(plane_ptr, ids, inside):
    """Set the bits of tokens in a row of a plane; some may be the same."""
    bit = tl.full(ids.shape, 1, tl.int32) << (ids & 31)
    tl.atomic_or(plane_ptr + (ids >> 5), bit, mask=inside, sem="relaxed")


@triton.jit(
    do_not_specialize=["tokens_stride", "bits_stride", "counts_stride", "vocab_size"]
)
def _count_kernel(
    seats_ptr,  # [n] int64
    tokens_ptr,  # [N, longest] int32
    tokens_stride,
    prompt_lengths_ptr,  # [N] int32
    lengths_ptr,  # [N] int32
    prompt_bits_ptr,  # [N, V / 32] int32
    output_bits_ptr,  # [N, V / 32] int32
    bits_stride,
    counts_ptr,  # [N, V] int32
    counts_stride,
    vocab_size,
    TOKENS: tl.constexpr,
):
    seat = tl.load(seats_ptr + tl.program_id(0)).to(tl.int64)
    start = tl.program_id(1) * TOKENS
    length = tl.load(lengths_ptr + seat)
    if start >= length:
        return
    prompt_length = tl.load(prompt_lengths_ptr + seat)
    at = start + tl.arange(0, TOKENS)
    ids = tl.load(tokens_ptr + seat * tokens_stride + at, mask=at < length, other=-1)
    known = (ids >= 0) & (ids < vocab_size)
    if start < prompt_length:
        inside = known & (at < prompt_length)
        _set(prompt_bits_ptr + seat * bits_stride, ids, inside)
    if start + TOKENS > prompt_length:
        inside = known & (at >= prompt_length)
        _set(output_bits_ptr + seat * bits_stride, ids, inside)
        counts_ptr += seat * counts_stride
        one = tl.full((TOKENS,), 1, tl.int32)
        tl.atomic_add(counts_ptr + ids, one, mask=inside, sem="relaxed")


@triton.jit(
    do_not_specialize=["bits_stride", "counts_stride", "vocab_size"],
    do_not_specialize_on_alignment=["num_rows_ptr", "idx_mapping_ptr"],
)
def _bits_of_counts_kernel(
    num_rows_ptr,  # [1] int32
    idx_mapping_ptr,  # [B] seat of each row, negative: none
    params_ptr,  # [N, WORDS] int32
    output_bits_ptr,  # [N, V / 32] int32
    bits_stride,
    counts_ptr,  # [N, V] int32
    counts_stride,
    vocab_size,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    if row >= tl.load(num_rows_ptr):
        return
    seat = tl.load(idx_mapping_ptr + row).to(tl.int64)
    if seat < 0:
        return
    if (_word(params_ptr + seat * _STRIDE, _FLAGS) & _HAS_PENALTIES) == 0:
        return
    start = tl.program_id(1) * BLOCK
    ids = start + tl.arange(0, BLOCK)
    counts_ptr += seat * counts_stride
    counts = tl.load(counts_ptr + ids, mask=ids < vocab_size, other=0)
    seen = tl.reshape((counts > 0).to(tl.int32), (BLOCK // 8, 8))
    octets = tl.sum(seen << tl.arange(0, 8)[None, :], axis=1)
    at = start // 8 + tl.arange(0, BLOCK // 8)
    plane_ptr = (output_bits_ptr + seat * bits_stride).to(tl.pointer_type(tl.uint8))
    tl.store(plane_ptr + at, octets.to(tl.uint8), mask=at * 8 < vocab_size)


@triton.jit(do_not_specialize=["bits_stride", "list_stride", "vocab_size"])
def _bits_of_lists_kernel(
    seats_ptr,  # [n] int64
    params_ptr,  # [N, WORDS] int32
    listed_bits_ptr,  # [N, V / 32] int32
    bits_stride,
    listed_ptr,  # [N, L] int32
    list_stride,
    vocab_size,
    BLOCK: tl.constexpr,
):
    seat = tl.load(seats_ptr + tl.program_id(0)).to(tl.int64)
    plane_ptr = listed_bits_ptr + seat * bits_stride
    at = tl.arange(0, BLOCK)
    for start in range(0, tl.cdiv(vocab_size, 32), BLOCK):
        inside = (start + at) * 32 < vocab_size
        tl.store(plane_ptr + start + at, tl.zeros((BLOCK,), tl.int32), mask=inside)
    params_ptr += seat * _STRIDE
    listed = 0
    if _word(params_ptr, _FLAGS) & _HAS_LIST:
        listed = _word(params_ptr, _LISTED)
    tl.debug_barrier()
    for start in range(0, listed, BLOCK):
        inside = start + at < listed
        entries = tl.load(
            listed_ptr + seat * list_stride + start + at, mask=inside, other=0
        )
        _set(plane_ptr, entries & (_STOP - 1), inside)


# -- the launchers -------------------------------------------------------------------


def count_tokens(
    seats: torch.Tensor,
    tokens: torch.Tensor,
    prompt_lengths: torch.Tensor,
    lengths: torch.Tensor,
    longest: int,
    requests: Requests,
    vocab_size: int,
) -> None:
    """Count the tokens of requests that join, in two launches.

    Args:
        seats: ``[n]`` int64, of these requests, each once.
        tokens: ``[N, >= longest]`` int32, the tokens that a request has had; those
            outside of the vocabulary do not count.
        prompt_lengths: ``[N]`` int32: the first of them are its prompt.
        lengths: ``[N]`` int32, of prompt and generated tokens.
        longest: No length of these requests is larger.
        requests: Their ``prompt_bits``, ``output_bits`` and ``output_counts`` are
            written anew.
        vocab_size: ``V``.
    """
    if len(seats) == 0:
        return
    planes = (
        requests.prompt_bits,
        requests.output_bits,
        requests.prompt_bits.stride(0),
        requests.output_counts,
        requests.output_counts.stride(0),
        vocab_size,
    )
    _clear_kernel[(len(seats), triton.cdiv(vocab_size, BLOCK))](
        seats, *planes, BLOCK=BLOCK, num_warps=WARPS
    )
    if longest > 0:
        _count_kernel[(len(seats), triton.cdiv(longest, TOKENS))](
            *(seats, tokens, tokens.stride(0), prompt_lengths, lengths, *planes),
            TOKENS=TOKENS,
            num_warps=WARPS,
        )


def bits_of_counts(
    num_rows: torch.Tensor,
    idx_mapping: torch.Tensor,
    requests: Requests,
    vocab_size: int,
) -> None:
    """Set the bits of all tokens whose count is not 0, and no others.

    Args:
        num_rows: ``[1]`` int32: rows from there on are left alone.
        idx_mapping: ``[B]`` int32 or int64, the seat of each row's request; a row with
            a negative one is left alone, and so is one without penalties.
        requests: Whose ``output_bits`` are written.
        vocab_size: ``V``.
    """
    rows = len(idx_mapping)
    if rows == 0:
        return
    _bits_of_counts_kernel[(rows, triton.cdiv(vocab_size, BLOCK))](
        num_rows,
        idx_mapping,
        requests.params,
        requests.output_bits,
        requests.output_bits.stride(0),
        requests.output_counts,
        requests.output_counts.stride(0),
        vocab_size,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )


def bits_of_lists(seats: torch.Tensor, requests: Requests, vocab_size: int) -> None:
    """Set the bits of the tokens in the lists of requests that join.

    Args:
        seats: ``[n]`` int64, of these requests, each once.
        requests: Whose ``listed_bits`` are written.
        vocab_size: ``V``.
    """
    if len(seats) == 0:
        return
    _bits_of_lists_kernel[(len(seats),)](
        seats,
        requests.params,
        requests.listed_bits,
        requests.listed_bits.stride(0),
        requests.listed,
        requests.listed.stride(0),
        vocab_size,
        BLOCK=TOKENS,
        num_warps=WARPS,
    )


def warm(max_rows: int, vocab_size: int, device: torch.device) -> None:
    """Compile what serving launches."""
    requests = make_requests(1, vocab_size, device)
    seat = torch.zeros(1, dtype=torch.int64, device=device)
    one = torch.zeros(1, dtype=torch.int32, device=device)
    count_tokens(seat, one.view(1, 1), one, one, 1, requests, vocab_size)
    bits_of_counts(one, seat, requests, vocab_size)
    bits_of_lists(seat, requests, vocab_size)
