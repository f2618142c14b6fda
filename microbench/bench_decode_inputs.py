"""A decode step's inputs before its forward pass, and its tokens after it.

``prep`` is all that a step of one token per request prepares on the device, ``post``
what it takes down of its tokens. What is staged for a step is copied, and packed where
the host is timed. Every 16th request is given a block, as on average with blocks of 16.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vllm_ext.kernels import decode_inputs
from vllm_ext.microbench import shapes, stock
from vllm_ext.microbench.measure import Args, NotRun, Provider
from vllm_ext.microbench.shapes import Case

MODES = ("prep", "post")
VOCABULARY, SMALL_VOCABULARY = 151_936, 2_048
CONTEXTS = {"ctx1024": 1_024, "ctx32768": 32_768}  # tokens that each request has
SMALL_BATCHES = (1, 17)  # without a new block, and with one
SMALL_CONTEXTS = {"ctx100": 100}
BLOCK_SIZE = 16
COPIES = "copies lists of the host each step"

# Sets are tiny: this many bytes each, or there would be a million of them. In a round
# of cold calls each set comes once, so that none finds its own in the cache.
SET_BYTES = 2**20
ROOM = 2**21  # tokens that may be added: every call of ``post`` adds one
LINE = 32  # int32 of a cache line


def cases(*, small: bool, full: bool) -> Iterator[Case]:
    """The longer context only where somebody might decode at it."""
    batches = SMALL_BATCHES if small else shapes.BATCHES
    contexts = SMALL_CONTEXTS if small else CONTEXTS
    vocabulary = SMALL_VOCABULARY if small else VOCABULARY
    for mode in MODES:
        for kind, context in contexts.items():
            for batch in batches:
                if full or context <= 1_024 or (mode == "prep" and batch <= 32):
                    yield Case(mode, batch, vocabulary, "int32", kind)


def _context(case: Case) -> int:
    return (CONTEXTS | SMALL_CONTEXTS)[case.kind]


@dataclass(frozen=True)
class Step:
    """A step and the state that it is a step of, by seat; request i has seat B - 1 - i.

    Attributes:
        number: Of the set.
        appended: Row, group, column and number of each new block.
        packed: The staging on the host, pinned where there is a GPU.
        staging: And on the device.
        query_start_loc: What stock copies to the device.
        outputs: What is written for the model, by name.
    """

    number: int
    seats: np.ndarray
    appended: list[tuple[int, int, int, int]]
    packed: torch.Tensor
    staging: torch.Tensor
    query_start_loc: np.ndarray
    computed: torch.Tensor
    last: torch.Tensor
    total: torch.Tensor
    prefilled: torch.Tensor
    tokens: torch.Tensor
    groups: decode_inputs.Groups
    outputs: dict[str, torch.Tensor]


def _step(case: Case, number: int, device: str) -> Step:
    batch, context = case.batch, _context(case)
    rng = np.random.default_rng(1_000 * number + batch)
    width = -(-(context + BLOCK_SIZE) // BLOCK_SIZE)

    def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    lengths = rng.integers(context - BLOCK_SIZE, context, size=batch)
    lengths -= lengths % BLOCK_SIZE == 0  # those that need a block are chosen here
    seats: np.ndarray = np.arange(batch, dtype=np.int32)[::-1].copy()
    appended = []
    for row in range(BLOCK_SIZE - 1, batch, BLOCK_SIZE):
        column = context // BLOCK_SIZE
        lengths[seats[row]] = column * BLOCK_SIZE
        appended.append((row, 0, column, 10_000 + row))
    table = torch.tensor(rng.integers(1, 9_999, size=(batch, width)), dtype=torch.int32)
    computed = torch.tensor(lengths, dtype=torch.int32, device=device)
    tokens = rng.integers(case.vocabulary, size=(2, batch))
    last, sampled = torch.tensor(tokens, dtype=torch.int64, device=device)
    packed = torch.zeros(decode_inputs.words(batch, 1), dtype=torch.int32)
    if device != "cpu":
        packed = packed.pin_memory()
    decode_inputs.pack(packed.numpy(), batch, 1, seats, 0, appended)
    slots = zeros(1, batch, dtype=torch.int64)
    return Step(
        number=number,
        seats=seats,
        appended=appended,
        packed=packed,
        staging=packed.to(device, copy=True),
        query_start_loc=np.arange(batch + 1, dtype=np.int32),
        computed=computed,
        last=last[:, None].clone(),
        total=computed + 1,
        prefilled=computed.clone(),
        tokens=sampled.clone(),
        groups=decode_inputs.make_groups(
            [table.to(device)], [zeros(batch, width)], slots, [BLOCK_SIZE]
        ),
        outputs={
            "input_ids": zeros(batch),
            "positions": zeros(batch, dtype=torch.int64),
            "seq_lens": zeros(batch),
            "query_start_loc": zeros(batch + 1),
        },
    )


@dataclass(frozen=True)
class History:
    """What was said by all requests; far too large for each set to have its own."""

    tokens: torch.Tensor
    counts: torch.Tensor
    ring: torch.Tensor


def _history(case: Case, device: str) -> History:
    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=device)

    # Rows lie over each other, a cache line apart: they only have to be long.
    length = _context(case) + (ROOM if device != "cpu" else 2)
    tokens = zeros(length + case.batch * LINE)
    return History(
        tokens=tokens.as_strided((case.batch, length), (LINE, 1)),
        counts=zeros(case.batch, case.vocabulary),
        ring=zeros(2, case.batch),
    )


# -- stock -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Beside:
    """What stock has for a step, beside what the step says of it.

    Attributes:
        tables: vLLM's block tables, with the memory of the step.
        mapping: ``[B]`` int64, the seats.
        logits: ``[B + 1]`` int32, how many logits there are before each request's.
        drafts: ``[B, 0]`` int64.
        writes: Seats, columns, numbers and how many so far of new blocks; int32.
    """

    tables: Any
    mapping: torch.Tensor
    logits: torch.Tensor
    drafts: torch.Tensor
    writes: tuple[torch.Tensor, ...]


def _beside(step: Step, device: str) -> Beside | None:
    """Nothing where there is no vLLM."""
    try:
        stock.need_vllm()
    except NotRun:
        return None
    from vllm.v1.worker.gpu.block_table import BlockTables

    [table], [input_table] = step.groups.block_tables, step.groups.input_block_tables
    batch, width = table.shape
    tables = BlockTables([BLOCK_SIZE], batch, batch, [width], torch.device(device))
    tables.block_tables[0].gpu = table
    tables.input_block_tables = [input_table]
    tables.slot_mappings = step.groups.slot_mappings
    held = step.computed.cpu() // BLOCK_SIZE + 1  # sync: before anything is timed
    tables.num_blocks.np[0] = held.numpy()
    tables.num_blocks.copy_to_uva()
    tables.init_block_table_layout_tensors()
    writes = [(step.seats[row], column, n) for row, _, column, n in step.appended]
    columns = np.array(writes, dtype=np.int32).reshape(-1, 3).T
    ends: np.ndarray = np.arange(1, len(writes) + 1, dtype=np.int32)
    return Beside(
        tables=tables,
        mapping=torch.tensor(step.seats, dtype=torch.int64, device=device),
        logits=torch.arange(batch + 1, dtype=torch.int32, device=device),
        drafts=torch.zeros(batch, 0, dtype=torch.int64, device=device),
        writes=tuple(torch.tensor(each, device=device) for each in (*columns, ends)),
    )


def _copied(step: Step, beside: Beside) -> tuple[torch.Tensor, torch.Tensor]:
    """What stock has its host hand over in a step, or make anew."""
    from vllm.utils.torch_utils import async_tensor_h2d

    tables, device = beside.tables, beside.mapping.device
    for row, group, column, block in step.appended:
        tables.block_tables[group].stage_write(int(step.seats[row]), column, [block])
    tables.apply_staged_writes()
    mapping = async_tensor_h2d(step.seats, device=device, dtype=torch.int64)
    rows = len(step.seats)
    logits = torch.arange(rows + 1, device=device, dtype=torch.int32)
    torch.zeros(rows, dtype=torch.int32, device=device)  # expanded_local_pos
    async_tensor_h2d(step.query_start_loc, out=step.outputs["query_start_loc"])
    return mapping, logits


def _kept(step: Step, beside: Beside) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, with what is already on the device."""
    from vllm.v1.worker.gpu import buffer_utils

    if step.appended:
        [table], (seats, *what) = step.groups.block_tables, beside.writes
        buffer_utils._apply_write_kernel[(len(seats), 1)](
            *(table, table.stride(0), seats, *what, None),
            BLOCK_SIZE=1024,
            MULTI_GROUP=False,
        )
    return beside.mapping, beside.logits


