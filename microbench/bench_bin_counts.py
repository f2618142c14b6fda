"""Counting the tokens of requests with penalties that join, all ``batch`` at once.

Each request has had ``PROMPT`` tokens of prompt and ``OUTPUT`` generated ones, as one
that was preempted. Every 25th token is the same one.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from vllm_ext.kernels import bin_counts, sample
from vllm_ext.microbench import shapes, stock
from vllm_ext.microbench.measure import Provider
from vllm_ext.microbench.shapes import Case

MODES = ("join",)
PROMPT, OUTPUT = 1_024, 200
SMALL_PROMPT = 100
VOCABULARIES, SMALL_VOCABULARIES = (32_000, 151_936), (2_048,)

# The prompts' bits, and how often each token was generated.
Found = tuple[torch.Tensor, torch.Tensor]


def cases(*, small: bool, full: bool) -> Iterator[Case]:
    for vocabulary in SMALL_VOCABULARIES if small else VOCABULARIES:
        for batch in shapes.SMALL_BATCHES if small else shapes.BATCHES:
            if full or batch <= 32:  # more seldom join in one step
                prompt = SMALL_PROMPT if small else PROMPT
                yield Case("join", batch, vocabulary, "int32", f"prompt{prompt}")


def _lengths(case: Case) -> tuple[int, int]:
    prompt = int(case.kind.removeprefix("prompt"))
    return prompt, prompt + OUTPUT


def _tokens(case: Case, number: int, device: str) -> torch.Tensor:
    """``[batch, length]`` int32."""
    generator = torch.Generator(device).manual_seed(1_000 * number + case.batch)
    shape = (case.batch, _lengths(case)[1])
    tokens = torch.randint(
        case.vocabulary, shape, generator=generator, device=device, dtype=torch.int32
    )
    tokens[:, ::25] = 7
    return tokens


def _state(case: Case, device: str) -> tuple[Any, ...]:
    """Requests, their seats, and how long they are."""
    requests = sample.make_requests(case.batch, case.vocabulary, device, 1)
    seats = torch.arange(case.batch, device=device)
    prompts, lengths = (
        torch.full((case.batch,), length, dtype=torch.int32, device=device)
        for length in _lengths(case)
    )
    return requests, seats, prompts, lengths


def stock_v2(case: Case, device: str) -> Provider:
    """Model Runner V2."""
    stock.need_vllm()
    from vllm.v1.worker.gpu.sample.penalties import bincount

    requests, seats, prompts, lengths = _state(case, device)

    def call(tokens: torch.Tensor) -> Found:
        planes = (requests.prompt_bits, requests.output_counts)
        bincount(seats, tokens, prompts, lengths, *planes, _lengths(case)[1])
        return planes

    return Provider(call)


def ours(case: Case, device: str) -> Provider:
    """`vllm_ext.kernels.bin_counts`, which sets the bits of generated tokens too."""
    requests, seats, prompts, lengths = _state(case, device)
    longest = _lengths(case)[1]

    def call(tokens: torch.Tensor) -> Found:
        given = (seats, tokens, prompts, lengths, longest)
        bin_counts.count_tokens(*given, requests, case.vocabulary)
        return requests.prompt_bits, requests.output_counts

    return Provider(call)


PROVIDERS = {"stock": stock_v2, "ours": ours}


def bench_bin_counts(measure: Callable[..., None], case: Case, provider: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    planes = case.batch * case.vocabulary * 33 // 8
    measure(
        provider,
        PROVIDERS,
        case,
        make_args=lambda number: (_tokens(case, number, device),),
        check=functools.partial(check, case, device),
        set_bytes=4 * case.batch * _lengths(case)[1],
        # Tokens are read, counts and bits are cleared.
        moved_bytes=4 * case.batch * _lengths(case)[1] + planes,
        check_replay=lambda args, found: right(case, args[0], found),
    )


def check(case: Case, device: str, provider: Provider) -> None:
    """
    Raises:
        AssertionError: A bit or a count is another.
    """
    for number in range(2):  # what was there is cleared
        tokens = _tokens(case, number, device)
        right(case, tokens, provider.call(tokens))


def right(case: Case, tokens: torch.Tensor, found: Found) -> None:
    """
    Raises:
        AssertionError: A bit or a count is another.
    """
    prompt, _ = _lengths(case)
    bits, counts = found
    had = torch.zeros(case.batch, case.vocabulary + 31, device=tokens.device)
    had.scatter_(1, tokens[:, :prompt].long(), 1.0)
    words = shapes.bits(had[:, : case.vocabulary].bool())
    assert torch.equal(bits[:, : words.shape[1]], words), "other bits of the prompt"
    expected = torch.zeros_like(counts)
    generated = tokens[:, prompt:].long()
    expected.scatter_add_(1, generated, torch.ones_like(tokens[:, prompt:]))
    assert torch.equal(counts, expected), "other counts"
