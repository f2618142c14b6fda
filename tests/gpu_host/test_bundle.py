"""A bundle arrives in pieces, in any order, sometimes damaged; a tree comes of it."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest

from vllm_ext.microbench.gpu_host import bundle
from vllm_ext.microbench.gpu_host.bundle import (
    LISTING,
    MANIFEST,
    BundleError,
    IncompleteError,
    Manifest,
)

ABOUT = {"vllm": "0.33.0"}


def plant(root: Path, seed: int = 0) -> Path:
    """A tree whose bundle has several parts: noise does not pack."""
    noise = random.Random(seed)
    for name, size in {"a/b.py": 10, "lib/c.so": 9000, "empty": 0, "d": 4000}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(noise.randbytes(size))
    (root / "a" / "run").write_text("#!/bin/sh\n")
    (root / "a" / "run").chmod(0o755)
    return root


def packed(tree: Path, out: Path, part_bytes: int = 5000) -> Manifest:
    return bundle.write(tree, out, ABOUT, part_bytes=part_bytes, window_bytes=1 << 20)


def folders(out: Path) -> list[Path]:
    return sorted(out.iterdir())


def said_nothing(text: str) -> None:
    raise AssertionError(text)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return plant(tmp_path / "tree")


@pytest.fixture
def out(tree: Path, tmp_path: Path) -> Path:
    packed(tree, tmp_path / "out")
    assert len(folders(tmp_path / "out")) == 3
    return tmp_path / "out"


def same(one: Path, other: Path) -> None:
    files = {
        root: {
            path.relative_to(root).as_posix(): (
                path.read_bytes(),
                os.access(path, os.X_OK),
            )
            for path in root.rglob("*")
            if path.is_file() and path.name not in (LISTING, MANIFEST)
        }
        for root in (one, other)
    }
    assert files[one] == files[other]


def test_what_was_packed_comes_out(tree: Path, out: Path, tmp_path: Path):
    manifest = bundle.collect(folders(out), tmp_path / "store", said_nothing)
    bundle.unpack(tmp_path / "store", tmp_path / "new")
    same(tree, tmp_path / "new")
    assert bundle.damaged(tmp_path / "new") == []
    assert manifest.about == ABOUT
    assert (manifest.files, manifest.bytes) == (5, 13020)
    assert not (tmp_path / "new.partial").exists()
    assert Manifest.read(tmp_path / "new") == manifest


def test_the_same_tree_packs_to_the_same_bytes(tree: Path, out: Path, tmp_path: Path):
    os.utime(tree / "d", (0, 0))
    shutil.copytree(tree, tmp_path / "elsewhere")
    packed(tmp_path / "elsewhere", tmp_path / "again")
    same(out, tmp_path / "again")


def test_parts_come_one_by_one_and_in_any_order(tree: Path, out: Path, tmp_path: Path):
    store = tmp_path / "store"
    last, first, middle = (folders(out)[at] for at in (2, 0, 1))
    with pytest.raises(IncompleteError, match="1 of 3 parts are here; carry p0, p1"):
        bundle.collect([last], store, said_nothing)
    with pytest.raises(IncompleteError, match="2 of 3 parts are here; carry p1"):
        bundle.collect([first], store, said_nothing)
    with pytest.raises(IncompleteError, match="carry p1"):
        bundle.collect([], store, said_nothing)
    bundle.collect([middle], store, said_nothing)
    bundle.unpack(store, tmp_path / "new")
    same(tree, tmp_path / "new")


def test_a_flipped_bit_is_found_before_anything_is_unpacked(out: Path, tmp_path: Path):
    part = out / "p1" / "part-01"
    content = bytearray(part.read_bytes())
    content[100] ^= 1
    part.write_bytes(content)
    with pytest.raises(BundleError, match=r"p1/part-01 is damaged \(its content\)"):
        bundle.collect(folders(out), tmp_path / "store", said_nothing)
    assert not (tmp_path / "store" / "part-01").exists()


def test_a_part_that_was_cut_off_is_named(out: Path, tmp_path: Path):
    part = out / "p0" / "part-00"
    part.write_bytes(part.read_bytes()[:4000])
    with pytest.raises(BundleError, match=r"4000 of 5000 bytes\): carry p0 again"):
        bundle.collect(folders(out), tmp_path / "store", said_nothing)


def test_a_damaged_part_can_be_carried_again(tree: Path, out: Path, tmp_path: Path):
    good = (out / "p1" / "part-01").read_bytes()
    (out / "p1" / "part-01").write_bytes(b"")
    with pytest.raises(BundleError, match="carry p1 again"):
        bundle.collect(folders(out), tmp_path / "store", said_nothing)
    (out / "p1" / "part-01").write_bytes(good)
    bundle.collect(folders(out), tmp_path / "store", said_nothing)
    bundle.unpack(tmp_path / "store", tmp_path / "new")
    same(tree, tmp_path / "new")


def test_a_damaged_manifest_is_one_line(out: Path, tmp_path: Path):
    (out / "p0" / MANIFEST).write_text('{"format": 1, "par')
    with pytest.raises(
        BundleError, match=r"manifest\.json is damaged .* carry it again"
    ):
        bundle.collect(folders(out), tmp_path / "store", said_nothing)


def test_a_folder_without_a_bundle_is_one_line(tmp_path: Path):
    with pytest.raises(BundleError, match="name a folder of a bundle"):
        bundle.collect([tmp_path], tmp_path / "store", said_nothing)


def test_parts_of_two_bundles_do_not_mix(out: Path, tmp_path: Path):
    packed(plant(tmp_path / "other tree", seed=1), tmp_path / "other")
    mixed = [out / "p0", tmp_path / "other" / "p1", out / "p2"]
    with pytest.raises(BundleError, match="are of different bundles"):
        bundle.collect(mixed, tmp_path / "store", said_nothing)


def test_a_newer_bundle_drops_what_is_left_of_the_old(out: Path, tmp_path: Path):
    tree = plant(tmp_path / "other tree", seed=1)
    packed(tree, tmp_path / "other")
    said: list[str] = []
    with pytest.raises(IncompleteError):
        bundle.collect([out / "p0"], tmp_path / "store", said.append)
    assert said == []
    bundle.collect(folders(tmp_path / "other"), tmp_path / "store", said.append)
    assert len(said) == 1
    assert said[0].startswith("another bundle than before")
    bundle.unpack(tmp_path / "store", tmp_path / "new")
    same(tree, tmp_path / "new")


def test_unpacking_that_was_interrupted_leaves_no_tree(
    tree: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    bundle.collect(folders(out), tmp_path / "store", said_nothing)

    def pull_the_plug(*_: object) -> dict[str, str]:
        (tmp_path / "new.partial" / "half").write_text("half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(bundle, "_extract", pull_the_plug)
        with pytest.raises(KeyboardInterrupt):
            bundle.unpack(tmp_path / "store", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    bundle.unpack(tmp_path / "store", tmp_path / "new")
    same(tree, tmp_path / "new")


def test_packing_that_was_interrupted_leaves_the_old_bundle(
    tree: Path, out: Path, monkeypatch: pytest.MonkeyPatch
):
    before = Manifest.read(out / "p0")

    def pull_the_plug(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bundle._Parts, "close", pull_the_plug)
    with pytest.raises(KeyboardInterrupt):
        packed(tree, out)
    assert Manifest.read(out / "p0") == before


@pytest.mark.parametrize("what", ["changed", "missing"])
def test_a_tree_that_was_damaged_later_is_found(out: Path, tmp_path: Path, what: str):
    bundle.collect(folders(out), tmp_path / "store", said_nothing)
    bundle.unpack(tmp_path / "store", tmp_path / "new")
    if what == "changed":
        (tmp_path / "new" / "d").write_bytes(b"x" * 4000)
    else:
        (tmp_path / "new" / "d").unlink()
    assert bundle.damaged(tmp_path / "new") == ["d"]


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a//b"])
def test_a_name_that_leaves_the_tree_is_refused(name: str):
    with pytest.raises(ValueError, match="no entry"):
        bundle.listed(f"{'0' * 64}  {name}\n")


def test_a_file_that_changed_while_it_was_packed_is_found(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Listed with one content, packed with another."""
    listed = bundle._sha256

    def slow(path: Path) -> str:
        before = listed(path)
        if path.name == "d":
            path.write_bytes(b"later" * 800)
        return before

    with monkeypatch.context() as patched:
        patched.setattr(bundle, "_sha256", slow)
        packed(tree, tmp_path / "out")
    bundle.collect(folders(tmp_path / "out"), tmp_path / "store", said_nothing)
    with pytest.raises(BundleError, match="d is not what was listed"):
        bundle.unpack(tmp_path / "store", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "new.partial").exists()


def test_the_listing_is_checked_against_the_manifest(out: Path, tmp_path: Path):
    store = tmp_path / "store"
    manifest = bundle.collect(folders(out), store, said_nothing)
    text = (store / MANIFEST).read_text()
    (store / MANIFEST).write_text(text.replace(manifest.listing, "0" * 64))
    with pytest.raises(BundleError, match="is not that of the manifest"):
        bundle.unpack(store, tmp_path / "new")
    assert not (tmp_path / "new.partial").exists()
