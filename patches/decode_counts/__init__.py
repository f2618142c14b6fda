"""One sampled token per request is a constant: no kernel and no copy to the host."""

from vllm_ext.patching.declare import Edit, Patch

_GPU = "vllm.v1.worker.gpu"
_BY = "vllm_ext.patches.decode_counts.replacement"

PATCH = Patch(
    name="decode_counts",
    summary="[Perf][MRV2] Do not compute the token counts of a pure decode batch",
    why="""
        A request that is not prefilling and has no drafts samples one token and
        rejects none. Stock launches a kernel to find that out and copies the counts
        back to the host, each step: one Triton launch, one allocation, one pinned
        allocation and one device-to-host copy.

        Rung 3 of the ladder: wrappers around two functions of a few lines, and one
        around Sampler.__call__ that only tells them which batch is being sampled.
        There is no hook.
    """,
    retire_when="Sampler.__call__ takes the counts of a decode batch from the host.",
    edits=(
        Edit(f"{_GPU}.sample.sampler:Sampler.__call__", f"{_BY}:name_batch", "wrap"),
        Edit(
            f"{_GPU}.input_batch:get_num_sampled_and_rejected",
            f"{_BY}:give_constants",
            how="wrap",
        ),
        Edit(
            f"{_GPU}.async_utils:async_copy_to_np", f"{_BY}:copy_constants", how="wrap"
        ),
    ),
    relies_on=(
        # What the counts depend on.
        f"{_GPU}.input_batch:_get_num_sampled_and_rejected_kernel",
        f"{_GPU}.model_runner:GPUModelRunner.gather_batch_req_state",
        f"{_GPU}.input_batch:InputBatch.make_dummy",
        # Who reads them, and that nobody writes into them.
        f"{_GPU}.async_utils:AsyncOutput.__init__",
        f"{_GPU}.model_runner:GPUModelRunner.sample_tokens",
        f"{_GPU}.model_runner:GPUModelRunner.postprocess_sampled",
        f"{_GPU}.input_batch:_post_update_kernel",
        f"{_GPU}.pp_utils:PPHandler.broadcast",
        f"{_GPU}.sample.batch_shard:gather_sampler_output",
        f"{_GPU}.sample.batch_shard:_pack_sampler_output_kernel",
        f"{_GPU}.sample.output:SamplingMaskTensors.from_logits",
        f"{_GPU}.sample.output:_compact_sampling_mask_kernel",
        f"{_GPU}.model_states.mamba_hybrid:MambaHybridModelState.postprocess_state",
        f"{_GPU}.model_states.mamba_hybrid:_scatter_num_accepted_kernel",
        f"{_GPU}.model_states.recoverssm:RecoverSSMState.commit_step",
    ),
    since="2026-11-21",
    tested_with=("0.32.0", "0.33.0"),
)
