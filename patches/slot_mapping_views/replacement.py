# SPDX-License-Identifier: Apache-2.0
"""`build_slot_mappings_by_layer`, remembered per slice of the slot mapping buffer."""

import weakref
from collections import OrderedDict
from collections.abc import Callable

import torch
from vllm.v1.kv_cache_interface import KVCacheConfig

Views = dict[str, torch.Tensor]

# A decode step has one of the graph sizes; prefills, of any size, pass through.
MAX_SIZES = 128


def remember_views(original: Callable[..., Views]) -> Callable[..., Views]:
    """`build_slot_mappings_by_layer`; slot mappings are ``[groups, tokens]`` int64.

    A kept view holds its buffer, so that while it is kept no other tensor can have
    the address it is found by. Everything is dropped with the KV cache configuration.
    """
    kept: OrderedDict[tuple[object, ...], Views] = OrderedDict()
    owner: weakref.ref[KVCacheConfig] | None = None

    def build_slot_mappings_by_layer(
        slot_mappings: torch.Tensor, kv_cache_config: KVCacheConfig
    ) -> Views:
        nonlocal owner
        if owner is None or owner() is not kv_cache_config:
            kept.clear()
            owner = weakref.ref(kv_cache_config, lambda gone: kept.clear())
        key = (
            slot_mappings.data_ptr(),
            slot_mappings.shape,
            slot_mappings.stride(),
            slot_mappings.dtype,
            slot_mappings.device,
            *[len(group.layer_names) for group in kv_cache_config.kv_cache_groups],
        )
        views = kept.get(key)
        if views is None:
            views = kept[key] = original(slot_mappings, kv_cache_config)
            if len(kept) > MAX_SIZES:
                kept.popitem(last=False)
        else:
            kept.move_to_end(key)
        return views.copy()  # what the caller does to it stays with the caller

    return build_slot_mappings_by_layer
