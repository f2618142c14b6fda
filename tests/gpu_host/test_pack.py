"""What goes into the bundle: wheels, GPU code, and what is said about the size."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from vllm_ext.microbench.gpu_host import fatbin, pack, sampler
from vllm_ext.microbench.gpu_host.bundle import Manifest, Part
from vllm_ext.microbench.gpu_host.fatbin import ELF, PTX, FatbinError, containers, trim
from vllm_ext.microbench.gpu_host.pack import CannotPackError

# -- GPU code ----------------------------------------------------------------------


def entry(kind: int, arch: int, payload: bytes) -> bytes:
    payload = payload.ljust(-(-len(payload) // 8) * 8, b"\0")  # as nvcc aligns them
    header = struct.pack("<HHIQ", kind, 0, fatbin.ENTRY_HEADER, len(payload))
    return (header + bytes(12) + struct.pack("<I", arch)).ljust(64, b"\0") + payload


def container(*entries: bytes) -> bytes:
    body = b"".join(entries)
    return struct.pack("<IHHQ", fatbin.MAGIC, 1, 16, len(body)) + body


def library(*parts: bytes, section: bytes = b".nv_fatbin") -> bytes:
    """An ELF file with two sections: GPU code, and the names of the sections."""
    code, names = b"".join(parts), b"\0" + section + b"\0.shstrtab\0"
    code_at = 64
    names_at = code_at + len(code)
    table_at = names_at + len(names)
    second = 2 + len(section)

    def section_header(name: int, at: int, size: int) -> bytes:
        return struct.pack("<IIQQQQIIQQ", name, 1, 0, 0, at, size, 0, 0, 1, 0)

    head = b"\x7fELF".ljust(40, b"\0") + struct.pack("<Q", table_at)
    head = head.ljust(58, b"\0") + struct.pack("<HHH", 64, 2, 1)
    return (
        head
        + code
        + names
        + section_header(1, code_at, len(code))
        + section_header(second, names_at, len(names))
    )


def kept(found: bytes) -> list[list[tuple[int, int, bytes]]]:
    """Kind, architecture and code of each entry, by container."""
    return [
        [
            (
                each.kind,
                each.arch,
                found[each.offset + 64 : each.offset + each.size].rstrip(b"\0"),
            )
            for each in one.entries
        ]
        for one in containers(found)
    ]


def test_only_the_code_of_the_gpu_is_kept():
    every = [entry(ELF, arch, b"code %3d" % arch) for arch in (75, 80, 90, 100)]
    before = library(container(*every, entry(PTX, 75, b"ptx")), bytes(16))
    after = trim(before, 90)
    assert kept(after) == [[(ELF, 90, b"code  90")]]
    assert len(after) == len(before)  # nothing moved


def test_without_code_of_its_own_the_gpu_gets_what_it_can_compile():
    before = library(
        container(
            *(entry(PTX, arch, b"ptx %3d" % arch) for arch in (70, 80, 100)),
            entry(ELF, 80, b"older family"),
        ),
        bytes(8),  # padding between containers
        container(entry(ELF, 89, b"another chip"), entry(ELF, 100, b"no")),
    )
    assert kept(trim(before, 90)) == [[(PTX, 80, b"ptx  80")], [(ELF, 100, b"no")]]
    assert kept(trim(before, 86))[0] == [
        (PTX, 80, b"ptx  80"),
        (ELF, 80, b"older family"),
    ]


def test_what_is_around_the_code_stays():
    before = library(container(entry(ELF, 80, b"80" * 8), entry(ELF, 90, b"90" * 8)))
    after = trim(before, 90)
    end = 64 + 16 + 2 * 80
    assert after[:64] == before[:64]
    assert after[end:] == before[end:]
    assert after[64 + 16 + 80 : end] == bytes(80)  # zeros behind what is kept


def test_a_library_without_gpu_code_is_left_alone(tmp_path: Path):
    plain = library(b"text", section=b".text")
    assert trim(plain, 90) == plain
    assert trim(b"#!/bin/sh", 90) == b"#!/bin/sh"
    file = tmp_path / "lib.so"
    file.write_bytes(library(container(entry(ELF, 80, b"80"), entry(ELF, 90, b"90"))))
    assert fatbin.trim_file(file, 90) == 72
    assert fatbin.trim_file(file, 90) == 0


@pytest.mark.parametrize(
    ("code", "why"),
    [
        (container(entry(7, 90, b"what?")), "unknown layout"),
        (struct.pack("<IHHQ", fatbin.MAGIC, 1, 16, 1000), "leaves its section"),
        (struct.pack("<IHHQ", fatbin.MAGIC, 1, 16, 10) + bytes(10), "is cut off"),
    ],
)
def test_an_unknown_layout_is_refused_and_not_guessed(code: bytes, why: str):
    with pytest.raises(FatbinError, match=why):
        trim(library(code), 90)


# -- wheels ------------------------------------------------------------------------


def wheel(folder: Path, name: str, files: dict[str, str]) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for member, text in files.items():
            archive.writestr(member, text)
    return path


def test_a_tree_is_the_wheels_without_what_nobody_misses(tmp_path: Path):
    wheels = [
        wheel(
            tmp_path,
            "vllm-0.33.0-cp38-abi3-linux_x86_64.whl",
            {
                "vllm/__init__.py": "",
                "vllm/vllm-rs": "rust",
                "vllm/_moe_C.abi3.so": "moe",
                "vllm/_C_stable_libtorch.abi3.so": "kernels",
                "vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so": "fa2",
                "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so": "fa3",
                "vllm-0.33.0.data/scripts/vllm": "script",
                "vllm-0.33.0.data/purelib/vllm/pure.py": "pure",
                "vllm-0.33.0.dist-info/METADATA": "Name: vllm",
            },
        ),
        wheel(
            tmp_path,
            "flashinfer_python-1-py3-none-any.whl",
            {"flashinfer/__init__.py": "", "flashinfer/data/csrc/sampling.cu": "code"},
        ),
    ]
    module = tmp_path / "sampling.so"
    module.write_text("compiled")
    pack.make_tree(tmp_path / "tree", wheels, module, arch=90, say=lambda text: None)
    site = tmp_path / "tree" / "site"
    assert {
        str(path.relative_to(site)) for path in site.rglob("*") if path.is_file()
    } == {
        "vllm/__init__.py",
        "vllm/pure.py",
        "vllm/_C_stable_libtorch.abi3.so",
        "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so",
        "vllm-0.33.0.dist-info/METADATA",
        "flashinfer/__init__.py",
        str(sampler.AOT),
    }


def test_a_damaged_wheel_is_one_line(tmp_path: Path):
    (tmp_path / "a-1-py3-none-any.whl").write_bytes(b"PK cut off")
    with pytest.raises(CannotPackError, match="is damaged .* delete it and run"):
        pack.unzip(tmp_path / "a-1-py3-none-any.whl", tmp_path / "site")


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """Commands that were run in pip's place; it has every version of every package."""
    asked: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        name, _, version = command[-1].partition("==")
        if name == "unheard-of":
            said = "ERROR: No matching distribution found for unheard-of==1\n"
            return subprocess.CompletedProcess(command, 1, "", said)
        folder = Path(command[command.index("-d") + 1])
        file = f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
        wheel(folder, file, {"x.py": ""})
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(pack, "KEPT_WHEELS", tmp_path / "kept")
    return asked


