"""A folder tree in a few files that can be carried one by one, checked at every step.

A bundle is a ``.tar.xz`` cut into parts, one folder for each: ``p0/part-00``, and so
on, because a carrier may take only so much at a time. Each folder also has the
manifest, so that whichever part arrives first says what is still missing::

    p0/manifest.json    p0/part-00
    p1/manifest.json    p1/part-01

The first member of the archive, `LISTING`, holds the sha256 of every other, in the
format of ``sha256sum -c``; the manifest holds the sha256 of it and of every part.
"""

import hashlib
import io
import json
import lzma
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

FORMAT = 1
MANIFEST = "manifest.json"
LISTING = "FILES.sha256"
CHUNK = 1 << 20

Say = Callable[[str], None]


class BundleError(Exception):
    """One line: what is wrong with a bundle, and what to do."""


class IncompleteError(BundleError):
    """Parts have not arrived yet; what has arrived is kept."""


@dataclass(frozen=True)
class Part:
    """One file of a bundle.

    Attributes:
        name: Of the file.
        folder: Of the bundle's folder that it lies in.
        bytes: Its size.
        sha256: Of its content.
    """

    name: str
    folder: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a bundle consists of.

    Attributes:
        listing: Sha256 of `LISTING`: two bundles with the same are the same tree.
        files: How many files the tree has.
        bytes: Their size together.
        about: What the tree is, for people and for whoever uses it.
        parts: In their order.
    """

    listing: str
    files: int
    bytes: int
    about: dict[str, Any]
    parts: tuple[Part, ...]

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """The manifest in ``folder``.

        Raises:
            BundleError: There is none, or it cannot be understood.
        """
        path = folder / MANIFEST
        try:
            found = json.loads(path.read_text())
            if found["format"] != FORMAT:
                raise BundleError(
                    f"{path} has format {found['format']}, this reads {FORMAT}: "
                    "pack the bundle with the checkout that unpacks it"
                )
            return cls(
                found["listing"],
                found["files"],
                found["bytes"],
                found["about"],
                tuple(Part(**part) for part in found["parts"]),
            )
        except OSError as error:
            raise BundleError(
                f"{path} cannot be read ({error.strerror}): name a folder of a bundle"
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise BundleError(
                f"{path} is damaged ({type(error).__name__}: {error}): carry it again"
            ) from None

    def write(self, folder: Path) -> None:
        """Put it into ``folder``."""
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"
        (folder / MANIFEST).write_text(text)


# -- packing -----------------------------------------------------------------------


def write(
    tree: Path,
    out: Path,
    about: Mapping[str, Any],
    *,
    part_bytes: int,
    window_bytes: int,
) -> Manifest:
    """Pack ``tree`` into ``out``, which appears complete or not at all.

    The same tree gives the same bytes, whenever and wherever it is packed.

    Args:
        about: For the manifest.
        part_bytes: The most that a part may have.
        window_bytes: How far back the compressor looks; unpacking needs as much
            memory.
    """
    names = sorted(
        (str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file()),
        # Like beside like packs better, and code for the GPU best of all.
        key=lambda name: (not name.endswith(".so"), os.path.splitext(name)[1], name),
    )
    sums = {name: _sha256(tree / name) for name in names}
    listing = "".join(f"{sums[name]}  {name}\n" for name in names).encode()
    scratch = out.with_name(f"{out.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    parts = _Parts(scratch, part_bytes)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": window_bytes}]
    with (
        lzma.LZMAFile(
            cast(IO[bytes], parts), "wb", check=lzma.CHECK_CRC32, filters=filters
        ) as packed,
        tarfile.open(fileobj=packed, mode="w|", format=tarfile.GNU_FORMAT) as archive,
    ):
        first = tarfile.TarInfo(LISTING)
        first.size = len(listing)
        archive.addfile(first, io.BytesIO(listing))
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = (tree / name).stat().st_size
            member.mode = 0o755 if os.access(tree / name, os.X_OK) else 0o644
            with (tree / name).open("rb") as content:
                archive.addfile(member, content)
    parts.close()
    manifest = Manifest(
        listing=hashlib.sha256(listing).hexdigest(),
        files=len(names),
        bytes=sum((tree / name).stat().st_size for name in names),
        about=dict(about),
        parts=tuple(
            Part(path.name, path.parent.name, path.stat().st_size, _sha256(path))
            for path in parts.paths
        ),
    )
    for part in manifest.parts:
        manifest.write(scratch / part.folder)
    shutil.rmtree(out, ignore_errors=True)
    scratch.rename(out)
    return manifest


class _Parts(io.RawIOBase):
    """A file for writing that goes on in the next part when one is full."""

    def __init__(self, out: Path, part_bytes: int) -> None:
        self.paths: list[Path] = []
        self._out = out
        self._part_bytes = part_bytes
        self._left = 0
        self._file: BinaryIO | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        total = len(rest)
        while len(rest):
            if not self._left:
                self._next()
            assert self._file is not None
            taken = self._file.write(rest[: self._left])
            self._left -= taken
            rest = rest[taken:]
        return total

    def _next(self) -> None:
        if self._file:
            self._file.close()
        number = len(self.paths)
        path = self._out / f"p{number}" / f"part-{number:02d}"
        path.parent.mkdir(parents=True)
        self._file, self._left = path.open("wb"), self._part_bytes
        self.paths.append(path)

    def close(self) -> None:
        if self._file:
            self._file.close()
        super().close()


# -- unpacking ---------------------------------------------------------------------


def collect(folders: Sequence[Path], store: Path, say: Say) -> Manifest:
    """Take over into ``store`` the parts that have arrived; check each of them.

    A bundle may come in several calls, in any order. A part of another bundle than
    the one in ``store`` starts anew.

    Returns:
        The manifest, once every part is there.

    Raises:
        BundleError: A part is damaged, or ``folders`` are of different bundles.
        IncompleteError: The names of the folders that are still missing.
    """
    manifests = {folder: Manifest.read(folder) for folder in folders}
    if len({manifest.parts for manifest in manifests.values()}) > 1:
        raise BundleError(
            f"{' and '.join(map(str, folders))} are of different bundles: pack again, "
            "and carry only what that leaves"
        )
    store.mkdir(parents=True, exist_ok=True)
    manifest = next(iter(manifests.values()), None) or Manifest.read(store)
    if manifests and _is_of_another(store, manifest):
        say("another bundle than before: what had arrived of that one is dropped")
        shutil.rmtree(store)
        store.mkdir()
    if manifests:
        manifest.write(store)
    for part in manifest.parts:
        if (store / part.name).exists():
            continue
        for folder in folders:
            if (folder / part.name).exists():
                _take(folder / part.name, store, part)
    missing = [part for part in manifest.parts if not (store / part.name).exists()]
    if missing:
        raise IncompleteError(
            f"{len(manifest.parts) - len(missing)} of {len(manifest.parts)} parts are "
            f"here; carry {', '.join(part.folder for part in missing)}"
        )
    return manifest


def _is_of_another(store: Path, manifest: Manifest) -> bool:
    if not (store / MANIFEST).exists():
        return False
    try:
        return Manifest.read(store).parts != manifest.parts
    except BundleError:
        return True


def _take(source: Path, store: Path, part: Part) -> None:
    scratch = store / f".{part.name}"
    shutil.copyfile(source, scratch)
    size, found = scratch.stat().st_size, _sha256(scratch)
    if (size, found) != (part.bytes, part.sha256):
        scratch.unlink()
        how = "its content" if size == part.bytes else f"{size} of {part.bytes} bytes"
        raise BundleError(f"{source} is damaged ({how}): carry {part.folder} again")
    scratch.rename(store / part.name)


def unpack(store: Path, tree: Path) -> Manifest:
    """Unpack the parts in ``store`` to ``tree``, which appears complete or not at all.

    Raises:
        BundleError: What came out is not what was packed.
    """
    manifest = Manifest.read(store)
    scratch = tree.with_name(f"{tree.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        expected = _extract(manifest, store, scratch)
    except (tarfile.TarError, lzma.LZMAError, EOFError, ValueError) as error:
        shutil.rmtree(scratch, ignore_errors=True)
        raise BundleError(
            f"the bundle does not unpack ({type(error).__name__}: {error}): pack again"
        ) from None
    if expected:
        shutil.rmtree(scratch, ignore_errors=True)
        raise BundleError(
            f"{len(expected)} files are missing in the bundle, {next(iter(expected))} "
            "for one: pack again"
        )
    manifest.write(scratch)
    shutil.rmtree(tree, ignore_errors=True)
    scratch.rename(tree)
    return manifest


def _extract(manifest: Manifest, store: Path, tree: Path) -> dict[str, str]:
    """Unpack and check; what was listed and did not come."""
    expected: dict[str, str] = {}
    with (
        _Joined([store / part.name for part in manifest.parts]) as joined,
        lzma.LZMAFile(cast(IO[bytes], joined)) as unpacked,
        tarfile.open(fileobj=unpacked, mode="r|") as archive,
    ):
        for member in archive:
            content = archive.extractfile(member)
            if content is None:
                raise ValueError(f"{member.name} is no plain file")
            if member.name == LISTING:
                text = content.read()
                if hashlib.sha256(text).hexdigest() != manifest.listing:
                    raise ValueError(f"{LISTING} is not that of the manifest")
                (tree / LISTING).write_bytes(text)
                expected = listed(text.decode())
                continue
            # An unlisted name is refused here, and a listed one stays inside.
            wanted = expected.pop(member.name, "")
            path = tree / member.name
            path.parent.mkdir(parents=True, exist_ok=True)
            found = hashlib.sha256()
            with path.open("wb") as out:
                while chunk := content.read(CHUNK):
                    found.update(chunk)
                    out.write(chunk)
            if found.hexdigest() != wanted:
                raise ValueError(f"{member.name} is not what was listed")
            path.chmod(member.mode)
    return expected


def listed(text: str) -> dict[str, str]:
    """The sha256 of each name in a `LISTING`.

    Raises:
        ValueError: A line is no such entry, or its name leaves the tree.
    """
    found = {}
    for line in text.splitlines():
        match = re.fullmatch(r"([0-9a-f]{64})  (.+)", line)
        if not match or {"..", ""} & set(match[2].split("/")):
            raise ValueError(f"no entry of {LISTING}: {line[:80]}")
        found[match[2]] = match[1]
    return found


def damaged(tree: Path) -> list[str]:
    """The files of an unpacked tree that are missing or not as they were packed."""
    sums = listed((tree / LISTING).read_text())
    return [
        name
        for name, wanted in sums.items()
        if not (tree / name).is_file() or _sha256(tree / name) != wanted
    ]


class _Joined(io.RawIOBase):
    """Several files read as one."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._rest = list(paths)
        self._file: BinaryIO | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            taken = self._file.readinto(buffer) if self._file else 0  # type: ignore[attr-defined]
            if taken or not self._rest:
                return int(taken)
            if self._file:
                self._file.close()
            self._file = self._rest.pop(0).open("rb")

    def close(self) -> None:
        if self._file:
            self._file.close()
        super().close()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
