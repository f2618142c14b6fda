"""Sample a decode batch from views: there, row i of the logits is token i."""

from vllm_ext.patching.declare import Edit, Patch

_GPU = "vllm.v1.worker.gpu"

PATCH = Patch(
    name="identity_gathers",
    summary="[Perf][MRV2] Slice instead of gathering when every request has one token",
    why="""
        Stock gathers hidden states, positions and input ids at the tokens to sample
        from. With one token per request these are the first num_reqs rows: three
        kernels and three allocations per step that copy rows onto themselves.

        Rung 3 of the ladder: a wrapper that lends the batch a slice where the
        index tensor was, for the length of one call. The gathers are lines of two
        large functions; there is no hook and no smaller callee.
    """,
    retire_when="GPUModelRunner.sample and Sampler.__call__ slice in a decode batch.",
    edits=(
        Edit(
            f"{_GPU}.model_runner:GPUModelRunner.sample",
            by="vllm_ext.patches.identity_gathers.replacement:sample_from_views",
            how="wrap",
        ),
    ),
    relies_on=(
        # The only reader of logits_indices below sample(); these get the batch too.
        f"{_GPU}.sample.sampler:Sampler.__call__",
        f"{_GPU}.structured_outputs:StructuredOutputsWorker.apply_grammar_bitmask",
        f"{_GPU}.structured_outputs:grammar_invalid_drafts",
        # Who is handed the two views: none keeps them or writes into them.
        f"{_GPU}.sample.sampler:Sampler.sample",
        f"{_GPU}.sample.sampler:Sampler._sample_random",
        f"{_GPU}.sample.sampler:Sampler.apply_sampling_params",
        f"{_GPU}.sample.logit_bias:LogitBiasState",
        f"{_GPU}.sample.penalties:PenaltiesState",
        f"{_GPU}.sample.bad_words:BadWordsState",
        f"{_GPU}.sample.thinking_budget:ThinkingBudgetState.apply",
        "vllm.v1.watermarking.gpu_sampler:GPUWatermarkSampler",
        # logits_indices: the last token of each request.
        f"{_GPU}.input_batch:_combine_sampled_and_draft_tokens_kernel",
    ),
    since="2026-11-21",
    tested_with=("0.32.0", "0.33.0"),
)
