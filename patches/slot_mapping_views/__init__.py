"""Keep the per-layer slot mappings, which are views of one buffer."""

from vllm_ext.patching.declare import Edit, Patch

_ATTN = "vllm.v1.worker.gpu.attn_utils"

PATCH = Patch(
    name="slot_mapping_views",
    summary="[Perf][MRV2] Build the per-layer slot mapping dict once per batch size",
    why="""
        Stock slices the slot mapping buffer and enters the slices under every layer
        name in each step, although neither the buffer nor the layers change: the
        result depends on the number of tokens alone. A replayed FULL graph does not
        even read it.

        Rung 3 of the ladder: a wrapper around a function of seven lines. There is no
        hook.
    """,
    retire_when="build_slot_mappings_by_layer remembers its result.",
    edits=(
        Edit(
            f"{_ATTN}:build_slot_mappings_by_layer",
            by="vllm_ext.patches.slot_mapping_views.replacement:remember_views",
            how="wrap",
        ),
    ),
    tested_with=("0.32.0", "0.33.0"),
)
