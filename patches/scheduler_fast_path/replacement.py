# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Scheduling and evaluating requests that decode one token by what changes of them.

Both wrappers look first and write afterwards. While they look nothing has changed, so
what is not steady runs stock code from its beginning, with nothing to undo. What they
look at is read anew in each step, but for what a `Row` keeps: facts that hold from one
preemption of a request to the next, and bounds below which nothing can happen to it. A
bound may be too low, as it is after a step of stock's; then the stock function is
called that would have been called anyway, and finds nothing to do.

Stock code does everything that is not a row's: of a steady step it schedules the rest,
an empty one, and of every step it evaluates the rest, which may be empty too. So
order, events, statistics and the fields of a result that have nothing to do with rows
are stock's own.

Carries from vLLM's methods what they do to a row that decodes one token, and the two
conditions under which a row is left out of a step.
"""

import copy
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

import vllm.envs as envs
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_coordinator import (
    KVCacheCoordinatorNoPrefixCache,
    UnitaryKVCacheCoordinator,
)
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import CachedRequestData, SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.sched.utils import remove_all
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from vllm_ext.patching.engine import step_aside

NAME = "scheduler_fast_path"
NEVER = sys.maxsize

# Rows that save what it costs to treat those of a step in two ways.
WORTH_A_SPLIT = 16

COORDINATORS = (UnitaryKVCacheCoordinator, KVCacheCoordinatorNoPrefixCache)
NOTHING_SCHEDULED = SchedulerOutput.make_empty()


class Row:
    """A running request: what is known of it until it is preempted.

    Attributes:
        refused: Why it is left to stock code, if so.
        preemptions: How often it had been preempted when this was written.
        base: Tokens of the prompt, less one.
        end: Tokens, prompt and all, at which it has all it asked for.
        last: Computed tokens from which it may have to be left out of a step.
        stops: Tokens that end it.
        logprobs: Whether it asked for some.
        answered: Whether its first output since then has been sent: what comes with
            a first output is gone.
        room: Computed tokens from which it needs another block.
        full: Known tokens from which scheduling it puts a block into the prefix cache.
        calm: Computed tokens below which none of these three is reached.
        plain: Known tokens from which another one does more than make it longer.
    """

    __slots__ = (
        *("refused", "preemptions", "base", "end", "last", "stops", "logprobs"),
        *("answered", "room", "full", "calm", "plain", "_repeats"),
    )

    def __init__(self, scheduler: Scheduler, request: Request) -> None:
        self.refused = _why_not_this_request(request)
        self.preemptions = request.num_preemptions
        if self.refused:
            return
        params = request.sampling_params
        self.base = request.num_prompt_tokens - 1
        self.end = request.num_prompt_tokens + request.max_tokens
        self.last = min(self.end, scheduler.max_model_len) - 1
        self.stops = frozenset((params.eos_token_id, *(params.stop_token_ids or ())))
        self.logprobs = params.num_logprobs is not None
        self.answered = False
        self._repeats = params.repetition_detection is not None
        self.learn(scheduler, request)

    def learn(self, scheduler: Scheduler, request: Request) -> None:
        """Set the bounds that move, from the blocks and hashes that it has now."""
        [manager] = scheduler.kv_cache_manager.coordinator.single_type_managers
        size, name = manager.block_size, request.request_id
        self.room = len(manager.req_to_blocks.get(name, ())) * size
        self.full = NEVER
        self.plain = self.last + 1
        if manager.enable_caching:
            self.full = (manager.num_cached_block.get(name, 0) + 1) * size
            if _kind(scheduler).ahead:
                self.plain = min(self.plain, self.full + 1)
        if request._block_hasher is not None:
            hashed = len(request.block_hashes) + 1
            self.plain = min(self.plain, hashed * scheduler.hash_block_size)
        if self._repeats:
            self.plain = 0
        self.calm = min(self.last, self.room, self.full - 1)


class Roster(NamedTuple):
    """The running requests, in order, as they were when it was written."""

    requests: list[Request]
    rows: list[Row]
    names: list[str]
    refused: str


def steady_schedule(
    original: Callable[..., SchedulerOutput],
) -> Callable[..., SchedulerOutput]:
    """`Scheduler.schedule`, which goes through all requests only if one needs it."""

    def schedule(self: Scheduler, throttle_prefills: bool = False) -> SchedulerOutput:
        step = _steady_step(self)
        if step is None:
            if len(self.running) < WORTH_A_SPLIT:
                return original(self, throttle_prefills)
            with _asking_only_for_blocks(self):
                return original(self, throttle_prefills)

        # Blocks before anything else, in the order of the rows: it decides which
        # block each is given, and the order of events.
        blocks: list[Any] = [None] * len(step.requests)
        for position in step.due:
            request = step.requests[position]
            new = self.kv_cache_manager.allocate_slots(request, 1)
            assert new is not None, "a free block was counted and is gone"
            blocks[position] = new.get_block_ids(allow_none=True)
            request._vext_row.learn(self, request)

        running, self.running = self.running, []
        try:
            output = original(self, throttle_prefills)
        finally:
            self.running = running
        output.scheduled_cached_reqs = CachedRequestData(
            req_ids=step.names,
            resumed_req_ids=set(),
            new_token_ids=[],
            all_token_ids={},
            new_block_ids=blocks,
            num_computed_tokens=step.computed,
            num_output_tokens=step.outputs,
        )
        output.num_scheduled_tokens = dict.fromkeys(step.names, 1)
        output.total_num_scheduled_tokens = len(step.names)
        _note_the_step(self, step)
        return output

    return schedule


@contextmanager
def _asking_only_for_blocks(self: Scheduler) -> Iterator[None]:
    """While stock goes through the rows: `allocate_slots` only for those it changes."""
    if (
        _kind(self).refused
        or not self.running
        or "allocate_slots" in vars(self.kv_cache_manager)
    ):
        yield
        return
    manager = self.kv_cache_manager
    stock, nothing = manager.allocate_slots, manager.empty_kv_cache_blocks

    def allocate_slots(request: Request, num_new_tokens: int, **how: Any) -> Any:
        row = request.__dict__.get("_vext_row")
        if (
            row is None
            or row.refused
            or row.preemptions != request.num_preemptions
            or num_new_tokens != 1
        ):
            return stock(request, num_new_tokens, **how)
        if (
            request.num_computed_tokens < row.room
            and len(request._all_token_ids) < row.full
        ):
            return nothing
        blocks = stock(request, num_new_tokens, **how)
        row.learn(self, request)
        return blocks

    manager.allocate_slots = allocate_slots
    try:
        yield
    finally:
        del manager.allocate_slots


class Step(NamedTuple):
    """What a steady step does, one entry per scheduled request.

    Attributes:
        requests: The requests.
        names: Their ids.
        computed: Computed tokens before the step.
        outputs: Output tokens before the step, those in flight included.
        due: Positions of those whose blocks change.
    """

    requests: list[Request]
    names: list[str]
    computed: list[int]
    outputs: list[int]
    due: list[int]


def _steady_step(self: Scheduler) -> Step | None:
    """The next step, if each running request decodes one token in it or none."""
    kind = _kind(self)
    if kind.refused:
        step_aside(NAME, kind.refused)
        return None
    if (
        not self.running
        or self.waiting
        or self.kv_holding_waiting
        or self._inflight_prefills
        or self._pause_state != PauseState.UNPAUSED
    ):
        self._vext_roster = None  # or it would keep those that end meanwhile
        return None
    roster = _roster(self)
    if roster.refused:
        step_aside(NAME, roster.refused)
        return None

    requests, names = roster.requests, roster.names
    longest = self.max_model_len - 1
    computed: list[int] = []
    due: list[int] = []
    idle: list[int] = []
    needed = 0
    for request, row in zip(requests, roster.rows, strict=True):
        at = request.num_computed_tokens
        known = at + 1 - request.num_output_placeholders
        if known != len(request._all_token_ids):
            return None
        if row.preemptions != request.num_preemptions:
            self._vext_roster = None  # preempted and resumed since, in the same order
            return None
        computed.append(at)
        if at < row.calm:
            continue
        in_flight = known <= at
        if at >= row.last and (at >= longest or (in_flight and known >= row.end - 1)):
            idle.append(len(computed) - 1)
        elif at >= row.room:
            if at > row.room:
                return None
            due.append(len(computed) - 1)
            needed += 1
        elif known >= row.full:
            due.append(len(computed) - 1)
    outputs = [at - row.base for at, row in zip(computed, roster.rows, strict=True)]
    if idle:
        left = sorted(set(range(len(computed))).difference(idle))
        requests = [requests[position] for position in left]
        names = [names[position] for position in left]
        computed = [computed[position] for position in left]
        outputs = [outputs[position] for position in left]
        where = {position: i for i, position in enumerate(left)}
        due = [where[position] for position in due]
    if (
        not requests
        or len(requests) > self.max_num_scheduled_tokens
        or len(requests) > self.scheduler_config.max_num_batched_tokens
        or needed > self.kv_cache_manager.block_pool.get_num_free_blocks()
        or not (
            self.use_v2_model_runner
            or self.prev_step_scheduled_req_ids.issuperset(names)
        )
    ):
        return None
    return Step(requests, names.copy(), computed, outputs, due)


def _note_the_step(self: Scheduler, step: Step) -> None:
    """What stock notes of a step that has rows, once its output has been made."""
    if _kind(self).ahead:
        drafts = self._spec_token_placeholders
        eligible = self.current_step + self.decode_stagger
        second = self.use_v2_model_runner
        for request in step.requests:
            request.num_computed_tokens += 1
            request.num_in_flight_tokens += 1
            request.num_output_placeholders += 1
            request.spec_token_ids = drafts
            if second:
                request.next_decode_eligible_step = eligible
    else:
        for request in step.requests:
            request.num_computed_tokens += 1
            request.num_in_flight_tokens += 1
    if not self.use_v2_model_runner:
        self.prev_step_scheduled_req_ids.update(step.names)
    if hasattr(self, "num_executed_steps"):  # since 0.33
        self.num_executed_steps += 1


def steady_update(
    original: Callable[..., dict[int, EngineCoreOutputs]],
) -> Callable[..., dict[int, EngineCoreOutputs]]:
    """`Scheduler.update_from_output`, which does what one token per request asks."""

    def update_from_output(
        self: Scheduler,
        scheduler_output: SchedulerOutput,
        model_runner_output: ModelRunnerOutput,
    ) -> dict[int, EngineCoreOutputs]:
        rows = len(scheduler_output.num_scheduled_tokens)
        mixed = scheduler_output.total_num_scheduled_tokens != rows
        if (mixed and rows < WORTH_A_SPLIT) or _kind(self).refused:
            return original(self, scheduler_output, model_runner_output)
        answers, rest = _one_token_each(self, scheduler_output, model_runner_output)
        if not answers or (rest and len(answers) < WORTH_A_SPLIT):
            merged = original(self, scheduler_output, model_runner_output)
            _remember(self, rest)
            return merged

        outputs: dict[int, list[EngineCoreOutput]] = defaultdict(list)
        stopped: set[Request] = set()
        ahead = _kind(self).ahead
        logprobs = model_runner_output.logprobs
        for request, row, index, tokens in answers:
            request.num_in_flight_tokens -= 1
            known = request._all_token_ids
            if len(known) + 1 < row.plain and tokens[0] not in row.stops:
                request._output_token_ids.append(tokens[0])
                known.append(tokens[0])
                if ahead:
                    request.num_output_placeholders -= 1
                output = EngineCoreOutput(request.request_id, tokens)
            else:
                output = _append(self, request, tokens)
                if output.finish_reason is None:
                    row.learn(self, request)
                else:
                    stopped.add(request)
            if request.trace_headers is not None:
                output.trace_headers = request.trace_headers
            if row.logprobs and logprobs:
                output.new_logprobs = logprobs.slice_request(index, 1)
            outputs[request.client_index].append(output)
        if stopped:
            self.running = remove_all(self.running, stopped)
        left = NOTHING_SCHEDULED
        if rest:
            left = copy.copy(scheduler_output)
            left.num_scheduled_tokens = rest
            left.total_num_scheduled_tokens = sum(rest.values())
        merged = _merged(outputs, original(self, left, model_runner_output))
        _remember(self, rest)
        return merged

    return update_from_output


def _one_token_each(
    self: Scheduler, scheduled: SchedulerOutput, made: ModelRunnerOutput
) -> tuple[list[tuple[Request, Row, int, list[int]]], dict[str, int]]:
    """The rows of a step up to the first that needs more than one token appended.

    Only up to there: blocks are freed and events recorded in the order of the rows.

    Returns:
        Requests, rows, indices and tokens, without the requests that are gone; and
        what ``num_scheduled_tokens`` says of the others.
    """
    counts = scheduled.num_scheduled_tokens
    if (
        scheduled.scheduled_spec_decode_tokens
        or not made.sampled_token_ids
        or made.prompt_logprobs_dict
        or made.prompt_token_id_logprobs_dict
        or made.pooler_output
        or made.num_nans_in_logits
        or made.kv_connector_output
        or made.ec_connector_output
    ):
        return [], counts
    answers = []
    indices, sampled = made.req_id_to_index, made.sampled_token_ids
    get = self.requests.get
    passed = 0
    for name, count in counts.items():
        request = get(name)
        if request is not None:
            row = request.__dict__.get("_vext_row")
            if (
                row is None
                or count != 1
                or row.refused
                or row.preemptions != request.num_preemptions
            ):
                break
            if not row.answered:
                if (
                    request.prefill_stats is not None
                    or request.events
                    or request.num_stale_output_tokens
                ):
                    break
                row.answered = True
            index = indices[name]
            tokens = sampled[index]
            if len(tokens) != 1:
                break
            answers.append((request, row, index, tokens))
        passed += 1
    if passed == len(counts):
        return answers, {}
    return answers, dict(islice(counts.items(), passed, None))


def _remember(self: Scheduler, names: Iterable[str]) -> None:
    """Have a row for each of these requests that still runs."""
    for name in names:
        request = self.requests.get(name)
        if request is not None and request.status is RequestStatus.RUNNING:
            _row(self, request)


def _row(self: Scheduler, request: Request) -> Row:
    row: Row | None = request.__dict__.get("_vext_row")
    if row is None or row.preemptions != request.num_preemptions:
        row = request._vext_row = Row(self, request)
    return row


def _append(self: Scheduler, request: Request, tokens: list[int]) -> EngineCoreOutput:
    """Append a token that fills a block or may be the last, by stock's own methods."""
    placeholders = request.num_output_placeholders
    tokens, stopped = self._update_request_with_output(request, tokens)
    if placeholders > 0 and not _kind(self).caches:
        self.kv_cache_manager.cache_blocks(
            request, request.num_computed_tokens - request.num_in_flight_tokens
        )
    output = EngineCoreOutput(request.request_id, tokens)
    if stopped:
        output.finish_reason = request.get_finished_reason()
        output.stop_reason = request.stop_reason
        output.spec_decode_metrics = request.spec_decode_metrics
        output.kv_transfer_params, output.ec_transfer_params = self._free_request(
            request
        )
    return output


