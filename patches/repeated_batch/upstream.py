"""What the pull request says beyond its commit message."""

from vllm_ext.upstream.declare import Overlap, Upstream

_BATCH = "vllm.v1.worker.gpu.input_batch"
_RUNNER = "vllm.v1.worker.gpu.model_runner:GPUModelRunner"

UPSTREAM = Upstream(
    overlaps=(
        Overlap(
            "#17866",
            "Closed without being merged: the same for Model Runner V1, with about 10 "
            "% of the TPOT of a 1B model as its author measured it. Model Runner V2 "
            "keeps its state on the device, which leaves less to save and less to go "
            "wrong.",
        ),
        Overlap(
            "#57628",
            "Closed without being merged: fuses three kernels of this method into one. "
            "Here two of them still run in a repeated step, so that both could be had.",
        ),
        Overlap(
            "#42131",
            "Open: a fast path for decode-only steps of the scheduler and of Model "
            "Runner V1. Its runner part is another file; the thought is the same.",
        ),
    ),
    searches=("prepare_inputs decode reuse MRV2", "fast path decode prepare_inputs"),
    tests=(
        "pytest tests/v1/worker/test_gpu_repeated_batch.py",
        "pytest tests/v1/worker -k gpu",
        "pytest tests/v1/e2e/general/test_async_scheduling.py",
    ),
    accuracy=(
        "no evaluation was run. The batch of a repeated step is equal, field for "
        "field, to the one that is built from nothing; the new test compares them."
    ),
    trade_offs="""
        - State between steps: the batch that the input buffers hold. Whoever writes the
          buffers for another batch has to forget it; prepare_inputs and make_dummy are
          the only two that do.
        - Steps in which a request comes, goes or is preempted pay a comparison of the
          slots and a copy of the batch object.
        - Speculative decoding, pipeline and prefill context parallelism, fast prefill
          and windows that depend on the prompt gain nothing.
        - Model Runner V1 is not touched.
    """,
    by_hand={
        f"{_BATCH}:InputBuffers.__init__": ("repeat_inputs",),
        f"{_BATCH}:InputBatch.make_dummy": ("forget_before_dummy",),
        f"{_BATCH}:KeptBatch": ("Kept",),
        f"{_RUNNER}.prepare_inputs": ("repeat_inputs",),
        f"{_RUNNER}._next_step_may_repeat": ("_reason_to_rebuild",),
    },
    only_here={"_mark": "nothing is put in place or taken away while it runs"},
)
