"""What an instrument says of one patch, kernel or step."""

from dataclasses import dataclass
from typing import Literal

Outcome = Literal["proven on CPU", "proven on GPU", "not proven"]


@dataclass(frozen=True)
class Verdict:
    """One line of ``vllm-ext prove``.

    Attributes:
        instrument: ``syncs``, ``graphs``, ``races``, ``kernels`` or ``compiles``.
        subject: What was looked at: a patch, a kernel, a step.
        outcome: Proven, and where; or not.
        detail: What was counted; or why not, naming operation and line. One line.
        evidence: Path of the result file; always given for "proven on GPU".
        fault: Something is wrong, rather than merely not known.
    """

    instrument: str
    subject: str
    outcome: Outcome
    detail: str
    evidence: str = ""
    fault: bool = False
