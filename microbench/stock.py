"""vLLM's own samplers, set up for one decode step as its model runners set them up."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from vllm_ext.microbench import shapes
from vllm_ext.microbench.measure import NotRun, Provider
from vllm_ext.microbench.shapes import Case, Sampling

FLASHINFER = "VLLM_USE_FLASHINFER_SAMPLER"
HOST_RNG = "FlashInfer reads its seed from the host's generator"
HOST_LISTS = "copies lists of the host each step"


def default(case: Case, device: str) -> Provider:
    """Model Runner V2 as it comes: FlashInfer where that takes the batch."""
    return _v2(case, device, _default_flashinfer(case))


def without_flashinfer(case: Case, device: str) -> Provider:
    """Model Runner V2 with ``VLLM_USE_FLASHINFER_SAMPLER=0``: Triton throughout.

    It is also what a batch gets of which one request is greedy or has a seed.
    """
    if not _filters(case) or device != "cuda":
        raise NotRun("stock's default path is the same here: it takes no FlashInfer")
    return by_triton(case, device)


def by_triton(case: Case, device: str) -> Provider:
    """Model Runner V2 without FlashInfer, whether that would take the batch or not."""
    return _v2(case, device, "0")


def v1(case: Case, device: str) -> Provider:
    """Model Runner V1's sampler, with FlashInfer where that takes the batch."""
    need_vllm()
    if case.dtype == "fp32":
        raise NotRun("V1 scales fp32 logits in place: a replay would get other logits")
    from vllm.v1.sample.sampler import Sampler

    sampling = case.sampling
    with _flashinfer(_default_flashinfer(case)):
        try:
            sampler = Sampler()
        except ImportError as error:
            raise NotRun(f"vLLM needs FlashInfer by default: {error}") from None
    metadata = _v1_metadata(case, device)
    logprobs = sampling.logprobs is not None

    def call(logits: torch.Tensor, positions: torch.Tensor) -> Any:
        found = sampler(logits, metadata)
        tokens = found.sampled_token_ids[:, 0]
        return (tokens, found.logprobs_tensors.logprobs) if logprobs else tokens

    chosen = sampler.topk_topp_sampler
    fused = _filters(case) and chosen.forward == chosen.forward_cuda
    reads_host = HOST_RNG if fused else HOST_LISTS if sampling.penalizes else ""
    return Provider(call, reads_host, _path(fused))


def v2_states(
    case: Case, device: str, sampling: Sampling | None = None
) -> tuple[Any, Any]:
    """A V2 sampler whose request i is in row i, and the states of its requests.

    Args:
        case: Tells the shapes.
        device: Where it samples.
        sampling: Instead of those of the case.
    """
    need_vllm()
    from vllm.sampling_params import SamplingParams
    from vllm.v1.worker.gpu.sample.sampler import Sampler
    from vllm.v1.worker.gpu.states import RequestState

    sampling = sampling or case.sampling
    states = RequestState(
        max_num_reqs=case.batch,
        max_model_len=shapes.PROMPT_TOKENS + shapes.OUTPUT_TOKENS + 1,
        max_num_batched_tokens=case.batch,
        num_speculative_steps=0,
        vocab_size=case.vocabulary,
        device=torch.device(device),
    )
    try:
        sampler = Sampler(
            SimpleNamespace(reasoning_config=None),
            case.batch,
            case.vocabulary,
            torch.device(device),
            states,
        )
    except ImportError as error:
        raise NotRun(f"vLLM needs FlashInfer by default: {error}") from None
    parameters = SamplingParams(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition,
        presence_penalty=sampling.presence,
        frequency_penalty=sampling.frequency,
        logprobs=sampling.logprobs,
    )
    prompts, outputs = shapes.history(case)
    for row, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        states.free_indices = [row]
        states.add_request(str(row), len(prompt), prompt + output, 0, 1)
        sampler.add_request(row, parameters)
    sampler.sampling_states.seeds.np[:] = shapes.seeds(case)
    states.apply_staged_writes()
    sampler.apply_staged_writes()
    return sampler, states


