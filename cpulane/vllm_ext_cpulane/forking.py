"""Processes that begin with what vLLM imports from elsewhere, vLLM itself apart.

Half of the time of an engine of a few steps is Python importing torch, transformers
and the like. So one process does that, and each script is a fork of it: a process of
its own, in which vLLM, its plugins and Triton's kernels are still to be imported. It
has no thread, and has read the variables only that these packages look at.
"""

import atexit
import contextlib
import gc
import importlib
import json
import multiprocessing
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from functools import cache
from types import ModuleType

IMPORTED = (  # with what they import themselves, 7 of 8 seconds
    "torch._inductor.standalone_compile",
    "torch._inductor.lowering",
    "transformers.integrations.gguf.gguf_tokenizer_mapping",
    "transformers.models.auto.image_processing_auto",
    "compressed_tensors.quantization",
    "openai",
    "fastapi",
    "requests",
    "cv2",
    "xgrammar",
    "opentelemetry.sdk.trace",
)
LATE = ("VLLM_", "VEXT", "PYTHONPATH")  # vLLM's and our variables, and the script's


class Fork:
    """A script in a fork; what `run_script` asks of a `subprocess.Popen`."""

    returncode: int | None = None

    def __init__(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        added: Mapping[str, str],
    ) -> None:
        """Start ``python arguments``, which are ``-c`` and code or a file, and more.

        Args:
            environment: All variables of the process.
            added: Those of them that packages may look at when they are imported:
                scripts for which they are the same are forks of the same process.
        """
        request = {
            **{"arguments": list(arguments), "environment": dict(environment)},
            "folder": os.getcwd(),
        }
        early = {
            name: value
            for name, value in sorted(added.items())
            if not name.startswith(LATE)
        }
        self._output, output = os.pipe()
        self._status, status = os.pipe()
        with _one_at_a_time:
            _, control = _parent(json.dumps(early))
        socket.send_fds(control, [json.dumps(request).encode()], [output, status])
        os.close(output)
        os.close(status)
        self.pid = self._told()

    def communicate(self, timeout: float) -> tuple[str, None]:
        """What it and its children wrote, once all have ended."""
        deadline = time.monotonic() + timeout
        chunks = []
        while not chunks or chunks[-1]:
            left = max(0.0, deadline - time.monotonic())
            if not select.select([self._output], [], [], left)[0]:
                raise subprocess.TimeoutExpired("a fork", timeout)
            chunks.append(os.read(self._output, 1 << 16))
        self.wait()
        return b"".join(chunks).decode(errors="replace"), None

    def wait(self) -> None:
        """Until it has ended; once."""
        self.returncode = self._told()
        os.close(self._status)
        os.close(self._output)

    def _told(self) -> int:
        """The next of what `_look_after` says: its process's id, and how it ended."""
        said = os.read(self._status, 4)
        if not said:
            raise ChildProcessError("the process to fork, or a fork of it, is gone")
        return int.from_bytes(said, "little", signed=True)


_one_at_a_time = threading.Lock()


@cache
def _parent(early: str) -> tuple[subprocess.Popen, socket.socket]:
    """The process to fork, and what it is asked through; it ends when this one does."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            env={**os.environ, **json.loads(early)},
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
    return process, ours


def _serve(control: socket.socket) -> None:
    """In the process to fork: fork until nobody is left who could ask."""
    for name in IMPORTED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    if len(os.listdir("/proc/self/task")) > 1:
        raise RuntimeError("one of the packages has started a thread: no fork is safe")
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        request, (*files,), _, _ = socket.recv_fds(control, 1 << 20, 2)
        if not request:
            return
        if os.fork() == 0:
            control.close()
            _look_after(json.loads(request), *files)
        for file in files:
            os.close(file)


def _look_after(request: dict, output: int, status: int) -> None:
    """In a fork: fork the script, and say how it ends, which it could not itself."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid == 0:
        os.close(status)
        os.setsid()
        with open(os.devnull, "rb") as nothing:
            os.dup2(nothing.fileno(), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        os._exit(_run(**request))
    os.close(output)
    os.write(status, pid.to_bytes(4, "little", signed=True))
    ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.write(status, ended.to_bytes(4, "little", signed=True))
    os._exit(0)


def _run(arguments: list[str], environment: dict[str, str], folder: str) -> int:
    """In the script's process: what Python does with its arguments, and its status."""
    before = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    first = [*filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    sys.path[:] = [*first, *(each for each in sys.path if each not in before)]
    # Not what its siblings have, too; `random` sees to itself.
    tempfile.tempdir = None
    sys.modules["numpy"].random.seed()
    multiprocessing.current_process().authkey = os.urandom(32)
    status = 0
    try:
        if arguments[0] == "-c":
            sys.path.insert(0, "")
            sys.argv = ["-c", *arguments[2:]]
            sys.modules["__main__"] = main = ModuleType("__main__")
            exec(compile(arguments[1], "<string>", "exec"), vars(main))
        else:
            sys.path.insert(0, os.path.dirname(os.path.abspath(arguments[0])))
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as leaving:
        if not isinstance(leaving.code, int | None):
            sys.stderr.write(f"{leaving.code}\n")
        status = leaving.code if isinstance(leaving.code, int) else bool(leaving.code)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return int(status)


if __name__ == "__main__":
    del sys.path[0]  # the folder of this file
    _serve(socket.socket(fileno=int(sys.argv[1])))