def test_wheels_are_downloaded_once(tmp_path: Path, pip: list[list[str]]):
    wheel(tmp_path / "kept", "vllm-0.33.0-cp38-abi3-linux_x86_64.whl", {})
    wheel(tmp_path / "wheels", "my_thing-1.0-py3-none-any.whl", {})
    wanted = ["vllm==0.33.0", "my-thing==2.0", "Other.Thing==3"]
    for _ in range(2):
        found = pack.get_wheels(wanted, tmp_path / "wheels", lambda text: None)
        assert [path.name for path in found] == [
            "vllm-0.33.0-cp38-abi3-linux_x86_64.whl",
            "my_thing-2.0-py3-none-any.whl",
            "Other.Thing-3-py3-none-any.whl",
        ]
    assert [command[-1] for command in pip] == ["my-thing==2.0", "Other.Thing==3"]
    assert "--no-deps" in pip[0]
    assert pip[0][:3] == [sys.executable, "-m", "pip"]


def test_what_pip_cannot_get_is_one_line(tmp_path: Path, pip: list[list[str]]):
    with pytest.raises(CannotPackError, match="No matching distribution .* reachable"):
        pack.get_wheels(["unheard-of==1"], tmp_path / "wheels", lambda text: None)


def test_every_pin_is_exact():
    for requirement in (*pack.MISSING, *sampler.NVCC):
        assert requirement.count("==") == 1, requirement


