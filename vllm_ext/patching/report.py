"""What became of the patches in this process, as data and as a file.

A line in a log that says "applied" proves nothing: what counts is the process that
decodes. So each process writes its own file, and rewrites it as calls come in.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import multiprocessing
import multiprocessing.util
import os
import threading
import time
from pathlib import Path
from typing import Any

from vllm_ext.patching.engine import Engine, Outcome, log

SECONDS_BETWEEN_WRITES = 0.5


def server() -> str:
    """A name that the processes of one server have, and no other process.

    It is made of the random key that the first of them hands down to those that
    ``multiprocessing`` starts: pids come again, also in another container.
    """
    key = bytes(multiprocessing.current_process().authkey)
    return hashlib.sha256(key).hexdigest()[:12]


def snapshot(engine: Engine) -> dict[str, Any]:
    """State of every patch of ``engine``, ready for JSON."""
    return {
        "pid": os.getpid(),
        "process": multiprocessing.current_process().name,
        "server": server(),
        engine.source.package: engine.source.version,
        "patches": [
            {
                "name": outcome.patch.name,
                "state": outcome.state,
                "reason": outcome.reason,
                "calls": sum(outcome.calls.values()),
                "targets": dict(outcome.calls),
                "aside": dict(outcome.aside),
            }
            for outcome in engine.outcomes.values()
        ],
    }


class StateFile:
    """``<folder>/<pid>.json``, rewritten as states and counts change.

    Calls write it, at most twice a second, and each before it runs: what the calls of
    the last half second counted is there after the next call, or when the process ends.
    """

    def __init__(self, folder: Path, engine: Engine):
        self.folder = folder
        self.engine = engine
        self._pid = 0
        self._states: list[str] = []
        self._written = 0.0
        self._broken = False
        self._lock = threading.Lock()
        os.register_at_fork(after_in_child=self._after_fork)

    def _after_fork(self) -> None:
        self._lock = threading.Lock()  # the parent's may be held for ever

    def changed(self, outcome: Outcome) -> None:
        """Write now if a state changed, else at most twice a second."""
        if self._broken:
            return
        now = time.monotonic()
        states = [each.state for each in self.engine.outcomes.values()]
        if self._pid != os.getpid():  # first change in this process
            self._pid = os.getpid()
            atexit.register(self.write)
            # Children of multiprocessing leave without atexit.
            multiprocessing.util.Finalize(None, self.write, exitpriority=0)
        elif states == self._states and now - self._written < SECONDS_BETWEEN_WRITES:
            return
        self._states, self._written = states, now
        self.write()

    def write(self) -> None:
        """Replace the file; a folder that cannot be written is said once."""
        if self._broken or self._pid != os.getpid():
            return
        path = self.folder / f"{self._pid}.json"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._lock:  # calls come from any thread
                scratch = path.with_suffix(".new")
                scratch.write_text(json.dumps(snapshot(self.engine), indent=1) + "\n")
                scratch.replace(path)
        except OSError as error:
            self._broken = True
            log.warning("vllm-ext: VEXT_STATE_DIR cannot be written: %s", error)


def read_states(folder: Path) -> list[dict[str, Any]]:
    """What the processes wrote into ``folder``, by process id.

    Raises:
        ValueError: A file is not one of ours; names it.
    """
    states = []
    for path in sorted(folder.glob("*.json")):
        try:
            state = json.loads(path.read_text())
            state["pid"], state["process"], state["patches"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is no state file of vllm-ext ({error}); remove it"
            ) from None
        states.append(state)
    return sorted(states, key=lambda state: int(state["pid"]))