def _merged(
    outputs: dict[int, list[EngineCoreOutput]], rest: dict[int, EngineCoreOutputs]
) -> dict[int, EngineCoreOutputs]:
    """Outputs of the rows, and what stock makes of a step without any.

    In stock's order: clients with rows first, statistics with the first of all.
    """
    merged = {
        client: EngineCoreOutputs(outputs=made) for client, made in outputs.items()
    }
    stats = None
    for client, more in rest.items():
        stats, more.scheduler_stats = more.scheduler_stats or stats, None
        mine = merged.get(client)
        if mine is not None:
            mine.outputs.extend(more.outputs)
            mine.finished_requests = more.finished_requests
        elif more.outputs or more.finished_requests is not None:
            merged[client] = more
    next(iter(merged.values())).scheduler_stats = stats
    return merged


def _roster(self: Scheduler) -> Roster:
    """The rows of the running requests; the last step's if these are the same."""
    kept: Roster | None = self.__dict__.get("_vext_roster")
    if kept is not None and kept.requests == self.running:
        return kept
    rows = [_row(self, request) for request in self.running]
    roster = self._vext_roster = Roster(
        self.running.copy(),
        rows,
        [request.request_id for request in self.running],
        next((row.refused for row in rows if row.refused), ""),
    )
    return roster


