"""What a fingerprint sees, and what it must not see."""

from __future__ import annotations

import json
import shutil
import subprocess
import textwrap
import zipfile
from pathlib import Path

import pytest

from vllm_ext.patches import SERIES
from vllm_ext.patching import fingerprint as module
from vllm_ext.patching.fingerprint import (
    Source,
    SourceError,
    find,
    fingerprint,
    fit,
    read_known,
    version_key,
)
from vllm_ext.plugin import package_folder

STOCK = '''
import torch

@torch.no_grad()
def scale(x, by=2):
    """Twice."""
    # a remark
    text = """
    # not a remark
    """

    return x * by, text


class Sampler:
    def sample(self):
        return 1
'''


def source_of(folder: Path, text: str) -> Source:
    package = folder / "toy"
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").write_text("")
    (package / "_version.py").write_text('__version__: str = "1.2.0"\n')
    (package / "ops.py").write_text(textwrap.dedent(text))
    return Source(folder, "toy")


def digest(folder: Path, text: str, target: str = "toy.ops:scale") -> str | None:
    return fingerprint(source_of(folder, text), target)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"""Twice."""', '"""Something else,\n    on two lines."""'),
        ("    # a remark\n", ""),
        ("    # a remark\n", "    # another remark\n\n\n"),
        ("class Sampler:", "class Other:"),
        ("\n    return", "\n\n\n    return"),
    ],
)
def test_blind_to_what_does_not_run(tmp_path, old, new):
    assert old in STOCK
    assert digest(tmp_path, STOCK) == digest(tmp_path, STOCK.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("x * by", "by * x"),
        ("by=2", "by=3"),
        ("@torch.no_grad()\n", ""),
        ("# not a remark", "# still not a remark"),
        ("    # not a remark\n", ""),
        ("return x", "if x:\n        return x"),
    ],
)
def test_sees_what_does(tmp_path, old, new):
    assert old in STOCK
    assert digest(tmp_path, STOCK) != digest(tmp_path, STOCK.replace(old, new))


def test_methods_classes_and_what_is_not_there(tmp_path):
    source = source_of(tmp_path, STOCK)
    assert fingerprint(source, "toy.ops:Sampler.sample")
    assert fingerprint(source, "toy.ops:Sampler")
    for gone in ("toy.ops:Sampler.draw", "toy.ops:nothing", "toy.no:scale", "toy.ops"):
        assert fingerprint(source, gone) is None


def test_a_method_hashes_as_the_same_code_at_another_indent(tmp_path):
    inside = "class A:\n    def f(self):\n        if self:\n            return 1\n"
    deeper = "if True:\n    " + inside.replace("\n", "\n    ")
    assert digest(tmp_path, inside, "toy.ops:A.f") == digest(
        tmp_path, deeper, "toy.ops:A.f"
    )


def test_every_definition_of_a_name_counts(tmp_path):
    text = (
        "if A:\n    def f():\n        return 1\nelse:\n    def f():\n        return {}"
    )
    one, two = text.format(2), text.format(3)
    assert digest(tmp_path, one, "toy.ops:f") != digest(tmp_path, two, "toy.ops:f")
    assert find(source_of(tmp_path, one), "toy.ops:f").length == 4


def test_a_wheel_reads_as_its_folder(tmp_path):
    source = source_of(tmp_path / "tree", STOCK)
    wheel = tmp_path / "toy-1.2.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path in (tmp_path / "tree").rglob("*.py"):
            archive.write(path, path.relative_to(tmp_path / "tree").as_posix())
    packed = Source(wheel, "toy")
    target = "toy.ops:scale"
    assert fingerprint(packed, target) == fingerprint(source, target)
    assert packed.version == source.version == "1.2.0"
    assert list(packed.modules()) == list(source.modules())


def test_the_packages_own_folder_will_do(tmp_path):
    source_of(tmp_path, STOCK)
    assert fingerprint(Source(tmp_path / "toy", "toy"), "toy.ops:scale")


def test_what_cannot_be_read_is_one_line(tmp_path):
    (tmp_path / "text.whl").write_text("not a wheel")
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as archive:
        archive.writestr("other/__init__.py", "")
    for name in ("text.whl", "other.whl", "missing.whl", "."):
        with pytest.raises(SourceError) as caught:
            Source(tmp_path / name, "toy")
        assert "\n" not in str(caught.value)
    with pytest.raises(SourceError, match="does not parse"):
        digest(tmp_path, "def scale(:")


