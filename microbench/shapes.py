"""What a decode step hands to the sampler: shapes, sampling parameters and logits.

Vocabularies are those of Llama 2, Llama 3, Qwen 2.5 and Gemma 3. Logits come in two
kinds, since kernels that look for the likeliest tokens depend on how many there are:
``llm``, where a few tokens hold nearly all of the probability, as in text that a model
continues, and ``random``, where thousands share it.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

BATCHES = (1, 8, 32, 128, 256)
VOCABULARIES = (32_000, 128_256, 151_936, 262_144)
FEW = {(1, 151_936), (32, 151_936), (256, 151_936)}

# Without a GPU kernels are interpreted: a tenth of a second for a row of these.
SMALL_BATCHES = (1, 8)
SMALL_VOCABULARIES = (2_048, 2_500)

PROMPT_TOKENS = 200
OUTPUT_TOKENS = 50
ROLL = 7_919  # a prime: argument sets differ in where their likely tokens are


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters that all requests of a batch have."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    logprobs: int | None = None

    @property
    def penalizes(self) -> bool:
        """Whether what was said before counts."""
        return (self.repetition, self.presence, self.frequency) != (1.0, 0.0, 0.0)


# vLLM takes the defaults that a model ships: such as the fourth those of Qwen3, such as
# the sixth those of Qwen2.5-Instruct.
MODES = {
    "greedy": Sampling(),
    "temperature": Sampling(temperature=0.7),
    "min-p": Sampling(temperature=0.7, min_p=0.05),
    "top-k+top-p": Sampling(temperature=0.6, top_k=20, top_p=0.95),
    "penalties": Sampling(temperature=0.7, repetition=1.1),
    "qwen2.5": Sampling(temperature=0.7, top_k=20, top_p=0.8, repetition=1.1),
    "logprobs": Sampling(temperature=0.7, logprobs=5),
}


@dataclass(frozen=True)
class Case:
    """One decode step.

    Attributes:
        mode: Of `MODES`, or what a benchmark calls its own.
        batch: Rows, one per request.
        vocabulary: Columns.
        dtype: ``bf16`` or ``fp32``, of the logits.
        kind: ``llm`` or ``random``.
    """

    mode: str
    batch: int
    vocabulary: int
    dtype: str
    kind: str

    def __str__(self) -> str:
        return (
            f"{self.mode} B={self.batch} V={self.vocabulary} {self.dtype} {self.kind}"
        )

    @property
    def id(self) -> str:
        """For ``-k``."""
        return f"{self.mode}-b{self.batch}-v{self.vocabulary}-{self.dtype}-{self.kind}"

    @property
    def sampling(self) -> Sampling:
        return MODES[self.mode]

    @property
    def torch_dtype(self) -> torch.dtype:
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[self.dtype]

    @property
    def logits_bytes(self) -> int:
        """Of one batch of logits."""
        itemsize: int = self.torch_dtype.itemsize
        return self.batch * self.vocabulary * itemsize


def cases(
    modes: Sequence[str], dtypes: Sequence[str], *, small: bool, full: bool = False
) -> Iterator[Case]:
    """The cases of a benchmark.

    Args:
        modes: Each is run at every shape.
        dtypes: The first is the usual one.
        small: Shapes that can be interpreted, for a machine without a GPU.
        full: Every combination. Otherwise the second dtype and the random logits are
            run at a few shapes only: they answer whether a kernel depends on them, not
            how it scales.
    """
    batches = SMALL_BATCHES if small else BATCHES
    vocabularies = SMALL_VOCABULARIES if small else VOCABULARIES
    few = {(batch, vocabularies[-1]) for batch in batches} if small else FEW
    for mode, dtype, kind in itertools.product(modes, dtypes, ("llm", "random")):
        unusual = (dtype != dtypes[0]) + (kind != "llm")
        for vocabulary, batch in itertools.product(vocabularies, batches):
            rare = unusual == 1 and (batch, vocabulary) in few
            if full or not unusual or rare:
                yield Case(mode, batch, vocabulary, dtype, kind)


def logits(case: Case, number: int, device: str) -> torch.Tensor:
    """``[batch, vocabulary]`` logits; those of two numbers have the same likelihoods.

    ``llm``: the token of rank r has ``-1.7 ln r``, give or take a little, so that the
    likeliest has about half of the probability, and some sixty have 95 % of it.
    """
    generator = torch.Generator(device).manual_seed(case.batch * 1_000 + 1)
    shape = (case.batch, case.vocabulary)
    values = torch.randn(shape, generator=generator, device=device)
    if case.kind == "llm":
        ranks = torch.rand(shape, generator=generator, device=device).argsort(dim=-1)
        values = 0.3 * values - 1.7 * torch.log1p(ranks.float())
    return values.to(case.torch_dtype).roll(number * ROLL, dims=-1)


def positions(case: Case, number: int, device: str) -> torch.Tensor:
    """``[batch]`` int64: where in its request each row is."""
    first = 1_000 + 100_000 * number
    return torch.arange(first, first + case.batch, dtype=torch.int64, device=device)


def seeds(case: Case) -> np.ndarray:
    """``[batch]`` int64: of the requests' random numbers."""
    return np.arange(case.batch, dtype=np.int64) * 6_364_136_223 + 42


def history(case: Case) -> tuple[list[list[int]], list[list[int]]]:
    """Tokens of each request's prompt, and those it generated; some more than once."""
    rng = np.random.default_rng(case.batch)
    often = min(case.vocabulary, 4 * OUTPUT_TOKENS)
    prompts = rng.integers(case.vocabulary, size=(case.batch, PROMPT_TOKENS))
    outputs = rng.integers(often, size=(case.batch, OUTPUT_TOKENS))
    return prompts.tolist(), outputs.tolist()


def seen(case: Case, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """`history` as ``[batch, vocabulary]``: bool prompt mask, int32 output counts."""
    prompts, outputs = history(case)
    mask = torch.zeros(case.batch, case.vocabulary, dtype=torch.bool, device=device)
    counts = torch.zeros(mask.shape, dtype=torch.int32, device=device)
    ids = torch.tensor(prompts, device=device)
    mask.scatter_(1, ids, torch.ones_like(ids, dtype=torch.bool))
    ids = torch.tensor(outputs, device=device)
    counts.scatter_add_(1, ids, torch.ones_like(ids, dtype=torch.int32))
    return mask, counts


def bits(mask: torch.Tensor) -> torch.Tensor:
    """``[rows, columns]`` bool as ``[rows, ceil(columns / 32)]`` int32.

    Bit ``v % 32`` of word ``v // 32`` is column ``v``: vLLM's ``prompt_bin_mask``.
    """
    rows, columns = mask.shape
    words = -(-columns // 32)
    wide = torch.zeros(rows, words * 32, dtype=torch.int64, device=mask.device)
    wide[:, :columns] = mask
    values = 1 << torch.arange(32, device=mask.device)
    packed = (wide.view(rows, words, 32) * values).sum(dim=-1)
    return packed.to(torch.uint32).view(torch.int32)
