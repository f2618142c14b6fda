"""Verdicts on the decode step of Model Runner V2 as a CUDA graph.

Stock is not one graph today, and `work_list` says why, argument by argument: what a
step graph has to put an end to. Of each patch it is said that its steps, run out of
graphs, give stock's tokens, and what it takes from that list or adds to it.

A real engine on the pretend device (`vllm_ext.prove.steprun`) decodes four requests,
greedy and sampled, of which one is replaced by another on the way. Limits: the list
is that of this workload and a batch of four; other features, prompts that are still
being read, drafts and adapters are not looked at.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from vllm_ext import hostbench, jsonfile
from vllm_ext.children import Child
from vllm_ext.patches import SERIES
from vllm_ext.prove import page, stepdrawing
from vllm_ext.prove.verdict import Verdict

STOCK = "stock"
EVERY_STEP = "every step"
SUBJECT = "the stock step as one graph"
TOGETHER = "all patches"
# The step of one that needs an engine of its own is looked at by `stepdrawing`.
ALL = {TOGETHER: [patch.name for patch in SERIES if not patch.from_boot]}
TIMEOUT = 600  # seconds, for an engine and all that it looks at


def verdicts(say: Callable[[str], None]) -> list[Verdict]:
    """Each patch's decode step out of graphs, stock's as one, and that of step graphs.

    Raises:
        CannotRunError: There is no CPU lane.
        ChildError: An engine failed.
    """
    subjects = {name: [name] for name in ALL[TOGETHER]} | ALL
    found = look(say, subjects)
    stock = found[STOCK]
    return [
        judge_stock(stock),
        *(judge_patch(name, found[name], stock) for name in subjects),
        stepdrawing.judge(stepdrawing.look(say)),
    ]


def write(path: Path, say: Callable[[str], None]) -> None:
    """Write `work_list` to ``path``.

    Raises:
        CannotRunError: There is no CPU lane, or the step with all patches failed.
        ChildError: An engine failed.
        CannotWriteError: The file cannot be written.
    """
    found = look(say, ALL)
    if "failed" in found[TOGETHER]:
        raise hostbench.CannotRunError(f"{TOGETHER}: {found[TOGETHER]['failed']}")
    jsonfile.write_text(path, work_list(found[STOCK], found[TOGETHER]))


def html(path: Path, say: Callable[[str], None]) -> None:
    """Draw the stock step on a page."""
    jsonfile.write_text(path, page.draw(look(say, {})[STOCK]))


def look(
    say: Callable[[str], None], subjects: dict[str, list[str]]
) -> dict[str, dict[str, Any]]:
    """What `vllm_ext.prove.steprun.look` finds of stock, and of patches.

    Args:
        say: Is told how far it is.
        subjects: By what they are called, names of patches that are applied together.

    An engine stops at a patch that fails; what it leaves is for another.
    """
    names = list(subjects)
    half = max(0, len(names) - 1) // 2  # for the engine that decodes stock, and twice
    with ExitStack() as stack:
        children = [
            _start(stack, {name: subjects[name] for name in share}, stock)
            for share, stock in ((names[:half], True), (names[half:], False))
            if share or stock
        ]
        say("capturing decode steps of a real engine on the pretend device")
        found: dict[str, dict[str, Any]] = {}
        for child in children:
            found |= child.hear(TIMEOUT)
        while left := {name: subjects[name] for name in names if name not in found}:
            say(f"a patch failed; another engine for {', '.join(left)}")
            found |= _start(stack, left, stock=False).hear(TIMEOUT)
    return found


def _start(stack: ExitStack, patches: dict[str, list[str]], stock: bool) -> Child:
    """An engine that looks at ``patches``; closed with ``stack``."""
    environment = hostbench.environment("interpret")
    # Patches are applied in turn; the engine's own setting sizes its KV cache.
    environment |= {"VEXT": "0", "VLLM_CPU_KVCACHE_SPACE": None}
    child = Child("vllm_ext.prove.steprun", environment, "the engine")
    stack.callback(child.close)
    child.tell("look", patches=patches, stock=stock)
    return child


def judge_stock(entry: dict[str, Any]) -> Verdict:
    """Whether the stock step is one graph today."""
    steady = [each for each in entry["moving"] if each["when"] == EVERY_STEP]
    wrong = _wrong(entry, entry["eager"])
    if wrong:
        return Verdict("graphs", SUBJECT, "not proven", wrong, fault=True)
    if steady:
        buffers = Counter(each["buffer"] or each["operation"] for each in steady)
        shown = ", ".join(f"{name} x{count}" for name, count in buffers.items())
        detail = f"not one graph: {len(steady)} arguments move every step: {shown}"
        return Verdict("graphs", SUBJECT, "not proven", detail)
    return Verdict("graphs", SUBJECT, "proven on CPU", _replayed(entry))


def judge_patch(name: str, entry: dict[str, Any], stock: dict[str, Any]) -> Verdict:
    """Whether a patch's step gives stock's tokens out of graphs, and what it moves."""
    if "failed" in entry:
        return Verdict("graphs", name, "not proven", entry["failed"], fault=True)
    wrong = _wrong(entry, stock["eager"])
    if wrong:
        return Verdict("graphs", name, "not proven", wrong, fault=True)
    if not entry["calls"]:
        return Verdict("graphs", name, "not proven", "not called in this decode step")
    changes = Counter(_changes(entry["moving"], stock["moving"]))
    steady, before = (
        sum(each["when"] == EVERY_STEP for each in found["moving"])
        for found in (entry, stock)
    )
    detail = f"{_replayed(entry)}; moving every step: {before} -> {steady}"
    shown = [f"{what} x{count}" for what, count in changes.items()]
    return Verdict("graphs", name, "proven on CPU", "; ".join([detail, *shown]))


def _changes(mine: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> Iterator[str]:
    """How what moves differs from stock: the buffer, and since when it does."""

    def by_place(moving: list[dict[str, Any]]) -> dict[Any, dict[str, Any]]:
        keys = ("operation", "argument", "kind")
        return {tuple(each[key] for key in keys): each for each in moving}

    after, before = by_place(mine), by_place(theirs)
    for place in dict.fromkeys((*before, *after)):
        now, then = after.get(place), before.get(place)
        name = (then or now or {})["buffer"] or place[0]
        if now is None:
            yield f"{name} no more"
        elif then is None:
            yield f"{name} new, {now['when']}"
        elif now["when"] != then["when"]:
            yield f"{name} only {now['when']}"


def _wrong(entry: dict[str, Any], tokens: list[list[int]]) -> str:
    if entry["tokens"] != tokens:
        return "tokens out of graphs differ from those of stock without graphs"
    return str(entry["unwritten"][0]) if entry["unwritten"] else ""


def _replayed(entry: dict[str, Any]) -> str:
    tokens = sum(map(len, entry["tokens"]))
    launches = sum(entry["launches"].values())
    return (
        f"{entry['steps']} captured steps of {launches} launches replay to stock's "
        f"{tokens} tokens"
    )


def work_list(stock: dict[str, Any], patched: dict[str, Any]) -> str:
    """What keeps the decode step from being one graph, as Markdown.

    Args:
        stock: What was found of it.
        patched: The same with all patches.
    """
    torch, triton = (stock["launches"].get(kind, 0) for kind in ("launch", "triton"))
    lines = [
        "# What keeps the decode step from being one CUDA graph",
        "",
        "Written by `vllm-ext prove graphs --write docs/step-graph-work-list.md`, and",
        "checked by its test: do not edit. Decode steps of Model Runner V2, from the",
        "block tables to `post_update`, were captured on the pretend device and",
        "compared. Listed is what a graph captured once gets wrong. The two copies",
        "in front of the step and that of the tokens behind it are no part of it.",
        "",
        f"The stock step has {torch} operations of torch and {triton} launches of",
        "Triton kernels. Run out of graphs made of them, steps give the tokens of",
        "steps that were not captured; once such a step is over, of what its graph",
        f"was given {stock['freed']} arguments are freed memory.",
        "",
        *_tables("Stock", stock["moving"]),
        *_tables("With all patches", patched["moving"]),
    ]
    return "\n".join(lines[:-1]) + "\n"


def _tables(title: str, moving: list[dict[str, Any]]) -> Iterator[str]:
    for when in dict.fromkeys(each["when"] for each in moving):
        chosen = [each for each in moving if each["when"] == when]
        yield from (f"## {title}, {when}: {len(chosen)}", "")
        yield from ("| buffer | argument | of | at | why |", "| - | - | - | - | - |")
        for each in chosen:
            where = each["where"].removeprefix("vllm/v1/worker/gpu/")
            yield (
                f"| {each['buffer'] or '-'} | {each['argument'] or '-'} "
                f"| `{each['operation']}` | {where} | {each['why']} |"
            )
        yield ""
