"""Choosing the next tokens from a batch of logits: one decode step of the sampler.

Timed is what turns logits into tokens, and into logprobs where those are asked for: for
vLLM's Model Runner V2 that is ``Sampler.sample`` and ``compute_topk_scores``.
"""

import functools
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

from vllm_ext.kernels import sample, top_k_top_p
from vllm_ext.microbench import compiling, reference, shapes, stock
from vllm_ext.microbench.measure import NotRun, Provider
from vllm_ext.microbench.shapes import Case, Sampling

MODES = tuple(shapes.MODES)
DTYPES = ("bf16", "fp32")

# Rows that are drawn for the check.
DRAWS = 1024
INTERPRETED_DRAWS = 32

SONIC_KEEPS = 128  # tokens, whatever top-k says


def ours(case: Case, device: str) -> Provider:
    """`vllm_ext.kernels`, which have to draw the tokens of vLLM's own kernels."""
    sampling = case.sampling
    if sampling.logprobs is not None:
        raise NotRun("logprobs have a launch of their own: see bench_logprobs")
    filters = sampling.top_k > 0 or sampling.top_p < 1
    kernel = top_k_top_p.sample_top_k_top_p if filters else sample.sample
    scratch = (top_k_top_p if filters else sample).make_scratch(
        case.batch, case.vocabulary, device
    )
    requests = sample.make_requests(case.batch, case.vocabulary, device, 1)
    for row, seed in enumerate(shapes.seeds(case).tolist()):
        packed = top_k_top_p.pack(
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            temperature=sampling.temperature,
            seed=seed,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition,
            frequency_penalty=sampling.frequency,
            presence_penalty=sampling.presence,
        )
        requests.params[row].copy_(packed)
    mask, counts = shapes.seen(case, device)
    requests.prompt_bits.copy_(shapes.bits(mask))
    requests.output_bits.copy_(shapes.bits(counts > 0))
    requests.output_counts.copy_(counts)
    number = torch.tensor([case.batch], dtype=torch.int32, device=device)
    rows = torch.arange(case.batch, dtype=torch.int32, device=device)

    def call(logits: torch.Tensor, positions: torch.Tensor) -> Any:
        # The caller keeps what a replay wrote, so each call has its own.
        out = torch.empty(case.batch, dtype=torch.int64, device=device)
        return kernel(logits, number, requests, rows, positions, rows, out, scratch)

    try:
        twin = stock.by_triton(case, device).call
    except NotRun:
        twin = None
    return Provider(call, twin=twin)


def compiled(case: Case, device: str) -> Provider:
    """The definition in PyTorch, compiled; draws by exponential noise."""
    seen = shapes.seen(case, device) if case.sampling.penalizes else None
    program = compiling.compiled(_program(case.sampling), device)
    return Provider(lambda logits, positions: program(logits, seen))


def sonic(case: Case, device: str) -> Provider:
    """sonic-sampler, its noise drawn anew each step as its users have to."""
    sampling = case.sampling
    try:
        buffer = import_module("sonic_sampler.core.buffer")
        interface = import_module("sonic_sampler.interface")
    except ImportError:
        raise NotRun("sonic-sampler is not installed; it needs Python 3.12") from None
    if case.dtype != "bf16":
        raise NotRun("sonic-sampler takes bf16 logits only")
    if sampling.logprobs is not None:
        raise NotRun("sonic-sampler gives logprobs in bf16, too coarse to be checked")
    if sampling.temperature and not 0 < sampling.top_k <= SONIC_KEEPS:
        raise NotRun("sonic-sampler keeps 128 tokens at most")
    rows = case.batch
    try:
        sampler = interface.UnshardedFusedSingular.initialize(
            vocab_size=case.vocabulary, batch_size=rows
        )
        with torch.device(device):
            buffers = buffer.SamplingBuffers.default(
                size=rows, timesteps=1, vocab_size=case.vocabulary, device=device
            )
        mask, counts = shapes.seen(case, device)
        buffers.update(
            counts=list(zip(mask.int(), counts, strict=True)),
            target_gumbel=[None] * rows,
            multiplicative=[sampling.repetition] * rows,
            frequency=[sampling.frequency] * rows,
            presence=[sampling.presence] * rows,
            biases=[None] * rows,
            temperature=[sampling.temperature] * rows,
            top_k=[sampling.top_k] * rows,
            top_p=[sampling.top_p] * rows,
            min_p=[sampling.min_p] * rows,
            top_logprobs=[0] * rows,
            bitmasks=[None] * rows,
        )
    except Exception as error:  # another version of it
        raise NotRun(f"sonic-sampler: {' '.join(str(error).split())}") from None

    def call(logits: torch.Tensor, positions: torch.Tensor) -> Any:
        if sampling.temperature:
            buffers.weights.gumbel.populate(slice(None), None, prefill=True)
        return sampler.autoregressive(logits, buffers).tokens

    return Provider(call)


