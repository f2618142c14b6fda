"""What an instrument says of one patch, kernel or step."""

from dataclasses import dataclass
from typing import Literal

from vllm_ext.children import ChildError
from vllm_ext.hostbench import CannotRunError
from vllm_ext.jsonfile import CannotWriteError
from vllm_ext.patching.engine import PatchError
from vllm_ext.patching.fingerprint import SourceError

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


def failed(instrument: str, subject: str, error: Exception) -> Verdict:
    """The verdict on what could not be looked at because of an error."""
    return Verdict(instrument, subject, "not proven", reason(error), fault=True)


def reason(error: Exception) -> str:
    """What went wrong, in one line."""
    if isinstance(error, ChildError):
        return error.line
    if isinstance(error, ModuleNotFoundError):
        return (
            f"needs {error.name}, which comes with vLLM; in a checkout, run make setup"
        )
    kind = type(error).__name__
    said = next(iter(str(error).splitlines()), "")
    if not said:
        return kind
    # These say what to do; of the others the kind helps to understand what they say.
    told = (CannotRunError, CannotWriteError, PatchError, SourceError)
    return said if isinstance(error, told) else f"{kind}: {said}"
