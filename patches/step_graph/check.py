"""A step by the graphs beside the same step by stock code, and what differs.

The graphs run first, on the state that stock is about to start from; what they wrote
is copied away, and what they changed of that state is put back. Then stock runs as if
nothing had been, and its step is the one that is served. So a graph that is wrong has
cost time, and no token. The graph of a whole step writes keys and values as well: it
runs after stock's forward pass, on its own inputs, and only if the prep graph made the
same ones, so that what it writes is what is there.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from operator import setitem
from typing import Any

import numpy as np
import torch
import vllm.envs as envs
from vllm.distributed.parallel_state import get_tp_group
from vllm.utils.gpu_sync_debug import gpu_sync_allowed

from vllm_ext.kernels import decode_inputs
from vllm_ext.patches.fused_sampler.state import FILTERS
from vllm_ext.patches.step_graph.eligibility import Plan
from vllm_ext.patches.step_graph.graphs import StepGraph

VARIABLE = "VEXT_STEP_GRAPH_CHECK"
FIRST = 2  # steps of each graph
WIPED = 255  # bytes of which no key or value is made: a NaN, in any type that has one


class Calendar:
    """Which eligible steps are checked: the first of each graph, and every so often.

    Args:
        text: What `VARIABLE` says: how often; 0 for never, not even the first.
    """

    def __init__(self, text: str | None = None) -> None:
        text = os.environ.get(VARIABLE, "").strip() if text is None else text
        self._every = int(text) if text.isdecimal() else 0
        self._first = 0 if text == "0" else FIRST
        self._steps = 0
        self._seen: dict[tuple[int, bool], int] = {}

    def due(self, plan: Plan) -> bool:
        """Whether to check this step; asked once for each."""
        self._steps += 1
        key = plan.padded, bool(plan.asks & FILTERS)
        seen = self._seen.get(key, 0)
        if seen < self._first:
            self._seen[key] = seen + 1
            return True
        return self._every > 0 and self._steps % self._every == 0


class Check:
    """One step twice. Runs the prep graph when it is made, before stock's step.

    Args:
        graph: The graphs.
        plan: The step.
    """

    def __init__(self, graph: StepGraph, plan: Plan) -> None:
        self._graph, self._plan = graph, plan
        self._not_written: list[torch.Tensor] = []  # by layer: whether any was not
        tables = graph.buffers.groups.block_tables
        before = [table.clone() for table in tables]
        graph.prepare(plan)
        self._inputs = self._read_inputs()
        for table, old in zip(tables, before, strict=True):
            table.copy_(old)

    def draw(self, batch: Any) -> None:
        """Run the sampler graph, between stock's forward pass and stock's sampler.

        Args:
            batch: Stock's ``InputBatch``.
        """
        graph, plan = self._graph, self._plan
        buffers, runner = graph.buffers, graph.runner
        rows = len(plan.requests)
        self._stock_inputs = self._read_inputs()
        # Of as many rows as the graph's: what a product has in its rows may depend on
        # how many there are.
        logits = runner.model.compute_logits(buffers.hidden_states[: plan.padded])
        if plan.asks & FILTERS and _by_flashinfer(runner.sampler, batch):
            # FlashInfer draws other numbers, of the same distribution, and one more
            # draw would change the next ones. So by the graph's kernels.
            drawn = torch.empty_like(buffers.tokens[: plan.padded])
            graph.draw(plan.padded, True, logits, drawn)
            expected = drawn[:rows]
        else:
            expected = _drawn_by_stock(runner.sampler, logits[:rows], batch)

        seats = decode_inputs.seats(buffers.staging, plan.padded)[:rows].long()
        self._seats, self._lengths = seats, buffers.total_len[seats].long()
        small = buffers.num_computed_tokens, buffers.last_sampled_tokens
        whole = [(tensor, tensor.clone()) for tensor in (*small, buffers.total_len)]
        cells = buffers.all_token_ids[seats, self._lengths]
        counts = buffers.output_bin_counts[seats]
        self._ran = True
        with ExitStack() as undo:  # also if something fails: stock's step comes next
            for tensor, old in whole:
                undo.callback(tensor.copy_, old)
            at = seats, self._lengths
            undo.callback(setitem, buffers.all_token_ids, at, cells)
            undo.callback(setitem, buffers.output_bin_counts, seats, counts)
            if graph.mono:
                self._ran = self._replay_step()
            else:
                graph.replay_sampler(plan)
            self._state = self._read_state()

        number = graph.slot.number
        self._expected = expected
        self._drawn = buffers.ring.tokens[number, :rows].clone()

    def _replay_step(self) -> bool:
        """Run the graph of the whole step, if that is safe; whether it was.

        What stock made for this step is not there meanwhile: neither its inputs nor its
        keys, values and hidden states can stand in for the graph's own.
        """
        with gpu_sync_allowed():
            # On all ranks or on none: a forward pass waits for the others.
            if not agree(not any(self._wrong_inputs())):
                return False
        graph, padded = self._graph, self._plan.padded
        made = self._inputs_now()
        made["hidden_states"] = graph.buffers.hidden_states[:padded]
        kept = {name: tensor.clone() for name, tensor in made.items()}
        written = [(cache, at, cache[at]) for cache, at in self._written()]
        with ExitStack() as undo:
            for cache, at, old in reversed(written):
                undo.callback(setitem, cache, at, old)
            for name, tensor in made.items():
                undo.callback(tensor.copy_, kept[name])
                if not name.startswith("block_tables"):  # state, which a step adds to
                    tensor.fill_(-1 if name == "slot_mappings" else 0)
            for cache, at, old in written:
                cache[at] = torch.full_like(old, WIPED)
            graph.replay_step(self._plan)
            self._inputs = self._read_inputs()
            for cache, at, _ in written:
                self._not_written.append((cache[at] == WIPED).all(-1).any())
        return True

    def _written(self) -> Iterator[tuple[torch.Tensor, tuple[Any, ...]]]:
        """The bytes of each layer's KV cache, and where this step's are in them."""
        runner, rows = self._graph.runner, len(self._plan.requests)
        layers = runner.compilation_config.static_forward_context
        for slots, size, group in zip(
            self._graph.buffers.groups.slot_mappings[:, :rows],
            runner.block_tables.block_sizes,
            runner.kv_cache_config.kv_cache_groups,
            strict=True,
        ):
            at = slots // size, slice(None), slots % size
            for name in group.layer_names:
                # Block, head, place in the block, content.
                yield layers[name].kv_cache.view(torch.uint8), at

    def problems(self) -> list[str]:
        """What differs, a line each; after stock's step. Waits for the device."""
        moved = self._graph.buffers.moved(self._graph.runner)
        with gpu_sync_allowed():
            found = [
                *(f"{name} is another tensor than the graphs'" for name in moved),
                *self._wrong_inputs(),
            ]
            if self._ran:
                found += [
                    *self._wrong_cache(),
                    *self._wrong_tokens(),
                    *self._wrong_state(),
                ]
            return found

    # -- what is looked at -------------------------------------------------------------

    def _read_inputs(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self._inputs_now().items()}

    def _inputs_now(self) -> dict[str, torch.Tensor]:
        buffers, rows = self._graph.buffers, len(self._plan.requests)
        padded = self._plan.padded
        found = {
            # Stock leaves these two of padding rows as they are.
            "input_ids": buffers.input_ids[:rows],
            "positions": buffers.positions[:rows],
            "seq_lens": buffers.seq_lens[:padded],
            "query_start_loc": buffers.query_start_loc[: padded + 1],
            "slot_mappings": buffers.groups.slot_mappings[:, :padded],
        }
        if envs.VLLM_MOE_SKIP_PADDING:  # without, nobody reads it and stock lets it be
            found["is_padding"] = buffers.is_padding[:padded]
        for group, table in enumerate(buffers.groups.block_tables):
            found[f"block_tables[{group}]"] = table
        for group, table in enumerate(buffers.groups.input_block_tables):
            found[f"input_block_tables[{group}]"] = table[:padded]
        return found

    def _read_state(self) -> dict[str, torch.Tensor]:
        buffers = self._graph.buffers
        return {
            "num_computed_tokens": buffers.num_computed_tokens.clone(),
            "total_len": buffers.total_len.clone(),
            "last_sampled_tokens": buffers.last_sampled_tokens[:, 0].clone(),
            "all_token_ids": buffers.all_token_ids[self._seats, self._lengths],
            "output_bin_counts": buffers.output_bin_counts[self._seats],
        }

    def _wrong_inputs(self) -> Iterator[str]:
        layout = self._graph.runner.block_tables
        used = {
            f"input_block_tables[{group}]": self._plan.computed // size + 1
            for group, size in enumerate(layout.block_sizes)
        }
        for name, ours in self._inputs.items():
            mine, theirs = _read(ours), _read(self._stock_inputs[name])
            if name in used:  # behind a row's blocks is what was there before
                for row, blocks in enumerate(used[name]):
                    mine[row, blocks:] = theirs[row, blocks:]
            yield from _difference(name, mine, theirs)

    def _wrong_cache(self) -> Iterator[str]:
        layers = sum(bool(_read(each)) for each in self._not_written)
        if layers:
            yield f"keys and values of {layers} layers are not written"

    def _wrong_tokens(self) -> Iterator[str]:
        expected, ours = _read(self._expected), _read(self._drawn)
        yield from _difference("sampled tokens", ours, expected)

    def _wrong_state(self) -> Iterator[str]:
        ours = {name: _read(each) for name, each in self._state.items()}
        theirs = {name: _read(each) for name, each in self._read_state().items()}
        seats = _read(self._seats)
        # The logits of stock's step may have been others in their last bits; what a
        # token leaves behind is compared where it is the same.
        name = "last_sampled_tokens"
        other = ours[name] != theirs[name]
        served = theirs["all_token_ids"]
        drawn = _read(self._drawn)
        if (other[seats] & (served == drawn)).any() or other.sum() > (
            served != drawn
        ).sum():
            yield from _difference(name, ours[name], theirs[name])
        for name in ("num_computed_tokens", "total_len"):
            yield from _difference(name, ours[name], theirs[name])
        same = served == drawn
        for name in ("all_token_ids", "output_bin_counts"):
            yield from _difference(name, ours[name][same], theirs[name][same])


