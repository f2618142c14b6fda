"""The patches, in order of application."""

from pathlib import Path

from vllm_ext.patching.declare import Patch

FINGERPRINTS = Path(__file__).with_name("fingerprints.json")

SERIES: tuple[Patch, ...] = ()
