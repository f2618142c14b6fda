"""``python -m vllm_ext.microbench.gpu_host.pack``: stock vLLM in one file of 50 MiB.

Runs on a machine with pip and a package index, without a GPU. It gets vLLM's wheel
for CUDA and the packages that the GPU host lacks, compiles FlashInfer's sampler
(`sampler`), takes out what a dense bf16 model on one GPU never loads (`LEAVE_OUT`,
`fatbin`) and packs the rest (`bundle`).

What it downloads and compiles is kept: run again after an interruption, it goes on
where it was, and when nothing changed it only writes down the current commit.
"""

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_ext.machine import CHECKOUT
from vllm_ext.microbench.gpu_host import bundle, checkout, fatbin, host, sampler
from vllm_ext.microbench.gpu_host.bundle import BundleError, Manifest, Say

OUT = CHECKOUT / ".gpu-bundle"
WORK = CHECKOUT / "build" / "gpu-host"
KEPT_WHEELS = CHECKOUT / ".venv" / "wheels"  # `make setup` has vLLM's there
CARRIED_MIB = 64.0  # what one call to the GPU host may carry, the checkout included
NEEDED_GB = 4.0

# -- what goes in ------------------------------------------------------------------

VLLM = "0.33.0"
FLASHINFER = "0.7.2.post1"
TVM_FFI = "0.1.11"
ARCH = 90  # H100, H200
FLASHINFER_ARCH = "9.0a"

PYTHON = "3.12"
GLIBC = (39, 38, 36, 35, 34, 31, 28, 27, 26, 24, 17)
PLATFORMS = (
    *(f"manylinux_2_{minor}_x86_64" for minor in GLIBC),
    *("manylinux2014_x86_64", "manylinux1_x86_64", "linux_x86_64"),
)

# What `vllm` and its commands import and the GPU host does not have, found by running
# them with exactly its packages; versions are what pip resolves for vLLM's metadata.
MISSING = f"""
annotated-types==0.8.0 apache-tvm-ffi=={TVM_FFI} cachetools==8.0.0 cbor2==6.2.1
compressed-tensors==0.17.0 loguru==0.7.3 fastapi==0.136.3 starlette==1.10.0
uvicorn==0.54.0 python-multipart==0.0.34 httpx2==2.16.2 httpcore2==2.16.2
sniffio==1.3.1 llguidance==1.7.6 model-hosting-container-standards==0.1.16
jmespath==1.1.0 msgspec==0.22.0 openai==3.52.0 jiter==0.19.0 opentelemetry-api==1.45.2
orjson==3.13.0 oss-harmony==0.0.11 partial-json-parser==0.2.1.1.post7
prometheus-fastapi-instrumentator==8.1.0 watchfiles==1.3.0 pybase64==1.5.1
pydantic==2.14.3 pydantic-core==2.50.4 pydantic-extra-types==2.11.1 pyzmq==27.3.0
setproctitle==1.3.8 typing-inspection==0.4.5 xgrammar==0.2.8
""".split()

# Paths in the tree, as regular expressions, with why nobody misses them.
LEAVE_OUT = (
    r"/__pycache__/|\.pyc$",
    r"^vllm/vllm-rs$",  # the front end in Rust, 60 MB, off by default
    r"^vllm/third_party/(fmha_sm100|deep_gemm|tml_fa4)/",  # other GPUs, fp8
    r"^vllm/_(flashmla|flashkda|deepselect|qutlass)\w*\.abi3\.so$",  # MLA, KDA, NVFP4
    r"^vllm/_moe_C",
    r"^vllm/vllm_flash_attn/_vllm_fa2_C",  # Hopper takes FlashAttention 3
    r"^vllm/entrypoints/serve/instrumentator/static/",
    # Tuned figures of MoE and fp8 kernels.
    r"^vllm/model_executor/layers/(fused_moe|quantization/utils)/configs/.*\.json$",
    r"^(llguidance|pydantic_core|openai|xgrammar)/.*\.(md|rs|pyi)$",
    # Of FlashInfer, its Python is all that a finished module needs.
    r"^flashinfer/data/(?!aot/)",
    r"^flashinfer/experimental/(?!__init__|cake_nvfp4_per_token)",
    r"^flashinfer/moe_ep/kernel_src/",
    r"^flashinfer/.*\.(cu|cuh|h|hpp|md)$",
    r"^(b12x|build_backend|build_utils)\b",
)
STRIPPED_BYTES = 1 << 20  # smaller libraries are left as they are

Options = dict[str, Any]


class CannotPackError(Exception):
    """One line: what is missing or wrong, and what to do."""


