"""Minimum-tokens masking beside structured outputs, without waiting for the GPU."""

from vllm_ext.patching.declare import Edit, Patch

_PROCESSOR = "vllm.v1.sample.logits_processor.builtin:MinTokensLogitsProcessor"

PATCH = Patch(
    name="min_tokens_restore",
    summary="[Perf] Restore masked stop tokens without a GPU sync",
    why="""
        A structured-output request below its min_tokens gets its stop tokens back
        where masking them leaves no token. Stock finds the rows concerned with
        unique_consecutive and picks entries with boolean masks: four results whose
        sizes the host has to wait for, in every step of such a batch (Model Runner
        V1). The same entries can all be written, each with the value it needs.

        Rung 4 of the ladder: a short method with no hook and no callee to wrap; a
        wrapper could not change how it selects.
    """,
    retire_when="_mask_stop_token_logits selects no entries by a boolean mask.",
    edits=(
        Edit(
            f"{_PROCESSOR}._mask_stop_token_logits",
            by="vllm_ext.patches.min_tokens_restore.replacement:mask_stop_token_logits",
        ),
    ),
    relies_on=(f"{_PROCESSOR}.apply", f"{_PROCESSOR}.apply_with_spec_decode"),
    # The frontend imports the processors too, and never calls them.
    after=("vllm.v1.worker.gpu_model_runner",),
    since="2026-11-21",
    tested_with=("0.32.0", "0.33.0"),
)
