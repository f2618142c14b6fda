"""Every tensor that a step graph reads or writes, allocated once.

A CUDA graph keeps addresses. What it reads in a step has to lie where it lay when the
graph was captured, so all of it is here: what `step_graph` allocates itself, when
graphs are captured and never again, and what is vLLM's and stays where it is.
`Buffers.table` lists both, from the very fields that the graphs are given, so it cannot
be out of date; docs/decisions/0032 says how long each lives. What is not listed are the
weights that ``compute_logits`` reads, which stay where vLLM's own graphs need them to
stay, and memory of the graphs' own pool (logits), which nobody else sees.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from vllm.utils.platform_utils import is_pin_memory_available

from vllm_ext.kernels import decode_inputs

HOST = "the host"
COPY = "the copy in front of a step"
PREP = "the prep graph"
FORWARD = "vLLM's forward graph"
SAMPLER = "the sampler graph"
BACK = "the copy behind a step"
STOCK = "stock steps"


@dataclass(frozen=True)
class Entry:
    """One tensor.

    Attributes:
        name: What `Buffers` calls it.
        tensor: Itself.
        owner: ``step_graph`` or the part of vLLM that allocated it.
        written_by: Who writes it, beside what initializes it.
        read_by: Who reads it.
        what: What it holds.
    """

    name: str
    tensor: torch.Tensor
    owner: str
    written_by: tuple[str, ...]
    read_by: tuple[str, ...]
    what: str

    def __str__(self) -> str:
        dtype = str(self.tensor.dtype).removeprefix("torch.")
        return (
            f"{self.name} {list(self.tensor.shape)} {dtype}, of {self.owner}: "
            f"{self.what}; written by {', '.join(self.written_by) or 'nobody'}, "
            f"read by {', '.join(self.read_by)}"
        )


@dataclass(frozen=True)
class Ring:
    """What steps in flight have apart from each other, a slot each.

    A step takes the slot that the step ``len(self)`` before it had. `Slot` has views
    for each padded batch, so that a step makes none.

    Attributes:
        packed: ``[R, words]`` int32, pinned: what the host hands over.
        packed_np: The same.
        tokens: ``[R, rows]`` int32, on the device: what was sampled.
        host_tokens: ``[R, rows]`` int32, pinned: a copy of it.
        host_tokens_np: The same.
    """

    packed: torch.Tensor
    packed_np: np.ndarray
    tokens: torch.Tensor
    host_tokens: torch.Tensor
    host_tokens_np: np.ndarray

    def __len__(self) -> int:
        return int(self.packed.shape[0])


def make_ring(slots: int, words: int, rows: int, device: torch.device) -> Ring:
    pinned = {"dtype": torch.int32, "pin_memory": is_pin_memory_available()}
    packed = torch.zeros(slots, words, **pinned)
    host_tokens = torch.zeros(slots, rows, **pinned)
    return Ring(
        packed=packed,
        packed_np=packed.numpy(),
        tokens=torch.zeros(slots, rows, dtype=torch.int32, device=device),
        host_tokens=host_tokens,
        host_tokens_np=host_tokens.numpy(),
    )


@dataclass(frozen=True)
class Buffers:
    """What the graphs of one engine are given; from `make_buffers`.

    The comment of a field says shape and type, with ``P`` the most rows of a graph,
    ``N`` seats of requests, ``G`` groups of KV cache, ``T`` the most tokens of a step.
    """

    ring: Ring
    # [words(P, G)] int32
    staging: torch.Tensor
    # [P] int64
    tokens: torch.Tensor
    # [P] int64: 0, 1, 2, ...
    rows: torch.Tensor
    groups: decode_inputs.Groups
    # vLLM's, by row.
    # [T] int32
    input_ids: torch.Tensor
    # [T] int64
    positions: torch.Tensor
    # [T] bool
    is_padding: torch.Tensor
    # [N] int32
    seq_lens: torch.Tensor
    # [N + 1] int32
    query_start_loc: torch.Tensor
    # [T, H], of the model's type
    hidden_states: torch.Tensor
    # vLLM's, by seat.
    # [N] int32
    num_computed_tokens: torch.Tensor
    # [N, 1] int64
    last_sampled_tokens: torch.Tensor
    # [N, L] int32
    all_token_ids: torch.Tensor
    # [N] int32
    total_len: torch.Tensor
    # [N, V] int32
    output_bin_counts: torch.Tensor

    def table(self) -> Iterator[Entry]:
        """Each tensor that is read or written in a step, in the order of its use."""
        own, states, inputs = "step_graph", "RequestState", "InputBuffers"
        yield from (
            Entry(
                "ring.packed",
                self.ring.packed,
                *(own, (HOST,), (COPY,)),
                "pinned; rows, seats and new blocks of each step in flight",
            ),
            Entry(
                "staging",
                self.staging,
                *(own, (COPY,), (PREP, SAMPLER)),
                "the same of the step that runs",
            ),
            Entry(
                "groups.layout",
                self.groups.layout,
                *(own, (), (PREP,)),
                "addresses, widths, block sizes and reaches of the block tables",
            ),
        )
        for group, table in enumerate(self.groups.block_tables):
            yield Entry(
                f"groups.block_tables[{group}]",
                table,
                *("BlockTables", (PREP, STOCK), (PREP, STOCK)),
                "the blocks of each seat",
            )
        yield from (
            Entry(
                "num_computed_tokens",
                self.num_computed_tokens,
                *(states, (SAMPLER, STOCK), (PREP, STOCK)),
                "how far each seat is",
            ),
            Entry(
                "last_sampled_tokens",
                self.last_sampled_tokens,
                *(states, (SAMPLER, STOCK), (PREP, STOCK)),
                "each seat's next input",
            ),
            Entry(
                "input_ids",
                self.input_ids,
                *(inputs, (PREP, STOCK), (FORWARD, STOCK)),
                "the token of each row",
            ),
            Entry(
                "positions",
                self.positions,
                *(inputs, (PREP, STOCK), (FORWARD, SAMPLER, STOCK)),
                "its position",
            ),
            Entry(
                "is_padding",
                self.is_padding,
                *(inputs, (PREP, STOCK), (FORWARD, STOCK)),
                "whether a row is one",
            ),
            Entry(
                "seq_lens",
                self.seq_lens,
                *(inputs, (PREP, STOCK), (FORWARD, STOCK)),
                "how much each row attends to",
            ),
            Entry(
                "query_start_loc",
                self.query_start_loc,
                *(inputs, (PREP, STOCK), (FORWARD, STOCK)),
                "where each row begins",
            ),
        )
        for group, table in enumerate(self.groups.input_block_tables):
            yield Entry(
                f"groups.input_block_tables[{group}]",
                table,
                *("BlockTables", (PREP, STOCK), (FORWARD, STOCK)),
                "the blocks of each row",
            )
        yield from (
            Entry(
                "groups.slot_mappings",
                self.groups.slot_mappings,
                *("BlockTables", (PREP, STOCK), (FORWARD, STOCK)),
                "where each row's key and value go",
            ),
            Entry(
                "hidden_states",
                self.hidden_states,
                *("ModelCudaGraphManager", (FORWARD,), (SAMPLER, STOCK)),
                "what the forward pass makes of each row",
            ),
            Entry(
                "rows",
                self.rows,
                *(own, (), (SAMPLER,)),
                "0, 1, 2, ...: a row's logits are in its own row",
            ),
            Entry(
                "tokens",
                self.tokens,
                *(own, (SAMPLER,), (SAMPLER,)),
                "what was sampled, on its way to where it is needed",
            ),
            Entry(
                "all_token_ids",
                self.all_token_ids,
                *(states, (SAMPLER, STOCK), (STOCK,)),
                "prompt and output of each seat",
            ),
            Entry(
                "total_len",
                self.total_len,
                *(states, (SAMPLER, STOCK), (SAMPLER, STOCK)),
                "how long they are",
            ),
            Entry(
                "output_bin_counts",
                self.output_bin_counts,
                *("PenaltiesState", (SAMPLER, STOCK), (SAMPLER, STOCK)),
                "how often each seat was given each token",
            ),
            Entry(
                "ring.tokens",
                self.ring.tokens,
                *(own, (SAMPLER,), (BACK,)),
                "what was sampled, of each step in flight",
            ),
            Entry(
                "ring.host_tokens",
                self.ring.host_tokens,
                *(own, (BACK,), (HOST,)),
                "pinned; a copy of it",
            ),
        )

    def moved(self, runner: Any) -> list[str]:
        """Names of vLLM's tensors that are no longer where the graphs know them."""
        now = {name: tensor.data_ptr() for name, tensor in _of_vllm(runner)}
        kept = {entry.name: entry.tensor.data_ptr() for entry in self.table()}
        return [name for name, address in now.items() if kept[name] != address]