PROVIDERS = {
    "stock": stock.default,
    "stock-triton": stock.without_flashinfer,
    "stock-v1": stock.v1,
    "torch.compile": compiled,
    "sonic-sampler": sonic,
    "ours": ours,
}


def bench_sample(measure: Callable[..., None], case: Case, provider: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = case.batch * case.vocabulary
    measure(
        provider,
        PROVIDERS,
        case,
        make_args=lambda number: (
            shapes.logits(case, number, device),
            shapes.positions(case, number, device),
        ),
        check=lambda prepared: check(case, prepared, device),
        check_replay=lambda args, result: check_one(case, args[0], result, device),
        set_bytes=case.logits_bytes,
        # Penalties need one bit per token of the prompt and one count of the output.
        moved_bytes=case.logits_bytes
        + (rows * 33 // 8 if case.sampling.penalizes else 0),
    )


def check(case: Case, provider: Provider, device: str) -> None:
    """Draw often from the same logits, and judge the tokens.

    Raises:
        AssertionError: They are wrong, or the logits have changed.
    """
    logits = shapes.logits(case, 0, device)
    before = logits.clone()
    draws = reference.Draws(*_distribution(case, logits, device))
    wanted = DRAWS if device == "cuda" else INTERPRETED_DRAWS
    for number in range(-(-wanted // case.batch) if case.sampling.temperature else 1):
        positions = shapes.positions(case, number, device)
        tokens = _tokens(case, logits, provider.call(logits, positions))
        draws.add(tokens)
        if provider.twin is not None:
            same = provider.twin(logits, positions) == tokens
            assert bool(same.all()), f"row {int((~same).nonzero()[0])} is not stock's"
    if case.sampling.temperature:
        draws.judge()
    assert torch.equal(logits, before), "it changes the logits"


def check_one(case: Case, logits: torch.Tensor, result: Any, device: str) -> None:
    """Judge one draw.

    Raises:
        AssertionError: It is wrong.
    """
    draws = reference.Draws(*_distribution(case, logits, device))
    draws.add(_tokens(case, logits, result))


def _tokens(case: Case, logits: torch.Tensor, result: Any) -> torch.Tensor:
    """The tokens of a result, whose logprobs are checked on the way."""
    if case.sampling.logprobs is None:
        return result
    tokens, logprobs = result
    reference.check_logprobs(logits, tokens, logprobs, case.sampling.logprobs)
    return tokens


def _distribution(
    case: Case, logits: torch.Tensor, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    seen = shapes.seen(case, device) if case.sampling.penalizes else None
    return reference.distribution(logits, case.sampling, seen)


@functools.cache
def _program(sampling: Sampling) -> Callable[..., Any]:
    """The same function for all shapes, so that it is compiled once."""

    def chosen(logits: torch.Tensor, seen: Any) -> Any:
        values = logits.float()
        if sampling.penalizes:
            mask, counts = seen
            values = reference.penalized(values, mask, counts, sampling)
        if sampling.temperature == 0:
            return values.argmax(dim=-1)
        values = values / sampling.temperature
        if sampling.min_p:
            shares = values.softmax(dim=-1)
            least = sampling.min_p * shares.max(dim=-1, keepdim=True).values
            values = values.masked_fill(shares < least, -float("inf"))
        if sampling.top_k:
            least = values.topk(sampling.top_k, dim=-1).values[:, -1:]
            values = values.masked_fill(values < least, -float("inf"))
        if sampling.top_p < 1:
            ordered, indices = values.sort(dim=-1, descending=True)
            shares = ordered.softmax(dim=-1)
            before = shares.cumsum(dim=-1) - shares
            ordered = ordered.masked_fill(before >= sampling.top_p, -float("inf"))
            values = torch.empty_like(values).scatter(-1, indices, ordered)
        shares = values.softmax(dim=-1)
        tokens = (shares / torch.empty_like(shares).exponential_()).argmax(dim=-1)
        if sampling.logprobs is None:
            return tokens
        raw = logits.float().log_softmax(dim=-1)
        drawn = raw.gather(1, tokens[:, None])
        return tokens, torch.cat((drawn, raw.topk(sampling.logprobs).values), dim=1)

    return chosen