def _by_stock(
    handed: Callable[[Step, Beside], tuple[torch.Tensor, torch.Tensor]],
) -> Callable[[Case, str], Provider]:
    """What ``GPUModelRunner`` does in a step."""

    def make(case: Case, device: str) -> Provider:
        stock.need_vllm()
        from vllm.v1.worker.gpu import input_batch

        copies = handed is _copied

        def prepare(step: Step, beside: Beside) -> Any:
            mapping, logits = handed(step, beside)
            outputs, tables, rows = step.outputs, beside.tables, case.batch
            starts = outputs["query_start_loc"]
            input_batch.prepare_pos_seq_lens(
                *(mapping, starts, step.computed),
                *(outputs["positions"], outputs["seq_lens"]),
            )
            input_batch.combine_sampled_and_draft_tokens(
                *(outputs["input_ids"], mapping, step.last, starts),
                *(outputs["seq_lens"], step.prefilled, beside.drafts, logits, rows),
            )
            tables.gather_block_tables(mapping, rows)
            tables.compute_slot_mappings(mapping, starts, outputs["positions"], rows)
            return step

        if case.mode == "prep":
            return Provider(prepare, COPIES if copies else "")
        if not copies:
            raise NotRun("stock itself copies nothing here")
        history = _history(case, device)

        def account(step: Step, beside: Beside) -> Any:
            lengths = step.outputs["seq_lens"]
            numbers = input_batch.get_num_sampled_and_rejected(
                *(lengths.new_ones(case.batch), lengths, beside.logits),
                *(beside.mapping, step.prefilled),
            )
            input_batch.post_update(
                *(beside.mapping, step.computed, step.last, history.counts),
                *(step.tokens[:, None], *numbers, step.outputs["query_start_loc"]),
                *(history.tokens, step.total),
            )
            return step, history

        return Provider(account)

    return make


