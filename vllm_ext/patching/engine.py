"""Check, apply, verify, witness and revert patches; remember what became of each.

A patch is applied when the last of its modules has been imported: then, and only
then, all of its edits are made, or none. Whatever goes wrong, the stock code stays
in place and the outcome says why.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import os
import sys
import sysconfig
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Container, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from vllm_ext.patching.declare import Edit, Patch
from vllm_ext.patching.fingerprint import Known, Source, find, fit, version_key
from vllm_ext.patching.on_import import forget, on_import

# Below "vllm.", so that vLLM's own handler prints it.
log = logging.getLogger("vllm.vllm_ext")

WAITING = "waiting"  # its modules have not all been imported in this process
APPLIED = "applied"
IN_USE = "in use"  # applied, and the replaced code has been called
SKIPPED = "skipped"  # does not fit this vLLM, or somebody else was first
FAILED = "failed"  # a fault of the patch; its edits were undone
OFF = "off"
UPSTREAM = "upstream"  # this vLLM no longer needs it
STATES = (WAITING, APPLIED, IN_USE, SKIPPED, FAILED, OFF, UPSTREAM)


class PatchError(RuntimeError):
    """One line: which patch, what is wrong, what to do."""


class Refused(Exception):
    """The target is not stock: somebody else's code stands there."""


@dataclass
class Placed:
    """One edit that was made: what stood where, and everything of ours there."""

    holder: Any
    name: str
    original: Any  # the entry of vars(holder), descriptors as they are
    ours: list[Any] = field(default_factory=list)  # the last one is in place
    undo: list[Callable[[], None]] = field(default_factory=list)


@dataclass
class Outcome:
    """What became of one patch in this process.

    Attributes:
        state: One of ``STATES``.
        reason: Why, for the states that need one.
        version: The known version whose code it found.
        copies: References made by ``from x import f`` that were moved over.
        used: Targets that have been called since.
        calls: Calls per target; counted only where the engine was told to.
        aside: Steps handed to stock code by the patch itself, per reason.
    """

    patch: Patch
    state: str = WAITING
    reason: str = ""
    version: str | None = None
    copies: int = 0
    used: set[str] = field(default_factory=set)
    calls: Counter[str] = field(default_factory=Counter)
    aside: Counter[str] = field(default_factory=Counter)
    placed: list[Placed] = field(default_factory=list)


_aside: dict[str, Counter[str]] = {}


def step_aside(name: str, reason: str) -> None:
    """Count one step that the patch ``name`` left to stock code, and why."""
    counter = _aside.get(name)
    if counter is None:
        return
    if reason not in counter:
        log.info("vllm-ext: %s leaves steps to stock code: %s", name, reason)
    counter[reason] += 1


