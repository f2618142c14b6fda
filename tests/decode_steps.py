"""Requests that decode, in vLLM's own state: a step by its kernels, or by ours."""

from __future__ import annotations

import importlib
import importlib.util
import mmap
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vllm_ext.kernels import decode_inputs

V, LENGTH = 70, 200  # tokens there are, and the longest request
SEATS, TOKENS = 20, 40  # of the model runner, in all and in a step
CANARY = -77
NORESERVE = 0x4000  # Linux's MAP_NORESERVE, which Python's mmap has from 3.13 on
SLOTS_OF_RING = 3


@dataclass(frozen=True)
class Group:
    block_size: int
    reach: int = 0


ONE = (Group(16),)
WINDOW = (Group(8, 21),)
THREE = (Group(16), Group(4, 10), Group(8, 64))
GROUPS = {"one group": ONE, "a window": WINDOW, "three groups": THREE}


def stock_modules(folder: Path | None = None) -> SimpleNamespace:
    """What a step of Model Runner V2 is made of.

    Args:
        folder: Of another vLLM than the installed one; its kernels only, the rest is
            the installed one's.
    """
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        # What its CPU worker imports: the GPU path's buffers without pinned memory.
        import vllm.v1.worker.cpu.shm  # noqa: F401
    found = SimpleNamespace()
    for name in ("block_table", "input_batch", "states"):
        module: Any = importlib.import_module(f"vllm.v1.worker.gpu.{name}")
        if folder is not None and name != "states":
            path = folder / f"vllm/v1/worker/gpu/{name}.py"
            module = loaded(f"another_{name}", path)
        vars(found).update(
            {key: value for key, value in vars(module).items() if key[0] != "_"}
        )
    return found


