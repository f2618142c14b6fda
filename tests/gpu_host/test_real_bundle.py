"""The real bundle, up to the first call into CUDA; asked for by naming it.

    VEXT_BUNDLE=.gpu-bundle VEXT_BUNDLE_PYTHON=~/host/bin/python make test TESTS=...

The Python is a 3.12 with the packages of the GPU host and none of the bundle's: torch
2.11 for CUDA, Triton 3.6, transformers 5. Takes minutes. What only a GPU can show is
not shown: kernels that run, graphs, what Inductor makes of the model.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vllm_ext.bench import models
from vllm_ext.microbench.gpu_host import bundle, fatbin, pack
from vllm_ext.microbench.gpu_host.host import Host, environment
from vllm_ext.microbench.gpu_host.run import Runner
from vllm_ext.microbench.gpu_host.stages import OURS, STAGES
from vllm_ext.microbench.gpu_host.switches import NONE, ORDER, Switches

BUNDLE = os.environ.get("VEXT_BUNDLE", "")
PYTHON = os.environ.get("VEXT_BUNDLE_PYTHON", "")
HERE = Path(__file__).parent
ROOT = HERE.parents[1]

pytestmark = pytest.mark.skipif(
    not (BUNDLE and PYTHON), reason="not run: VEXT_BUNDLE and VEXT_BUNDLE_PYTHON unset"
)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    sys.path.insert(0, str(HERE))
    from emulation import write_libcuda

    folder = tmp_path_factory.mktemp("host")
    found = Host(folder / "home")
    folders = sorted(each.parent for each in Path(BUNDLE).glob("*/manifest.json"))
    unpacking = Runner(found, folder, bundles=folders, interpreter=PYTHON)
    assert unpacking.run(STAGES["unpack"]) == "complete"
    write_libcuda(folder)
    return found


def emulated(host: Host, *arguments: str, used: Switches = NONE) -> str:
    variables = {**used.variables, "LD_LIBRARY_PATH": str(host.home.parent)}
    done = subprocess.run(
        [PYTHON, str(HERE / "emulation.py"), *arguments],
        env=environment(host, variables, used.engine),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def chosen(host: Host, used: Switches) -> dict[str, Any]:
    model = models.write("qwen2.5-0.5b", host.home.parent)
    said = emulated(host, "h200", str(model), used=used).splitlines()
    found: dict[str, Any] = json.loads(said[-1])
    return found


def test_what_was_unpacked_is_what_was_packed(host: Host):
    assert bundle.damaged(host.tree) == []


def test_the_gpu_code_that_is_kept_is_bit_for_bit_that_of_the_wheel(host: Host):
    import zipfile

    wheel = pack._wheel(f"vllm=={pack.VLLM}", pack.WORK / "wheels")
    assert wheel
    for name in ("vllm/_C_stable_libtorch.abi3.so",):
        with zipfile.ZipFile(wheel) as archive:
            before = archive.read(name)
        after = (host.site / name).read_bytes()
        kept = list(fatbin.containers(after))
        for old, new in zip(fatbin.containers(before), kept, strict=True):
            wanted = fatbin.chosen(old.entries, pack.ARCH)
            assert [code(before, each) for each in wanted] == [
                code(after, each) for each in new.entries
            ]
        native = [each for one in kept for each in one.entries if each.arch == 90]
        assert len(native) > 50


def code(library: bytes, entry: fatbin.Entry) -> bytes:
    return library[entry.offset : entry.offset + entry.size]


def test_every_library_loads_and_vllm_imports(host: Host, tmp_path: Path):
    file = tmp_path / "environment.json"
    done = subprocess.run(
        [PYTHON, "-m", f"{OURS}.environment", "--json", str(file)],
        env=environment(host, {"LD_LIBRARY_PATH": str(host.home.parent)}, "{}"),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert "torch sees no GPU" in done.stdout
    found = json.loads(file.read_text())
    assert found["vllm"] is True
    assert set(found["libraries"].values()) == {True}
    assert found["packages"]["vllm"] == pack.VLLM
    assert found["packages"]["vllm-ext"]
    assert found["shadowed"] == {}


def test_stock_on_an_h200_would_be_the_stock_that_is_measured(host: Host):
    found = chosen(host, NONE)
    assert found == {
        "platform": "NvmlCudaPlatform",
        "v2": True,
        "cudagraph_mode": "FULL_AND_PIECEWISE",
        "compilation_mode": "3",
        "async_scheduling": True,
        "attention_backend": "None",
        "enforce_eager": False,
        "jit_warmup": True,
        "flashinfer_autotune": True,
        "flash_attention": 3,
        "flashinfer_supported": True,
        "flashinfer_module": True,
    }


def test_every_switch_reaches_the_engine(host: Host):
    found = chosen(host, ORDER[-1])
    changed = {
        "cudagraph_mode": "NONE",
        "attention_backend": "AttentionBackendEnum.TRITON_ATTN",
        "enforce_eager": True,
        "jit_warmup": False,
        "flashinfer_autotune": False,
        "flashinfer_supported": False,
    }
    assert changed.items() <= found.items()


def test_the_smoke_test_decodes(host: Host, tmp_path: Path):
    file = tmp_path / "smoke.json"
    options = ("--model", "tiny", "--tokens", "4", "--json", str(file))
    said = emulated(host, "cpu", f"{OURS}.smoke", *options)
    assert "greedy tokens the same twice" in said
    found = json.loads(file.read_text())
    assert found["complete"]
    assert found["attention"] == ["TritonAttentionImpl"]


def test_the_baseline_measures_and_goes_on_where_it_was(host: Host, tmp_path: Path):
    file = tmp_path / "baseline.json"
    short = ("--model", "tiny", "--steps", "3", "--traced", "2", "--json", str(file))
    emulated(host, "cpu", f"{OURS}.baseline", *short, "--batch", "1")
    first = json.loads(file.read_text())["cases"]
    emulated(host, "cpu", f"{OURS}.baseline", *short, "--batch", "1,2")
    cases = json.loads(file.read_text())["cases"]
    assert set(cases) == {
        f"tiny, batch {batch}, {sampling}"
        for batch in (1, 2)
        for sampling in ("greedy", "sampled")
    }
    assert first.items() <= cases.items()
    for case in cases.values():
        parts = {name: each["median"] for name, each in case["parts_us"].items()}
        assert {"schedule", "execute_model", "sample_tokens"} <= set(parts)
        assert 0 < sum(parts.values()) < 1.5 * case["step_us"]["median"]
        assert case["trace"]["steps"] == 2
        assert set(parts) | {"step"} == set(case["trace"]["host"])


def test_the_gpu_tests_can_be_collected(host: Host):
    command = (PYTHON, "-m", "pytest", "-m", "gpu", "--collect-only", "-q", "tests")
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider"],
        env=environment(host, {"LD_LIBRARY_PATH": str(host.home.parent)}, "{}"),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert "tests/gpu/test_decode.py::test_same_answers" in done.stdout
    assert "error" not in done.stdout.lower(), done.stdout[-3000:]
