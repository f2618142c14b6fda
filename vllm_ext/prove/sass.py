"""What a compiled kernel asks of a GPU, read from its machine code.

`figures` disassembles cubins with the tools that Triton brings along; `occupancy` says
how many blocks of a kernel one multiprocessor (SM) could hold. Facts of the binary, not
of a run: how often an instruction is executed, and what it waits for, is not here.
"""

import hashlib
import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

WARP = 32  # threads
INSTRUCTION_BYTES = 16
WIDE = 128  # bits per thread: the widest access of sm_80 and sm_90


@dataclass(frozen=True)
class Limits:
    """What one SM has for the blocks that it runs at once.

    From the table of technical specifications per compute capability in NVIDIA's CUDA
    C++ Programming Guide; `QUARTERS` and the units from ``cuda_occupancy.h`` of the
    CUDA toolkit.

    Attributes:
        shared: Bytes of shared memory; a block can have all but `SHARED_OF_SYSTEM`.
        registers: Of 32 bits.
        warps: Resident at once.
        blocks: Resident at once.
    """

    shared: int
    registers: int = 65536
    warps: int = 64
    blocks: int = 32


LIMITS = {
    80: Limits(164 * 1024),
    90: Limits(228 * 1024),
    100: Limits(228 * 1024),
}
QUARTERS = 4  # an SM's registers belong to four schedulers
REGISTER_UNIT = 256  # registers, for a warp
SHARED_UNIT = 128  # bytes, for a block
SHARED_OF_SYSTEM = 1024  # bytes that each block costs on top of its own

_INSTRUCTION = re.compile(
    r"^\s*/\*[0-9a-f]+\*/\s+(?:@\S+\s+)?([A-Z][\w.]*)([^;]*);", re.MULTILINE
)
_WIDTHS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
_ROUNDS = re.compile(r"U?(F|D|H|FH)(ADD|MUL|FMA)2?(32I)?|MUFU|\w*[DHQO]G?MMA")


@dataclass(frozen=True)
class Compiled:
    """A kernel as it would be loaded.

    Attributes:
        cubin: As ptxas wrote it.
        warps: Of one block.
        shared: Bytes of shared memory that its launch asks for, per block.
    """

    cubin: bytes
    warps: int
    shared: int


def figures(kernels: Sequence[Compiled], arch: int) -> list[dict[str, Any]]:
    """What each of these kernels needs and is made of.

    Args:
        kernels: Compiled for ``arch``.
        arch: 80, 90 or 100.

    Returns:
        For each: ``registers`` per thread; ``spill_stores`` and ``spill_loads``, bytes
        per thread that instructions move to and from local memory, each instruction
        counted once (Triton declares no local arrays, so all of it is spilled
        registers); ``stack``, bytes per thread; ``shared`` and ``warps`` as given;
        ``loads`` and ``stores`` of global memory, number of instructions by bits per
        thread; ``barriers``, instructions; ``code``, bytes with padding; ``floats``,
        instructions that round, by opcode; ``float_order``, a hash of their sequence
        in the code; and what `occupancy` returns.

    Raises:
        RuntimeError: A tool failed, or wrote what is not understood.
    """
    codes = [_machine_code(kernel.cubin) for kernel in kernels]
    instructions = _disassembled(b"".join(codes), arch)
    result = []
    for kernel, code in zip(kernels, codes, strict=True):
        length = len(code) // INSTRUCTION_BYTES
        mine, instructions = instructions[:length], instructions[length:]
        opcodes = [opcode for opcode, _ in mine]
        floats = [opcode for opcode, operands in mine if _rounds(opcode, operands)]
        registers, stack = _usage(kernel.cubin)
        result.append(
            {
                "registers": registers,
                "spill_stores": _bits(_accesses(opcodes, "STL")) // 8,
                "spill_loads": _bits(_accesses(opcodes, "LDL")) // 8,
                "stack": stack,
                "shared": kernel.shared,
                "warps": kernel.warps,
                "loads": _by_width(_accesses(opcodes, "LDG", "LDGSTS")),
                "stores": _by_width(_accesses(opcodes, "STG")),
                "barriers": sum(op.partition(".")[0] == "BAR" for op in opcodes),
                "code": len(code),
                "floats": dict(sorted(Counter(floats).items())),
                "float_order": hashlib.sha256(" ".join(floats).encode()).hexdigest()[
                    :12
                ],
                **occupancy(arch, registers, kernel.warps, kernel.shared),
            }
        )
    return result


