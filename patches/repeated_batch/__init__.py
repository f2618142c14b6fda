"""A decode step on the requests of the step before takes over that step's inputs."""

from vllm_ext.patching.declare import Edit, Patch

_GPU = "vllm.v1.worker.gpu"
_BY = "vllm_ext.patches.repeated_batch.replacement"

PATCH = Patch(
    name="repeated_batch",
    summary="[Perf][MRV2] Reuse the input batch while its requests only decode",
    why="""
        Between two steps of the same decoding requests, five things of an input
        batch change: positions, sequence lengths, input ids, and the two bounds on
        lengths that the host keeps. Stock also copies idx_mapping and query_start_loc
        to the device again, fills cu_num_logits, expanded_local_pos and is_padding
        again, and builds a batch of 40 fields: two pinned allocations, two
        host-to-device copies, up to four kernels and three device allocations per
        step.

        Rung 3 of the ladder: a wrapper around a large method that runs it for every
        other step and, for these, calls the two kernels that have to run. What it
        skips are lines of that method, so there is no smaller callee to wrap; it
        restates their two calls and the two bounds, about 25 lines.
    """,
    retire_when="prepare_inputs keeps idx_mapping and query_start_loc between steps.",
    edits=(
        Edit(
            f"{_GPU}.model_runner:GPUModelRunner.prepare_inputs",
            by=f"{_BY}:repeat_inputs",
            how="wrap",
        ),
        Edit(
            f"{_GPU}.input_batch:InputBatch.make_dummy",
            by=f"{_BY}:forget_before_dummy",
            how="wrap",
        ),
    ),
    relies_on=(
        # The fields, and what they hold.
        f"{_GPU}.input_batch:InputBatch",
        f"{_GPU}.input_batch:InputBuffers",
        f"{_GPU}.input_batch:prepare_pos_seq_lens",
        f"{_GPU}.input_batch:_prepare_pos_seq_lens_kernel",
        f"{_GPU}.input_batch:combine_sampled_and_draft_tokens",
        f"{_GPU}.input_batch:_combine_sampled_and_draft_tokens_kernel",
        f"{_GPU}.model_runner:GPUModelRunner.gather_batch_req_state",
        # That a request which is given a slot comes as a prefill, and where the host
        # keeps how far it is.
        f"{_GPU}.model_runner:GPUModelRunner.add_requests",
        f"{_GPU}.model_runner:GPUModelRunner.update_requests",
        f"{_GPU}.states:RequestState.add_request",
        # Who else writes the input buffers, or the batch.
        f"{_GPU}.model_runner:GPUModelRunner.execute_model",
        f"{_GPU}.cudagraph_utils:prepare_inputs_to_capture",
        f"{_GPU}.cudagraph_utils:BatchExecutionDescriptor",
    ),
    since="2026-11-21",
    tested_with=("0.32.0", "0.33.0"),
)
