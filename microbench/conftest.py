"""The fixture `measure`: check first, then time, and never the wrong answer.

Run by ``vllm-ext bench kernels``. On a GPU each competitor of a case is a benchmark of
pytest-benchmark whose rounds were taken on the device; its JSON gets the project's own
block, so that it is a result file. Without a GPU kernels are interpreted, answers are
checked, and nothing is timed.
"""

import json
import math
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_ext import machine
from vllm_ext.bench import results
from vllm_ext.bench.watch import Watch
from vllm_ext.microbench import shapes
from vllm_ext.microbench.measure import (
    Args,
    Check,
    Device,
    NotRun,
    Provider,
    Times,
    WrongReplayError,
    measure,
)
from vllm_ext.microbench.shapes import Case
from vllm_ext.stats import median, paired_ratio, quartiles, tolerance

Maker = Callable[[Case, str], Provider]
Key = tuple[str, Case]

STOCK = ("stock", "stock-triton")  # what others are compared with: the first there is
OURS = "ours"
METRICS = {"cold": "device time, cold", "hot": "device time, hot"}


def make_device() -> Device | None:
    """The GPU, if there is one."""
    if not torch.cuda.is_available():
        return None
    from vllm_ext.microbench.cuda import Cuda

    return Cuda()


class Session:
    """What one run of the benchmarks has found so far."""

    def __init__(self, seconds: float) -> None:
        self.watch = Watch()
        self.device: Device | None = None
        self.copy_bytes_per_second: float | None = None
        self.selected: dict[Key, list[str]] = defaultdict(list)
        self.parity: list[dict[str, Any]] = []
        self.not_run: list[dict[str, str]] = []
        self.wrong: list[dict[str, str]] = []
        self.comparisons: list[dict[str, Any]] = []
        self.done = 0
        self.started = time.monotonic()
        self._ends = self.started + seconds
        self._outcomes: dict[Key, dict[str, Times | Exception | None]] = {}

    def start(self) -> None:
        """Before anything here uses the GPU."""
        self.watch.__enter__()
        self.device = make_device()
        if self.device is not None:
            self.copy_bytes_per_second = self.device.copy_bytes_per_second()

    def outcome(
        self,
        group: str,
        case: Case,
        makers: Mapping[str, Maker],
        *,
        make_args: Callable[[int], Args],
        check: Callable[[Provider], None],
        check_replay: Check | None,
        set_bytes: int,
    ) -> dict[str, Times | Exception | None]:
        """Of each competitor: its times, ``None`` for right but not timed, or why not.

        All that were selected are measured together, the first time one is asked for.
        """
        key = (group, case)
        if key in self._outcomes:
            return self._outcomes[key]
        if time.monotonic() > self._ends:
            late = NotRun("no time was left for it")
            self.not_run += [
                {"case": f"{group} {case}", "provider": name, "why": str(late)}
                for name in self.selected[key]
            ]
            self._outcomes[key] = dict.fromkeys(self.selected[key], late)
            return self._outcomes[key]
        self.done += 1
        elapsed = time.monotonic() - self.started
        sys.stderr.write(
            f"[{elapsed:4.0f} s] {self.done} of {len(self.selected)}: {group} {case}\n"
        )
        found = self._outcomes[key] = {}
        where = "cpu" if self.device is None else "cuda"
        right: dict[str, Provider] = {}
        for name in self.selected[key]:
            noted = {"case": f"{group} {case}", "provider": name}
            try:
                provider = makers[name](case, where)
                check(provider)
            except NotRun as reason:
                found[name] = reason
                self.not_run.append({**noted, "why": str(reason)})
                continue
            except Exception as error:
                found[name] = error
                self.wrong.append({**noted, "why": _line(error)})
                continue
            right[name], found[name] = provider, None
            launches = None
            if self.device is None:
                launches = _submissions(provider, make_args(0))
            self.parity.append({**noted, "submissions": launches})
        if self.device is not None:
            self._time(
                key,
                right,
                makers,
                make_args=make_args,
                check_replay=check_replay,
                set_bytes=set_bytes,
            )
        return found

    def _time(
        self,
        key: Key,
        right: dict[str, Provider],
        makers: Mapping[str, Maker],
        *,
        make_args: Callable[[int], Args],
        check_replay: Check | None,
        set_bytes: int,
    ) -> None:
        """Time those whose answers are right, and stock a second time as a control."""
        assert self.device is not None
        found, case = self._outcomes[key], f"{key[0]} {key[1]}"
        base = next((name for name in STOCK if name in right), None)
        if base is not None:
            right[results.CONTROL] = makers[base](key[1], "cuda")
        while right:
            try:
                times = measure(
                    right,
                    make_args,
                    set_bytes=set_bytes,
                    device=self.device,
                    throttled=self.watch.throttled,
                    seed=self.done,
                    check_replay=check_replay,
                )
                break
            except WrongReplayError as error:
                name, culprits = error.provider, [error.provider]
                if name in (base, results.CONTROL):
                    name, culprits = base or name, [str(base), results.CONTROL]
                    base = None
                failure: Exception = error
            except Exception as error:
                name, culprits, failure = "all", list(right), error
            for culprit in culprits:
                del right[culprit]
                if culprit in found:
                    found[culprit] = failure
            self.wrong.append({"case": case, "provider": name, "why": _line(failure)})
        else:
            return
        found.update({name: times[name] for name in right if name in found})
        if base is not None:
            self._compare(case, base, times)

    def _compare(self, case: str, base: str, times: Mapping[str, Times]) -> None:
        arms = [arm for arm in (results.CONTROL, OURS) if arm in times]
        for clock, metric in METRICS.items():
            stock = getattr(times[base], clock)
            control = getattr(times[results.CONTROL], clock)
            allowed = tolerance(paired_ratio(stock, control))
            for arm in arms:
                self.comparisons.append(
                    results.comparison(
                        case=case,
                        metric=metric + _clocks(times[arm], times[base]),
                        unit="s",
                        arm=arm,
                        against=base,
                        arm_samples=getattr(times[arm], clock),
                        against_samples=stock,
                        tolerance=allowed,
                    )
                )