def _v2(case: Case, device: str, flashinfer: str | None) -> Provider:
    """With ``VLLM_USE_FLASHINFER_SAMPLER`` as given."""
    need_vllm()
    from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores

    with _flashinfer(flashinfer):
        sampler, _ = v2_states(case, device)
    rows = torch.arange(case.batch, dtype=torch.int32, device=device)
    rows_np: Any = np.arange(case.batch, dtype=np.int32)
    tokens_in = torch.zeros(case.batch, dtype=torch.int32, device=device)
    first = torch.zeros(case.batch, dtype=torch.int32, device=device)
    lengths = np.full(case.batch, shapes.PROMPT_TOKENS + shapes.OUTPUT_TOKENS)
    number = case.sampling.logprobs

    def call(logits: torch.Tensor, positions: torch.Tensor) -> Any:
        tokens, _ = sampler.sample(
            logits, rows, rows, rows_np, positions, tokens_in, first, lengths
        )
        if number is None:
            return tokens
        scores = compute_topk_scores(logits, number, tokens)
        return tokens, scores.logprobs

    fused = bool(sampler.use_flashinfer and _filters(case))
    return Provider(call, HOST_RNG if fused else "", _path(fused))


def _v1_metadata(case: Case, device: str) -> Any:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.sample.logits_processor import LogitsProcessors
    from vllm.v1.sample.logits_processor.builtin import MinPLogitsProcessor
    from vllm.v1.sample.logits_processor.interface import BatchUpdate
    from vllm.v1.sample.metadata import SamplingMetadata

    sampling, batch = case.sampling, case.batch
    prompts, outputs = shapes.history(case)

    def all_rows(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.full((batch,), value, dtype=dtype, device=device)

    config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=batch))
    min_p = MinPLogitsProcessor(config, torch.device(device), device == "cuda")
    parameters = SamplingParams(temperature=1.0, min_p=sampling.min_p)
    min_p.update_state(
        BatchUpdate(
            batch_size=batch,
            removed=[],
            added=[(row, parameters, [], []) for row in range(batch)],
            moved=[],
        )
    )
    greedy = sampling.temperature == 0
    return SamplingMetadata(
        temperature=None if greedy else all_rows(sampling.temperature),
        all_greedy=greedy,
        all_random=not greedy,
        top_p=all_rows(sampling.top_p) if sampling.top_p < 1 else None,
        top_k=all_rows(sampling.top_k, torch.int32) if sampling.top_k else None,
        generators={},
        max_num_logprobs=sampling.logprobs,
        no_penalties=not sampling.penalizes,
        prompt_token_ids=torch.tensor(prompts, device=device),
        frequency_penalties=all_rows(sampling.frequency),
        presence_penalties=all_rows(sampling.presence),
        repetition_penalties=all_rows(sampling.repetition),
        output_token_ids=outputs,
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors([min_p]),
    )


def _filters(case: Case) -> bool:
    return bool(case.sampling.top_k or case.sampling.top_p < 1)


def _default_flashinfer(case: Case) -> str | None:
    """For its variable, where vLLM's default is asked for.

    A batch without top-k and top-p never gets to FlashInfer; asking for none then lets
    it run where FlashInfer is not installed.
    """
    return None if _filters(case) else "0"


def _path(fused: bool) -> str:
    return "FlashInfer" if fused else "no FlashInfer"


def need_vllm() -> None:
    """
    Raises:
        NotRun: There is none that can run its GPU path here.
    """
    try:
        from vllm.triton_utils import HAS_TRITON
    except ImportError:
        raise NotRun("vLLM is not installed") from None
    if not HAS_TRITON:
        raise NotRun("vLLM runs no Triton kernels here: it needs a GPU or the CPU lane")
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        # What its CPU worker imports: the GPU path's buffers without pinned memory.
        import vllm.v1.worker.cpu.shm  # noqa: F401


@contextmanager
def _flashinfer(value: str | None) -> Iterator[None]:
    """``VLLM_USE_FLASHINFER_SAMPLER`` as given, unset for ``None``."""
    before = os.environ.pop(FLASHINFER, None)
    if value is not None:
        os.environ[FLASHINFER] = value
    try:
        yield
    finally:
        os.environ.pop(FLASHINFER, None)
        if before is not None:
            os.environ[FLASHINFER] = before
