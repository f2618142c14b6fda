"""What the pull request says beyond its commit message."""

from vllm_ext.upstream.declare import Overlap, Upstream

UPSTREAM = Upstream(
    overlaps=(
        Overlap(
            "#54218",
            "Merged: brought _mask_stop_token_logits, so that a finished grammar can "
            "stop below min_tokens. This keeps what it does and takes away its waits.",
        ),
        Overlap(
            "#44800",
            "Merged: VLLM_GPU_SYNC_CHECK, with which such waits are found. This takes "
            "away four that are left on Model Runner V1.",
        ),
    ),
    searches=("min_tokens structured output sync", "_mask_stop_token_logits"),
    tests=(
        "pytest tests/v1/logits_processors/test_min_tokens_restore.py",
        "pytest tests/v1/logits_processors/test_correctness.py -k min_tokens",
        "pytest tests/v1/e2e/general/test_min_tokens.py",
    ),
    environment="VLLM_USE_V2_MODEL_RUNNER=0",
    requests=(
        """--extra-body '{"min_tokens": 90, "structured_outputs": """
        """{"regex": "[a-z ]*"}}'"""
    ),
    benchmark="python benchmarks/kernels/benchmark_min_tokens_restore.py",
    accuracy=(
        "no evaluation was run. The masked logits are equal bit for bit, in rows with "
        "NaN and infinities too; the new test compares them."
    ),
    trade_offs="""
        - The maximum of every row of the batch is computed, where before the rows
          concerned were copied and reduced: one pass over the logits, in steps that
          have a structured-output request below its min_tokens and in no others.
        - Model Runner V2 does this in a kernel of its own and is not touched.
    """,
)