def make_buffers(runner: Any, rows: int) -> Buffers:
    """Allocate, and find what is vLLM's.

    Args:
        runner: A ``GPUModelRunner`` with KV cache and captured graphs.
        rows: Of the largest graph.
    """
    device, tables = runner.device, runner.block_tables
    slots = runner.vllm_config.max_concurrent_batches + 2
    words = decode_inputs.words(rows, tables.num_kv_cache_groups)
    found = dict(_of_vllm(runner))
    names = {field.name for field in fields(Buffers)}
    return Buffers(
        ring=make_ring(slots, words, rows, device),
        staging=torch.zeros(words, dtype=torch.int32, device=device),
        tokens=torch.zeros(rows, dtype=torch.int64, device=device),
        rows=torch.arange(rows, dtype=torch.int64, device=device),
        groups=decode_inputs.make_groups(
            [table.gpu for table in tables.block_tables],
            tables.input_block_tables,
            tables.slot_mappings,
            tables.block_sizes,
            # vLLM 0.32 has none.
            getattr(tables, "_sliding_window_reach", None),
        ),
        **{name: tensor for name, tensor in found.items() if name in names},
    )


def _of_vllm(runner: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """What is vLLM's, by the name that it has in `Buffers.table`."""
    states, tables = runner.req_states, runner.block_tables
    for name in (
        *("input_ids", "positions", "is_padding", "seq_lens", "query_start_loc"),
    ):
        yield name, getattr(runner.input_buffers, name)
    yield "hidden_states", runner.cudagraph_manager.hidden_states
    yield "num_computed_tokens", states.num_computed_tokens.gpu
    yield "last_sampled_tokens", states.last_sampled_tokens
    yield "all_token_ids", states.all_token_ids.gpu
    yield "total_len", states.total_len.gpu
    yield "output_bin_counts", runner.sampler.penalties_state.output_bin_counts
    for group, table in enumerate(tables.block_tables):
        yield f"groups.block_tables[{group}]", table.gpu
    for group, table in enumerate(tables.input_block_tables):
        yield f"groups.input_block_tables[{group}]", table
    yield "groups.slot_mappings", tables.slot_mappings
