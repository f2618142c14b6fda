"""The machine block: complete where it can be, silent where it cannot."""

import builtins
import json
import subprocess
import sys

import pytest

from vllm_ext import machine

KEYS = {
    *("cpu", "cores", "memory_gb", "os", "python", "torch", "triton", "vllm"),
    *("vllm_ext", "gpu", "gpu_memory_gb", "driver", "commit", "dirty"),
}


def test_it_names_this_machine():
    found = machine.describe()
    assert found.keys() == KEYS
    assert found["cores"] >= 1
    assert found["python"].startswith(f"{sys.version_info[0]}.{sys.version_info[1]}.")
    json.dumps(found)


def test_nothing_heavy_is_imported():
    code = (
        "import sys; from vllm_ext import machine; machine.describe(); "
        "print([name for name in ('torch', 'triton', 'vllm') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.fixture
def nothing_works(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("not here")

    real_import = builtins.__import__

    def no_nvml(name, *args, **kwargs):
        if name == "pynvml":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_nvml)
    monkeypatch.setattr(machine.Path, "read_text", refuse)
    monkeypatch.setattr(machine.os, "sysconf", refuse)
    monkeypatch.setattr(machine.os, "sched_getaffinity", refuse)
    monkeypatch.setattr(machine.subprocess, "run", refuse)
    monkeypatch.setattr(machine.platform, "freedesktop_os_release", refuse)
    monkeypatch.setattr(machine, "version", refuse_version)


def refuse_version(name):
    raise machine.PackageNotFoundError(name)


def test_a_machine_where_every_probe_fails_is_described_all_the_same(nothing_works):
    found = machine.describe()
    assert found.keys() == KEYS
    assert found["gpu"] == "no GPU"
    assert [found[key] for key in ("memory_gb", "torch", "commit", "dirty")] == [
        None
    ] * 4


def test_a_copied_checkout_has_its_commit_from_whoever_copied_it(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "CHECKOUT", tmp_path)
    monkeypatch.delenv("VEXT_COMMIT", raising=False)
    assert machine.describe()["commit"] is None
    for text, dirty in (("0123456789ab", False), ("0123456789ab+", True)):
        monkeypatch.setenv("VEXT_COMMIT", text)
        found = machine.describe()
        assert (found["commit"], found["dirty"]) == ("0123456789ab", dirty)