def _clocks(arm: Times, base: Times) -> str:
    """That two were timed in different ways, if so: one cannot be captured."""
    ways = ["queued" if each.uncapturable else "graph" for each in (arm, base)]
    return "" if ways[0] == ways[1] else f" ({ways[0]} against {ways[1]})"


SESSION = pytest.StashKey[Session]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("vllm-ext")
    group.addoption(
        "--vext-report", type=Path, help="write what was found, but timings"
    )
    group.addoption(
        "--vext-seconds", type=float, default=math.inf, help="begin no case later"
    )
    group.addoption(
        "--vext-full", action="store_true", help="every combination of shapes"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SESSION] = Session(config.getoption("vext_seconds"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"case", "provider"} <= set(metafunc.fixturenames):
        module = metafunc.module
        full: bool = metafunc.config.getoption("vext_full")
        sizes = {"small": not torch.cuda.is_available(), "full": full}
        if hasattr(module, "cases"):
            cases = list(module.cases(**sizes))
        else:
            cases = list(shapes.cases(module.MODES, module.DTYPES, **sizes))
        metafunc.parametrize("provider", module.PROVIDERS)
        metafunc.parametrize("case", cases, ids=[case.id for case in cases])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.Function) and "measure" in item.fixturenames:
            # Rounds are handed to pytest-benchmark as they were taken on the device.
            item.add_marker(pytest.mark.benchmark(timer=device_clock))


def pytest_collection_finish(session: pytest.Session) -> None:
    found = session.config.stash[SESSION]
    for item in session.items:
        if isinstance(item, pytest.Function) and "measure" in item.fixturenames:
            params: dict[str, Any] = item.callspec.params
            key = (_group(item), params["case"])
            found.selected[key].append(params["provider"])


def pytest_sessionstart(session: pytest.Session) -> None:
    if not session.config.option.collectonly:
        session.config.stash[SESSION].start()


def pytest_sessionfinish(session: pytest.Session) -> None:
    found = session.config.stash[SESSION]
    found.watch.__exit__(None, None, None)
    path = session.config.getoption("vext_report")
    if path:
        path.write_text(json.dumps(document(found, [])))


