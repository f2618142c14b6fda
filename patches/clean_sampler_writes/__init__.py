"""Copy sampling parameters to the device when a request was added, not every step."""

from vllm_ext.patching.declare import Edit, Patch

_SAMPLER = "vllm.v1.worker.gpu.sample.sampler:Sampler"
_BUFFERS = "vllm.v1.worker.gpu.buffer_utils"
_BY = "vllm_ext.patches.clean_sampler_writes.replacement"

PATCH = Patch(
    name="clean_sampler_writes",
    summary="[Perf][MRV2] Skip Sampler.apply_staged_writes when nothing was staged",
    why="""
        Stock copies 15 arrays of max_num_seqs elements into the next pinned buffer
        of their pools before every step. They change only in add_request, so in a
        decode step each copy writes what the device reads already.

        Rung 3 of the ladder: two wrappers. There is no hook, and a subclass would
        have to be put into the method that loads the model.
    """,
    retire_when="Sampler.apply_staged_writes returns early when nothing was staged.",
    edits=(
        Edit(f"{_SAMPLER}.add_request", f"{_BY}:note_the_write", how="wrap"),
        Edit(f"{_SAMPLER}.apply_staged_writes", f"{_BY}:skip_when_clean", how="wrap"),
    ),
    relies_on=(
        # What is staged only by add_request, and flushed completely by one call.
        "vllm.v1.worker.gpu.sample.states:SamplingStates",
        "vllm.v1.worker.gpu.sample.logit_bias:LogitBiasState",
        "vllm.v1.worker.gpu.sample.penalties:PenaltiesState",
        "vllm.v1.worker.gpu.sample.bad_words:BadWordsState",
        "vllm.v1.worker.gpu.sample.thinking_budget:ThinkingBudgetState",
        "vllm.v1.worker.gpu.sample.logprob:LogprobTokenIdsState",
        "vllm.v1.worker.gpu.sample.trace_replay:TraceReplayState",
        f"{_BUFFERS}:StagedWriteTensor.apply_write",
        # Who calls the two, and the sampler that adds a copy of its own to each.
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner.add_requests",
        "vllm.v1.watermarking.gpu_sampler:GPUWatermarkSampler",
        # Which parameter buffer may be overwritten while a step still reads it.
        f"{_BUFFERS}:set_default_max_concurrency",
        f"{_BUFFERS}:UvaBufferPool.__init__",
        f"{_BUFFERS}:UvaBufferPool.copy_to_uva",
        f"{_BUFFERS}:UvaBackedTensor.copy_to_uva",
        f"{_BUFFERS}:NonUvaBuffer.uva",
    ),
    # A vLLM sampler too; it may be what imports the module of the edits.
    after=("vllm.v1.watermarking.gpu_sampler",),
    since="2026-11-21",
    tested_with=("0.32.0", "0.33.0"),
)