class Engine:
    """The patches of one package in this process.

    Args:
        source: The package's files, to compare with ``known``.
        known: Fingerprints per target and version.
        count: Keep counting calls, instead of only noting the first.
        strict: Raise ``PatchError`` where a patch cannot be applied.
        on_change: Called with an outcome after each change of its state or calls.
    """

    def __init__(
        self,
        source: Source,
        known: Known,
        *,
        count: bool = False,
        strict: bool = False,
        on_change: Callable[[Outcome], None] = lambda outcome: None,
    ):
        self.source = source
        self.known = known
        self.count = count
        self.strict = strict
        self.on_change = on_change
        self.outcomes: dict[str, Outcome] = {}
        self._callbacks: dict[str, Callable[[ModuleType], None]] = {}
        self._lock = threading.RLock()
        os.register_at_fork(after_in_child=self._after_fork)

    def _after_fork(self) -> None:
        """A child has its own calls to show; it inherits only what was applied."""
        for outcome in self.outcomes.values():
            outcome.calls.clear()
            outcome.aside.clear()
            if self.count and outcome.state == IN_USE:
                outcome.used.clear()
                outcome.state = APPLIED

    # -- life of a patch ------------------------------------------------------------

    def offer(self, patch: Patch) -> Outcome:
        """Apply ``patch`` as soon as all its modules are imported, if it fits then."""
        outcome = self.outcomes.get(patch.name)
        if outcome is not None and outcome.state != OFF:
            return outcome
        outcome = self.outcomes[patch.name] = Outcome(patch)
        _aside[patch.name] = outcome.aside
        merged = patch.merged_in
        if merged and version_key(self.source.version) >= version_key(merged):
            self._settle(outcome, UPSTREAM, f"part of {self.source.package} {merged}")
            return outcome

        # Not sys.modules: a module stands there while its own imports still run.
        missing = set(patch.modules)

        def imported(module: ModuleType) -> None:
            missing.discard(module.__name__)
            if not missing and self.outcomes.get(patch.name) is outcome:
                self._try(outcome)

        self._callbacks[patch.name] = imported
        for module in patch.modules:
            on_import(module, imported)
        return outcome

    def withhold(self, patch: Patch, reason: str) -> Outcome:
        """Do not apply ``patch``; revert it where it has been applied."""
        outcome = self.outcomes.get(patch.name)
        if outcome is not None and outcome.placed:
            self.revert(patch.name)
        callback = self._callbacks.pop(patch.name, None)
        for module in patch.modules if callback else ():
            forget(module, callback)  # type: ignore[arg-type]
        outcome = self.outcomes[patch.name] = Outcome(patch, OFF, reason)
        self.on_change(outcome)
        return outcome

    def _try(self, outcome: Outcome) -> None:
        with self._lock:
            if outcome.state != WAITING or outcome.placed:
                return
            try:
                self._check(outcome)
                self._apply(outcome)
                self._verify(outcome)
            except Refused as refusal:
                self._undo(outcome)
                self._settle(outcome, SKIPPED, str(refusal))
            except Exception as error:  # a broken patch must not take the engine down
                self._undo(outcome)
                self._settle(outcome, FAILED, f"{type(error).__name__}: {error}")
            else:
                self._settle(outcome, APPLIED)
            finally:
                if all(each.state != WAITING for each in self.outcomes.values()):
                    self.source.forget()

    def _settle(self, outcome: Outcome, state: str, reason: str = "") -> None:
        outcome.state, outcome.reason = state, reason
        name = outcome.patch.name
        if state == SKIPPED:
            log.warning("vllm-ext: %s skipped: %s; running stock code", name, reason)
        elif state == FAILED:
            log.error("vllm-ext: %s failed and was reverted: %s", name, reason)
        elif state == APPLIED:
            edits = len(outcome.placed)
            log.info(
                "vllm-ext: %s applied (%d edits, %d copies)",
                *(name, edits, outcome.copies),
            )
        self.on_change(outcome)
        if self.strict and state in (SKIPPED, FAILED):
            raise PatchError(
                f"{name} {state}: {reason}; VEXT_PATCHES=-{name} turns it off, "
                "VEXT_STRICT=0 runs stock code instead of stopping"
            )

    def _check(self, outcome: Outcome) -> None:
        found = fit(self.source, outcome.patch.watched, self.known)
        if found.version is None:
            raise Refused("; ".join(found.problems))
        outcome.version = found.version
        for target in outcome.patch.relies_on:
            module = sys.modules.get(target.partition(":")[0])
            if module is None or getattr(module.__spec__, "_initializing", False):
                continue  # nobody can have replaced it yet
            self._refuse_foreign(target, resolve(module, target)[2], stacks=True)

    def _apply(self, outcome: Outcome) -> None:
        for edit in outcome.patch.edits:
            module = sys.modules[edit.module]
            holder, name, original = resolve(module, edit.target)
            stacks = edit.how in ("wrap", "subclass")
            self._refuse_foreign(edit.target, original, stacks)
            by_module, _, by_name = edit.by.partition(":")
            by = getattr(importlib.import_module(by_module), by_name)
            place = _FORMS[edit.how]
            outcome.placed.append(Placed(holder, name, original))
            place(self, outcome, edit, outcome.placed[-1], by)

    def _verify(self, outcome: Outcome) -> None:
        for edit, placed in zip(outcome.patch.edits, outcome.placed, strict=True):
            if vars(placed.holder)[placed.name] is not placed.ours[-1]:
                raise PatchError(f"{edit.target} does not hold the replacement")
            left = [name for name, _ in self._holders(placed.original)]
            if left:
                raise PatchError(f"{', '.join(left)} still hold the original")

    def revert(self, name: str) -> None:
        """Put stock back, object for object.

        Raises:
            PatchError: Somebody else has replaced our replacement since; it would be
                lost.
        """
        outcome = self.outcomes[name]
        with self._lock:
            for edit, placed in zip(outcome.patch.edits, outcome.placed, strict=True):
                if vars(placed.holder)[placed.name] is not placed.ours[-1]:
                    raise PatchError(
                        f"{edit.target} was replaced again after {name}; "
                        "revert that first"
                    )
            self._undo(outcome)
            outcome.state = OFF
            outcome.reason = "reverted"
            self.on_change(outcome)

    def _undo(self, outcome: Outcome) -> None:
        while outcome.placed:
            placed = outcome.placed.pop()
            while placed.undo:
                placed.undo.pop()()
            setattr(placed.holder, placed.name, placed.original)
            # Modules imported since the patch copied ours.
            for ours in placed.ours:
                self._rebind(ours, placed.original)

    # -- edits ----------------------------------------------------------------------

    def _put(self, placed: Placed, new: Any) -> int:
        """Let ``new`` stand where the edit is, and in every copy of what stood so."""
        old = vars(placed.holder)[placed.name]
        setattr(placed.holder, placed.name, new)
        placed.ours.append(new)
        return self._rebind(old, new)

    def _swap(self, placed: Placed, new: Any) -> None:
        """Put ``new`` in the witness's place, unless another patch stands on it."""
        with self._lock:
            if placed.ours and vars(placed.holder)[placed.name] is placed.ours[-1]:
                self._put(placed, new)

    def _place_function(
        self, outcome: Outcome, edit: Edit, placed: Placed, by: Any
    ) -> None:
        kind = type(placed.original)
        bound = kind in (staticmethod, classmethod)
        raw = placed.original.__func__ if bound else placed.original
        new = by(raw) if edit.how == "wrap" else by
        if inspect.isclass(new):
            self._guard_class(outcome, edit, placed, new)
        elif edit.guard and inspect.isfunction(new):
            new = self._guard(
                *(outcome, edit, new),
                swap=lambda plain: self._swap(placed, kind(plain) if bound else plain),
            )
        outcome.copies += self._put(placed, kind(new) if bound else new)

    def _place_subclass(
        self, outcome: Outcome, edit: Edit, placed: Placed, by: Any
    ) -> None:
        if not (inspect.isclass(by) and issubclass(by, placed.original)):
            raise PatchError(f"{edit.by} is not a subclass of {edit.target}")
        self._place_function(outcome, edit, placed, by)

    def _place_kernel(
        self, outcome: Outcome, edit: Edit, placed: Placed, by: Any
    ) -> None:
        """Stand behind a Triton kernel, through the package's own dispatcher.

        It has no way back of its own, so undoing empties its record of the kernel.
        """
        dispatcher = importlib.import_module(
            f"{self.source.package}.triton_utils.dispatcher"
        )
        name = edit.target.replace(":", ".")
        impl = self._guard(outcome, edit, by) if edit.guard else by
        dispatcher.register_kernels({name: impl})
        wrapper = vars(placed.holder)[placed.name]
        placed.ours.append(wrapper)
        if wrapper is placed.original:
            raise PatchError(f"register_kernels left {edit.target} as it was")

        def unregister() -> None:
            dispatcher._registry.pop(name, None)
            # It moves copies in every module, also in those that are not its own,
            # and some warn when they are looked at.
            with warnings.catch_warnings(action="ignore"):
                for module in list(sys.modules.values()):
                    for key, value in list(getattr(module, "__dict__", {}).items()):
                        if value is wrapper:
                            setattr(module, key, placed.original)
                            continue
                        # Warm-up objects hold the kernel, and names read from it.
                        with suppress(TypeError):
                            if vars(value).get("kernel") is wrapper:
                                value.kernel = placed.original
                                vars(value).pop("_kernel_arg_names", None)

        placed.undo.append(unregister)

    def _guard(
        self,
        outcome: Outcome,
        edit: Edit,
        new: Callable[..., Any],
        swap: Callable[[Callable[..., Any]], object] | None = None,
    ) -> Callable[..., Any]:
        """``new``, with errors noted and its first call, or every call, witnessed.

        Where only the first call matters the witness swaps itself for a wrapper that
        does nothing but add the note.
        """
        noted = _noting(new, outcome.patch.name)
        if self.count:

            @functools.wraps(new)
            def counted(*args: Any, **kwargs: Any) -> Any:
                self._called(outcome, edit.target)
                return noted(*args, **kwargs)

            return counted

        @functools.wraps(new)
        def first(*args: Any, **kwargs: Any) -> Any:
            if edit.target not in outcome.used:
                self._called(outcome, edit.target)
                if swap is not None:
                    swap(noted)
            return noted(*args, **kwargs)

        return first

    def _guard_class(
        self, outcome: Outcome, edit: Edit, placed: Placed, new: type
    ) -> None:
        """Witness instances, and note errors in the class's own methods."""
        if not edit.guard:
            return
        own = dict(vars(new))

        def put_back(name: str) -> None:
            if name in own:
                setattr(new, name, own[name])
            elif name in vars(new):
                delattr(new, name)

        for name, value in {"__init__": new.__init__, **own}.items():  # type: ignore[misc]
            if inspect.isfunction(value):
                guarded = _noting(value, outcome.patch.name)
                if name == "__init__":
                    guarded = self._guard(
                        *(outcome, edit, guarded),
                        swap=None if self.count else lambda plain: put_back("__init__"),
                    )
                setattr(new, name, guarded)
                placed.undo.append(functools.partial(put_back, name))

    def _called(self, outcome: Outcome, target: str) -> None:
        if self.count:
            outcome.calls[target] += 1
        if target not in outcome.used:
            outcome.used.add(target)
            if outcome.state == APPLIED:
                outcome.state = IN_USE
                log.info("vllm-ext: %s in use", outcome.patch.name)
        elif not self.count:
            return
        self.on_change(outcome)

    # -- who holds what -------------------------------------------------------------

    def _modules(self) -> Iterator[ModuleType]:
        top = self.source.package
        for name, module in list(sys.modules.items()):
            if name.partition(".")[0] == top and isinstance(module, ModuleType):
                yield module

    def _holders(self, thing: Any) -> Iterator[tuple[str, ModuleType]]:
        """Globals of the package's modules that are ``thing``: dotted name, module."""
        for module in self._modules():
            for name, value in list(vars(module).items()):
                if value is thing:
                    yield f"{module.__name__}.{name}", module

    def _rebind(self, old: Any, new: Any) -> int:
        """Point every ``from x import old`` made inside the package at ``new``."""
        holders = list(self._holders(old))
        for dotted, module in holders:
            setattr(module, dotted.rpartition(".")[2], new)
        return len(holders)

    def _placed_here(self) -> Iterator[Any]:
        """All that patches have put somewhere, in place or below another patch."""
        for outcome in self.outcomes.values():
            for placed in outcome.placed:
                yield from placed.ours

    def _refuse_foreign(self, target: str, original: Any, stacks: bool) -> None:
        """Raise ``Refused`` unless ``original`` is the code that was compared.

        Args:
            stacks: Whether a replacement of ours may stand there already.
        """
        for outcome in self.outcomes.values():
            for placed in outcome.placed:
                if any(original is ours for ours in placed.ours):
                    if stacks:
                        return
                    raise Refused(
                        f"{target} is already replaced by {outcome.patch.name}"
                    )
        found = find(self.source, target)
        if found is None:
            raise Refused(f"{target} is gone")
        # What was compared with the record is the text in this file, so a function
        # from another one, be it of the package itself, was not.
        allowed = [Path(str(sys.modules[target.partition(":")[0]].__file__))]
        if found.decorated or inspect.isclass(original):
            # Upstream's own decorators, and those of its methods, live elsewhere.
            allowed = [self.source.path / self.source.package, *_decorator_homes()]
        elif type(_unbound(original)) is not FunctionType:
            kind = type(original).__name__
            raise Refused(f"{target} was already replaced by a {kind}")
        ours = {id(each) for each in self._placed_here()}
        for file in _code_files(original, ours):
            if not any(Path(file).is_relative_to(home) for home in allowed):
                raise Refused(f"{target} was already replaced from {file}")


