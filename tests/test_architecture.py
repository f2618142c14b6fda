"""Which part may import which: an arrow pointing up is a failing test.

Kernels and the patch engine know neither vLLM nor each other; declarations of patches
know the engine's vocabulary only; replacements know kernels and vLLM; the serving
process gets nothing that vLLM does not bring.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STANDARD = set(sys.stdlib_module_names)

# Glob -> what may be imported beside the standard library. First match counts.
RULES = {
    "kernels/**/*.py": {"torch", "triton", "numpy", "vllm_ext.kernels"},
    "vllm_ext/patching/*.py": {"vllm_ext.patching"},
    "patches/__init__.py": {"vllm_ext.patching.declare", "vllm_ext.patches"},
    "patches/*/__init__.py": {"vllm_ext.patching.declare"},
    "patches/*/upstream.py": {"vllm_ext.upstream.declare"},
    "patches/*/*.py": {
        *("torch", "triton", "numpy", "vllm"),
        *("vllm_ext.kernels", "vllm_ext.patches", "vllm_ext.patching"),
    },
    "vllm_ext/__init__.py": set(),
    "vllm_ext/settings.py": set(),
    "vllm_ext/plugin.py": {
        *("vllm_ext.patches", "vllm_ext.patching", "vllm_ext.settings"),
        *("vllm_ext.__version__", "vllm_ext.metrics"),
    },
    # Late, and only where vLLM has imported it.
    "vllm_ext/metrics.py": {"vllm_ext.patching", "prometheus_client"},
}


def imports(path: Path) -> Iterator[str]:
    """Every name imported anywhere in the file, ``from a import b`` as ``a.b``."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files(*folders: str) -> list[Path]:
    found = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert found
    return sorted(found)


def rule(path: Path) -> set[str] | None:
    relative = path.relative_to(ROOT)
    return next(
        (allowed for glob, allowed in RULES.items() if path in ROOT.glob(glob)),
        None if relative.parts[0] in ("vllm_ext", "microbench") else set(),
    )


@pytest.mark.parametrize(
    "path",
    files("kernels", "patches", "vllm_ext", "microbench"),
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_imports_point_down(path: Path):
    allowed = rule(path)
    for name in imports(path):
        top = name.partition(".")[0]
        assert top not in ("kernels", "patches", "microbench"), f"{name}: use vllm_ext."
        if allowed is None or top in STANDARD:
            continue
        assert any(
            name == other or name.startswith(f"{other}.") for other in allowed
        ), f"{path.relative_to(ROOT)} may not import {name}"


def test_a_wrong_arrow_would_be_seen(tmp_path: Path):
    wrong = tmp_path / "kernel.py"
    wrong.write_text("def f():\n    from vllm.v1 import sample\n")
    assert list(imports(wrong)) == ["vllm.v1.sample"]
    assert rule(ROOT / "patches" / "__init__.py") == RULES["patches/__init__.py"]
    assert rule(ROOT / "vllm_ext" / "cli.py") is None


@pytest.mark.parametrize("path", files("kernels", "patches", "vllm_ext", "cpulane"))
def test_a_name_says_what_is_inside(path: Path):
    assert path.stem not in ("utils", "util", "common", "core", "helpers", "misc")


@pytest.mark.parametrize(
    "path", [path for path in files("kernels") if path.stem != "__init__"] or [None]
)
def test_every_kernel_has_reference_test_and_benchmark(path: Path | None):
    if path is None:
        assert not list((ROOT / "microbench").glob("bench_*.py"))
        return
    assert "_reference(" in path.read_text()
    assert (ROOT / "tests" / "kernels" / f"test_{path.stem}.py").exists()
    assert (ROOT / "microbench" / f"bench_{path.stem}.py").exists()
