"""Repetition, presence and frequency penalties on a batch of logits, in place.

The logits are fp32: vLLM applies penalties to the copy that it samples from.
``boolean-index`` is the way before vLLM's pull request #16436, a reproduction only.
"""

from collections.abc import Callable

import torch

from vllm_ext.bench import legacy
from vllm_ext.microbench import compiling, reference, shapes, stock
from vllm_ext.microbench.measure import NotRun, Provider
from vllm_ext.microbench.shapes import Case, Sampling

MODES = ("penalties",)
DTYPES = ("fp32",)
EVERY_PENALTY = Sampling(repetition=1.1, presence=0.5, frequency=0.25)

ROUNDING = 1e-5
WAITS = "its boolean indices make the host wait for the device"


def _legacy(form: str, uncapturable: str = "") -> Callable[[Case, str], Provider]:
    def make(case: Case, device: str) -> Provider:
        mask, counts = shapes.seen(case, device)
        appeared = counts > 0
        penalties = torch.full((case.batch,), EVERY_PENALTY.repetition, device=device)

        def call(logits: torch.Tensor) -> None:
            legacy.FORMS[form](logits, mask, appeared, penalties)
            logits -= EVERY_PENALTY.frequency * counts
            logits -= EVERY_PENALTY.presence * appeared

        return Provider(call, uncapturable)

    return make


def stock_v1(case: Case, device: str) -> Provider:
    """Model Runner V1: a CUDA op for repetition, PyTorch for the others."""
    if device == "cpu":
        raise NotRun("V1's penalties are a CUDA op, which needs a GPU")
    stock.need_vllm()
    from vllm.v1.sample.ops.penalties import apply_all_penalties

    prompts, outputs = shapes.history(case)
    prompt_ids = torch.tensor(prompts, device=device)
    repetition, presence, frequency = (
        torch.full((case.batch,), value, device=device)
        for value in (
            EVERY_PENALTY.repetition,
            EVERY_PENALTY.presence,
            EVERY_PENALTY.frequency,
        )
    )

    def call(logits: torch.Tensor) -> None:
        apply_all_penalties(
            logits, prompt_ids, presence, frequency, repetition, outputs
        )

    return Provider(call, stock.HOST_LISTS)


def stock_v2(case: Case, device: str) -> Provider:
    """Model Runner V2: one Triton kernel over counts that it keeps."""
    sampler, _ = stock.v2_states(case, device, EVERY_PENALTY)
    from vllm.v1.worker.gpu.sample.penalties import apply_penalties

    state = sampler.penalties_state
    rows = torch.arange(case.batch, dtype=torch.int32, device=device)
    tokens_in = torch.zeros(case.batch, dtype=torch.int32, device=device)
    first = torch.zeros(case.batch, dtype=torch.int32, device=device)

    def call(logits: torch.Tensor) -> None:
        apply_penalties(
            logits,
            rows,
            tokens_in,
            first,
            state.repetition_penalty.gpu,
            state.frequency_penalty.gpu,
            state.presence_penalty.gpu,
            state.prompt_bin_mask,
            state.output_bin_counts,
        )

    return Provider(call)


def compiled(case: Case, device: str) -> Provider:
    """The definition in PyTorch, compiled."""
    mask, counts = shapes.seen(case, device)
    program = compiling.compiled(_penalize, device)

    def call(logits: torch.Tensor) -> None:
        logits.copy_(program(logits, mask, counts))

    return Provider(call)


def _penalize(
    logits: torch.Tensor, mask: torch.Tensor, counts: torch.Tensor
) -> torch.Tensor:
    return reference.penalized(logits, mask, counts, EVERY_PENALTY)


PROVIDERS = {
    "stock": stock_v2,
    "stock-v1": stock_v1,
    "torch.where": _legacy("where"),
    "boolean-index": _legacy("boolean", WAITS),
    "torch.compile": compiled,
}


def bench_penalties(measure: Callable[..., None], case: Case, provider: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    elements = case.batch * case.vocabulary
    measure(
        provider,
        PROVIDERS,
        case,
        make_args=lambda number: (shapes.logits(case, number, device),),
        check=lambda prepared: check(case, prepared, device),
        set_bytes=case.logits_bytes,
        # Logits are read and written; a bit of the prompt and a count of the output.
        moved_bytes=2 * case.logits_bytes + elements * 33 // 8,
    )


def check(case: Case, provider: Provider, device: str) -> None:
    """Compare every logit with the definition in float64.

    Raises:
        AssertionError: One is off by more than rounding.
    """
    logits = shapes.logits(case, 0, device)
    seen = shapes.seen(case, device)
    expected = reference.penalized(logits.double(), *seen, EVERY_PENALTY)
    provider.call(logits)
    error = (logits.double() - expected).abs() / (1 + expected.abs())
    worst = float(error.max())
    assert worst <= ROUNDING, f"a logit is off by {worst:.1e} of itself"
