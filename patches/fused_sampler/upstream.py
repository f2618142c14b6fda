"""What the pull request says beyond its commit message."""

from vllm_ext.upstream.declare import Overlap, Upstream

_GPU = "vllm.v1.worker.gpu"
_SAMPLER = f"{_GPU}.sample.sampler:Sampler"
_PENALTIES = f"{_GPU}.sample.penalties:PenaltiesState"
_FUSED = f"{_GPU}.sample.fused"

UPSTREAM = Upstream(
    overlaps=(
        Overlap(
            "#57319",
            "Open: fuses the argmax and the gather at the end of Gumbel sampling. That "
            "makes the last step of the other path shorter; here that path is not "
            "taken. Both can be merged.",
        ),
        Overlap(
            "#48913",
            "Open: top-k and top-p for batches below 8 without sorting the vocabulary. "
            "The kernels here need no sort at any size, and draw as well.",
        ),
        Overlap(
            "#33538",
            "Merged: the Triton kernel that masks by top-k and top-p on the other "
            "path, by searching pivots, one program per row. Here rows are split over "
            "programs, nothing masked is written, and the token is drawn as well.",
        ),
        Overlap(
            "#54651",
            "Merged: splits rows for that kernel where a small batch has top-p alone. "
            "The benchmark has to compare with it on main.",
        ),
        Overlap(
            "#29720",
            "Merged: penalties and temperature in one kernel, which this goes on from.",
        ),
        Overlap(
            "#57277",
            "Merged: a fused top-k and top-p sampler for XPU, beside FlashInfer's. It "
            "stays where it is.",
        ),
    ),
    searches=("MRV2 fused sampler", "top-k top-p sampling kernel Triton", "gumbel"),
    tests=(
        "pytest tests/v1/worker/test_gpu_fused_sampler.py",
        "pytest tests/v1/worker/test_gpu_gumbel_sample.py tests/v1/sample",
    ),
    benchmark="python benchmarks/kernels/benchmark_fused_sampler.py",
    requests="--temperature 0.7 --top-p 0.8 --top-k 20 --repetition-penalty 1.1",
    accuracy=(
        "a GSM8K run with the model's default sampling, before and after, is needed "
        "and has not been made. Greedy and seeded requests keep their tokens. "
        "Unseeded requests with top-k or top-p, which FlashInfer draws today from a "
        "generator of its own, get other tokens of the same distribution. With top-k "
        "or top-p, rows that have equal logits at the boundary keep the lower token "
        "ids, where today it depends on the path which are kept."
    ),
    trade_offs="""
        - Size. About 2,500 lines of kernels, and more than 500 lines need an RFC issue
          first. They come in four files that can be merged one after the other:
          `sample` (greedy, temperature, min-p, penalties, bias) stands alone, then
          `top_k_top_p`, `logprobs` and `bin_counts`.
        - A second path for the common cases, with the first kept for the others. What a
          request asks for is written down twice, in SamplingStates and in Seats.
        - Memory: two more planes of a bit per token and request, 64 bytes and two lists
          of 1,152 entries per request, and scratch for max_num_reqs rows.
        - The kernels are compiled at the first call, that of the memory profile, rather
          than through VllmJitKernel.
        - Sleep mode, level 2, empties the memory that models are loaded into, and with
          it what Sampler.__init__ allocates. Seats hold constants there; with that mode
          they have to be made later, at the first call.
        - ROCm and XPU have not been tried.
        - Model Runner V1 is not touched.
    """,
    by_hand={
        f"{_SAMPLER}.__init__": ("take_seats",),
        f"{_SAMPLER}.add_request": ("join",),
        f"{_SAMPLER}.apply_staged_writes": ("write",),
        f"{_SAMPLER}.__call__": ("sample_in_one_launch",),
        f"{_PENALTIES}.__init__": ("count_in_two_launches",),
        f"{_PENALTIES}.apply_staged_writes": ("count_in_two_launches",),
        f"{_GPU}.spec_decode.rejection_sampler:RejectionSampler.__call__": (
            "note_the_verification",
        ),
        f"{_FUSED}.step:sample_fused": ("sample_in_one_launch", "_leave"),
        f"{_FUSED}.step:_sample": ("_sample",),
        f"{_FUSED}.step:_logprobs": ("_logprobs", "_leave"),
        f"{_FUSED}.seats:REASONS": ("REASONS",),
        f"{_FUSED}.seats:Seats.__init__": ("Seats",),
        # They ask vLLM for the number of multiprocessors.
        f"{_FUSED}.sample:make_scratch": ("make_scratch",),
        f"{_FUSED}.top_k_top_p:make_scratch": ("make_scratch",),
        f"{_FUSED}.logprobs:make_scratch": ("make_scratch",),
    },
    only_here={
        "WARM_UP": "a step that is left to the other path is not counted there",
        "_application": "nothing is put in place or taken away while it runs",
        "new_application": "nothing is put in place or taken away while it runs",
        "seats_of": "the sampler has its seats at hand there",
    },
    modules={
        "vllm_ext.kernels.sample": f"{_FUSED}.sample",
        "vllm_ext.kernels.top_k_top_p": f"{_FUSED}.top_k_top_p",
        "vllm_ext.kernels.logprobs": f"{_FUSED}.logprobs",
        "vllm_ext.kernels.bin_counts": f"{_FUSED}.bin_counts",
    },
)
