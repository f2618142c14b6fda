"""What the pull request says beyond its commit message."""

from vllm_ext.upstream.declare import Overlap, Upstream

_GPU = "vllm.v1.worker.gpu"
_SAMPLER = f"{_GPU}.sample.sampler:Sampler"

UPSTREAM = Upstream(
    overlaps=(
        Overlap(
            "#30029",
            "Merged: the kernel that counts. It stays for every batch with a prefill "
            "or with drafts; a batch without either does not need it.",
        ),
        Overlap(
            "#57319",
            "Open: fuses the argmax and the gather at the end of Gumbel sampling. "
            "Another launch of the same step; both can be merged.",
        ),
    ),
    searches=("get_num_sampled_and_rejected", "num_sampled decode constant MRV2"),
    tests=(
        "pytest tests/v1/worker/test_gpu_decode_counts.py",
        "pytest tests/v1/worker tests/v1/sample -k 'gpu or sampl'",
    ),
    accuracy=(
        "no evaluation was run. The counts are those that the kernel computes; no "
        "logit and no random number is touched."
    ),
    trade_offs="""
        - Two tensors of max_num_reqs int32 per sampler, and a flag that travels with
          SamplerOutput. Whoever writes into num_sampled or num_rejected would write
          into all later steps; nobody does today.
        - Batches with prefills or drafts, and warm-up, launch the kernel as before.
        - Sleep mode, level 2, empties the memory that models are loaded into, and with
          it what Sampler.__init__ allocates. The two constants lie there, so with that
          mode they have to be made later, at the first step; this is not done yet.
        - Model Runner V1 is not touched.
    """,
    by_hand={
        f"{_GPU}.async_utils:AsyncOutput.__init__": ("copy_constants",),
        f"{_GPU}.sample.output:SamplerOutput": ("copy_constants",),
        f"{_SAMPLER}.__init__": ("_ones", "_zeros"),
        f"{_SAMPLER}.__call__": ("give_constants", "name_batch"),
    },
    only_here={"_batch": "the sampler has its batch at hand there"},
)
