"""What the pull request says beyond its commit message."""

from vllm_ext.upstream.declare import Overlap, Upstream

_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
_STEADY = "vllm.v1.core.sched.steady"
_TRANSLATED = (
    *("steady_schedule", "_steady_step", "_note_the_step", "steady_update"),
    *("_one_token_each", "_row", "_append", "_roster", "Kind", "_kind"),
)

UPSTREAM = Upstream(
    overlaps=(
        Overlap(
            "#42131",
            "Open: a fast path for decode-only steps of schedule() and of Model Runner "
            "V1. It has to be agreed with its author which of the two is taken up. "
            "This one leaves the runner alone, covers update_from_output() and the "
            "decoding rows of mixed steps too, and allocates by calling the manager "
            "only for rows that need a block.",
        ),
        Overlap(
            "#46112",
            "Closed without being merged: hoists what can be hoisted out of the loop "
            "of update_from_output(), and a fast path for batches that only decode. "
            "Its author measured a tenth less for that call.",
        ),
        Overlap(
            "#26114",
            "Closed as stale: the issue that asks for less work in "
            "update_from_output().",
        ),
    ),
    searches=("scheduler decode fast path", "update_from_output overhead"),
    tests=(
        "pytest tests/v1/core/test_steady_steps.py",
        "pytest tests/v1/core",
        "pytest tests/v1/e2e/general/test_async_scheduling.py",
    ),
    accuracy=(
        "no evaluation was run. The scheduler's outputs are equal, field for field, to "
        "those without this change; the new test compares two schedulers call by call."
    ),
    trade_offs="""
        - A second description of what a decoding row is. Whoever adds something that
          happens to a row in every step has to add it to steady.py, or to its reasons
          for which a step is not steady. The new test draws random traffic to notice.
        - A step in which requests come and go pays for looking. Below 16 running
          requests it is given up at once.
        - A decorated method is called with less than there is: while schedule() does
          what has no rows, `running` is an empty list.
        - Over 500 lines: this needs an RFC issue, and a reason why the two loops should
          not rather be made cheaper one by one.
        - Speculative decoding, connectors, pipeline parallelism, hybrid KV caches and
          derived schedulers gain nothing.
    """,
    by_hand={
        f"{_SCHEDULER}.__init__": ("_kind", "_roster"),
        f"{_SCHEDULER}.schedule": ("_asking_only_for_blocks",),
        f"{_SCHEDULER}.update_from_output": ("steady_update",),
        "vllm.v1.request:Request.__init__": ("_row",),
        f"{_STEADY}:logger": ("_kind",),
        f"{_STEADY}:allocate_if_needed": ("_asking_only_for_blocks",),
        **{f"{_STEADY}:{name}": (name,) for name in _TRANSLATED},
    },
)
