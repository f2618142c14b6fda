"""Build attention metadata for a replayed graph only if somebody reads it."""

from vllm_ext.patching.declare import Edit, Patch

_BACKENDS = "vllm.v1.attention.backends"

PATCH = Patch(
    name="late_metadata",
    summary="[Perf][MRV2] Do not build attention metadata that a FULL graph ignores",
    why="""
        A FULL CUDA graph replays with the tensors it was captured with, which are
        persistent. Where a builder only collects such tensors into an object, as
        Triton attention does, and FlashAttention when it has no schedule to compute
        ahead, stock builds that object in every step and nobody reads it.

        FlashAttention 3 and FlashInfer do compute something in build() that the
        replay reads; with them this patch leaves the step to stock.

        Rung 3 of the ladder: a wrapper around one method. The official hook is to
        write a model state for the model; there is none for all models.
    """,
    retire_when="execute_model skips prepare_attn before a FULL replay.",
    edits=(
        Edit(
            "vllm.v1.worker.gpu.model_states.default:DefaultModelState.prepare_attn",
            by="vllm_ext.patches.late_metadata.replacement:build_when_read",
            how="wrap",
        ),
    ),
    relies_on=(
        # That building does nothing on the device, which depends on aot_schedule,
        # dcp_world_size and rswa_window: all set when the builder is made.
        f"{_BACKENDS}.triton_attn:TritonAttentionMetadataBuilder.__init__",
        f"{_BACKENDS}.flash_attn:FlashAttentionMetadataBuilder.__init__",
        f"{_BACKENDS}.triton_attn:TritonAttentionMetadataBuilder.build",
        f"{_BACKENDS}.flash_attn:FlashAttentionMetadataBuilder.build",
        f"{_BACKENDS}.flash_attn:FlashAttentionMetadataBuilder._get_scheduler_metadata",
        f"{_BACKENDS}.flash_attn:FlashAttentionMetadataBuilder"
        "._store_scheduler_metadata",
        "vllm.v1.worker.gpu.attn_utils:build_attn_metadata",
        "vllm.v1.worker.utils:AttentionGroup",
        # That nobody reads the metadata of a FULL step.
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner.execute_model",
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner.sample_tokens",
        "vllm.v1.worker.gpu.cudagraph_utils:ModelCudaGraphManager.run_fullgraph",
    ),
    since="2026-11-21",
    tested_with=("0.32.0", "0.33.0"),
)
