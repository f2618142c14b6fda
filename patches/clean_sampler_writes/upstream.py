"""What the pull request says beyond its commit message."""

from vllm_ext.upstream.declare import Overlap, Upstream

_SAMPLER = "vllm.v1.worker.gpu.sample.sampler:Sampler"

UPSTREAM = Upstream(
    overlaps=(
        Overlap(
            "#55819",
            "Merged: UVA buffers for the contents of staged writes to host tables. "
            "That makes a write cheaper; this makes none where nothing was staged. "
            "They touch different files.",
        ),
        Overlap(
            "#56497",
            "Merged: custom logits processors for Model Runner V2, with the promise of "
            "apply_staged_writes() in each step, which this keeps.",
        ),
    ),
    searches=("apply_staged_writes", "MRV2 sampler staged writes", "copy_to_uva"),
    tests=(
        "pytest tests/v1/worker/test_gpu_sampler_staged_writes.py",
        "pytest tests/v1/sample tests/v1/worker -k 'sampl or gumbel or penalt'",
    ),
    accuracy=(
        "no evaluation was run. The device reads the same values as before: a skipped "
        "copy would have written what is there. Greedy and seeded outputs are to be "
        "equal token for token."
    ),
    trade_offs="""
        - One more flag to keep in mind: whoever stages sampling state outside of
          add_request() has to set has_staged_writes. Nothing in the tree does.
        - A custom logits processor keeps the copies of every step, as it was promised.
        - Model Runner V1 has no staged writes and stays as it is.
    """,
    by_hand={
        f"{_SAMPLER}.__init__": ("OWN_PROCESSORS",),
        f"{_SAMPLER}.add_request": ("note_the_write",),
        f"{_SAMPLER}.apply_staged_writes": ("skip_when_clean",),
    },
    only_here={
        "OWN_SAMPLERS": "a sampler derived from vLLM's is a matter of its author there",
        "_clean_mark": "nothing is put in place or taken away while it runs",
    },
)