def occupancy(arch: int, registers: int, warps: int, shared: int) -> dict[str, Any]:
    """How many blocks one SM can hold at once: a bound, whatever the grid.

    Args:
        arch: 80, 90 or 100.
        registers: Per thread.
        warps: Per block.
        shared: Bytes per block.

    Returns:
        ``blocks_per_sm``, 0 where even one does not fit; ``warps_per_sm`` of theirs;
        ``limited_by``: ``registers``, ``shared memory``, ``warps`` or ``blocks``.
    """
    limits = LIMITS[arch]
    of_warp = _rounded_up(max(registers, 1) * WARP, REGISTER_UNIT)
    of_block = _rounded_up(shared + SHARED_OF_SYSTEM, SHARED_UNIT)
    fit = {
        "blocks": limits.blocks,
        "warps": limits.warps // warps,
        "registers": limits.registers // QUARTERS // of_warp * QUARTERS // warps,
        "shared memory": limits.shared // of_block,
    }
    limited_by = min(fit, key=lambda name: fit[name])
    return {
        "blocks_per_sm": fit[limited_by],
        "warps_per_sm": fit[limited_by] * warps,
        "limited_by": limited_by,
    }


def wide(by_width: dict[str, int]) -> int:
    """How many of the ``loads`` or ``stores`` move 16 bytes per thread, or more."""
    return sum(number for bits, number in by_width.items() if int(bits) >= WIDE)


def _machine_code(cubin: bytes) -> bytes:
    """The sections of an ELF file that hold instructions, one after the other."""
    return b"".join(
        cubin[start : start + size]
        for name, start, size in _sections(cubin)
        if name.startswith(b".text.")
    )


def _sections(elf: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Name, start and size of the sections of a 64-bit ELF file."""
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    entry, number, names = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [
        struct.unpack_from("<I20xQQ", elf, table + i * entry) for i in range(number)
    ]
    for name, start, size in headers:
        begin = headers[names][1] + name
        yield elf[begin : elf.index(b"\0", begin)], start, size


def _disassembled(code: bytes, arch: int) -> list[tuple[str, str]]:
    """Opcode and operands of each instruction.

    One run for all kernels: the tool takes 0.3 s to start, and nothing for a kernel.
    """
    if not code:
        return []
    name = f"SM{arch}" + ("a" if arch >= 90 else "")  # as Triton compiles for it
    text = _tool("nvdisasm", code, "-ndf", "-b", name)
    found = _INSTRUCTION.findall(text)
    if len(found) * INSTRUCTION_BYTES != len(code):
        raise RuntimeError(f"nvdisasm wrote what is not understood: {text[:80]!r}")
    return found


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack per thread."""
    text = _tool("cuobjdump", cubin, "-res-usage")
    found = re.findall(r"REG:(\d+) STACK:(\d+)", text)
    if not found:
        raise RuntimeError(f"cuobjdump wrote what is not understood: {text[:80]!r}")
    registers, stack = zip(*found, strict=True)
    return max(map(int, registers)), max(map(int, stack))


def _tool(name: str, content: bytes, *options: str) -> str:
    """What a tool of Triton's says of a file with this content."""
    from triton import knobs

    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        path = getattr(knobs.nvidia, name).path
        done = subprocess.run(
            [path, *options, file.name], capture_output=True, text=True
        )
    if done.returncode:
        raise RuntimeError(f"{name} failed: {done.stderr.strip().splitlines()[:1]}")
    return done.stdout


def _accesses(opcodes: Iterable[str], *names: str) -> Counter[int]:
    """Instructions of these names, by the bits that a thread moves with one."""
    found: Counter[int] = Counter()
    for opcode in opcodes:
        name, *modifiers = opcode.split(".")
        if name in names:
            found[next((_WIDTHS[m] for m in modifiers if m in _WIDTHS), 32)] += 1
    return found


def _bits(accesses: Counter[int]) -> int:
    return sum(bits * number for bits, number in accesses.items())


def _by_width(accesses: Counter[int]) -> dict[str, int]:
    return {str(bits): number for bits, number in sorted(accesses.items())}


def _rounds(opcode: str, operands: str) -> bool:
    """Whether it computes a float; the idiom that loads a constant does not."""
    if not _ROUNDS.fullmatch(opcode.partition(".")[0]):
        return False
    return not (opcode.startswith("HFMA2") and "-RZ, RZ" in operands)


def _rounded_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
