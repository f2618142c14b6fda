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
        # The only reader of logits_indices below sample(), and what it does with
        # the two views.
        f"{_GPU}.sample.sampler:Sampler.__call__",
        f"{_GPU}.sample.sampler:Sampler.sample",
        f"{_GPU}.sample.sampler:Sampler.apply_sampling_params",
        # logits_indices: the last token of each request.
        f"{_GPU}.input_batch:_combine_sampled_and_draft_tokens_kernel",
    ),
    tested_with=("0.32.0", "0.33.0"),
)
