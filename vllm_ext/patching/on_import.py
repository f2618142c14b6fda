"""Call a function right after a module has been imported."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Callback = Callable[[ModuleType], None]

_waiting: dict[str, list[Callback]] = {}


class _NotifyingLoader(Loader):
    """The module's own loader, followed by the callbacks that wait for it."""

    def __init__(self, loader: Any):
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        # Nobody else is to see this class: loaders are asked for source and data.
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        for callback in _waiting.pop(module.__name__, []):
            callback(module)


class _Finder(MetaPathFinder):
    """Finds what the others find, and gives it the notifying loader."""

    def __init__(self) -> None:
        self._asking: set[str] = set()

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        if fullname not in _waiting or fullname in self._asking:
            return None
        self._asking.add(fullname)  # another finder may ask everybody, as we do
        try:
            for finder in sys.meta_path:
                if finder is self or not hasattr(finder, "find_spec"):
                    continue
                spec = finder.find_spec(fullname, path, target)
                if spec is not None:
                    if spec.loader is not None:
                        spec.loader = _NotifyingLoader(spec.loader)
                    return spec
            return None
        finally:
            self._asking.discard(fullname)


_finder = _Finder()


def on_import(module: str, callback: Callback) -> None:
    """Run ``callback(module)`` now if ``module`` is imported, else as soon as it is.

    What ``callback`` raises reaches whoever imports the module. An import that runs
    in another thread is waited for; one that runs in this thread cannot be, and the
    callback sees the module as far as it is.
    """
    if module in sys.modules:
        callback(importlib.import_module(module))  # returns when the import is over
        return
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    _waiting.setdefault(module, []).append(callback)


def forget(module: str, callback: Callback) -> None:
    """Take back what ``on_import`` was asked, if it has not happened."""
    callbacks = _waiting.get(module, [])
    if callback in callbacks:
        callbacks.remove(callback)