def _why_not_this_request(request: Request) -> str:
    """What of a request this patch does not do; empty if nothing."""
    if request.sampling_params is None or request.pooling_params is not None:
        return "pooling"
    if request.structured_output_request is not None:
        return "structured output"
    if request.mm_features:
        return "multimodal input"
    if request.resumable:
        return "streaming input"
    return ""


class Kind(NamedTuple):
    """What kind of scheduler this is.

    Attributes:
        refused: Why it is left to stock code, if so.
        ahead: It schedules a step before it has seen the tokens of the one before.
        caches: A method of its own puts these tokens into the prefix cache; that is
            so until 0.32, then the loop does it that this patch replaces.
    """

    refused: str
    ahead: bool
    caches: bool


def _kind(self: Scheduler) -> Kind:
    kept: Kind | None = self.__dict__.get("_vext_kind")
    if kept is not None:
        return kept
    # Not with the others: this module may be what is importing ours.
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    ahead = type(self) is AsyncScheduler
    refused = "scheduler from elsewhere"  # which may lack what is looked at here
    if type(self) in (Scheduler, AsyncScheduler):
        refused = _why_not_this_scheduler(self)
    kind = Kind(refused, ahead, "_update_request_with_output" in vars(AsyncScheduler))
    self._vext_kind = kind
    return kind