def main(argv: Sequence[str] | None = None) -> int:
    """Pack, and say what to carry; the exit status."""
    args = _parser().parse_args(argv)
    started = time.monotonic()

    def say(text: str) -> None:
        sys.stdout.write(f"[{time.monotonic() - started:4.0f} s] {text}\n")
        sys.stdout.flush()

    try:
        manifest = pack(
            args.out,
            args.work,
            trim=args.trim,
            flashinfer=args.flashinfer,
            part_mib=args.part_mib,
            window_mib=args.window_mib,
            say=say,
        )
        noted = checkout.note(CHECKOUT, args.out / manifest.parts[0].folder)
    except (CannotPackError, BundleError, sampler.CannotBuildError) as error:
        sys.stderr.write(f"pack: {error}\n")
        return 1
    except OSError as error:
        sys.stderr.write(f"pack: {error}; fix that and run it again\n")
        return 1
    commit = f"{noted['commit']}{' with changes' if noted['dirty'] else ''}"
    say(f"the code that goes with it: {commit if noted['commit'] else 'no checkout'}")
    for line in to_carry(manifest, args.out, checkout_bytes(CHECKOUT)):
        say(line)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vllm_ext.microbench.gpu_host.pack",
        description="Pack stock vLLM for a GPU host that has no network.",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=OUT,
        help="where the bundle goes (default: %(default)s)",
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=WORK,
        help="where downloads and tools are kept (default: %(default)s)",
    )
    parser.add_argument(
        "--no-trim",
        dest="trim",
        action="store_false",
        help="leave GPU code as NVIDIA's compiler wrote it: two parts",
    )
    parser.add_argument(
        "--no-flashinfer",
        dest="flashinfer",
        action="store_false",
        help="without FlashInfer's sampler, which is stock's default for top-k/top-p",
    )
    parser.add_argument(
        "--part-mib", type=float, default=51.0, help="size of a part (default: 51)"
    )
    parser.add_argument(
        "--window-mib",
        type=int,
        default=256,
        help="how far back the compressor looks (default: 256)",
    )
    return parser


def pack(
    out: Path,
    work: Path,
    *,
    trim: bool,
    flashinfer: bool,
    part_mib: float,
    window_mib: int,
    say: Say,
) -> Manifest:
    """Make the bundle in ``out``, unless it is there already.

    Raises:
        CannotPackError: A wheel cannot be had, or there is no room.
        CannotBuildError: FlashInfer's sampler cannot be compiled.
    """
    options = {
        **{"trim": trim, "flashinfer": flashinfer},
        **{"part_mib": part_mib, "window_mib": window_mib},
    }
    recipe = _recipe(options)
    try:
        manifest = Manifest.read(out / "p0")
        if manifest.about["recipe"] == recipe and _complete(manifest, out):
            say(f"{out} is up to date")
            return manifest
    except (BundleError, KeyError):
        pass
    work.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(work).free / 1e9
    if free < NEEDED_GB:
        raise CannotPackError(
            f"{free:.1f} GB are left on the disk of {work}, {NEEDED_GB:.0f} are needed"
        )
    wheels = get_wheels(_requirements(flashinfer), work / "wheels", say)
    module = None
    if flashinfer:
        module = sampler.build(work, FLASHINFER, TVM_FFI, FLASHINFER_ARCH, say)
    tree = work / "tree"
    say(f"unpacking {len(wheels)} wheels")
    make_tree(tree, wheels, module, arch=ARCH if trim else None, say=say)
    say("packing (one core, some minutes)")
    manifest = bundle.write(
        tree,
        out,
        {
            "recipe": recipe,
            "vllm": VLLM,
            "arch": ARCH,
            "trimmed": trim,
            "flashinfer": FLASHINFER if flashinfer else None,
            "wheels": [wheel.name for wheel in wheels],
        },
        part_bytes=int(part_mib * 2**20),
        window_bytes=window_mib << 20,
    )
    shutil.rmtree(tree)
    return manifest


def _recipe(options: Options) -> str:
    """What the bundle depends on."""
    contents = (
        *(bundle.FORMAT, VLLM, FLASHINFER, FLASHINFER_ARCH, ARCH, MISSING),
        *(LEAVE_OUT, STRIPPED_BYTES, sampler.NVCC, sorted(options.items())),
    )
    return hashlib.sha256(repr(contents).encode()).hexdigest()


def _complete(manifest: Manifest, out: Path) -> bool:
    return all(
        (path := out / part.folder / part.name).is_file()
        and path.stat().st_size == part.bytes
        for part in manifest.parts
    )


def _requirements(flashinfer: bool) -> list[str]:
    extra = [f"flashinfer-python=={FLASHINFER}"] if flashinfer else []
    return [f"vllm=={VLLM}", *MISSING, *extra]


# -- wheels ------------------------------------------------------------------------


