"""Where things lie on the GPU host, and the environment that its stages run in.

::

    HOME/parts        what has arrived of a bundle, until it is unpacked
    HOME/tree/site    vLLM and its packages, for PYTHONPATH
    HOME/plugin       this checkout, as if it were installed
    HOME/cache        what vLLM, Inductor and Triton compile
    HOME/results      results and status of the stages

Nothing is installed and nothing of the machine's own is changed.
"""

import os
import shutil
import tempfile
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vllm_ext import __version__
from vllm_ext.machine import CHECKOUT
from vllm_ext.microbench.gpu_host import checkout, enginedefaults
from vllm_ext.microbench.gpu_host.bundle import BundleError, Manifest
from vllm_ext.microbench.gpu_host.sampler import AOT

HOME = Path(tempfile.gettempdir()) / "vllm-ext-gpu-host"
SITE = "site"


@dataclass(frozen=True)
class Host:
    """The folders below ``home``.

    Attributes:
        home: Outside the checkout, and still there in the next call if the machine is.
        root: Of the checkout that runs.
    """

    home: Path
    root: Path = CHECKOUT

    @property
    def parts(self) -> Path:
        return self.home / "parts"

    @property
    def tree(self) -> Path:
        return self.home / "tree"

    @property
    def site(self) -> Path:
        return self.tree / SITE

    @property
    def plugin(self) -> Path:
        return self.home / "plugin"

    @property
    def results(self) -> Path:
        return self.home / "results"

    @property
    def checkout_note(self) -> Path:
        return self.home / checkout.FILE

    @property
    def unpacked(self) -> Manifest | None:
        """The manifest of the bundle that is unpacked; ``None`` if there is none."""
        try:
            return Manifest.read(self.tree)
        except BundleError:
            return None


def link_checkout(host: Host) -> None:
    """Make ``HOME/plugin``: the checkout's packages, and the plugin's entry point.

    Links, because the checkout's own root on the path would also offer its folders
    ``kernels`` and ``tests`` to whoever asks for packages of those names.
    """
    shutil.rmtree(host.plugin, ignore_errors=True)
    host.plugin.mkdir(parents=True)
    (host.plugin / "vllm_ext").symlink_to(host.root / "vllm_ext")
    lane = "vllm_ext_cpulane"  # its tiny model
    (host.plugin / lane).symlink_to(host.root / "cpulane" / lane)
    assert enginedefaults.__file__
    shutil.copyfile(enginedefaults.__file__, host.plugin / "sitecustomize.py")
    project = tomllib.loads((host.root / "pyproject.toml").read_text())["project"]
    info = host.plugin / f"vllm_ext-{__version__}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {__version__}\n"
    )
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {to}" for name, to in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


def environment(
    host: Host, variables: Mapping[str, str], engine_arguments: str
) -> dict[str, str]:
    """For a process that uses the bundle and the checkout.

    Args:
        variables: Of the switches that this host needs.
        engine_arguments: Likewise, as JSON; see `enginedefaults`.
    """
    cache = host.home / "cache"
    path = [str(host.plugin), str(host.site), os.environ.get("PYTHONPATH", "")]
    no_flashinfer = (
        {}
        if (host.site / AOT).exists()
        else {
            # It is the default, and without the package vLLM stops.
            "VLLM_USE_FLASHINFER_SAMPLER": "0"
        }
    )
    merged = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "PYTHONSAFEPATH": "1",  # not the current folder
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_CACHE_ROOT": str(cache / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "FLASHINFER_WORKSPACE_BASE": str(cache / "flashinfer"),
        "VEXT_COMMIT": checkout.told(host.root, host.checkout_note),
        **no_flashinfer,
        **variables,
        enginedefaults.VARIABLE: engine_arguments,
    }
    # vLLM is 3000 files of Python: their bytecode is worth keeping.
    merged.pop("PYTHONDONTWRITEBYTECODE", None)
    return merged