def test_damaged_files_are_one_line(tmp_path):
    source = source_of(tmp_path / "tree", STOCK)
    (tmp_path / "tree" / "toy" / "ops.py").write_bytes(b"\xff\xfe")
    with pytest.raises(SourceError, match="damaged"):
        fingerprint(Source(tmp_path / "tree", "toy"), "toy.ops:scale")
    wheel = tmp_path / "toy.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("toy/__init__.py", "")
        archive.writestr("toy/ops.py", STOCK)
    data = wheel.read_bytes()
    wheel.write_bytes(data.replace(b"return x * by", b"return y * by", 1))
    with pytest.raises(SourceError, match="damaged"):
        fingerprint(Source(wheel, "toy"), "toy.ops:scale")
    assert source.version == "1.2.0"


def test_the_installed_version_is_named_where_several_fit(tmp_path):
    source = source_of(tmp_path, STOCK)  # 1.2.0
    scale = "toy.ops:scale"
    digest = fingerprint(source, scale)
    known = {scale: {"1.2.0": digest, "1.3.0": digest}}
    assert fit(source, (scale,), known).version == "1.2.0"


def test_all_watched_code_must_be_of_one_version(tmp_path):
    source = source_of(tmp_path, STOCK)
    scale, sample = "toy.ops:scale", "toy.ops:Sampler.sample"
    a, b = fingerprint(source, scale), fingerprint(source, sample)
    both = (scale, sample)
    assert fit(source, both, {scale: {"1": a}, sample: {"1": b}}).version == "1"
    newest = {scale: {"1.9": a, "1.10": a}, sample: {"1.10": b, "1.9": b}}
    assert fit(source, both, newest).version == "1.10"
    mixed = fit(source, both, {scale: {"1": a}, sample: {"2": b}})
    assert mixed.version is None
    assert mixed.problems == (f"{scale} is not the one of 2",)
    assert fit(source, both, {scale: {"1": a}}).problems == (
        f"{sample} has no recorded fingerprint",
    )


def test_versions_sort_as_numbers():
    assert sorted(["0.9.1", "0.10.0", "0.32.0rc1"], key=version_key) == [
        "0.9.1",
        "0.10.0",
        "0.32.0rc1",
    ]


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1}', "{"])
def test_a_broken_record_is_one_line(tmp_path, text):
    (tmp_path / "fingerprints.json").write_text(text)
    with pytest.raises(SourceError, match="reinstall vllm-ext"):
        read_known(tmp_path / "fingerprints.json")


@pytest.mark.parametrize("minor", [12, 13])
def test_another_python_computes_the_same(tmp_path, minor):
    """Only text is hashed; run where that Python is on this machine."""
    python = _python(minor)
    if python is None:
        pytest.skip(f"no Python 3.{minor} on this machine")
    tricky = STOCK + (
        'def f(x):\n    """D."""\n    return f"{x!r:>{10}} {x}" f"""\n  # {x}\n"""\n'
    )
    source_of(tmp_path, tricky)
    targets = ["toy.ops:scale", "toy.ops:f", "toy.ops:Sampler"]
    here = Source(tmp_path, "toy")
    real = Source(package_folder())
    watched = sorted({target for patch in SERIES for target in patch.watched})
    code = (
        "import json, sys; from pathlib import Path;"
        f"sys.path.insert(0, {str(Path(module.__file__).parents[2])!r});"
        "from vllm_ext.patching.fingerprint import *;"
        f"toy = Source(Path({str(tmp_path)!r}), 'toy');"
        f"vllm = Source(Path({str(real.path)!r}));"
        f"print(json.dumps([fingerprint(toy, t) for t in {targets}]"
        f" + [fingerprint(vllm, t) for t in {watched}]))"
    )
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = [fingerprint(here, name) for name in targets]
    expected += [fingerprint(real, name) for name in watched]
    assert None not in expected
    assert json.loads(done.stdout) == expected


def _python(minor: int) -> str | None:
    versions = Path.home() / ".pyenv" / "versions"
    candidates = [
        *(str(path) for path in versions.glob(f"3.{minor}.*/bin/python")),
        shutil.which(f"python3.{minor}"),
    ]
    for candidate in filter(None, candidates):
        if subprocess.run([candidate, "-c", ""], capture_output=True).returncode == 0:
            return candidate
    return None
