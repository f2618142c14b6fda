"""What the pull request says beyond its commit message."""

from vllm_ext.upstream.declare import Overlap, Upstream

_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_SAMPLER = "vllm.v1.sample.sampler:Sampler"

UPSTREAM = Upstream(
    overlaps=(
        Overlap(
            "#47540",
            "Open: keeps the penalties' statistics from step to step, drafts included. "
            "It takes away the same rebuilding and, with it, the same wait. It has to "
            "be agreed with its author which is taken up; this one leaves steps with "
            "drafts alone, and does bad words too.",
        ),
        Overlap(
            "#26467",
            "Merged: made penalties and bad words right with asynchronous scheduling "
            "by waiting for the last tokens. This keeps them right without that wait.",
        ),
        Overlap(
            "#27910",
            "Merged: batches in which some rows have penalties. It notes that the "
            "penalties are to be reworked; this does so where no drafts are.",
        ),
        Overlap(
            "#30495",
            "Merged: the same with drafts. Steps with drafts are not touched.",
        ),
    ),
    searches=("V1 penalties async scheduling", "update_async_output_token_ids"),
    tests=(
        "pytest tests/v1/sample/test_last_tokens.py",
        "pytest tests/v1/sample tests/v1/worker/test_gpu_input_batch.py",
        "pytest tests/v1/e2e/general/test_async_scheduling.py",
    ),
    environment="VLLM_USE_V2_MODEL_RUNNER=0",
    requests="--repetition-penalty 1.1 --frequency-penalty 0.1",
    accuracy=(
        "no evaluation was run. The logits after penalties and bad words are equal bit "
        "for bit to those of a batch that knows all tokens; the new test compares them "
        "over random traffic."
    ),
    trade_offs="""
        - Counts of [rows, vocabulary] int32 and a mask of bools stay on the device
          while a request with a penalty is in the batch. Before, two of that shape
          were made and dropped in every step.
        - The lists of output tokens have -1 at their end one step longer. Whoever reads
          them on the host in between has to be named in `_needs_last_tokens`.
        - Over 250 lines, on a model runner that is not the default any more. Model
          Runner V2 counts on the device already.
        - Drafts, thinking budgets, processors that read output tokens, KV transfer and
          pipeline parallelism wait as before.
    """,
    by_hand={
        f"{_RUNNER}._follow_outputs": ("sample_ahead",),
        f"{_RUNNER}._needs_last_tokens": ("_reason_to_wait",),
        f"{_RUNNER}._sample": ("sample_ahead",),
        f"{_SAMPLER}.apply_logits_processors": ("forbid_words",),
        f"{_SAMPLER}.apply_penalties": ("penalize",),
        "vllm.v1.sample.metadata:SamplingMetadata": ("sample_ahead",),
        "vllm.v1.sample.ops.penalties:apply_counted_penalties": ("penalize",),
        "vllm.v1.worker.gpu_input_batch:InputBatch.__init__": ("sample_ahead",),
    },
)