_FORMS: dict[str, Callable[[Engine, Outcome, Edit, Placed, Any], None]] = {
    "replace": Engine._place_function,
    "wrap": Engine._place_function,
    "subclass": Engine._place_subclass,
    "kernel": Engine._place_kernel,
}


def resolve(module: ModuleType, target: str) -> tuple[Any, str, Any]:
    """Holder, name and current value of ``target`` in its imported ``module``.

    Raises:
        Refused: It is not there, or only inherited.
    """
    holder: Any = module
    *path, name = target.partition(":")[2].split(".")
    try:
        for part in path:
            holder = vars(holder)[part]
        return holder, name, vars(holder)[name]
    except (KeyError, TypeError):
        raise Refused(f"{target} is not in the imported module") from None


def _noting(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """``function``; an error that leaves it says which patch it passed through."""
    note = (
        f"[vllm-ext] raised in code replaced by the patch `{name}`; "
        f"VEXT_PATCHES=-{name} turns it off, VEXT=0 turns all patches off"
    )

    @functools.wraps(function)
    def noted(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            if note not in getattr(error, "__notes__", ()):
                error.add_note(note)
            raise

    return noted


def _decorator_homes() -> tuple[Path, ...]:
    homes = [Path(sysconfig.get_paths()["stdlib"])]
    for name in ("torch", "triton"):
        file = getattr(sys.modules.get(name), "__file__", None)
        if file:
            homes.append(Path(file).resolve().parent)
    return tuple(homes)


def _unbound(thing: Any) -> Any:
    """The function in a descriptor; anything else as it is."""
    if isinstance(thing, staticmethod | classmethod):
        return thing.__func__
    return thing.fget if isinstance(thing, property) else thing


def _code_files(thing: Any, ours: Container[int] = ()) -> Iterator[str]:
    """Files of the code behind ``thing``; nothing where it has no Python code.

    Args:
        thing: A function or a class.
        ours: By ``id``, methods of the class that patches have put there.
    """
    thing = _unbound(thing)
    if inspect.isclass(thing):
        file = getattr(sys.modules.get(thing.__module__), "__file__", None)
        if file:
            yield file
        for value in vars(thing).values():
            # A dataclass's own methods are made of text, in no file.
            if not inspect.isfunction(value) or id(value) in ours:
                continue
            if value.__code__.co_filename[0] != "<":
                yield from _code_files(value)
        return
    code = getattr(getattr(thing, "fn", thing), "__code__", None)
    if code is not None:
        yield code.co_filename
