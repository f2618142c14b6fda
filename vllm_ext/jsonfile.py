"""Result files: complete or not there."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any


class CannotWriteError(Exception):
    """One line: which file, and why it cannot be written."""


def check(path: Path) -> None:
    """Find out before the work whether `write` will be able to write ``path``.

    Raises:
        CannotWriteError: It will not.
    """
    if path.is_dir():
        raise CannotWriteError(f"{path} cannot be written: it is a folder")
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise CannotWriteError(f"{path} cannot be written: {error.strerror}") from None


def write(path: Path, value: Any) -> None:
    """Put ``value`` into ``path`` as JSON; see `write_text`."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Put ``text`` into ``path``, in one move.

    Raises:
        CannotWriteError: The folder or the disk does not let it.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_text(text)
        scratch.replace(path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise CannotWriteError(f"{path} cannot be written: {error.strerror}") from None
