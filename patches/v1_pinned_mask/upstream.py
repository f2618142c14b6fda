"""What the pull request says beyond its commit message."""

from vllm_ext.upstream.declare import Overlap, Upstream

UPSTREAM = Upstream(
    overlaps=(
        Overlap(
            "#13210",
            "Merged: brought the mask. Its review asked for a tensor on the host that "
            "is copied as a whole, which it is; pinning it was not discussed.",
        ),
        Overlap(
            "#43894",
            "Open: an issue about rows of this mask that keep what they held. This "
            "changes where the mask lies, not what is in it.",
        ),
    ),
    searches=("allowed_token_ids mask pinned", "allowed_token_ids_mask_cpu_tensor"),
    tests=(
        "pytest tests/v1/worker/test_gpu_input_batch_pinned_mask.py",
        "pytest tests/v1/worker/test_gpu_input_batch.py",
        "pytest tests/v1/sample/test_sampler.py -k allowed_token_ids",
    ),
    environment="VLLM_USE_V2_MODEL_RUNNER=0",
    requests="--extra-body '{\"allowed_token_ids\": [11, 12, 13, 14]}'",
    accuracy="none is needed: the same values are copied, from another kind of memory.",
    trade_offs="""
        - max_num_seqs times the vocabulary in bytes of pinned memory, from the first
          request with allowed_token_ids on: 39 MB for 256 and 152,000.
        - Pinning it takes that first request a moment longer.
        - Model Runner V2 has no such mask and is not touched.
    """,
    by_hand={
        "vllm.v1.worker.gpu_input_batch:InputBatch.add_request": ("pin_after_adding",)
    },
)
