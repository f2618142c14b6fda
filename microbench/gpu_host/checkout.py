"""Which code an offline host runs: a copy of a checkout travels without its history.

`note` writes down, where git is, the commit and a digest of the code; `told` compares
that with the code that arrived, and puts it into words for `vllm_ext.machine`.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from vllm_ext import machine

FILE = "checkout.json"
FOLDERS = ("vllm_ext", "kernels", "patches", "microbench", "tests", "cpulane")


def digest(root: Path) -> str:
    """Of every Python file below `FOLDERS` of ``root``."""
    code = hashlib.sha256()
    for folder in FOLDERS:
        for file in sorted((root / folder).rglob("*.py")):
            name = file.relative_to(root).as_posix()
            code.update(f"{name}\0{file.stat().st_size}\0".encode())
            code.update(file.read_bytes())
    return code.hexdigest()


def note(root: Path, folder: Path) -> dict[str, Any]:
    """Write `FILE` into ``folder``; what it says."""
    here = machine.describe()
    found = {
        "commit": here["commit"],
        "dirty": here["dirty"],
        "digest": digest(root),
    }
    (folder / FILE).write_text(json.dumps(found) + "\n")
    return found


def told(root: Path, file: Path) -> str:
    """The commit of the code in ``root`` as far as ``file`` can say it.

    Returns:
        For ``VEXT_COMMIT``: the commit, with "+" if the code is not quite that; empty
        if nothing is known.
    """
    try:
        noted = json.loads(file.read_text())
        commit, dirty, known = noted["commit"], noted["dirty"], noted["digest"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    if not commit:
        return ""
    return f"{commit}+" if dirty or known != digest(root) else str(commit)
