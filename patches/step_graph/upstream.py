"""What the pull request says beyond its commit message."""

from vllm_ext.upstream.declare import Overlap, Upstream

_GPU = "vllm.v1.worker.gpu"
_RUNNER = f"{_GPU}.model_runner:GPUModelRunner"
_STEP = f"{_GPU}.step_graph"
_MANAGER = f"{_STEP}.manager:StepGraphManager"
_OURS = ("StepGraphModelRunner",)

UPSTREAM = Upstream(
    needs=("fused_sampler", "repeated_batch"),
    overlaps=(
        Overlap(
            "#46849",
            "Merged: the whole draft loop in one graph, with slot mappings, metadata "
            "and sampling. Here it is the step of the target model.",
        ),
        Overlap(
            "#57628",
            "Closed: positions, sequence lengths and input ids in one kernel for one "
            "request with drafts. The kernel here gathers block tables and makes slot "
            "mappings as well, and is captured.",
        ),
        Overlap(
            "#42131",
            "Open: a decode fast path in the scheduler and in Model Runner V1. It "
            "shortens what Python does; here Python does not do it.",
        ),
        Overlap(
            "#52440",
            "Open: a guard for addresses of captured metadata when debugging. The "
            "check here looks at those of the step graphs.",
        ),
    ),
    searches=("MRV2 CUDA graph sampler", "decode step graph", "capture prepare_inputs"),
    tests=(
        "pytest tests/v1/worker/test_gpu_step_graph.py",
        "VLLM_STEP_GRAPH=bracketed VLLM_STEP_GRAPH_CHECK=1 pytest "
        "tests/v1/e2e/general/test_async_scheduling.py",
    ),
    environment="VLLM_STEP_GRAPH=bracketed",
    accuracy=(
        "greedy and seeded requests keep their tokens where a matrix product gives a "
        "row the same bits for any number of rows; otherwise logits differ in their "
        "last bits, as they do between sizes of a batch. A GSM8K run with and without "
        "is needed and has not been made."
    ),
    trade_offs="""
        - Size: more than 500 lines, which need an RFC issue first.
        - It stands on two other changes: what requests ask of the sampler has to lie
          on the device, and the batch that is kept between steps has to be dropped
          when other code writes the input buffers.
        - Two graphs more for each size up to 128 requests, and one of them twice, with
          and without top-k and top-p. They share the pool of the forward graphs; the
          memory profile counts them.
        - It has not been run on a GPU. It is off unless it is asked for.
        - VLLM_STEP_GRAPH=mono has one graph in place of the three, and captures the
          model once more for it.
        - Triton attention and FlashAttention 3 only, and no KV connector, LoRA,
          speculative decoding, pipeline, data or context parallelism.
        - A check is a step on both paths, twice for each graph.
        - ROCm and XPU are left alone.
    """,
    by_hand={
        f"{_RUNNER}.__init__": _OURS,
        f"{_RUNNER}.initialize_kv_cache": _OURS,
        f"{_RUNNER}.capture_model": _OURS,
        f"{_RUNNER}.add_requests": _OURS,
        f"{_RUNNER}.execute_model": _OURS,
        f"{_RUNNER}.sample_tokens": _OURS,
        f"{_RUNNER}.shutdown": _OURS,
        "vllm.envs:<module>": ("VARIABLE",),
        "vllm.envs:environment_variables": ("VARIABLE", "MONO", "asked_for_mono"),
        f"{_STEP}.manager:logger": _OURS,
        _MANAGER: _OURS,
        **{
            f"{_MANAGER}.{name}": _OURS
            for name in (
                *("__init__", "maybe_make", "capture", "_missing_of_profile"),
                *("_capture", "_seats", "add_requests", "execute", "_plan"),
                *("has_step", "sample_tokens", "_tried", "turn_off"),
            )
        },
        f"{_STEP}.check:Calendar.__init__": ("Calendar", "VARIABLE"),
        # The newest vLLM's attributes need not be asked for.
        f"{_STEP}.buffers:make_buffers": ("make_buffers",),
        f"{_STEP}.eligibility:plan": ("plan",),
        f"{_STEP}.graphs:StepGraph.forward": ("StepGraph",),
    },
    modules={"vllm_ext.kernels.decode_inputs": f"{_STEP}.decode_inputs"},
)
