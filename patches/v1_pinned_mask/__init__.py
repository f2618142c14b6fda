"""Allowed token ids from pinned memory, so that their copy waits for nothing."""

from vllm_ext.patching.declare import Edit, Patch

_BATCH = "vllm.v1.worker.gpu_input_batch:InputBatch"
_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"

PATCH = Patch(
    name="v1_pinned_mask",
    summary="[Perf][V1] Keep the mask of allowed token ids in pinned memory",
    why="""
        While a request with allowed_token_ids is in the batch, Model Runner V1 copies
        a mask of [requests, vocabulary] to the device whenever the batch changes: 39
        MB for 256 requests and 152,000 tokens. Every other tensor that is copied
        there is pinned. This one is not, so the copy is staged by the driver, and the
        host waits until the device has come that far.

        Rung 3 of the ladder: a wrapper that pins the mask when stock has made it, in
        the middle of a long method; there is no hook, and no callee makes it.
    """,
    retire_when="InputBatch.add_request allocates the mask in pinned memory.",
    edits=(
        Edit(
            f"{_BATCH}.add_request",
            by="vllm_ext.patches.v1_pinned_mask.replacement:pin_after_adding",
            how="wrap",
        ),
    ),
    relies_on=(
        # Who else writes the mask: inside synchronize_input_prep, which waits for
        # the copies of the step before, as it does for the pinned tensors beside it.
        f"{_BATCH}._make_sampling_metadata",
        f"{_BATCH}.remove_request",
        f"{_BATCH}.swap_states",
        f"{_BATCH}.condense",
        f"{_RUNNER}.synchronize_input_prep",
        f"{_RUNNER}._update_states",
        f"{_RUNNER}.execute_model",
        "vllm.v1.utils:copy_slice",
    ),
    # The frontend never holds a batch.
    after=("vllm.v1.worker.gpu_model_runner",),
    since="2026-11-21",
    tested_with=("0.32.0", "0.33.0"),
)
