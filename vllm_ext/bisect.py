"""Find the patches that make a command fail, by running it with fewer and fewer.

Delta debugging (Zeller and Hildebrandt, "Simplifying and Isolating Failure-Inducing
Input", 2002) over the set of patches: it also finds two that fail only together.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

Say = Callable[[str], None]


class CannotBisect(Exception):
    """One line: why there is nothing to search for."""


@dataclass(frozen=True)
class Verdict:
    """The smallest set found that makes the command fail, and how often it ran."""

    culprits: tuple[str, ...]
    runs: int


def minimise(names: Sequence[str], fails: Callable[[Sequence[str]], bool]) -> list[str]:
    """A subset of ``names`` that fails and of which no single name can be left out.

    ``names`` itself must fail.
    """
    failing = list(names)
    parts = 2
    while len(failing) > 1:
        size = -(-len(failing) // parts)
        chunks = [failing[at : at + size] for at in range(0, len(failing), size)]
        rests = [[name for name in failing if name not in chunk] for chunk in chunks]
        smaller = next((chunk for chunk in chunks if fails(chunk)), None)
        if smaller is not None:
            failing, parts = smaller, 2
            continue
        # With two parts the rest of one is the other, and has just been tried.
        rest = next((r for r in rests if fails(r)), None) if parts > 2 else None
        if rest is not None:
            failing, parts = rest, max(parts - 1, 2)
            continue
        if parts >= len(failing):
            break
        parts = min(parts * 2, len(failing))
    return failing


def bisect(
    command: Sequence[str],
    names: Sequence[str],
    say: Say,
    timeout: float | None = None,
) -> Verdict:
    """Search ``names`` for the patches that make ``command`` fail.

    Args:
        command: Program and arguments; it fails by exiting with anything but 0, or
            by running longer than ``timeout`` seconds.
        names: The patches in question, all applied together at first.
        say: Told about each run.

    Raises:
        CannotBisect: It passes with all of them, fails with none of them, or cannot
            be started.
    """
    runs = 0
    seen: dict[tuple[str, ...], bool] = {}

    def fails(subset: Sequence[str]) -> bool:
        nonlocal runs
        key = tuple(subset)
        if key in seen:
            return seen[key]
        runs += 1
        environ = dict(os.environ)
        if subset:
            environ |= {"VEXT": "1", "VEXT_PATCHES": ",".join(subset)}
        else:
            environ["VEXT"] = "0"
        how = _run(command, environ, timeout)
        seen[key] = bool(how)
        outcome = f"fails ({how})" if how else "passes"
        say(f"run {runs}: {outcome} with {', '.join(subset) or 'no patch'}")
        return seen[key]

    if not names:
        raise CannotBisect("no patch is on, so there is nothing to search")
    if fails(()):
        raise CannotBisect(
            "the command fails without any patch too: vllm-ext is not the cause"
        )
    if not fails(names):
        raise CannotBisect("the command passes with all patches on: nothing to find")
    return Verdict(tuple(minimise(names, fails)), runs)


def _run(command: Sequence[str], environ: dict[str, str], timeout: float | None) -> str:
    """How ``command`` failed; empty where it passed.

    It gets a process group of its own, which is ended with it: engine processes that
    outlive a run would hold the device, and the next run would fail for that.
    """
    try:
        process = subprocess.Popen(
            command,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=2,  # what we print ourselves may be read by a program
            start_new_session=True,
        )
    except OSError as error:
        raise CannotBisect(f"{command[0]} cannot be started: {error}") from None
    try:
        code = process.wait(timeout)
        return f"exit status {code}" if code else ""
    except subprocess.TimeoutExpired:
        return f"timeout after {timeout:.0f} s"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
