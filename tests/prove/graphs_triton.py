"""Run in a process of the lane: kernels in graphs. See test_graphs.py.

The line to blame is marked ``# here``.
"""

import gc

import torch

from vllm_ext_cpulane import interpret
from vllm_ext_cpulane.engine import report

interpret.install()

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from vllm_ext.prove import graphs  # noqa: E402
from vllm_ext.prove.pretend import (  # noqa: E402
    DEVICE,
    PretendDevice,
    data_of,
    pin,
    uva_view,
)


@triton.jit
def _add_kernel(left_ptr, right_ptr, out_ptr, factor, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    left = tl.load(left_ptr + at, mask=mask)
    right = tl.load(right_ptr + at, mask=mask)
    tl.store(out_ptr + at, left * factor + right, mask=mask)


@triton.jit
def _follow_kernel(table_ptr, out_ptr, BLOCK: tl.constexpr):
    """out[i] = sum of what the i-th pointer of the table points to."""
    row = tl.program_id(0)
    pointer = tl.load(table_ptr + row).to(tl.pointer_type(tl.int32))
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + row, tl.sum(tl.load(pointer + at)))


@triton.jit
def _count_kernel(counts_ptr, ids_ptr):
    tl.atomic_add(counts_ptr + tl.load(ids_ptr + tl.program_id(0)), 1)


def capture(step):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph, result


def data(tensor):
    return data_of(tensor).tolist()


def failure(call):
    try:
        call()
    except graphs.GraphError as error:
        return [type(error).__name__, str(error)]
    return ["", ""]


def clean():
    """Replays against the same launches outside of a graph."""
    with PretendDevice():
        left, right = (torch.arange(6.0, device=DEVICE) for _ in range(2))
        counts = torch.zeros(4, dtype=torch.int32, device=DEVICE)
        ids = torch.tensor([0, 2, 2], device=DEVICE)

        def step():
            scratch, out = torch.empty_like(left), torch.empty_like(left)
            _add_kernel[(2,)](left, right, scratch, 2.0, 6, BLOCK=4)
            _add_kernel[(2,)](scratch, right, out, 1.0, 6, BLOCK=4)
            _count_kernel[(3,)](counts, ids)
            return out

        graph, out = capture(step)
        nothing_ran = [data(counts), data(left)]
        found = []
        for number in range(3):
            left.fill_(number)
            graph.replay()
            replayed = [data(out), data(counts)]
            counts.zero_()
            found.append([replayed, [data(step()), data(counts)]])
            counts.zero_()
        add = graph.nodes[0]
        return {
            "nothing_ran": nothing_ran,
            "pairs": found,
            "unwritten": graph.unwritten,
            "flow": [sorted(add.reads), sorted(add.writes)],
            "atomic": [sorted(graph.nodes[2].reads), sorted(graph.nodes[2].writes)],
            "names": sorted(set(graphs.names(graph).values())),
        }


def baked():
    """What differs between two captures: a grid, a number, a constant."""
    with PretendDevice():
        left = torch.arange(8.0, device=DEVICE)
        host = {"programs": 1, "factor": 2.0, "block": 4}

        def step():
            _add_kernel[(host["programs"],)](  # here
                left, left, left, host["factor"], 8, BLOCK=host["block"]
            )

        first, _ = capture(step)
        found = {}
        for name, value in (("programs", 2), ("factor", 3.0), ("block", 8)):
            kept, host[name] = host[name], value
            found[name] = [str(each) for each in graphs.diff(first, capture(step)[0])]
            host[name] = kept
        return found


def unwritten():
    """A kernel that reads more of a scratch tensor than was written, and one not."""
    with PretendDevice():
        left = torch.ones(8, device=DEVICE)

        def step(size):
            scratch = torch.empty(8, device=DEVICE)
            _add_kernel[(1,)](left, left, scratch, 1.0, 4, BLOCK=8)
            out = torch.zeros(8, device=DEVICE)
            _add_kernel[(1,)](scratch, left, out, 1.0, size, BLOCK=8)  # here
            return out

        found = []
        for size in (8, 4):
            graph, _ = capture(lambda size=size: step(size))
            graph.replay()
            found.append(graph.unwritten)
        return found


def tables():
    """Memory behind a table of pointers: alive, freed, replaced."""
    with PretendDevice():
        rows = [torch.full((4,), n, dtype=torch.int32, device=DEVICE) for n in (1, 2)]
        spare = torch.full((4,), 7, dtype=torch.int32, device=DEVICE)

        def pointers(tensors):
            addresses = [each.data_ptr() for each in tensors]
            return torch.tensor(addresses, dtype=torch.uint64, device=DEVICE)

        table = pointers(rows)
        out = torch.zeros(2, dtype=torch.int32, device=DEVICE)

        def step():
            _follow_kernel[(2,)](table, out, BLOCK=4)  # here

        graph, _ = capture(step)
        behind = len(graph.nodes[0].tables)
        graph.replay()
        sums = [data(out)]
        rows.pop()
        gc.collect()
        freed = failure(graph.replay)
        table.copy_(pointers([rows[0], spare]))
        graph.replay()
        sums.append(data(out))
        reads = sorted(graph.nodes[0].reads)
        # Pointers that are found only when they are followed.
        late = torch.zeros(2, dtype=torch.uint64, device=DEVICE)
        graph, _ = capture(lambda: _follow_kernel[(2,)](late, out, BLOCK=4))
        wild = failure(graph.replay)
        late.copy_(pointers([spare, spare]))
        graph.replay()
        sums.append(data(out))
        return {
            **{"behind": behind, "sums": sums, "freed": freed},
            **{"reads": reads, "wild": wild},
        }


def staged():
    """A kernel reads pinned memory that the host writes again too early, or not."""
    with PretendDevice(lags=True) as device:
        host = pin(torch.ones(4))
        seen = uva_view(host)
        out = torch.zeros(4, device=DEVICE)

        def step():
            _add_kernel[(1,)](seen, seen, out, 1.0, 4, BLOCK=4)  # here

        graph, _ = capture(step)
        graph.replay()
        host.fill_(5)
        early = failure(out.cpu)
        device.finish()
        graph.replay()
        device.stream.advance()
        host.fill_(6)
        in_time = [failure(out.cpu), out.tolist()]
        # A row of another request may change at any time.
        graph, _ = capture(lambda: _add_kernel[(1,)](seen, seen, out, 1.0, 3, BLOCK=4))
        graph.replay()
        host[3] = 9
        return {"early": early, "in_time": in_time, "other_row": failure(out.cpu)}


report(
    {
        function.__name__: function()
        for function in (clean, baked, unwritten, tables, staged)
    }
)
