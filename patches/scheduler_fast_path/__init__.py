"""A steady decode step is scheduled and evaluated by what changes in it."""

from vllm_ext.patching.declare import Edit, Patch

_SCHED = "vllm.v1.core.sched.scheduler:Scheduler"
_ASYNC = "vllm.v1.core.sched.async_scheduler:AsyncScheduler"
_POOL = "vllm.v1.core.block_pool:BlockPool"
_MANAGER = "vllm.v1.core.kv_cache_manager:KVCacheManager"
_COORDINATOR = "vllm.v1.core.kv_cache_coordinator"
_GROUP = "vllm.v1.core.single_type_kv_cache_manager"
_BY = "vllm_ext.patches.scheduler_fast_path.replacement"

PATCH = Patch(
    name="scheduler_fast_path",
    summary="[Perf][Core] Schedule and evaluate a steady decode step by what changes",
    why="""
        Stock asks of every running request in every step whether it needs an encoder,
        drafts, a prompt chunk, new blocks, an entry in the prefix cache, and of every
        token whether it brings logprobs, events, a grammar or a transfer. In a step
        in which nothing waits and each request decodes one token, the answer is no
        for all but those that reach the end of a block: about 10 us per request for
        schedule() and update_from_output() together, 1.3 ms at batch 128.

        Rung 3 of the ladder: two wrappers. They look whether the step is such a one
        and otherwise call stock. From 16 running requests on, those of its rows that
        only decode then pass allocate_slots without a question, and from 16 such rows
        on they are evaluated apart from the others. The
        rows that reach the end of a block, and the tokens that may be the last, go
        through stock's own methods; what has no rows, through the method that is
        wrapped. There is no smaller callee: what is saved is the loops of these two.
        docs/decisions/0020 says what steady is, and why leaving it is safe.
    """,
    retire_when="Scheduler has a path of its own for a step that only decodes.",
    edits=(
        Edit(f"{_SCHED}.schedule", by=f"{_BY}:steady_schedule", how="wrap"),
        Edit(f"{_SCHED}.update_from_output", by=f"{_BY}:steady_update", how="wrap"),
    ),
    relies_on=(
        # What else writes what a row keeps, or what a step reads of a request.
        f"{_SCHED}.__init__",
        f"{_SCHED}._update_after_schedule",
        f"{_SCHED}._make_cached_request_data",
        f"{_SCHED}._preempt_request",
        f"{_SCHED}._update_request_with_output",
        f"{_SCHED}._handle_stopped_request",
        f"{_SCHED}._free_request",
        f"{_SCHED}.add_request",
        f"{_SCHED}.finish_requests",
        f"{_SCHED}.make_stats",
        f"{_SCHED}.reset_prefix_cache",
        f"{_ASYNC}",
        "vllm.v1.core.sched.utils:check_stop",
        "vllm.v1.core.sched.utils:remove_all",
        "vllm.v1.core.sched.output:CachedRequestData",
        "vllm.v1.core.sched.output:SchedulerOutput",
        "vllm.v1.request:Request",
        "vllm.v1.engine:EngineCoreOutput",
        "vllm.v1.engine:EngineCoreOutputs",
        # That they do nothing for a request without a grammar, and without drafts.
        "vllm.v1.structured_output:StructuredOutputManager.accept_tokens",
        "vllm.config.vllm:VllmConfig.num_lookahead_tokens",
        # When a running request's blocks change, and that nothing else happens then.
        f"{_MANAGER}.allocate_slots",
        f"{_MANAGER}.cache_blocks",
        f"{_MANAGER}.new_step_starts",
        f"{_COORDINATOR}:KVCacheCoordinator",
        f"{_COORDINATOR}:KVCacheCoordinatorNoPrefixCache",
        f"{_COORDINATOR}:UnitaryKVCacheCoordinator",
        f"{_GROUP}:SingleTypeKVCacheManager",
        f"{_GROUP}:FullAttentionManager",
        f"{_POOL}.get_new_blocks",
        f"{_POOL}.cache_full_blocks",
        "vllm.v1.core.kv_cache_utils:get_request_block_hasher",
    ),
    since="2026-11-21",
    tested_with=("0.32.0", "0.33.0"),
)
