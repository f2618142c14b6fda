"""The patches, in order of application."""

from vllm_ext.patching.declare import Patch

SERIES: tuple[Patch, ...] = ()
