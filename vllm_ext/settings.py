"""The ``VEXT*`` environment variables, parsed once into a frozen object.

They do not start with ``VLLM_``: vLLM warns about, and in strict mode refuses, every
variable of that prefix that it does not know.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Variable -> (default as it is shown, meaning); the table in README is tested on it.
VARIABLES = {
    "VEXT": ("1", "`0` turns the plugin off"),
    "VEXT_PATCHES": (
        "(defaults)",
        "`a,b` only these patches; `+a,-b` adds to or takes from the defaults",
    ),
    "VEXT_STRICT": (
        "0",
        "`1`: a patch that cannot be applied stops the process (for CI)",
    ),
    "VEXT_STATE_DIR": (
        "(unset)",
        "folder for one JSON per process: what was applied and used, or why not",
    ),
    "VEXT_STEP_GRAPH": (
        "bracketed",
        "`mono`: `step_graph` captures a forward pass of its own and replays one graph "
        "per step, instead of two around vLLM's",
    ),
    "VEXT_STEP_GRAPH_CHECK": (
        "(first steps)",
        "`N`: every `N`-th step of `step_graph` is compared with stock's, beside the "
        "first ones of each graph; `0`: none is",
    ),
}

# Keys of --additional-config '{"vllm_ext": {...}}' -> the variable each stands for.
CONFIG_KEYS = {
    "enabled": "VEXT",
    "patches": "VEXT_PATCHES",
    "strict": "VEXT_STRICT",
    "state_dir": "VEXT_STATE_DIR",
    "step_graph": "VEXT_STEP_GRAPH",
    "step_graph_check": "VEXT_STEP_GRAPH_CHECK",
}
CONFIG_NAME = "vllm_ext"

_ON = ("1", "true", "yes", "on")
_OFF = ("0", "false", "no", "off")


@dataclass(frozen=True)
class Settings:
    """What the variables say.

    Attributes:
        enabled: Whether the plugin does anything at all.
        patches: Names of the patches to apply, in the order of the series.
        strict: Whether a patch that cannot be applied stops the process.
        state_dir: Where each process writes what became of its patches.
        problems: One line per value that was not understood; the rest holds.
    """

    enabled: bool
    patches: tuple[str, ...]
    strict: bool
    state_dir: Path | None
    problems: tuple[str, ...]


def parse(environ: Mapping[str, str], defaults: Mapping[str, bool]) -> Settings:
    """Read the settings.

    Args:
        environ: The environment.
        defaults: Every patch, in the order of the series, and whether it is on by
            default.
    """
    problems: list[str] = []

    def switch(name: str, default: bool) -> bool:
        text = environ.get(name, "").strip().lower()
        if text in _ON + _OFF:
            return text in _ON
        if text:
            problems.append(
                f"{name}={environ[name]} is neither 1 nor 0; taken as {int(default)}"
            )
        return default

    wanted = _choose(environ.get("VEXT_PATCHES", ""), defaults, problems)
    form = environ.get("VEXT_STEP_GRAPH", "").strip().lower()
    if form not in ("", "bracketed", "mono"):
        problems.append(
            f"VEXT_STEP_GRAPH={form} is neither bracketed nor mono; taken as bracketed"
        )
    often = environ.get("VEXT_STEP_GRAPH_CHECK", "").strip()
    if often and not often.isdecimal():
        problems.append(f"VEXT_STEP_GRAPH_CHECK={often} is no number; not taken")
    folder = environ.get("VEXT_STATE_DIR", "").strip()
    return Settings(
        enabled=switch("VEXT", True),
        patches=tuple(name for name in defaults if name in wanted),
        strict=switch("VEXT_STRICT", False),
        state_dir=Path(folder).expanduser() if folder else None,
        problems=tuple(problems),
    )


def _choose(text: str, defaults: Mapping[str, bool], problems: list[str]) -> set[str]:
    entries = [entry.strip() for entry in text.split(",") if entry.strip()]
    plain = [entry for entry in entries if entry[0] not in "+-"]
    chosen = set() if plain else {name for name, on in defaults.items() if on}
    unknown = []
    for entry in entries:
        name = entry[1:].strip() if entry[0] in "+-" else entry
        if name not in defaults:
            unknown.append(name or entry)
        elif entry.startswith("-"):
            chosen.discard(name)
        else:
            chosen.add(name)
    if unknown:
        problems.append(
            f"VEXT_PATCHES names unknown patches: {', '.join(unknown)}; "
            f"known are {', '.join(defaults) or 'none'}"
        )
    return chosen


def from_config(config: Any) -> tuple[dict[str, str], list[str]]:
    """Translate ``--additional-config`` into variables.

    Args:
        config: vLLM's ``additional_config``: a dictionary, or whatever else a
            platform put there.

    Returns:
        The variables it stands for, and one line per key or value not understood.
    """
    if not isinstance(config, Mapping) or CONFIG_NAME not in config:
        return {}, []
    ours = config[CONFIG_NAME]
    if not isinstance(ours, Mapping):
        return {}, [f"additional_config.{CONFIG_NAME} is not an object; ignored"]
    variables: dict[str, str] = {}
    problems = []
    for key, value in ours.items():
        if key not in CONFIG_KEYS:
            problems.append(
                f"additional_config.{CONFIG_NAME}.{key} is unknown; "
                f"known are {', '.join(CONFIG_KEYS)}"
            )
        elif (text := _as_text(value)) is None:
            shown = json.dumps(value, default=str)
            problems.append(
                f"additional_config.{CONFIG_NAME}.{key}={shown} is not a text, a "
                "number, a truth value or a list of texts; ignored"
            )
        else:
            variables[CONFIG_KEYS[key]] = text
    return variables, problems


def _as_text(value: Any) -> str | None:
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, str | int):
        return str(value)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, Iterable) and not isinstance(value, Mapping | bytes):
        entries = list(value)
        # None at all cannot be said in the variable, where it means the defaults.
        if entries and all(isinstance(entry, str) for entry in entries):
            return ",".join(entries)
    return None