# -- ours ------------------------------------------------------------------------------


def ours(case: Case, device: str) -> Provider:
    """`vllm_ext.kernels.decode_inputs`, and the copy of what is staged."""
    batch = case.batch

    def prepare(step: Step, beside: Any) -> Any:
        packed, seats = step.packed.numpy(), step.seats
        decode_inputs.pack(packed, batch, 1, seats, 0, step.appended)
        step.staging.copy_(step.packed, non_blocking=True)
        decode_inputs.prep(
            *(step.staging, batch, step.computed, step.last, step.groups),
            **step.outputs,
        )
        return step

    if case.mode == "prep":
        return Provider(prepare)
    history = _history(case, device)

    def account(step: Step, beside: Any) -> Any:
        decode_inputs.post(
            *(step.staging, batch, step.tokens, history.ring, step.last),
            *(history.tokens, step.total, step.computed, history.counts),
        )
        return step, history

    return Provider(account)


PROVIDERS = {
    "stock": _by_stock(_copied),
    "stock-kernels": _by_stock(_kept),  # which a graph can hold
    "ours": ours,
}


def bench_decode_inputs(
    measure: Callable[..., None], case: Case, provider: str
) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    right = _prepared if case.mode == "prep" else _accounted
    blocks = case.batch * (_context(case) // BLOCK_SIZE + 1)

    def make_args(number: int) -> Args:
        step = _step(case, number, device)
        starts = torch.from_numpy(step.query_start_loc)
        # What stock has from its copies, and stock's post from what went before.
        step.outputs["query_start_loc"].copy_(starts)
        if case.mode == "post":
            step.outputs["seq_lens"].copy_(step.computed[step.seats.tolist()] + 1)
        return step, _beside(step, device)

    def check(prepared: Any) -> None:
        args = make_args(0)
        right(case, args, prepared.call(*args), device)

    measure(
        provider,
        PROVIDERS,
        case,
        make_args=make_args,
        check=check,
        check_replay=lambda args, found: right(case, args, found, device),
        set_bytes=SET_BYTES,
        # A table is read and written; some 60 bytes of state for each request.
        moved_bytes=8 * blocks if case.mode == "prep" else 60 * case.batch,
    )


def _reference(case: Case, step: Step) -> None:
    decode_inputs.prep_reference(
        *(step.staging, case.batch, step.computed, step.last, step.groups),
        **step.outputs,
    )


def _prepared(case: Case, args: Args, found: Step, device: str) -> None:
    """
    Raises:
        AssertionError: Something is not as defined.
    """
    expected = _step(case, found.number, device)
    _reference(case, expected)
    for name, tensor in expected.outputs.items():
        assert torch.equal(found.outputs[name], tensor), f"{name} are others"
    for name in ("block_tables", "input_block_tables"):
        [theirs], [table] = getattr(found.groups, name), getattr(expected.groups, name)
        assert torch.equal(theirs, table), f"{name} are others"
    slots = expected.groups.slot_mappings
    assert torch.equal(found.groups.slot_mappings, slots), "slot_mappings are others"


def _accounted(
    case: Case, args: Args, found: tuple[Step, History], device: str
) -> None:
    """After as many calls as there were.

    Raises:
        AssertionError: Something is not as defined.
    """
    step, history = found
    before = _step(case, step.number, device)
    calls = int(step.computed[0] - before.computed[0])
    assert calls > 0, "num_computed_tokens stays"
    assert torch.equal(step.computed, before.computed + calls), "not each grew by one"
    assert torch.equal(step.total, before.total + calls), "total_len is another"
    seats = torch.tensor(step.seats, device=device)
    assert torch.equal(step.last[seats.long(), 0], step.tokens), "another last token"
    for row, seat in enumerate(step.seats.tolist()):
        token, end = int(step.tokens[row]), int(step.total[seat])
        assert int(history.tokens[seat, end - 1]) == token, "another token was added"
        # Others, whose counts are elsewhere, have called with this set, too.
        assert 0 < int(history.counts[seat, token]) <= calls, "a count is wrong"
