"""What synchronous scheduling reads back, in one wait."""

from vllm_ext.patching.declare import Edit, Patch

_TENSORS = "vllm.v1.outputs:LogprobsTensors"
_REJECTION = "vllm.v1.sample.rejection_sampler:RejectionSampler"
_BY = "vllm_ext.patches.v1_copy_back.replacement"

PATCH = Patch(
    name="v1_copy_back",
    summary="[Perf][V1] Read logprobs and accepted drafts back in one wait",
    why="""
        With synchronous scheduling Model Runner V1 reads logprobs back in three
        blocking copies, one after the other. With drafts it first waits for the
        tokens, sends a mask made from them back to the device, once per tensor, picks
        entries there, whose number the host waits for each time, and then copies: ten
        waits per step. All of it can be copied together and picked from on the host.

        Rung 3 of the ladder: two wrappers that hand stock's own methods tensors of
        the host. There is no hook, and no smaller callee has all the tensors.
    """,
    retire_when="parse_output and tolists copy without blocking, and wait once.",
    edits=(
        Edit(f"{_TENSORS}.tolists", by=f"{_BY}:after_one_wait", how="wrap"),
        Edit(f"{_REJECTION}.parse_output", by=f"{_BY}:parse_on_host", how="wrap"),
    ),
    relies_on=(
        f"{_TENSORS}.to_cpu_nonblocking",
        f"{_TENSORS}.filter",
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner._bookkeeping_sync",
    ),
    # The frontend imports the outputs too, and never reads tensors back.
    after=("vllm.v1.worker.gpu_model_runner",),
    since="2026-11-21",
    tested_with=("0.32.0", "0.33.0"),
)
