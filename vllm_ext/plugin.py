"""What vLLM calls in every one of its processes, before it does anything else."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from vllm_ext import __version__, metrics, settings
from vllm_ext.patches import FINGERPRINTS, SERIES
from vllm_ext.patching.declare import Patch
from vllm_ext.patching.engine import Engine, PatchError, log
from vllm_ext.patching.fingerprint import Source, SourceError, read_known
from vllm_ext.patching.on_import import on_import
from vllm_ext.patching.report import StateFile

PACKAGE = "vllm"

engine: Engine | None = None
_own_variables: dict[str, str] = {}  # set by us from additional_config


def register() -> None:
    """Entry point of ``vllm.general_plugins``; called once or more per process.

    Imports nothing of vLLM and no torch, touches no device. Raises nothing, except
    ``PatchError`` under ``VEXT_STRICT=1``.
    """
    if engine is not None:
        return
    try:
        start(SERIES)
    except PatchError:
        raise
    except SourceError as error:
        log.warning("vllm-ext: %s; running stock code", error)
    except Exception as error:  # vLLM calls us unguarded: it must go on serving
        log.exception("vllm-ext could not start (%s); running stock code", error)


def start(series: Iterable[Patch]) -> None:
    """Offer the patches that the environment asks for to this process's engine."""
    global engine
    series = tuple(series)
    chosen = _read_settings(series)
    if not chosen.enabled:
        return
    engine = Engine(Source(package_folder(), PACKAGE), read_known(FINGERPRINTS))
    _configure(engine, series, chosen)
    on_import(f"{PACKAGE}.engine.arg_utils", functools.partial(_hear_config, series))


def package_folder() -> Path:
    """The folder that holds the installed vLLM, found without importing it.

    Raises:
        SourceError: There is no vLLM.
    """
    loaded = sys.modules.get(PACKAGE)
    spec = loaded.__spec__ if loaded else importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise SourceError(f"{PACKAGE} is not installed beside vllm-ext")
    return Path(next(iter(spec.submodule_search_locations))).parent


def _read_settings(series: tuple[Patch, ...]) -> settings.Settings:
    chosen = settings.parse(os.environ, {patch.name: patch.default for patch in series})
    for problem in chosen.problems:
        log.warning("vllm-ext: %s", problem)
    return chosen


def _configure(
    engine: Engine, series: tuple[Patch, ...], chosen: settings.Settings
) -> None:
    engine.strict = chosen.strict
    state_file = StateFile(chosen.state_dir, engine) if chosen.state_dir else None
    counts = state_file is not None
    metrics.show(chosen.state_dir)
    engine.on_change = state_file.changed if state_file else lambda outcome: None
    if engine.count != counts:  # what stands already was placed for the other way
        for patch in series:
            engine.withhold(patch, "placed again")
        engine.count = counts
    for patch in series:
        if not chosen.enabled:
            engine.withhold(patch, "VEXT=0")
        elif patch.name in chosen.patches:
            engine.offer(patch)
        else:
            engine.withhold(patch, "not asked for")
    log.debug(
        "vllm-ext %s: %d of %d patches on; vLLM %s",
        *(__version__, len(chosen.patches), len(series), engine.source.version),
    )


def _hear_config(series: tuple[Patch, ...], arg_utils: ModuleType) -> None:
    """Let ``--additional-config '{"vllm_ext": {...}}'`` set what no variable sets.

    The frontend knows it before any engine process is started, so it is put into the
    environment, which every process inherits whether forked or spawned.
    """
    engine_args = getattr(arg_utils, "EngineArgs", None)
    stock = getattr(engine_args, "create_engine_config", None)
    if stock is None:
        log.debug("vllm-ext: no EngineArgs.create_engine_config; only variables count")
        return

    @functools.wraps(stock)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            _take_config(series, getattr(self, "additional_config", None))
        except Exception as error:
            if engine is not None and engine.strict:
                raise
            log.warning("vllm-ext: additional_config not taken: %s", error)
        return stock(self, *args, **kwargs)

    engine_args.create_engine_config = create_engine_config  # type: ignore[union-attr]


def _take_config(series: tuple[Patch, ...], config: Any) -> None:
    variables, problems = settings.from_config(config)
    for problem in problems:
        log.warning("vllm-ext: %s", problem)
    for name in [name for name in _own_variables if name not in variables]:
        os.environ.pop(name, None)  # an earlier engine of this process had set it
        del _own_variables[name]
    for name, value in variables.items():
        if name in os.environ and name not in _own_variables:
            log.info("vllm-ext: %s is set, so additional_config's is not taken", name)
        else:
            os.environ[name] = _own_variables[name] = value
    if engine is not None:
        _configure(engine, series, _read_settings(series))
