"""What a pull request says that the patch's declaration does not: data and prose."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Overlap:
    """Somebody else's work on the same thing.

    Attributes:
        link: ``"#57319"`` for a pull request or issue of vLLM, or an address.
        what: What it does, whether it is open, and how this differs. One sentence.
    """

    link: str
    what: str


@dataclass(frozen=True)
class Upstream:
    """``UPSTREAM`` in ``patches/<name>/upstream.py``, for readers who know only vLLM.

    The title is the patch's ``summary``, and the purpose the message of the stored
    mail. Texts are Markdown and speak of vLLM's code, never of this project: what is
    written here is what a reviewer reads.

    Attributes:
        overlaps: Pull requests that somebody may take this for a copy of.
        searches: What to search vLLM's pull requests for before it is sent.
        tests: Commands of the test plan, to be run in a checkout of vLLM.
        accuracy: Which evaluation of a model is needed, or why none is.
        trade_offs: What the change costs, and what it leaves as it is.
        benchmark: Command that measures it, in a checkout of vLLM.
        environment: Before ``vllm serve``, for it to take the changed path.
        serve: Arguments of ``vllm serve`` that are needed for that.
        requests: Arguments of ``vllm bench serve`` that are needed for that.
        by_hand: Upstream object that the stored patch changes or adds, in a form
            which no splicing gives -> the definitions in ``replacement.py`` that it
            says the same as.
        only_here: Definition in ``replacement.py`` -> why upstream needs none of it.
        modules: ``vllm_ext.kernels.<op>`` -> the module of vLLM that it becomes.
        needs: Patches whose forms have to be merged first, in this order: this one is
            written on top of them.
    """

    overlaps: tuple[Overlap, ...]
    searches: tuple[str, ...]
    tests: tuple[str, ...]
    accuracy: str
    trade_offs: str
    benchmark: str | None = None
    environment: str = ""
    serve: str = ""
    requests: str = ""
    by_hand: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    only_here: Mapping[str, str] = field(default_factory=dict)
    modules: Mapping[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
