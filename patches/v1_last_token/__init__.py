"""Penalties and bad words while the last token is still on its way to the host."""

from vllm_ext.patching.declare import Edit, Patch

_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_BATCH = "vllm.v1.worker.gpu_input_batch:InputBatch"
_SAMPLER = "vllm.v1.sample.sampler:Sampler"
_BY = "vllm_ext.patches.v1_last_token.replacement"

PATCH = Patch(
    name="v1_last_token",
    summary="[Perf][V1] Penalties and bad words without waiting for the last token",
    why="""
        With a penalty or a bad word in the batch, Model Runner V1 waits in every step
        for the copy of the last step's tokens, because it counts tokens on the host:
        it turns the whole output of every request into a padded tensor of 64-bit
        integers, copies that to the device and counts it there, prompts included, in
        two tensors of [requests, vocabulary]. The host's share grows with every
        token put out. The last tokens are on the device already: the counts can stay
        there, one token added per step, and a bad word that hangs on the last token
        can be decided there.

        Rung 3 of the ladder: three wrappers. One keeps the host's lists, one step
        late, one applies the counts, one the bad words that the host cannot decide.
        The waiting call and the counting are lines of larger functions; there is no
        hook, and no one callee that has both the batch and the logits.
    """,
    retire_when="update_async_output_token_ids is not called for penalties any more.",
    edits=(
        Edit(f"{_RUNNER}._sample", by=f"{_BY}:sample_ahead", how="wrap"),
        Edit(
            f"{_SAMPLER}.apply_logits_processors", by=f"{_BY}:forbid_words", how="wrap"
        ),
        Edit(f"{_SAMPLER}.apply_penalties", by=f"{_BY}:penalize", how="wrap"),
    ),
    relies_on=(
        # When a token is unknown, who reads the lists, and when they change.
        f"{_BATCH}.update_async_output_token_ids",
        f"{_BATCH}.set_async_sampled_token_ids",
        f"{_BATCH}.refresh_metadata",
        f"{_BATCH}._make_sampling_metadata",
        f"{_BATCH}.condense",
        f"{_BATCH}.swap_states",
        f"{_RUNNER}._bookkeeping_sync",
        f"{_RUNNER}._update_states",
        f"{_RUNNER}._update_streaming_request",
        "vllm.v1.sample.metadata:SamplingMetadata",
        # What is computed, and in which order.
        f"{_SAMPLER}.forward",
        "vllm.v1.sample.ops.penalties:apply_all_penalties",
        "vllm.v1.sample.ops.penalties:_convert_to_tensors",
        "vllm.model_executor.layers.utils:apply_penalties",
        "vllm.model_executor.layers.utils:get_token_bin_counts_and_mask",
        "vllm.v1.sample.ops.bad_words:apply_bad_words",
        "vllm.v1.sample.ops.bad_words:_apply_bad_words_single_batch",
        "vllm.v1.sample.logits_processor.builtin:MinTokensLogitsProcessor.update_state",
    ),
    since="2026-11-21",
    tested_with=("0.32.0", "0.33.0"),
)
