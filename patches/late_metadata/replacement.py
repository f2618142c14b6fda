# SPDX-License-Identifier: Apache-2.0
"""`DefaultModelState.prepare_attn`, put off until the metadata is looked at."""

import functools
from collections.abc import Callable
from typing import Any

from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.utils import AttentionGroup

from vllm_ext.patching.engine import step_aside

NAME = "late_metadata"


class LateMetadata(dict[str, Any]):
    """Metadata by layer name, built at the first look.

    A dict in every respect, since that is what readers expect. Looking must happen
    in the step it was made for, as the tensors it is built from are the step's.
    """

    def __init__(self, build: Callable[[], dict[str, Any]]):
        super().__init__()
        self._build: Callable[[], dict[str, Any]] | None = build

    def fill(self) -> None:
        if self._build is not None:
            build, self._build = self._build, None
            super().update(build())

    def __reduce__(self) -> tuple[type, tuple[dict[str, Any]]]:
        return dict, (self.copy(),)


def _filled(name: str) -> Callable[..., Any]:
    method = getattr(dict, name)

    @functools.wraps(method)
    def looked_at(self: LateMetadata, *args: Any, **kwargs: Any) -> Any:
        self.fill()
        return method(self, *args, **kwargs)

    return looked_at


# Everything that a dict can be asked or told, apart from being made and hashed.
for _name in (
    *("__contains__", "__delitem__", "__eq__", "__ge__", "__getitem__", "__gt__"),
    *("__ior__", "__iter__", "__le__", "__len__", "__lt__", "__ne__", "__or__"),
    *("__repr__", "__reversed__", "__ror__", "__setitem__", "clear", "copy", "get"),
    *("items", "keys", "pop", "popitem", "setdefault", "update", "values"),
):
    setattr(LateMetadata, _name, _filled(_name))


def build_when_read(
    original: Callable[..., dict[str, Any]],
) -> Callable[..., dict[str, Any]]:
    """`DefaultModelState.prepare_attn`, late where only a replay would follow."""

    def prepare_attn(
        self: DefaultModelState,
        input_batch: InputBatch,
        cudagraph_mode: CUDAGraphMode,
        block_tables: Any,
        slot_mappings: Any,
        attn_groups: list[list[AttentionGroup]],
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Any]:
        build = functools.partial(
            original,
            *(self, input_batch, cudagraph_mode, block_tables, slot_mappings),
            attn_groups,
            *args,
            **kwargs,
        )
        # Anything but for_capture=False after the configuration is a special case:
        # a capture, a microbatch, a model with metadata of its own.
        if (
            cudagraph_mode != CUDAGraphMode.FULL
            or type(self) is not DefaultModelState
            or len(args) != 1
            or kwargs != {"for_capture": False}
        ):
            return build()
        reason = _reason_to_build(self, input_batch, attn_groups)
        if reason is not None:
            step_aside(NAME, reason)
            return build()
        return LateMetadata(build)

    return prepare_attn


def _reason_to_build(
    model_state: DefaultModelState,
    batch: InputBatch,
    attn_groups: list[list[AttentionGroup]],
) -> str | None:
    """Why the metadata is read, or building it has an effect of its own, if so."""
    config = model_state.vllm_config
    if config.kv_transfer_config is not None:
        return "KV connector"
    if config.speculative_config is not None:
        return "speculative decoding"
    if batch.dcp_local_seq_lens is not None:
        return "decode context parallelism"
    if batch.fast_prefill is not None:
        return "fast prefill"
    if batch.prompt_lens is not None:
        return "attention window that depends on the prompt"
    if model_state.model_config.is_mm_prefix_lm:
        return "bidirectional attention over images"
    for groups in attn_groups:
        for group in groups:
            if not _only_collects(group):
                return f"{group.backend.__name__} computes ahead"
    return None


def _triton_only_collects(builder: Any) -> bool:
    return builder.rswa_window is None


def _flash_only_collects(builder: Any) -> bool:
    return not (
        builder.aot_schedule
        or builder.dcp_world_size > 1
        or builder.rswa_window is not None
    )


# By name, as importing a backend looks for its GPU libraries. A builder that is not
# here, or that is derived from one that is, may do anything.
ONLY_COLLECTS: dict[str, Callable[[Any], bool]] = {
    "vllm.v1.attention.backends.triton_attn.TritonAttentionMetadataBuilder": (
        _triton_only_collects
    ),
    "vllm.v1.attention.backends.flash_attn.FlashAttentionMetadataBuilder": (
        _flash_only_collects
    ),
}


def _only_collects(group: AttentionGroup) -> bool:
    """Whether building the metadata of ``group`` leaves the device alone."""
    if group.kernel_block_size is not None:
        return False  # its block table is translated
    builder = group.get_metadata_builder(0)
    known = ONLY_COLLECTS.get(
        f"{type(builder).__module__}.{type(builder).__qualname__}"
    )
    return known is not None and known(builder)
