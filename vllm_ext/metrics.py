"""What became of the patches, in the server's own ``/metrics``.

The process that answers ``/metrics`` is not the one that decodes. So this one reads,
when it is asked, the state files that the processes of its server have written: no
step pays for it, and a count is as old as the file, which `StateFile` says.
"""

from __future__ import annotations

import functools
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from vllm_ext.patching.engine import log
from vllm_ext.patching.on_import import on_import
from vllm_ext.patching.report import server

# Imported only where vLLM answers over HTTP.
ROUTE = "vllm.entrypoints.serve.instrumentator.metrics"


class PatchCollector:
    """Prometheus metrics of this server's living processes, from their state files.

    Attributes:
        folder: ``VEXT_STATE_DIR``; ``None``: there are no metrics.
    """

    def __init__(self) -> None:
        self.folder: Path | None = None
        self._broken: set[Path] = set()

    def describe(self) -> list[Any]:
        """Nothing: a registry that asks for names is not to read the files."""
        return []

    def collect(self) -> Iterator[Any]:
        """``vext_patch_info`` and ``vext_steps_left_to_stock_total``."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        if self.folder is None:
            return
        info = GaugeMetricFamily(
            *("vext_patch_info", "State of each patch in each process, as a label."),
            labels=("patch", "state", "process", "pid"),
        )
        left = CounterMetricFamily(
            *("vext_steps_left_to_stock", "Steps that a patch left to stock code."),
            labels=("patch", "reason"),
        )
        aside: Counter[tuple[str, str]] = Counter()
        for path in sorted(self.folder.glob("*.json")):
            try:
                states, counts = _read(path)
            except Exception as error:  # whatever it holds, the server answers on
                if path not in self._broken:
                    self._broken.add(path)
                    log.warning("vllm-ext: %s left out of /metrics: %s", path, error)
                continue
            for labels in states:
                info.add_metric(labels, 1)
            aside.update(counts)
        for labels, count in aside.items():
            left.add_metric(labels, count)
        yield info
        yield left


def _read(path: Path) -> tuple[list[tuple[str, ...]], dict[tuple[str, str], int]]:
    """Labels of the patches' states, and steps left to stock by patch and reason."""
    state = json.loads(path.read_text())
    pid = int(state["pid"])
    if state.get("server") != server() or not _alive(pid):
        return [], {}
    return (
        [
            (each["name"], each["state"], state["process"], str(pid))
            for each in state["patches"]
        ],
        {
            (each["name"], reason): int(count)
            for each in state["patches"]
            for reason, count in each["aside"].items()
        },
    )


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


_collector = PatchCollector()


@functools.cache
def _ask() -> None:
    on_import(ROUTE, _join)


def show(folder: Path | None) -> None:
    """Let ``/metrics``, if this process ever has it, say what is in ``folder``."""
    _collector.folder = folder
    if folder is not None:
        _ask()


def _join(route: ModuleType) -> None:
    """Add the collector to what vLLM exports, with one API server or with several.

    With several, each request makes itself a registry that holds nothing but a
    ``MultiProcessCollector``, so that is where ours has to be.
    """
    try:
        from prometheus_client import REGISTRY
        from prometheus_client.multiprocess import MultiProcessCollector

        stock = MultiProcessCollector.collect

        @functools.wraps(stock)
        def collect(self: Any) -> list[Any]:
            return [*stock(self), *_collector.collect()]

        MultiProcessCollector.collect = collect
        REGISTRY.register(_collector)
    except Exception as error:  # the module is vLLM's: its import must not fail
        log.warning("vllm-ext: /metrics says nothing of patches: %s", error)
