"""Engines in processes of their own, asked and answered in lines of JSON.

vLLM and the plugin read their settings once per process, and vLLM writes to standard
output as it likes. So each engine is a child: questions go to its standard input,
answers come back on a pipe of their own, everything else goes to a file of which the
last lines are shown when the child fails.
"""

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import IO, Any

REPLY_FD = "VEXT_REPLY_FD"
SHOWN_LINES = 15


class ChildError(RuntimeError):
    """A child ended, or did not answer in time; carries its last lines."""

    @property
    def line(self) -> str:
        """What happened and the last thing that the child said, as one line."""
        lines = [line.strip(" |") for line in str(self).splitlines()]
        said = [line for line in lines if line] or [type(self).__name__]
        return " ".join(dict.fromkeys((said[0], said[-1])))


class Child:
    """A Python module that runs in its own process and serves questions.

    Args:
        module: Run as ``python -m module``; calls `serve`.
        environment: Added to this process's; a value of ``None`` takes one away.
        name: What messages call it.
    """

    def __init__(
        self, module: str, environment: Mapping[str, str | None], name: str
    ) -> None:
        self.name = name
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        reading, writing = os.pipe()
        merged = {**os.environ, **environment, REPLY_FD: str(writing)}
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module],
                env={
                    name: value for name, value in merged.items() if value is not None
                },
                stdin=subprocess.PIPE,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                pass_fds=(writing,),
                start_new_session=True,
            )
        finally:
            os.close(writing)
        self._replies = os.fdopen(reading, "rb", buffering=0)
        self._unread = b""

    def tell(self, what: str, **details: Any) -> None:
        """Ask without waiting for the answer."""
        question = json.dumps({"what": what, **details}).encode() + b"\n"
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(question)
            self._process.stdin.flush()
        except OSError:
            raise self._failed("ended") from None

    def hear(self, timeout: float = 300) -> Any:
        """The answer to the oldest unanswered question; waits ``timeout`` seconds.

        Raises:
            ChildError: There is none, or the child could not do what it was asked.
        """
        deadline = time.monotonic() + timeout
        while b"\n" not in self._unread:
            left = max(0.0, deadline - time.monotonic())
            if not select.select([self._replies], [], [], left)[0]:
                raise self._failed(f"said nothing for {timeout:.0f} s")
            chunk = self._replies.read(1 << 16)
            if not chunk:
                raise self._failed("ended")
            self._unread += chunk
        line, _, self._unread = self._unread.partition(b"\n")
        answer = json.loads(line)
        if "error" in answer:
            raise ChildError(f"{self.name}: {answer['error']}")
        return answer["answer"]

    def ready(self, timeout: float) -> bool:
        """Whether `hear` has something to say, or will within ``timeout`` seconds."""
        return b"\n" in self._unread or bool(
            select.select([self._replies], [], [], timeout)[0]
        )

    def ask(self, what: str, timeout: float = 300, **details: Any) -> Any:
        """Ask, and wait ``timeout`` seconds for the answer."""
        self.tell(what, **details)
        return self.hear(timeout)

    def close(self) -> None:
        """Let it end by itself, or end it; again: nothing."""
        if self._replies.closed:
            return
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self.kill()
        self._replies.close()
        self._log.close()

    def kill(self) -> None:
        """End it, and the processes that it started, now."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _failed(self, how: str) -> ChildError:
        try:
            status = self._process.wait(5)
            how = f"{how} with status {status}"
        except subprocess.TimeoutExpired:
            self.kill()
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").splitlines()
        shown = "\n".join(f"  | {line}" for line in lines[-SHOWN_LINES:])
        return ChildError(f"{self.name} {how}; its last lines:\n{shown}")


def serve(handlers: Mapping[str, Callable[..., Any]]) -> None:
    """In the child: answer questions until standard input ends, then end the process.

    Args:
        handlers: By what is asked; called with the details, and returns the answer
            as something that JSON can hold. A ``ValueError`` is answered; any other
            error ends the process, its traceback in the last lines.
    """
    with os.fdopen(int(os.environ[REPLY_FD]), "w") as replies:
        for line in sys.stdin:
            question = json.loads(line)
            handler = handlers[question.pop("what")]
            try:
                answer = {"answer": handler(**question)}
            except ValueError as error:
                answer = {"error": str(error)}
            print(json.dumps(answer), file=replies, flush=True)
    # What was registered for the end runs; taking an engine apart object by object
    # takes seconds, and nobody would see the result.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(0)