def loaded(name: str, path: Path) -> ModuleType:
    """A module of its own, from a file, which the interpreter reads again."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:  # for dataclasses
        patch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
    return module


class World:
    """State of the model runner, and what it hands to the model.

    Args:
        stock: From `stock_modules`.
        groups: Of KV cache.
        device: Where.
    """

    def __init__(
        self, stock: SimpleNamespace, groups: Sequence[Group], device: torch.device
    ) -> None:
        self.stock, self.groups, self.device = stock, groups, device
        sizes = [group.block_size for group in groups]
        reaches = [group.reach for group in groups]
        self.nulls = "sliding_window_reach" in (
            stock.BlockTables.__init__.__code__.co_varnames
        )
        self.tables = stock.BlockTables(
            *(sizes, SEATS, TOKENS, [-(-LENGTH // size) for size in sizes], device),
            **({"sliding_window_reach": reaches} if self.nulls else {}),
        )
        self.states = stock.RequestState(SEATS, LENGTH, TOKENS, 0, V, device)
        self.buffers = stock.InputBuffers(SEATS, TOKENS, device)
        self.counts = torch.zeros(SEATS, V, dtype=torch.int32, device=device)
        self.ring = torch.zeros(
            SLOTS_OF_RING, TOKENS, dtype=torch.int32, device=device
        ).fill_(CANARY)
        self.given = decode_inputs.make_groups(
            *([table.gpu for table in self.tables.block_tables],),
            *(self.tables.input_block_tables, self.tables.slot_mappings, sizes),
            reaches if self.nulls else None,
        )
        for buffer in (*self.inputs().values(), *self.tables.input_block_tables):
            buffer.fill_(1 if buffer.dtype == torch.bool else CANARY)

    def inputs(self) -> dict[str, torch.Tensor]:
        """What a step writes for the model, beside the input tables."""
        names = ("input_ids", "positions", "seq_lens", "query_start_loc", "is_padding")
        found = {name: getattr(self.buffers, name) for name in names}
        return {**found, "slot_mappings": self.tables.slot_mappings}

    def state(self) -> dict[str, torch.Tensor]:
        """What belongs to requests."""
        states = self.states
        return {
            **{f"table {n}": t.gpu for n, t in enumerate(self.tables.block_tables)},
            "num_computed_tokens": states.num_computed_tokens.gpu,
            "last_sampled_tokens": states.last_sampled_tokens,
            "total_len": states.total_len.gpu,
            "all_token_ids": states.all_token_ids.gpu,
            "counts": self.counts,
        }

    def reachable(self) -> list[torch.Tensor]:
        """For the sanitizer: what is reached through addresses in memory."""
        tables = [table.gpu for table in self.tables.block_tables]
        return tables + self.tables.input_block_tables

    def join(self, seat: int, length: int, token: int, blocks: Sequence[int]) -> None:
        """A request with ``length`` tokens behind it; ``token`` is its next input.

        Args:
            blocks: Numbers for its blocks, as many as it may need.
        """
        held, given = [], iter(blocks)
        for group in self.groups:
            held.append([next(given) for _ in range(-(-length // group.block_size))])
        self.tables.append_block_ids(seat, tuple(held), True)
        self.tables.apply_staged_writes()
        states = self.states
        states.num_computed_tokens.gpu[seat] = length
        states.num_computed_tokens_np[seat] = length
        states.prefill_len.np[seat] = length
        states.prefill_len.copy_to_uva()
        states.total_len.gpu[seat] = length + 1
        states.last_sampled_tokens[seat] = token
        states.all_token_ids.gpu[seat, length] = token
        self.counts[seat] = 0

    def appended(
        self, seats: Sequence[int], number: int
    ) -> list[tuple[int, int, int, int]]:
        """Row, group, column and number of each block that a step needs."""
        found = []
        for row, seat in enumerate(seats):
            position = int(self.states.num_computed_tokens_np[seat])
            for index, group in enumerate(self.groups):
                if position % group.block_size == 0:
                    column = position // group.block_size
                    found.append((row, index, column, number + len(found)))
        return found

    # -- a step by vLLM ----------------------------------------------------------------

    def prepare_by_stock(
        self,
        seats: Sequence[int],
        padded: int,
        appended: Sequence[tuple[int, int, int, int]],
    ) -> None:
        """In the order of ``GPUModelRunner``, from ``update_requests`` on."""
        rows, buffers = len(seats), self.buffers
        for row, seat in enumerate(seats):
            new = tuple(
                [number for r, g, _, number in appended if (r, g) == (row, group)]
                for group in range(len(self.groups))
            )
            self.tables.append_block_ids(seat, new, False)
        self.tables.apply_staged_writes()
        buffers.is_padding[:rows] = False
        buffers.is_padding[rows:padded] = True
        start = np.minimum(np.arange(SEATS + 1), rows).astype(np.int32)
        buffers.query_start_loc.copy_(torch.from_numpy(start))
        mapping = torch.tensor(seats, dtype=torch.int64, device=self.device)
        query_start_loc = buffers.query_start_loc[: padded + 1]
        computed = self.states.num_computed_tokens.gpu
        self.stock.prepare_pos_seq_lens(
            *(mapping, query_start_loc, computed, buffers.positions, buffers.seq_lens)
        )
        if rows:
            self.stock.combine_sampled_and_draft_tokens(
                *(buffers.input_ids, mapping, self.states.last_sampled_tokens),
                *(query_start_loc, buffers.seq_lens, self.states.prefill_len.gpu),
                *(self.states.draft_tokens, self._logits(rows), rows),
            )
        self.tables.gather_block_tables(
            *(mapping, padded),
            **({"num_computed_tokens": computed} if self.nulls else {}),
        )
        self.tables.compute_slot_mappings(
            mapping, query_start_loc, buffers.positions[:padded], padded
        )

    def account_by_stock(self, seats: Sequence[int], tokens: torch.Tensor) -> None:
        """``sample`` behind the sampler, and ``postprocess_sampled``."""
        rows, states = len(seats), self.states
        if not rows:
            return
        mapping = torch.tensor(seats, dtype=torch.int64, device=self.device)
        sampled = torch.ones(rows, dtype=torch.int32, device=self.device)
        counts = self.stock.get_num_sampled_and_rejected(
            *(sampled, self.buffers.seq_lens[:rows], self._logits(rows), mapping),
            states.prefill_len.gpu,
        )
        self.stock.post_update(
            *(mapping, states.num_computed_tokens.gpu, states.last_sampled_tokens),
            *(self.counts, tokens[:rows, None], *counts),
            *(self.buffers.query_start_loc[: rows + 1], states.all_token_ids.gpu),
            states.total_len.gpu,
        )
        states.num_computed_tokens_np[list(seats)] += 1

    def _logits(self, rows: int) -> torch.Tensor:
        return torch.arange(rows + 1, dtype=torch.int32, device=self.device)

    # -- a step by ours ----------------------------------------------------------------

    def staging(
        self,
        seats: Sequence[int],
        padded: int,
        appended: Sequence[tuple[int, int, int, int]],
        slot: int = 0,
    ) -> torch.Tensor:
        """And what the host keeps of it; rubbish where padding has no word to say."""
        groups = len(self.groups)
        for row, group, column, _ in appended:
            self.tables.num_blocks.np[group, seats[row]] = column + 1
        packed = np.full(decode_inputs.words(padded, groups) + 3, 2**30, np.int32)
        size = decode_inputs.pack(packed, padded, groups, seats, slot, appended)
        assert size == len(packed) - 3
        packed[decode_inputs.HEADER + len(seats) : decode_inputs.HEADER + padded] = (
            2**30
        )
        return torch.from_numpy(packed).to(self.device)

    def prepare(self, staging: torch.Tensor, padded: int, prep: Any) -> None:
        """With ``prep`` of `decode_inputs`, or its definition."""
        states, buffers = self.states, self.buffers
        if self.nulls:
            self.tables._num_dirty_rows = max(padded, self.tables._num_dirty_rows)
        prep(
            *(staging, padded, states.num_computed_tokens.gpu),
            *(states.last_sampled_tokens, self.given, buffers.input_ids),
            *(buffers.positions, buffers.seq_lens, buffers.query_start_loc),
            buffers.is_padding,
        )

    def account(
        self, staging: torch.Tensor, padded: int, tokens: torch.Tensor, post: Any
    ) -> None:
        """With ``post`` of `decode_inputs`, or its definition."""
        states = self.states
        post(
            *(staging, padded, tokens, self.ring, states.last_sampled_tokens),
            *(states.all_token_ids.gpu, states.total_len.gpu),
            *(states.num_computed_tokens.gpu, self.counts),
        )
        rows = min(int(staging[decode_inputs.ROWS]), padded)
        seats = staging[decode_inputs.HEADER :][:rows].tolist()
        states.num_computed_tokens_np[[seat for seat in seats if seat >= 0]] += 1


def assert_same_inputs(
    found: World, expected: World, seats: Sequence[int], padded: int
) -> None:
    """What the model reads; blocks that a request does not have are not read."""
    rows = len(seats)
    sizes = {"input_ids": rows, "positions": rows, "query_start_loc": padded + 1}
    for name, tensor in found.inputs().items():
        size = sizes.get(name, padded)
        other = expected.inputs()[name]
        assert torch.equal(tensor[..., :size], other[..., :size]), name
    for index, group in enumerate(found.groups):
        ours = found.tables.input_block_tables[index]
        theirs = expected.tables.input_block_tables[index]
        for row in range(padded):
            blocks = ours.shape[1]
            if row < rows:
                blocks = int(found.buffers.positions[row]) // group.block_size + 1
            assert torch.equal(ours[row, :blocks], theirs[row, :blocks]), (index, row)


def assert_same_state(found: World, expected: World) -> None:
    """All of it, whether it belongs to a request of the step or not."""
    for name, tensor in found.state().items():
        assert torch.equal(tensor, expected.state()[name]), name


def assert_nothing_beyond(
    world: World, before: dict[str, torch.Tensor], rows: int, padded: int
) -> None:
    """Beyond the rows of the graph, and in inputs of padding, all is as it was."""
    first = {"input_ids": rows, "positions": rows, "query_start_loc": padded + 1}
    for name, tensor in kept(world).items():
        if name.startswith("input table"):
            assert torch.equal(tensor[padded:], before[name][padded:]), name
        else:
            start = first.get(name, padded)
            assert torch.equal(tensor[..., start:], before[name][..., start:]), name


def kept(world: World) -> dict[str, torch.Tensor]:
    """Copies of all that a step writes for the model."""
    tables = world.tables.input_block_tables
    named = {f"input table {n}": table for n, table in enumerate(tables)}
    return {name: t.clone() for name, t in {**world.inputs(), **named}.items()}


def far_memory() -> torch.Tensor:
    """Room for int64 on both sides of where it begins; it is only reserved."""
    side = 2**31 + 2**20
    pages = mmap.mmap(-1, 16 * side, mmap.MAP_PRIVATE | NORESERVE)
    return torch.frombuffer(pages, dtype=torch.int32)[2 * side :]


def far_step(module: Any) -> None:
    """Offsets beyond 2**31 of whatever has rows; seats and rows are 2."""
    far, stride = far_memory(), 2**30 + 24

    def rows(at: int) -> torch.Tensor:
        return far[at:].as_strided((3, 8), (stride, 1))

    table, input_table, all_tokens, counts = map(rows, range(0, 64, 16))
    slots = far.view(torch.int64)[64:].as_strided((3, 3), (stride, 1))
    table[2] = torch.tensor([5, 6, 7, 0, 0, 0, 0, 0])
    small = torch.zeros(8, dtype=torch.int32)
    long = small.long()
    groups = module.Groups(
        *((table,) * 3, (input_table,) * 3, slots),
        torch.tensor(
            [[table.data_ptr(), input_table.data_ptr() + 16 * n, stride, 16, 0]
             for n in range(3)]
        ),
    )  # fmt: skip
    staging = np.zeros(module.words(3, 3), np.int32)
    module.pack(staging, 3, 3, [0, 1, 2])
    computed = torch.tensor([0, 0, 40], dtype=torch.int32)
    module.prep(
        *(torch.from_numpy(staging), 3, computed, long.clone(), groups),
        *(small.clone(), long.clone(), small.clone(), small.clone()),
    )
    module.post(
        *(torch.from_numpy(staging), 3, long + 3, small.view(2, 4), long.clone()),
        *(all_tokens, torch.full((3,), 4, dtype=torch.int32), computed),
        counts,
    )
    assert input_table[2, :3].tolist() == [5, 6, 7]
    assert slots[:, 2].tolist() == [7 * 16 + 8] * 3
    assert all_tokens[2].tolist() == [0, 0, 0, 0, 3, 0, 0, 0]
    assert counts[2].tolist() == [0, 0, 0, 1, 0, 0, 0, 0]
