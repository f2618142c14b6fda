"""From a trace of torch's profiler to a table: launches, gaps, kernels, host time.

A trace of a few decode steps is tens of megabytes and says everything; a person wants
to know how often the host handed something to the GPU in a step, how long the GPU
worked, where it had nothing to do, and which part of the host's step took how long.
`table` is a function of the trace alone.

The trace must mark steps and parts of them with `torch.profiler.record_function`:
`STEP` around each step, names that begin with `MARK` around its parts.

Which step a piece of GPU work belongs to is decided by when the host launched it: with
asynchronous scheduling it runs while the host is in the next step already.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

MARK = "vllm-ext: "
STEP = f"{MARK}step"

ON_GPU = {"kernel": "kernel", "gpu_memcpy": "copy", "gpu_memset": "memset"}
CALLS = ("cuda_runtime", "cuda_driver")
SUBMITTING = ("Launch", "Memcpy", "Memset")
WAITING = ("Synchronize",)
LEAST_GAP_US = 1.0
KERNELS = 60
PLACES = 20
NAME_LENGTH = 160

Event = Mapping[str, Any]
Span = tuple[float, float]  # start and end in microseconds


class TraceError(ValueError):
    """One line: why a trace cannot be made into a table."""


def table(trace: Mapping[str, Any], skip: int = 0) -> dict[str, Any]:
    """What the steps of a Chrome trace were made of, per step.

    The last marked step only ends the one before it: a step lasts until the next one
    begins.

    Args:
        trace: As ``torch.profiler`` exports it, parsed.
        skip: Steps at the beginning to leave out.

    Returns:
        ``steps``: how many were looked at. ``period_us``: their median length, and all
        lengths under ``periods_us``.
        ``host``: for each part ``us`` of its own (parts within it not counted), ``us``
        of calls into CUDA therein (``cuda_us``), and how often it ran.
        ``launches_per_step``: calls that hand something to the GPU; ``launches``: by
        call, how many ``per_step`` and their ``us``. ``waits``: so for calls that wait.
        ``gpu``: ``None`` if the trace has no GPU work; else ``busy_us`` per step,
        ``busy_share``, ``idle_us``, and ``gaps`` of at least `LEAST_GAP_US` between
        two pieces of work: how many per step, their ``us``, the largest, and by place.
        ``kernels``: the work on the GPU by time: ``name``, ``kind``, ``in_graph``,
        ``per_step``, ``us`` per step, ``share`` of the GPU's work.

    Raises:
        TraceError: It is no such trace, or fewer than two of its steps are left.
    """
    events = trace.get("traceEvents")
    if not isinstance(events, list):
        raise TraceError("the trace has no traceEvents: is it one of torch.profiler?")
    spans = [each for each in events if each.get("ph") == "X" and "dur" in each]
    starts, thread = _steps(spans, skip)
    window = (starts[0], starts[-1])
    steps = len(starts) - 1
    periods = [
        after - before for before, after in zip(starts, starts[1:], strict=False)
    ]
    calls = [
        each
        for each in spans
        if each.get("cat") in CALLS and window[0] <= each["ts"] < window[1]
    ]
    work = _work(spans, calls)
    launches = _calls(calls, SUBMITTING, steps)
    return {
        "steps": steps,
        "period_us": _median(periods),
        "periods_us": periods,
        "host": _host(spans, calls, window, thread, steps),
        "launches_per_step": sum(each["per_step"] for each in launches.values()),
        "launches": launches,
        "waits": _calls(calls, WAITING, steps),
        "gpu": _gpu(spans, window, steps),
        "kernels": _kernels(work, steps),
    }


def _steps(spans: Iterable[Event], skip: int) -> tuple[list[float], Any]:
    marked = sorted(
        (each for each in spans if each["name"] == STEP and _on_host(each)),
        key=lambda each: each["ts"],
    )
    if len(marked) < skip + 2:
        raise TraceError(
            f"{len(marked)} steps are marked with {STEP!r} in the trace, at least "
            f"{skip + 2} are needed"
        )
    return [each["ts"] for each in marked[skip:]], marked[0].get("tid")


def _on_host(event: Event) -> bool:
    # The profiler repeats an annotation on the GPU's tracks, over what it launched.
    return event.get("cat") in ("user_annotation", "cpu_op")


# -- host --------------------------------------------------------------------------


def _host(
    spans: Sequence[Event],
    calls: Sequence[Event],
    window: Span,
    thread: Any,
    steps: int,
) -> dict[str, dict[str, float]]:
    """Time by part on the engine's thread; a part's own time, without parts inside."""
    marked = [
        each
        for each in spans
        if str(each["name"]).startswith(MARK)
        and _on_host(each)
        and each.get("tid") == thread
        and window[0] <= each["ts"] < window[1]
    ]
    calls_here = [each for each in calls if each.get("tid") == thread]
    total: dict[str, float] = defaultdict(float)  # a part within another counted once
    in_cuda: dict[str, float] = defaultdict(float)
    times: Counter[str] = Counter()
    open_parts: list[tuple[str, float]] = []  # name and end, the outermost first

    for each in sorted((*marked, *calls_here), key=_outer_first):
        start = each["ts"]
        while open_parts and open_parts[-1][1] <= start:
            open_parts.pop()
        if each.get("cat") not in CALLS:
            name = str(each["name"]).removeprefix(MARK)
            total[name] += each["dur"]
            times[name] += 1
            if open_parts:
                total[open_parts[-1][0]] -= each["dur"]
            open_parts.append((name, start + each["dur"]))
        elif open_parts:
            in_cuda[open_parts[-1][0]] += each["dur"]
    return {
        name: {
            "us": total[name] / steps,
            "cuda_us": in_cuda[name] / steps,
            "per_step": times[name] / steps,
        }
        for name in sorted(total, key=lambda name: -total[name])
    }


def _outer_first(event: Event) -> tuple[float, bool, float]:
    return event["ts"], event.get("cat") in CALLS, -event["dur"]


def _calls(
    calls: Sequence[Event], words: Sequence[str], steps: int
) -> dict[str, dict[str, float]]:
    """Those whose names hold one of ``words``, the longest together first."""
    found: dict[str, list[float]] = defaultdict(list)
    for each in calls:
        if any(word in each["name"] for word in words):
            found[each["name"]].append(each["dur"])
    return {
        name: {"per_step": len(taken) / steps, "us": sum(taken) / steps}
        for name, taken in sorted(found.items(), key=lambda item: -sum(item[1]))
    }


# -- GPU ---------------------------------------------------------------------------


def _work(spans: Sequence[Event], calls: Sequence[Event]) -> list[tuple[Event, bool]]:
    """What the calls put on the GPU, each with whether a graph brought it."""
    by_correlation = {
        each["args"]["correlation"]: "GraphLaunch" in each["name"]
        for each in calls
        if "correlation" in each.get("args", {})
    }
    return [
        (each, by_correlation[correlation])
        for each in spans
        if each.get("cat") in ON_GPU
        and (correlation := each.get("args", {}).get("correlation")) in by_correlation
    ]


def _gpu(spans: Sequence[Event], window: Span, steps: int) -> dict[str, Any] | None:
    ran = sorted(
        (each for each in spans if each.get("cat") in ON_GPU),
        key=lambda each: each["ts"],
    )
    if not ran:
        return None
    busy = 0.0
    gaps: list[tuple[float, str, str]] = []
    covered, last = window[0], None  # until when, and by what
    for each in ran:
        start, end = each["ts"], min(each["ts"] + each["dur"], window[1])
        if end <= start:  # it ran after the last step
            continue
        gap = start - covered
        if last is not None and gap >= LEAST_GAP_US:
            gaps.append((gap, _name(last), _name(each)))
        if end > covered:
            busy += end - max(start, covered)
            covered, last = end, each
    length = window[1] - window[0]
    by_place: dict[tuple[str, str], list[float]] = defaultdict(list)
    for gap, before, after in gaps:
        by_place[before, after].append(gap)
    places = sorted(by_place.items(), key=lambda item: -sum(item[1]))
    return {
        "busy_us": busy / steps,
        "busy_share": busy / length,
        "idle_us": (length - busy) / steps,
        "gaps": {
            "per_step": len(gaps) / steps,
            "us": sum(gap for gap, _, _ in gaps) / steps,
            "largest_us": max((gap for gap, _, _ in gaps), default=0.0),
            "places": [
                {
                    "after": before,
                    "before": after,
                    "per_step": len(taken) / steps,
                    "us": sum(taken) / steps,
                }
                for (before, after), taken in places[:PLACES]
            ],
            "other_places": len(places[PLACES:]),
        },
    }


def _kernels(
    work: Sequence[tuple[Event, bool]], steps: int
) -> list[dict[str, str | bool | float]]:
    found: dict[tuple[str, str, bool], list[float]] = defaultdict(list)
    for each, in_graph in work:
        found[_name(each), ON_GPU[each["cat"]], in_graph].append(each["dur"])
    everything = sum(sum(taken) for taken in found.values())
    ranked = sorted(found.items(), key=lambda item: -sum(item[1]))

    def row(name: str, kind: str, in_graph: bool, taken: list[float]) -> dict[str, Any]:
        return {
            "name": name,
            "kind": kind,
            "in_graph": in_graph,
            "per_step": len(taken) / steps,
            "us": sum(taken) / steps,
            "share": sum(taken) / everything if everything else 0.0,
        }

    rows = [row(*which, taken) for which, taken in ranked[:KERNELS]]
    rest = [time for _, taken in ranked[KERNELS:] for time in taken]
    if rest:
        rows.append(row(f"{len(ranked) - KERNELS} others", "all", False, rest))
    return rows


def _name(event: Event) -> str:
    name = str(event["name"])
    return name if len(name) <= NAME_LENGTH else f"{name[: NAME_LENGTH - 3]}..."


def _median(values: Sequence[float]) -> float:
    ordered, half = sorted(values), len(values) // 2
    if len(ordered) % 2:
        return ordered[half]
    return (ordered[half - 1] + ordered[half]) / 2