def get_wheels(requirements: Sequence[str], folder: Path, say: Say) -> list[Path]:
    """The wheel of each requirement, downloaded if it is not there yet.

    Raises:
        CannotPackError: pip does not find one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number, requirement in enumerate(requirements, 1):
        if not _wheel(requirement, folder):
            say(f"getting {requirement} ({number} of {len(requirements)})")
            _download(requirement, folder)
    found = [_wheel(requirement, folder) for requirement in requirements]
    for requirement, wheel in zip(requirements, found, strict=True):
        if wheel is None:
            raise CannotPackError(f"pip left no wheel of {requirement} in {folder}")
    return [wheel for wheel in found if wheel]


def _wheel(requirement: str, folder: Path) -> Path | None:
    name, _, version = requirement.partition("==")
    for place in (folder, KEPT_WHEELS):
        for wheel in sorted(place.glob("*.whl")):
            has = wheel.name.split("-")
            if (_plain(has[0]), has[1]) == (_plain(name), version):
                return wheel
    return None


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "_", name).lower()


def _download(requirement: str, folder: Path) -> None:
    command = [
        *(sys.executable, "-m", "pip", "download", "-q", "--no-deps"),
        *("--disable-pip-version-check", "--only-binary=:all:"),
        *("--python-version", PYTHON, "--implementation", "cp"),
        *(part for name in PLATFORMS for part in ("--platform", name)),
        *("-d", str(folder), requirement),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "ERROR" in line]
        raise CannotPackError(
            f"pip cannot get {requirement}: {(said or [done.stderr])[-1].strip()}; "
            "is a package index configured and reachable?"
        )


# -- the tree ----------------------------------------------------------------------


def make_tree(
    tree: Path,
    wheels: Sequence[Path],
    module: Path | None,
    *,
    arch: int | None,
    say: Say,
) -> None:
    """Unpack ``wheels`` into ``tree/site``, without what nobody misses.

    Args:
        module: FlashInfer's compiled sampler, if it goes along.
        arch: Of the GPU whose code is kept; ``None`` keeps all.

    Raises:
        CannotPackError: A wheel is damaged.
    """
    shutil.rmtree(tree, ignore_errors=True)
    site = tree / host.SITE
    for wheel in wheels:
        unzip(wheel, site)
    if module:
        (site / sampler.AOT).parent.mkdir(parents=True)
        shutil.copyfile(module, site / sampler.AOT)
    if arch is not None:
        for library in sorted(site.rglob("*.so*")):
            if library.stat().st_size >= STRIPPED_BYTES:
                _shrink(library, site, arch, say)


def unzip(wheel: Path, site: Path) -> None:
    """Unpack one wheel, its ``.data`` merged, without `LEAVE_OUT` and scripts.

    Raises:
        CannotPackError: It is damaged.
    """
    left_out = re.compile("|".join(f"(?:{each})" for each in LEAVE_OUT))
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.infolist():
                name = member.filename
                if data := re.match(r"[^/]+\.data/(\w+)/(.*)", name):
                    if data[1] not in ("purelib", "platlib"):
                        continue
                    name = data[2]
                if member.is_dir() or left_out.search(name):
                    continue
                path = site / name
                path.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as content, path.open("wb") as out:
                    shutil.copyfileobj(content, out)
    except zipfile.BadZipFile as error:
        raise CannotPackError(
            f"{wheel} is damaged ({error}): delete it and run this again"
        ) from None


def _shrink(library: Path, site: Path, arch: int, say: Say) -> None:
    """Take out what is only there for other GPUs, and for debuggers."""
    name = library.relative_to(site)
    before = library.stat().st_size
    with library.open("rb") as file:
        if file.read(4) != b"\x7fELF":
            return
    dropped = 0
    if name.parts[0] == "vllm":
        try:
            dropped = fatbin.trim_file(library, arch)
        except fatbin.FatbinError as error:
            raise CannotPackError(f"{name}: {error}; pack with --no-trim") from None
    # auditwheel's copies in NAME.libs lose what it wrote into them.
    if shutil.which("strip") and not name.parts[0].endswith(".libs"):
        subprocess.run(["strip", "--strip-unneeded", str(library)], check=True)
    after = library.stat().st_size - dropped
    if before - after > 1 << 20:
        say(f"{name}: {before / 2**20:.0f} MiB, of which {after / 2**20:.0f} are kept")


# -- what to do with it ------------------------------------------------------------


def checkout_bytes(root: Path) -> int:
    """Of the files that travel with a checkout: all but the ignored ones."""
    done = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=root,
        capture_output=True,
        text=True,
    )
    names = filter(None, done.stdout.split("\0"))
    return sum(
        (root / name).lstat().st_size for name in names if (root / name).exists()
    )


def to_carry(manifest: Manifest, out: Path, checkout: int) -> list[str]:
    """Lines: what there is, and whether it fits."""
    parts = manifest.parts
    lines = [
        f"{out}: {sum(part.bytes for part in parts) / 2**20:.1f} MiB in {len(parts)} "
        f"parts; unpacked {manifest.bytes / 2**20:.0f} MiB in {manifest.files} files"
    ]
    for part in parts:
        alone, together = part.bytes / 2**20, (part.bytes + checkout) / 2**20
        lines.append(
            f"carry {os.path.relpath(out / part.folder)}: {alone:.1f} MiB, with the "
            f"checkout {together:.1f} of {CARRIED_MIB:.0f}"
        )
        if together > CARRIED_MIB:
            lines.append(
                f"TOO MUCH by {together - CARRIED_MIB:.1f} MiB: pack with a smaller "
                "--part-mib"
            )
    return lines


if __name__ == "__main__":
    sys.exit(main())
