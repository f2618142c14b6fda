"""Callbacks after an import, and nothing else about the import changed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
import time

import pytest
from toypackage import Toy

from vllm_ext.patching.on_import import _waiting, forget, on_import


def test_called_once_right_after_the_body_ran(toy: Toy):
    seen = []
    on_import("toy.ops", lambda module: seen.append(module.Sampler.kind))
    assert seen == []
    toy.load("toy.runner")
    toy.load("toy.ops")
    assert seen == ["stock"]
    del sys.modules["toy.ops"]  # a module of that name comes again: not our business
    toy.load("toy.ops")
    assert seen == ["stock"]


def test_called_at_once_where_the_module_is_there(toy: Toy):
    seen = []
    ops = toy.load("toy.ops")
    on_import("toy.ops", seen.append)
    assert seen == [ops]


def test_callbacks_keep_their_order(toy: Toy):
    seen = []
    on_import("toy.ops", lambda module: seen.append(1))
    on_import("toy.ops", lambda module: seen.append(2))
    toy.load("toy.ops")
    assert seen == [1, 2]


def test_a_look_without_an_import_does_not_use_it_up(toy: Toy):
    seen = []
    on_import("toy.ops", seen.append)
    assert importlib.util.find_spec("toy.ops") is not None
    assert seen == []
    toy.load("toy.ops")
    assert len(seen) == 1


def test_an_import_that_fails_may_be_tried_again(toy: Toy):
    seen = []
    toy.write("toy/late.py", "raise ValueError('not yet')")
    on_import("toy.late", seen.append)
    with pytest.raises(ValueError, match="not yet"):
        toy.load("toy.late")
    toy.write("toy/late.py", "ready = True")
    assert toy.load("toy.late").ready
    assert len(seen) == 1


def test_the_modules_own_loader_is_left_in_place(toy: Toy):
    on_import("toy.ops", lambda module: None)
    ops = toy.load("toy.ops")
    plain = toy.load("toy.runner")
    assert type(ops.__loader__) is type(plain.__loader__)
    assert type(ops.__spec__.loader) is type(plain.__spec__.loader)
    assert "def scale" in ops.__loader__.get_source("toy.ops")


def test_forgotten_is_not_called(toy: Toy):
    seen = []
    on_import("toy.ops", seen.append)
    forget("toy.ops", seen.append)
    toy.load("toy.ops")
    assert seen == []


def test_a_module_that_does_not_exist_fails_as_ever(toy: Toy):
    on_import("toy.nowhere", lambda module: None)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("toy.nowhere")
    _waiting.pop("toy.nowhere")
    assert "toy.nowhere" not in sys.modules


def test_a_finder_that_asks_everybody_too_is_no_endless_loop(toy: Toy, monkeypatch):
    class Curious:
        def find_spec(self, name, path=None, target=None):
            for finder in sys.meta_path:
                if finder is not self:
                    spec = finder.find_spec(name, path, target)
                    if spec is not None:
                        return spec
            return None

    seen = []
    on_import("toy.ops", seen.append)
    monkeypatch.setattr(sys, "meta_path", [Curious(), *sys.meta_path])
    toy.load("toy.ops")
    assert len(seen) == 1


def test_an_import_in_another_thread_is_waited_for(toy: Toy):
    toy.write(
        "toy/slow.py",
        """
        import time
        started = True
        time.sleep(0.3)
        done = True
        """,
    )
    thread = threading.Thread(target=toy.load, args=("toy.slow",))
    thread.start()
    while not hasattr(sys.modules.get("toy.slow"), "started"):
        time.sleep(0.001)
    seen = []
    on_import("toy.slow", lambda module: seen.append(module.done))
    thread.join()
    assert seen == [True]
