"""What the pull request says beyond its commit message."""

from vllm_ext.upstream.declare import Overlap, Upstream

UPSTREAM = Upstream(
    overlaps=(
        Overlap(
            "#31336",
            "Merged: takes these waits away for asynchronous scheduling. This does so "
            "for synchronous scheduling, with the same methods.",
        ),
        Overlap(
            "#27615",
            "Merged: copies logprobs without blocking for asynchronous scheduling, by "
            "to_cpu_nonblocking, which this uses too.",
        ),
    ),
    searches=("logprobs tolists sync", "parse_output rejection sampler sync"),
    tests=(
        "pytest tests/v1/sample/test_copy_back.py",
        "pytest tests/v1/sample/test_rejection_sampler.py",
        "pytest tests/v1/sample/test_logprobs.py",
    ),
    environment="VLLM_USE_V2_MODEL_RUNNER=0",
    serve="--no-async-scheduling",
    requests="--extra-body '{\"logprobs\": 5}'",
    accuracy=(
        "no evaluation was run. Nothing is computed: the same values are copied and "
        "picked, in another order. The new test compares them."
    ),
    trade_offs="""
        - With drafts, the logprobs of rejected ones are copied too: a few rows more of
          num_logprobs + 1 entries.
        - One event per step where three to ten blocking copies were.
        - Asynchronous scheduling, the default, is not touched, nor is Model Runner V2.
    """,
    by_hand={
        "vllm.v1.outputs:LogprobsTensors.tolists": ("after_one_wait", "_on_host"),
        "vllm.v1.outputs:wait_for_copies": ("_wait",),
        "vllm.v1.sample.rejection_sampler:RejectionSampler.parse_output": (
            "parse_on_host",
            "_on_host",
        ),
    },
)
