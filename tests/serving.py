"""``vllm serve`` in processes of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

PATIENCE = 180  # seconds, for a server to come up on a busy machine


@contextmanager
def served(
    model: Path, printed: Path, *options: str, environment: Mapping[str, str]
) -> Iterator[str]:
    """Serve ``model`` as "tiny"; the address, once it answers.

    Args:
        printed: A file for what the server says.
        options: Of ``vllm serve``, besides those below.
        environment: Of the server, over this process's.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with printed.open("w") as log:
        server = subprocess.Popen(
            [
                *(Path(sys.executable).with_name("vllm"), "serve", str(model)),
                *("--served-model-name", "tiny", "--max-model-len", "256"),
                *("--enforce-eager", "--kv-cache-memory-bytes", str(16 * 2**20)),
                *("--host", "127.0.0.1", "--port", str(port), *options),
            ],
            env={**os.environ, **environment},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + PATIENCE
        while True:
            assert server.poll() is None, printed.read_text()
            assert time.monotonic() < deadline, "the server did not come up"
            try:
                urllib.request.urlopen(f"{url}/health", timeout=1)
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.3)
        yield url
    finally:
        os.killpg(server.pid, signal.SIGINT)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
