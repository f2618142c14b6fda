"""What the way from logits to a token costs a decode step: launches, and bytes.

Real engines decode on the pretend device, a sampling mode at a time, stock and with
patches, and everything that their sampler submits in a step is recorded (see
`vllm_ext.prove.trafficrun`). Launches are counted. Bytes are counted in units of one
read of a row of bfloat16 logits, which is what no sampler can do without:

- of a Triton kernel, what its interpreted programs load, store and change;
- of an operation of torch, each tensor that it is given or returns, once. That is the
  least it can do: some go over their input several times.

`document` is that as a table; docs/sampling-traffic.md is kept, and a test compares it
with what is found now. A patched step may have one launch, two with logprobs, and move
as much as `LIMITS` says.

Limits: no caches, so what is read twice counts twice; logits are made up, of which a
few stand out as in a large model's; one row or a few; FlashInfer, which stock uses on
CUDA for top-k and top-p where no request is greedy or has a seed, is not there, so
stock's own Triton kernels are what is counted; and of these the one for more than 64
rows, since stock splits rows for top-p only where the device is called CUDA.
"""

import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from vllm_ext import doctor, jsonfile
from vllm_ext.children import Child
from vllm_ext.hostbench import environment
from vllm_ext.patches import SERIES
from vllm_ext.prove.audit import V2_PATCHES
from vllm_ext.prove.trafficrun import MODES, VOCABULARY
from vllm_ext.prove.verdict import Verdict

SUBJECT = "fused_sampler"
# What serves beside it; a patch that replays the whole step has no sampler of its own.
PATCHES = [
    *(each.name for each in SERIES if each.default and each.name in V2_PATCHES),
    SUBJECT,
]
COMMAND = "vllm-ext prove traffic --write docs/sampling-traffic.md"
TIMEOUT = 900  # seconds; an engine needs a fifth of that on a quiet machine
ONE_READ = 1.05
LIMITS = dict.fromkeys(MODES, 1.25) | dict.fromkeys(
    ("greedy", "temperature", "min-p"), ONE_READ
)
LOGPROBS = 1 + 1.25  # the logits are read again, and some of them twice
INTRODUCTION = f"""
What a decode step of Model Runner V2 submits between the model's logits and the token,
and how many bytes that moves, in units of one read of a row's logits (bfloat16,
{VOCABULARY:,} tokens). Counted on the pretend device, with kernels interpreted: see
[traffic.py](../vllm_ext/prove/traffic.py) for what is counted and what is not. Nothing
ran on a GPU, and no time is meant. The groups that are read again for top-k are as
large in any vocabulary, so they weigh more in a small one: with 32,000 tokens, counted
in the same way, one row with top-k takes 1.20 reads and Qwen2.5's default 1.35, above
the limit; with 128,256 tokens it is 1.07 and 1.21. Stock's top-p is counted as it runs
for more than 64 rows; for fewer it takes seven launches on CUDA, instead of
`_topk_topp_kernel` or, with top-k in the batch, after it.
"""

Say = Callable[[str], None]


def gather(say: Say, modes: Sequence[str] = tuple(MODES)) -> dict[str, Any]:
    """What `vllm_ext.prove.trafficrun.record` finds, stock and under `PATCHES`.

    Raises:
        CannotRunError: The CPU lane is not installed.
        ChildError: The engine failed.
    """
    lane = {**environment("interpret"), "VEXT": "0", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    say(f"recording {len(modes)} sampling modes on the pretend device")
    with closing(Child("vllm_ext.prove.trafficrun", lane, "the engine")) as child:
        found: dict[str, Any] = child.ask(
            "record", TIMEOUT, patches=PATCHES, modes=list(modes)
        )
    return found


def verdicts(say: Say) -> list[Verdict]:
    """Whether patched steps stay below their limits."""
    return [judge(gather(say))]


def write(path: Path, say: Say) -> None:
    """Write `document` of what is found now to ``path``."""
    jsonfile.write_text(path, document(gather(say)))


def judge(found: dict[str, Any]) -> Verdict:
    """What `gather` found, held against the limits."""
    wrong = []
    for mode, step in found["patched"].items():
        launches, limit = (1, LIMITS[mode]) if _plain(mode) else (2, LOGPROBS)
        if len(step["launches"]) > launches:
            wrong.append(f"{mode}: {len(step['launches'])} launches")
        if reads(step) > limit:
            wrong.append(f"{mode}: {reads(step):.2f} reads, of {limit:g}")
    if found["aside"]:
        wrong.append(f"left to stock code: {', '.join(found['aside'])}")
    if wrong:
        return Verdict("traffic", SUBJECT, "not proven", "; ".join(wrong), fault=True)
    most = max(reads(step) for mode, step in found["patched"].items() if _plain(mode))
    stock = max(map(reads, found["stock"].values()))
    detail = (
        f"one launch, two with logprobs, in {len(found['patched'])} modes; at most "
        f"{most:.2f} reads of the logits without logprobs, stock {stock:.1f}"
    )
    return Verdict("traffic", SUBJECT, "proven on CPU", detail)


def reads(step: dict[str, Any]) -> float:
    """Bytes of a step, in reads of its rows' logits."""
    one_read: int = step["rows"] * VOCABULARY * 2
    return float(step["bytes"]) / one_read


def document(found: dict[str, Any]) -> str:
    """What was found, as Markdown."""
    return "\n".join(_document(found))


def _document(found: dict[str, Any]) -> Iterator[str]:
    version = doctor.open_source(None).version
    yield f"# From logits to a token: launches and bytes, vLLM {version}\n"
    yield f"Made by `{COMMAND}`; a test compares it with what is found now.\n"
    yield from textwrap.wrap(INTRODUCTION.strip(), 88)
    yield "\n| mode | launches | reads of the logits | at most |"
    yield "| --- | --- | --- | --- |"
    yield from (row(mode, found) for mode in found["stock"])
    names = ", ".join(f"`{name}`" for name in PATCHES)
    yield f"\nStock → patched: {names}.\n"
    yield "## Which launches\n"
    for mode, step in found["stock"].items():
        yield f"- **{mode}**: {_launches(step)} → {_launches(found['patched'][mode])}"
    yield ""


def row(mode: str, found: dict[str, Any]) -> str:
    """A mode's line of the table."""
    stock, patched = found["stock"][mode], found["patched"][mode]
    limit = LIMITS[mode] if _plain(mode) else LOGPROBS
    return (
        f"| {mode} | {len(stock['launches'])} → {len(patched['launches'])} "
        f"| {reads(stock):.2f} → {reads(patched):.2f} | {limit:g} |"
    )


def _launches(step: dict[str, Any]) -> str:
    return ", ".join(f"`{name}`" for name in step["launches"])


def _plain(mode: str) -> bool:
    return "logprobs" not in mode