# -- packing -----------------------------------------------------------------------

OPTIONS: dict[str, Any] = {
    **{"trim": True, "flashinfer": False},
    **{"part_mib": 1.0, "window_mib": 1},
}


def test_a_bundle_is_made_once_and_anew_when_its_contents_change(
    tmp_path: Path, pip: list[list[str]], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pack, "MISSING", ["thing==1"])
    said: list[str] = []

    def packed(**changed: Any) -> Manifest:
        said.clear()
        options = {**OPTIONS, **changed}
        return pack.pack(
            tmp_path / "out", tmp_path / "work", say=said.append, **options
        )

    first = packed()
    assert first.about["wheels"] == [
        "vllm-0.33.0-py3-none-any.whl",
        "thing-1-py3-none-any.whl",
    ]
    assert packed() == first
    assert said == [f"{tmp_path / 'out'} is up to date"]
    assert packed(window_mib=2).about["recipe"] != first.about["recipe"]
    (tmp_path / "out" / "p0" / "part-00").unlink()
    packed(window_mib=2)
    assert "is up to date" not in said[0]
    monkeypatch.setattr(pack, "MISSING", ["thing==2"])
    assert "thing-2-py3-none-any.whl" in packed(window_mib=2).about["wheels"]
    assert not (tmp_path / "work" / "tree").exists()


def test_a_full_disk_is_said_before_the_work(
    tmp_path: Path, pip: list[list[str]], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pack, "NEEDED_GB", 1e9)
    with pytest.raises(CannotPackError, match="are left on the disk"):
        pack.pack(tmp_path / "out", tmp_path / "work", say=lambda text: None, **OPTIONS)
    assert pip == []


def test_what_does_not_fit_into_a_call_is_said(tmp_path: Path):
    mib = 1 << 20
    parts = tuple(
        Part(f"part-0{n}", f"p{n}", size * mib, "") for n, size in ((0, 51), (1, 9))
    )
    manifest = Manifest("", 1, 100 * mib, {}, parts)
    fits = pack.to_carry(manifest, tmp_path, 12 * mib)
    assert not any("TOO MUCH" in line for line in fits)
    assert "63.0 of 64" in fits[1]
    [too_much] = [
        line
        for line in pack.to_carry(manifest, tmp_path, 14 * mib)
        if "TOO MUCH" in line
    ]
    assert too_much.startswith("TOO MUCH by 1.0 MiB")


def test_the_checkout_leaves_room_for_the_bundle():
    """13 MiB beside a part of 51: both travel in one call of 64."""
    assert pack.checkout_bytes(pack.CHECKOUT) < 13 * 2**20


def test_the_command_says_what_is_wrong_in_one_line(
    tmp_path: Path,
    pip: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(pack, "MISSING", ["unheard-of==1"])
    places = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    assert pack.main([*places, "--no-flashinfer"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("pack: pip cannot get unheard-of==1")


def test_the_sampler_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ran: list[list[str]] = []

    def run(command: list[str], what: str, **environment: str) -> None:
        ran.append(command)
        if command[1] == "-c":
            assert environment["FLASHINFER_CUDA_ARCH_LIST"] == "9.0a"
            Path(command[-1]).write_text("compiled")
        elif "--target" in command:
            Path(command[command.index("--target") + 1]).mkdir(exist_ok=True)

    monkeypatch.setattr(sampler, "_run", run)
    for _ in range(2):
        built = sampler.build(tmp_path, "0.7", "0.1", "9.0a", lambda text: None)
        assert built.read_text() == "compiled"
    assert sum(command[1] == "-c" for command in ran) == 1


def test_without_a_compiler_the_sampler_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(sampler.CannotBuildError, match="no C\\+\\+ compiler"):
        sampler.build(tmp_path, "0.7", "0.1", "9.0a", lambda text: None)


def test_the_manifest_can_be_read_by_people(tmp_path: Path, pip: list[list[str]]):
    pack.pack(tmp_path / "out", tmp_path / "work", say=lambda text: None, **OPTIONS)
    found = json.loads((tmp_path / "out" / "p0" / "manifest.json").read_text())
    assert found["about"]["vllm"] == "0.33.0"
