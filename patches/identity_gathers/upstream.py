"""What the pull request says beyond its commit message."""

from vllm_ext.upstream.declare import Overlap, Upstream

_GPU = "vllm.v1.worker.gpu"
_SAMPLER = f"{_GPU}.sample.sampler:Sampler"

UPSTREAM = Upstream(
    overlaps=(
        Overlap(
            "#55022",
            "Closed without being merged: slices the hidden states alone, under the "
            "same condition.",
        ),
        Overlap(
            "#55655",
            "Closed without being merged: slices all three, also in a batch with "
            "drafts (its condition is that each token has a logit). This is the part "
            "of it for a batch without drafts, and leaves copies to custom logits "
            "processors.",
        ),
    ),
    searches=(
        "logits_indices slice",
        "identity gather decode",
        "logits_indices arange",
    ),
    tests=(
        "pytest tests/v1/worker/test_gpu_logits_rows.py",
        "pytest tests/v1/worker tests/v1/sample -k 'gpu or sampl'",
    ),
    accuracy=(
        "no evaluation was run. The same rows reach the same kernels, as views "
        "instead of copies: outputs are equal bit for bit."
    ),
    trade_offs="""
        - The sampler sees views of buffers that the next step overwrites. They are read
          on the stream on which that step is launched, and none outlives the call; a
          later reader on another stream would have to copy.
        - Batches with drafts gather as before, and so does sharded sampling, unless one
          rank owns all requests.
        - Model Runner V1 is not touched.
    """,
    by_hand={
        f"{_GPU}.input_batch:InputBatch.logits_rows": ("sample_from_views",),
        f"{_GPU}.model_runner:GPUModelRunner.sample": ("sample_from_views",),
        f"{_SAMPLER}.__init__": ("OWN_PROCESSORS", "_reason_to_gather"),
        f"{_SAMPLER}.__call__": ("sample_from_views", "_reason_to_gather"),
    },
    only_here={
        "OWN_SAMPLERS": "a sampler derived from vLLM's is a matter of its author there",
    },
)
