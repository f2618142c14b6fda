"""From the model's logits to tokens in one launch, whatever the requests ask for."""

from vllm_ext.patching.declare import Edit, Patch

_GPU = "vllm.v1.worker.gpu"
_SAMPLE = f"{_GPU}.sample"
_SAMPLER = f"{_SAMPLE}.sampler:Sampler"
_OPS = "vllm.v1.sample.ops"
_BY = "vllm_ext.patches.fused_sampler.replacement"

PATCH = Patch(
    name="fused_sampler",
    summary="[Perf][MRV2] Draw tokens from the model's logits in one launch",
    why="""
        Stock gathers positions and input ids, copies the logits to float32 as soon as
        one request has a temperature, a penalty or a filter, and goes over the copy
        once or more for each feature: 3 to 12 launches, and about 62 bytes per logit
        for what Qwen2.5-Instruct asks for, where 2.25 have to be read. One greedy or
        seeded request takes FlashInfer away from the whole batch, and FlashInfer draws
        its seed on the host, so that a graph would bake it in.

        Here one kernel reads the logits as they are and draws the token that stock's
        own kernels would draw; what requests ask for lies on the device. One more
        launch gives logprobs. A step that asks for something else is stock's from
        beginning to end, and is counted.

        Rung 3 of the ladder: wrappers around six functions of the samplers. The hook,
        ModelState.custom_sampler, is a method of every model's own state, and a model
        that uses it is refused watermarks and loses its rejection sampler; a subclass
        would have to be put into the method that loads the model.
    """,
    retire_when="Sampler draws from the model's logits without a copy of them.",
    edits=(
        Edit(f"{_SAMPLER}.__init__", f"{_BY}:take_seats", how="wrap"),
        Edit(f"{_SAMPLER}.add_request", f"{_BY}:join", how="wrap"),
        Edit(f"{_SAMPLER}.apply_staged_writes", f"{_BY}:write", how="wrap"),
        Edit(
            f"{_SAMPLE}.penalties:bincount", f"{_BY}:count_in_two_launches", how="wrap"
        ),
        Edit(f"{_SAMPLER}.__call__", f"{_BY}:sample_in_one_launch", how="wrap"),
        Edit(
            f"{_GPU}.spec_decode.rejection_sampler:RejectionSampler.__call__",
            by=f"{_BY}:note_the_verification",
            how="wrap",
        ),
    ),
    relies_on=(
        # What stock does with logits, in which order, and when it does it.
        f"{_SAMPLER}.get_logprobs_dims",
        f"{_SAMPLER}.sample",
        f"{_SAMPLER}.apply_sampling_params",
        f"{_SAMPLER}._sample_random",
        f"{_SAMPLE}.states:SamplingStates",
        f"{_SAMPLE}.logit_bias:LogitBiasState",
        f"{_SAMPLE}.logit_bias:_bias_kernel",
        f"{_SAMPLE}.penalties:PenaltiesState",
        f"{_SAMPLE}.penalties:_penalties_kernel",
        f"{_SAMPLE}.penalties:_bincount_kernel",
        f"{_SAMPLE}.bad_words:BadWordsState",
        f"{_SAMPLE}.thinking_budget:ThinkingBudgetState",
        f"{_SAMPLE}.min_p:_min_p_kernel",
        f"{_SAMPLE}.min_p:apply_min_p",
        f"{_OPS}.topk_topp_sampler:apply_top_k_top_p",
        f"{_OPS}.topk_topp_triton:apply_top_k_top_p_triton",
        f"{_OPS}.topk_topp_triton:_topk_topp_kernel",
        f"{_OPS}.topk_topp_triton:_apply_topp_split",
        f"{_OPS}.topk_topp_triton:_topp_sb_stats_kernel",
        f"{_OPS}.topk_topp_triton:_topp_sb_combine",
        f"{_OPS}.topk_topp_triton:_topp_sb_step_kernel",
        f"{_OPS}.topk_topp_triton:_topp_sb_mask_kernel",
        # Its noise, which is stated again in our kernels.
        f"{_SAMPLE}.gumbel:_temperature_kernel",
        f"{_SAMPLE}.gumbel:_murmur3_rotl32",
        f"{_SAMPLE}.gumbel:_murmur3_mix",
        f"{_SAMPLE}.gumbel:_murmur3_fmix32",
        f"{_SAMPLE}.gumbel:murmur3_hash32",
        f"{_SAMPLE}.gumbel:murmur3_uniform32",
        f"{_SAMPLE}.gumbel:_log1p_neg_stable",
        f"{_SAMPLE}.gumbel:gumbel_noised_argmax",
        f"{_SAMPLE}.gumbel:gumbel_block_argmax",
        f"{_SAMPLE}.gumbel:_gumbel_sample_kernel",
        f"{_SAMPLE}.gumbel:gumbel_sample",
        # Logprobs and ranks.
        f"{_SAMPLE}.logprob:LogprobTokenIdsState",
        f"{_SAMPLE}.logprob:compute_topk_scores",
        f"{_SAMPLE}.logprob:compute_token_logprobs",
        f"{_SAMPLE}.logprob:_topk_log_softmax_kernel",
        f"{_SAMPLE}.logprob:_ranks_kernel",
        # Who counts tokens, and how many there are of a request.
        f"{_GPU}.input_batch:InputBatch",
        f"{_GPU}.input_batch:get_num_sampled_and_rejected",
        f"{_GPU}.input_batch:_get_num_sampled_and_rejected_kernel",
        f"{_GPU}.input_batch:post_update",
        f"{_GPU}.input_batch:_post_update_kernel",
        # How what is staged reaches the device.
        f"{_GPU}.buffer_utils:StagedWriteTensor",
        f"{_GPU}.buffer_utils:UvaBufferPool",
        f"{_GPU}.buffer_utils:_apply_write_kernel",
        f"{_GPU}.states:RequestState",
        # Who calls the samplers, with what, and who reads what they return.
        f"{_GPU}.model_runner:GPUModelRunner.load_model",
        f"{_GPU}.model_runner:GPUModelRunner.add_requests",
        f"{_GPU}.model_runner:GPUModelRunner.prepare_inputs",
        f"{_GPU}.model_runner:GPUModelRunner.sample",
        f"{_GPU}.model_runner:GPUModelRunner.sample_tokens",
        f"{_GPU}.model_runner:GPUModelRunner.postprocess_sampled",
        f"{_GPU}.model_runner:GPUModelRunner.profile_run",
        f"{_GPU}.model_runner:GPUModelRunner._dummy_sampler_run",
        f"{_GPU}.async_utils:AsyncOutput.__init__",
        f"{_GPU}.warmup:_warmup_kernels",
        # That nobody writes into the ones of a decode batch, which are shared.
        f"{_GPU}.pp_utils:PPHandler.broadcast",
        f"{_SAMPLE}.batch_shard:gather_sampler_output",
        f"{_SAMPLE}.batch_shard:_pack_sampler_output_kernel",
        f"{_GPU}.model_states.mamba_hybrid:MambaHybridModelState.postprocess_state",
        f"{_GPU}.model_states.mamba_hybrid:_scatter_num_accepted_kernel",
        f"{_GPU}.model_states.recoverssm:RecoverSSMState.commit_step",
        # Which memory a model is loaded into, and what sleeping does with it.
        "vllm.v1.worker.gpu_worker:Worker._maybe_get_memory_pool_context",
        f"{_SAMPLE}.batch_shard:BatchSharder.shard_sampler_inputs",
        f"{_SAMPLE}.output:SamplerOutput",
        "vllm.v1.watermarking.gpu_sampler:GPUWatermarkSampler",
    ),
    # A vLLM sampler too; it may be what imports the module of the edits.
    after=("vllm.v1.watermarking.gpu_sampler",),
    since="2026-11-21",
    tested_with=("0.32.0", "0.33.0"),
    default=False,
)