def _why_not_this_scheduler(self: Scheduler) -> str:
    """What of a configuration this patch does not do; empty if nothing."""
    if self.vllm_config.speculative_config is not None or self.num_spec_tokens:
        return "speculative decoding"
    if self.connector is not None or self.aux_output_connector is not None:
        return "KV connector"
    if self.ec_connector is not None or self.is_mm_encoder_only:
        return "encoder connector"
    if self.is_encoder_decoder:
        return "encoder-decoder model"
    if self.use_pp or getattr(self, "decode_stagger", 1) != 1:
        return "pipeline parallelism"
    if self.num_sampled_tokens_per_step != 1:
        return "not one token per step"
    if self.perf_metrics is not None:
        return "MFU metrics"
    if self.return_sampling_mask or envs.VLLM_COMPUTE_NANS_IN_LOGITS:
        return "sampling masks or counts of NaN"
    manager = self.kv_cache_manager
    if type(manager) is not KVCacheManager or type(manager.block_pool) is not BlockPool:
        return "KV cache manager from elsewhere"
    if type(manager.coordinator) not in COORDINATORS:
        return "KV cache coordinator of another kind"
    groups = manager.coordinator.single_type_managers
    if [type(group) for group in groups] != [FullAttentionManager] or (
        groups[0].block_size != manager.block_pool.hash_block_size
    ):
        return "KV cache that is not one group of full attention"
    return ""
