"""What the pull request says beyond its commit message."""

from vllm_ext.upstream.declare import Overlap, Upstream

_BACKENDS = "vllm.v1.attention.backends"
_STATES = "vllm.v1.worker.gpu.model_states"
_ONLY_COLLECTS = ("ONLY_COLLECTS", "_only_collects")

UPSTREAM = Upstream(
    overlaps=(
        Overlap(
            "#40410",
            "Merged: the drafter reuses the target's metadata before a FULL replay. "
            "The same thought, for the speculator; this is for the target model "
            "without one.",
        ),
        Overlap(
            "#35383",
            "Merged: attention metadata is prepared by the model state, which is where "
            "this asks whether it is read.",
        ),
    ),
    searches=("skip attn metadata FULL cudagraph", "prepare_attn replay MRV2"),
    tests=(
        "pytest tests/v1/worker/test_gpu_full_replay_metadata.py",
        "pytest tests/v1/cudagraph tests/v1/attention",
    ),
    serve="--attention-backend TRITON_ATTN",
    accuracy=(
        "no evaluation was run. A replay reads the tensors that it was captured with, "
        "and these are written as before; what is left out is read by nobody."
    ),
    trade_offs="""
        - A promise of each backend: build_only_collects() says that building writes
          nothing that a replay reads. The default is no, so that a backend which says
          nothing keeps its build; a derived builder has to say so for itself.
        - FlashAttention 3 with a schedule computed ahead, and FlashInfer, gain nothing.
        - Nothing changes for a step that is not a FULL replay, with a KV connector,
          with speculative decoding or with decode context parallelism.
    """,
    by_hand={
        "vllm.v1.attention.backend:AttentionMetadataBuilder.build_only_collects": (
            _ONLY_COLLECTS
        ),
        f"{_BACKENDS}.flash_attn:FlashAttentionMetadataBuilder.build_only_collects": (
            "_flash_only_collects",
            *_ONLY_COLLECTS,
        ),
        f"{_BACKENDS}.triton_attn:TritonAttentionMetadataBuilder.build_only_collects": (
            "_triton_only_collects",
            *_ONLY_COLLECTS,
        ),
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner.execute_model": (
            "build_when_read",
        ),
        f"{_STATES}.default:DefaultModelState.replay_reads_attn_metadata": (
            "_reason_to_build",
            "_only_collects",
            "build_when_read",
        ),
        f"{_STATES}.interface:ModelState.replay_reads_attn_metadata": (
            "build_when_read",
        ),
    },
    only_here={
        "LateMetadata": "who reads it is known there, so that none is built late",
        "_filled": "makes the methods of LateMetadata",
        "<module>": "gives LateMetadata its methods",
    },
)