def _read(tensor: torch.Tensor) -> np.ndarray:
    return tensor.cpu().numpy()  # sync: a checked step is compared on the host


def _by_flashinfer(sampler: Any, batch: Any) -> bool:
    """Whether stock leaves top-k and top-p of this batch to FlashInfer."""
    states, seats = sampler.sampling_states, batch.idx_mapping_np
    return bool(sampler.use_flashinfer) and not (
        states.any_greedy(seats) or states.any_explicit_seed(seats)
    )


def _drawn_by_stock(sampler: Any, logits: torch.Tensor, batch: Any) -> torch.Tensor:
    """Tokens of stock's sampler, also where calls of it are fused_sampler's."""
    at = batch.logits_indices
    tokens, _ = sampler.sample(
        *(logits, batch.expanded_idx_mapping, batch.idx_mapping, batch.idx_mapping_np),
        *(batch.positions[at], batch.input_ids[at], batch.expanded_local_pos),
        batch.seq_lens_cpu_upper_bound.numpy(),
    )
    return tokens


def _difference(name: str, ours: np.ndarray, theirs: np.ndarray) -> Iterator[str]:
    different = np.argwhere(ours != theirs)
    if len(different):
        at = tuple(int(index) for index in different[0])
        yield (
            f"{name}{list(at)} is {ours[at]} instead of {theirs[at]}, "
            f"{len(different)} of {ours.size} differ"
        )


def agree(right: bool) -> bool:
    """Whether it is so on all ranks, so that they go on in the same way."""
    group = get_tp_group()
    if group.world_size == 1:
        return right
    flag = torch.tensor([right], dtype=torch.int32)
    torch.distributed.all_reduce(
        flag, op=torch.distributed.ReduceOp.MIN, group=group.cpu_group
    )
    return bool(flag)  # on the host: no sync
