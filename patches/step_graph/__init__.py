"""A decode step is one copy to the device, three graph replays and one copy back."""

from vllm_ext.patching.declare import Edit, Patch

_GPU = "vllm.v1.worker.gpu"
_RUNNER = f"{_GPU}.model_runner:GPUModelRunner"

PATCH = Patch(
    name="step_graph",
    summary="[Perf][MRV2] Decode by replaying graphs of the whole step",
    why="""
        A step in which every request decodes one token is one CUDA graph and, around
        it, 21 to 36 launches and copies that Python submits one by one, most of them
        with arguments that are other ones in the next step: 15 tensors on the device
        and 4 of pinned memory are allocated for it. None of that depends on more than
        which requests there are and which blocks they were given. Here these two are
        copied to the device in one piece; a graph makes the inputs of them, vLLM's
        own graph is replayed, and a third one has logits, sampling and what is noted
        of the tokens.

        Rung 2 of the ladder: a subclass put where vLLM constructs its runner. There
        is no official hook below worker_cls, which is the user's. The four methods
        that it takes over call vLLM's for every step, engine and request that are
        not for it.
    """,
    retire_when="Model Runner V2 captures its decode step from block tables to tokens.",
    edits=(
        Edit(
            _RUNNER,
            by="vllm_ext.patches.step_graph.replacement:StepGraphModelRunner",
            how="subclass",
        ),
    ),
    relies_on=(
        # What a step consists of, and what it leaves behind.
        f"{_RUNNER}.execute_model",
        f"{_RUNNER}.sample_tokens",
        f"{_RUNNER}.sample",
        f"{_RUNNER}.postprocess_sampled",
        f"{_RUNNER}.prepare_inputs",
        f"{_RUNNER}.prepare_attn",
        f"{_RUNNER}.add_requests",
        f"{_RUNNER}.update_requests",
        f"{_RUNNER}.finish_requests",
        f"{_RUNNER}.capture_model",
        f"{_RUNNER}.initialize_kv_cache",
        f"{_GPU}.input_batch:InputBuffers",
        f"{_GPU}.input_batch:_prepare_pos_seq_lens_kernel",
        f"{_GPU}.input_batch:_combine_sampled_and_draft_tokens_kernel",
        f"{_GPU}.input_batch:_post_update_kernel",
        f"{_GPU}.block_table:BlockTables",
        f"{_GPU}.block_table:_gather_block_tables_kernel",
        f"{_GPU}.block_table:_compute_slot_mappings_kernel",
        f"{_GPU}.states:RequestState",
        f"{_GPU}.async_utils:AsyncOutput",
        f"{_GPU}.model_states.default:DefaultModelState",
        # How a token is drawn; the rest of it is what fused_sampler relies on.
        f"{_GPU}.sample.sampler:Sampler",
        f"{_GPU}.sample.states:SamplingStates",
        f"{_GPU}.sample.logit_bias:LogitBiasState",
        f"{_GPU}.sample.penalties:PenaltiesState",
        f"{_GPU}.sample.bad_words:BadWordsState",
        f"{_GPU}.sample.gumbel:gumbel_sample",
        f"{_GPU}.sample.gumbel:_gumbel_sample_kernel",
        # The graphs in the middle.
        f"{_GPU}.cudagraph_utils:CudaGraphManager",
        f"{_GPU}.cudagraph_utils:ModelCudaGraphManager",
        f"{_GPU}.cudagraph_utils:prepare_inputs_to_capture",
        f"{_GPU}.cudagraph_utils:profile_cudagraph_memory",
        "vllm.compilation.cudagraph_pool:capture_pool",
        "vllm.distributed.parallel_state:graph_capture",
        "vllm.forward_context:set_forward_context",
        "vllm.forward_context:create_forward_context",
        "vllm.v1.worker.utils:AttentionGroup.update_draft_decode_metadata",
    ),
    since="2026-11-21",
    tested_with=("0.32.0", "0.33.0"),
    default=False,
)
