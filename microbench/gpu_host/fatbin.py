"""GPU code inside shared libraries: find it, and take out what one GPU never runs.

nvcc puts the code of every kernel into containers in the section ``.nv_fatbin``: a
header, then one entry per architecture, machine code ("ELF") or PTX. A wheel for all
GPUs carries seven or more; a device picks one of them.

Source: the layout is that of NVIDIA's ``fatbinary_section.h`` as far as it is public,
and for the rest what ``cuobjdump`` shows of libraries with known content.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MAGIC = 0xBA55ED50
PTX, ELF = 1, 2
SECTIONS = (".nv_fatbin", "__nv_relfatbin")
ENTRY_HEADER = 64  # bytes at least


class FatbinError(ValueError):
    """A container does not have the layout that is known here."""


@dataclass(frozen=True)
class Entry:
    """The code of one architecture.

    Attributes:
        kind: `PTX` or `ELF`.
        arch: 90 for sm_90.
        offset: In the file, of its own header.
        size: With that header, in bytes.
    """

    kind: int
    arch: int
    offset: int
    size: int


@dataclass(frozen=True)
class Container:
    """What one object file brought.

    Attributes:
        offset: In the file, of its header.
        header: The header's size in bytes.
        size: Of all entries together, in bytes.
        entries: In their order.
    """

    offset: int
    header: int
    size: int
    entries: tuple[Entry, ...]


def containers(library: bytes) -> Iterator[Container]:
    """Those of a shared library, in their order; none if it holds no GPU code.

    Raises:
        FatbinError: The layout is not the known one.
    """
    for start, size in _sections(library):
        at, end = start, start + size
        while at + 16 <= end:
            magic, _, header, total = struct.unpack_from("<IHHQ", library, at)
            if magic != MAGIC:  # padding
                at += 8
                continue
            stop = at + header + total
            if stop > end:
                raise FatbinError(f"a container at {at:#x} leaves its section")
            yield Container(
                at, header, total, tuple(_entries(library, at + header, stop))
            )
            at = stop


def _entries(library: bytes, at: int, stop: int) -> Iterator[Entry]:
    while at < stop:
        if at + ENTRY_HEADER > stop:
            raise FatbinError(f"an entry at {at:#x} is cut off")
        kind, _, header, payload = struct.unpack_from("<HHIQ", library, at)
        (arch,) = struct.unpack_from("<I", library, at + 28)
        size = header + payload
        if kind not in (PTX, ELF) or header < ENTRY_HEADER or at + size > stop:
            raise FatbinError(f"an entry at {at:#x} has an unknown layout")
        yield Entry(kind, arch, at, size)
        at += size


def _sections(library: bytes) -> Iterator[tuple[int, int]]:
    """Offset and size of each section that holds GPU code."""
    if library[:4] != b"\x7fELF":
        return
    (table,) = struct.unpack_from("<Q", library, 40)
    width, number, names_at = struct.unpack_from("<HHH", library, 58)
    headers = [
        struct.unpack_from("<IIQQQQIIQQ", library, table + index * width)
        for index in range(number)
    ]
    if not headers:
        return
    names = headers[names_at][4]
    for header in headers:
        name_at = names + header[0]
        name = library[name_at : library.index(b"\0", name_at)].decode()
        if name in SECTIONS:
            yield header[4], header[5]


def chosen(entries: tuple[Entry, ...], arch: int) -> tuple[Entry, ...]:
    """Those that a device of ``arch`` could pick; never none.

    Its own machine code; else machine code of an earlier chip of its family, and the
    newest PTX that it can compile. Where there is nothing for it, the smallest entry
    stays, so that asking for such a kernel fails as it did: "no kernel image".
    """
    native = [each for each in entries if (each.kind, each.arch) == (ELF, arch)]
    if native:
        return tuple(native)
    ptx = [each.arch for each in entries if each.kind == PTX and each.arch <= arch]
    usable = [
        each
        for each in entries
        if (
            each.arch == max(ptx, default=None)
            if each.kind == PTX
            else each.arch <= arch and each.arch // 10 == arch // 10
        )
    ]
    return tuple(usable or sorted(entries, key=lambda each: each.size)[:1])


def trim(library: bytes, arch: int) -> bytes:
    """The library with only the GPU code that a device of ``arch`` could pick.

    Every container stays where it was and well formed: kept entries move to its front,
    its size says so, and zeros, which pack to nothing, fill what is left.

    Raises:
        FatbinError: The layout is not the known one.
    """
    trimmed = bytearray(library)
    for each in containers(library):
        kept = b"".join(
            library[entry.offset : entry.offset + entry.size]
            for entry in chosen(each.entries, arch)
        )
        body = each.offset + each.header
        trimmed[body : body + each.size] = kept + bytes(each.size - len(kept))
        struct.pack_into("<Q", trimmed, each.offset + 8, len(kept))
    return bytes(trimmed)


def trim_file(path: Path, arch: int) -> int:
    """`trim` a file in place; by how many bytes of GPU code."""
    before = path.read_bytes()
    after = trim(before, arch)
    dropped = _code(before) - _code(after)
    if dropped:
        path.write_bytes(after)
    return dropped


def _code(library: bytes) -> int:
    return sum(each.size for each in containers(library))