@pytest.fixture(name="measure")
def _measure(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Check a competitor and, on a GPU, time it beside the others of its case.

    The function takes the competitor's name, all of them by name (``Maker``: case and
    device to `Provider`), the case, and by keyword:

    ``make_args``  argument set of a number; on a GPU many are alive together
    ``check``  raises AssertionError when a `Provider` answers wrong
    ``check_replay``  the same for one argument set and what a replay answered
    ``set_bytes``  what a call reads of an argument set
    ``moved_bytes``  the least that any implementation has to read and write
    """
    session = request.config.stash[SESSION]
    group = _group(request.node)

    def run(
        name: str,
        makers: Mapping[str, Maker],
        case: Case,
        *,
        make_args: Callable[[int], Args],
        check: Callable[[Provider], None],
        set_bytes: int,
        moved_bytes: int,
        check_replay: Check | None = None,
    ) -> None:
        found = session.outcome(
            group,
            case,
            makers,
            make_args=make_args,
            check=check,
            check_replay=check_replay,
            set_bytes=set_bytes,
        )[name]
        if isinstance(found, NotRun):
            pytest.skip(f"not run: {found}")
        if isinstance(found, Exception):
            raise found
        if found is not None:
            benchmark = request.getfixturevalue("benchmark")
            benchmark.group = group
            benchmark.extra_info.update(
                figures(found, moved_bytes, session.copy_bytes_per_second)
            )
            samples = iter(found.cold)
            benchmark.pedantic(
                lambda: _clock.tick(next(samples)),
                setup=_clock.reset,
                rounds=len(found.cold),
            )

    return run


def figures(
    times: Times, moved_bytes: int, copy_bytes_per_second: float | None
) -> dict[str, Any]:
    """What a result says of one competitor beside its rounds, which are the cold ones.

    ``moved_bytes`` is the least that any implementation has to move, so that ``gbs``
    and the share compare competitors, whatever they themselves read again.
    """
    info: dict[str, Any] = {}
    for clock in ("cold", "hot", "host"):
        samples = getattr(times, clock)
        low, high = quartiles(samples)
        info[f"{clock}_us"] = 1e6 * median(samples)
        info[f"{clock}_iqr_us"] = 1e6 * (high - low)
    for clock in ("cold", "hot"):
        rate = moved_bytes / median(getattr(times, clock))
        info[f"{clock}_gbs"] = rate / 1e9
        if copy_bytes_per_second:
            info[f"{clock}_share_of_copy"] = rate / copy_bytes_per_second
    return info | {
        "copy_gbs": copy_bytes_per_second and copy_bytes_per_second / 1e9,
        "moved_bytes": moved_bytes,
        "launches": times.launches,
        "argument_sets": times.sets,
        "calls_per_round": times.calls,
        "dropped_rounds": times.dropped,
        "clock": f"queued: {times.uncapturable}" if times.uncapturable else "graph",
        "note": times.note,
    }


class _Clock:
    """Stands where a recorded round ended."""

    def __init__(self) -> None:
        self.now = 0.0

    def reset(self) -> None:
        self.now = 0.0  # a sum would lose digits

    def tick(self, seconds: float) -> None:
        self.now += seconds


_clock = _Clock()


def device_clock() -> float:
    """Seconds on the device: what pytest-benchmark takes for the time."""
    return _clock.now


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_generate_machine_info() -> dict[str, Any]:
    here = machine.describe()
    return {"node": here["gpu"], "machine": here["cpu"], "system": here["os"]}


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_generate_commit_info() -> dict[str, Any]:
    here = machine.describe()
    return {"id": here["commit"] or "unknown", "dirty": bool(here["dirty"])}


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(
    config: pytest.Config, output_json: dict[str, Any]
) -> None:
    found = config.stash[SESSION]
    for entry in output_json["benchmarks"]:
        case, provider = entry["params"]["case"], entry["params"]["provider"]
        entry["params"] = {**asdict(case), "provider": provider}
        entry["fullname"] = f"{entry['group']}::{entry['name']}"
        entry["options"] = {}
    output_json.update(document(found, output_json["benchmarks"]))


def document(found: Session, entries: list[dict[str, Any]]) -> dict[str, Any]:
    """The result file of a run."""
    whole = results.document(
        "kernels",
        entries,
        found.comparisons,
        patches=[],
        watch=found.watch.summary(),
        command=sys.argv,
        label="interpreted kernels" if found.device is None else "GPU kernels",
    )
    whole["vllm_ext"] |= _report(found)
    return whole


def _report(found: Session) -> dict[str, Any]:
    return {
        "timed": found.device is not None,
        "interrupted": False,
        "parity": found.parity,
        "not_run": found.not_run,
        "wrong": found.wrong,
    }


def _group(item: Any) -> str:
    """A benchmark's name: that of its function, without ``bench_``."""
    return str(item.originalname).removeprefix("bench_")


def _submissions(provider: Provider, args: Args) -> int | None:
    """What a call would hand to a GPU: launches, operators and copies, counted here.

    ``None`` without vLLM, whose buffers the count has to know.
    """
    try:
        from vllm_ext.submissions import HostMemory, Submissions

        launches: Counter[str] = Counter()
        with (
            Submissions(HostMemory(), launches) as counted,
            _launches_counted(launches, counted),
        ):
            provider.call(*args)
    except ImportError:
        return None
    return sum(counted.kinds.values())


@contextmanager
def _launches_counted(launches: Counter[str], counted: Any) -> Iterator[None]:
    """Count interpreted launches, and not the operators that interpret them."""
    from triton.runtime.interpreter import GridExecutor

    stock = GridExecutor.__call__

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        launches[self.fn.__name__] += 1
        with counted.paused():
            stock(self, *args, **kwargs)

    GridExecutor.__call__ = launch
    try:
        yield
    finally:
        GridExecutor.__call__ = stock


def _line(error: BaseException) -> str:
    """The first line of ``error``, with its kind."""
    text = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
