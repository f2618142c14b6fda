"""The CUDA-graph emulator: planted bugs with their lines, silence where all is well."""

import gc
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from prove import graphs_planted
from prove.graphs_planted import BAKED, REFUSED, ROWS, Toy, clean, line_of, pinned

from vllm_ext.hostbench import CannotRunError
from vllm_ext.patching.engine import PatchError
from vllm_ext.prove import graphs, page, pretend, stepdrawing, stepgraph, steprun
from vllm_ext.prove.graphs import (
    CaptureError,
    DeadInput,
    Graph,
    PoolReuse,
    StaleInput,
    diff,
)
from vllm_ext.prove.pretend import DEVICE, PretendDevice, data_of
from vllm_ext_cpulane.engine import run_script
from vllm_ext_cpulane.environment import lane_environment

HERE = Path(__file__).parent


@pytest.fixture(params=[False, True], ids=["plain", "inference"])
def mode(request):
    """vLLM's steps run in inference mode, where operations arrive in other pieces."""
    with torch.inference_mode(request.param):
        yield


@pytest.fixture
def device(mode):
    with PretendDevice() as device:
        yield device


@pytest.fixture
def lagging(mode):
    with PretendDevice(lags=True) as device:
        yield device


def capture(step, *args, pool=None):
    """A graph of ``step``, and what the step returned."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = step(*args)
    return graph, result


def values(tensor):
    """The data on the device, without asking the device for it."""
    return data_of(tensor).clone()


def ones():
    return torch.ones(ROWS, device=DEVICE)


# -- clean controls --------------------------------------------------------------------


def test_replays_equal_the_code_with_changed_inputs(device):
    plain, graphed = Toy(), Toy()
    graph, out = capture(clean, graphed)
    for _ in range(5):
        plain.advance()
        graphed.advance()
        graph.replay()
        assert torch.equal(values(out), values(clean(plain)))
        assert torch.equal(values(plain.positions), values(graphed.positions))
        assert graph.unwritten == []


def test_two_captures_of_one_step_do_not_differ(device):
    toy = Toy()
    first, _ = capture(clean, toy)
    toy.advance()
    second, _ = capture(clean, toy)
    assert diff(first, second) == []


def test_a_capture_runs_nothing(device):
    toy = Toy()
    before = [values(each) for each in (toy.positions, toy.scales, toy.out)]
    seen = []
    device.observers.append(seen.append)
    graph, out = capture(clean, toy)
    after = [values(each) for each in (toy.positions, toy.scales, toy.out)]
    assert all(map(torch.equal, before, after))
    assert [each.name for each in seen if each.kind == "launch"] == [
        node.name for node in graph.nodes
    ]


def test_a_replay_runs_none_of_the_python(device):
    calls = []

    def step(toy):
        calls.append(toy)
        return clean(toy)

    toy = Toy()
    graph, _ = capture(step, toy)
    graph.replay()
    graph.replay()
    assert len(calls) == 1


def test_the_instrument_changes_nothing(device):
    watched, alone = Toy(), Toy()
    graph, _ = capture(clean, watched)
    graphs.describe(graph, diff(graph, capture(clean, watched)[0]))
    del graph
    for toy in (watched, alone):
        clean(toy)
    assert torch.equal(values(watched.out), values(alone.out))


def test_a_lagging_device_replays_in_order(lagging):
    toy, plain = Toy(), Toy()
    graph, out = capture(clean, toy)
    for _ in range(3):
        toy.advance()
        plain.advance()
        graph.replay()
        clean(plain)
    assert lagging.stream.pending
    assert torch.equal(out.cpu(), plain.out.cpu())


def test_random_numbers_are_drawn_anew(device):
    graph, drawn = capture(lambda: torch.rand(16, device=DEVICE))
    graph.replay()
    first = values(drawn)
    graph.replay()
    assert not torch.equal(first, values(drawn))


def test_a_forked_stream_that_is_joined_is_part_of_the_graph(device):
    def step(toy):
        main, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            doubled = toy.scales * 2
            done = side.record_event()
        toy.out.add_(1)
        main.wait_event(done)
        toy.out.add_(doubled)
        return toy.out

    toy = Toy()
    graph, out = capture(step, toy)
    graph.replay()
    assert values(out).tolist() == [3.0] * ROWS
    assert [node.name for node in graph.nodes] == ["mul", "add_", "add_"]


def test_work_on_a_stream_that_did_not_join_runs_at_once(device):
    toy, other = Toy(), torch.cuda.Stream()

    def step(toy):
        with torch.cuda.stream(other):
            toy.scales.add_(1)
        return toy.out.add_(1)

    graph, _ = capture(step, toy)
    assert values(toy.scales).tolist() == [2.0] * ROWS
    assert [node.name for node in graph.nodes] == ["add_"]


def test_a_shape_changed_in_place_is_not_what_was_recorded(device):
    def step(toy):
        tensor = toy.table * 2
        tensor.t_()
        return tensor + toy.table.t()

    toy = Toy()
    graph, out = capture(step, toy)
    graph.replay()
    assert torch.equal(values(out), values(toy.table).t() * 3)


def test_pinned_memory_may_be_allocated_and_copied_to(device):
    toy = Toy()
    graph, host = capture(lambda: toy.scales.to("cpu", non_blocking=True))
    toy.scales.fill_(7)
    graph.replay()
    assert host.tolist() == [7.0] * ROWS


def test_a_failed_capture_leaves_the_device_usable(device):
    toy = Toy()
    with pytest.raises(CaptureError):
        capture(graphs_planted.reads_back, toy)
    assert device.capture is None
    assert clean(toy).cpu().tolist() == [5.0] * ROWS


# -- what cannot be captured -----------------------------------------------------------


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_captured_is_refused_with_its_line(device, name):
    function, why = REFUSED[name]
    line, text = line_of(function)
    with pytest.raises(CaptureError) as refused:
        capture(function, Toy())
    message = str(refused.value)
    assert why in message
    assert f"graphs_planted.py:{line} in {name} | {text}" in message
    assert "\n" not in message


def test_a_capture_that_swallowed_a_refusal_fails_at_its_end(device):
    def step(toy):
        try:
            return graphs_planted.reads_an_item(toy)
        except CaptureError:
            return toy.table

    with pytest.raises(CaptureError, match="had failed before: .*reads_an_item"):
        capture(step, Toy())


def test_the_default_stream_is_not_captured(device):
    with pytest.raises(CaptureError, match="default stream"):
        Graph().capture_begin()


def test_captures_do_not_nest(device):
    inner = Graph()
    with pytest.raises(CaptureError, match="under way"):
        capture(inner.capture_begin)


def test_a_replay_is_not_captured(device):
    graph, _ = capture(clean, Toy())
    with pytest.raises(CaptureError, match="replay cannot be captured"):
        capture(graph.replay)


def test_what_was_not_captured_is_not_replayed(device):
    with pytest.raises(CaptureError, match="not captured"):
        Graph().replay()


# -- what a graph bakes in -------------------------------------------------------------


@pytest.mark.parametrize("name", BAKED)
def test_what_is_baked_in_is_named_by_a_second_capture(device, name):
    function, operation, kind, argument = BAKED[name]
    line, text = line_of(function)
    toy = Toy()
    first, _ = capture(function, toy)
    toy.advance()
    second, _ = capture(function, toy)
    found = [each for each in diff(first, second) if each.operation == operation]
    [difference] = [each for each in found if each.where.line == line]
    assert (difference.kind, difference.argument) == (kind, argument)
    assert str(difference).endswith(
        f"graphs_planted.py:{line} in {name} | {text}".replace("tests/", "")
    )
    assert operation in str(difference)
    assert "\n" not in str(difference)


@pytest.mark.parametrize("name", BAKED)
def test_what_is_baked_in_makes_a_replay_wrong(device, name):
    function = BAKED[name][0]
    plain, graphed = Toy(), Toy()
    graph, out = capture(function, graphed)
    graph.replay()
    assert torch.equal(values(out), values(function(plain)))
    for toy in (plain, graphed):
        toy.advance()
    graph.replay()
    right = values(function(plain))
    assert out.shape != right.shape or not torch.equal(values(out), right)


def test_memory_of_the_graph_is_told_by_the_line_that_allocated_it(device):
    """One allocation more in front must not move all that follow."""
    toy = Toy()

    def step(more):
        if more:
            toy.out.add_(torch.zeros(ROWS, device=DEVICE))
        return (toy.scales * 2).relu()

    first, _ = capture(step, False)
    second, _ = capture(step, True)
    assert [(each.operation, each.kind) for each in diff(first, second)] == [
        ("zeros", "operation"),
        ("add_", "operation"),
    ]


# -- what a replay would read or write -------------------------------------------------


def test_an_input_that_was_freed_is_named(device):
    toy = Toy()

    def step(index):
        return toy.table[index]

    index = torch.tensor([0, 2], device=DEVICE)
    graph, out = capture(step, index)
    graph.replay()
    assert values(out).tolist() == toy.table.cpu()[[0, 2]].tolist()
    del index
    with pytest.raises(DeadInput) as dead:
        graph.replay()
    assert str(dead.value).startswith("index argument indices[0] is memory that was ")
    assert "test_graphs.py" in str(dead.value)
    assert "return toy.table[index]" in str(dead.value)


def test_a_view_of_an_input_keeps_it_alive(device):
    scales = torch.ones(2, ROWS, device=DEVICE)
    graph, _ = capture(lambda tensor: tensor * 2, scales[0])
    other = scales[1]
    del scales
    graph.replay()
    del other
    with pytest.raises(DeadInput):
        graph.replay()


def test_staging_that_lived_as_long_as_the_capture_is_named(device):
    toy = Toy()

    def step():
        toy.scales.copy_(pinned([3.0] * ROWS), non_blocking=True)
        return toy.scales * 2

    graph, _ = capture(step)
    with pytest.raises(DeadInput, match=r"copy_ argument source is memory that was"):
        graph.replay()


def test_a_host_tensor_that_a_graph_writes_and_nobody_has_is_named(device):
    toy = Toy()
    graph, host = capture(lambda: toy.scales.to("cpu", non_blocking=True))
    graph.replay()
    del host
    with pytest.raises(DeadInput, match=r"to argument target is memory that was"):
        graph.replay()


def test_the_graph_keeps_no_input_alive(device):
    tensor = ones()
    storage = data_of(tensor).untyped_storage()
    before = torch._C._storage_Use_Count(storage._cdata)
    graph, _ = capture(lambda: tensor * 2 + tensor)
    assert torch._C._storage_Use_Count(storage._cdata) == before
    graph.replay()
    assert torch._C._storage_Use_Count(storage._cdata) == before


def test_a_submitted_replay_may_outlive_its_input(lagging):
    tensor = ones()
    graph, out = capture(lambda tensor: tensor * 2, tensor)
    graph.replay()
    del tensor
    assert out.cpu().tolist() == [2.0] * ROWS


def test_a_read_of_memory_that_nothing_wrote_is_named(device):
    line, text = line_of(graphs_planted.reads_what_it_never_wrote)
    toy = Toy()
    graph, out = capture(graphs_planted.reads_what_it_never_wrote, toy)
    for _ in range(2):
        graph.replay()
        [note] = graph.unwritten
        assert note.startswith("mul argument self has 2 elements that are read and")
        assert f":{line} in reads_what_it_never_wrote | {text}" in note
        assert values(out)[1:].isnan().all()


def test_rows_that_nothing_wrote_are_named(device):
    line, text = line_of(graphs_planted.writes_some_rows)
    toy = Toy()
    graph, _ = capture(graphs_planted.writes_some_rows, toy)
    graph.replay()
    [note] = graph.unwritten
    assert note.startswith("mul argument self has 4 elements that are read and")
    assert note.endswith(f":{line} in writes_some_rows | {text}")


@pytest.mark.parametrize(
    "step",
    [graphs_planted.picks_the_rows_it_wrote, graphs_planted.fills_what_it_allocates],
)
def test_nothing_is_said_of_memory_that_is_written_as_far_as_it_is_read(device, step):
    toy = Toy()
    graph, out = capture(step, toy)
    graph.replay()
    assert graph.unwritten == []
    assert torch.equal(values(out), values(step(Toy())))


def test_what_was_left_by_the_replay_before_is_not_there_any_more(device):
    """Memory of the graph that nobody holds is anybody's between two replays."""

    def step(toy):
        total = torch.empty(ROWS, device=DEVICE)
        toy.out.copy_(total)
        total.copy_(toy.scales)
        return toy.out

    toy = Toy()
    graph, out = capture(step, toy)
    for _ in range(2):
        graph.replay()
        assert values(out).isnan().all()
        assert len(graph.unwritten) == 1


def test_memory_of_the_graph_that_is_held_keeps_its_data(device):
    def step(toy):
        total = torch.empty(ROWS, device=DEVICE)
        return total, total.add_(toy.scales)

    toy = Toy()
    graph, (total, _) = capture(step, toy)
    total.zero_()
    for number in (1.0, 2.0):
        graph.replay()
        assert values(total).tolist() == [number] * ROWS
        assert graph.unwritten == []


# -- a device that lags ----------------------------------------------------------------


def test_a_staging_slot_written_too_early_is_named(lagging):
    step = graphs_planted.copies_from_its_staging
    line, text = line_of(step)
    toy = Toy()
    graph, _ = capture(step, toy)
    toy.staging.fill_(2)
    graph.replay()
    toy.staging.fill_(3)  # for the next step, while this one has not begun
    graph.replay()
    with pytest.raises(StaleInput) as stale:
        toy.out.cpu()
    assert str(stale.value).startswith("copy_ argument source was written by the host")
    assert f"graphs_planted.py:{line} in {step.__name__} | {text}" in str(stale.value)


def test_a_staging_slot_written_when_it_was_read_is_no_bug(lagging):
    toy, plain = Toy(), Toy()
    graph, _ = capture(graphs_planted.copies_from_its_staging, toy)
    for number in (2.0, 3.0, 4.0):
        toy.staging.fill_(number)
        graph.replay()
        lagging.stream.advance()  # the device is as fast as the host
        plain.scales.fill_(number)
        clean(plain)
    assert torch.equal(toy.out.cpu(), plain.out.cpu())


def test_as_many_staging_slots_as_steps_in_flight_are_enough(lagging):
    """Rotating slots, copied to the graph's input in front of it."""
    toy, plain = Toy(), Toy()
    slots = [pinned([0.0] * ROWS) for _ in range(2)]
    graph, _ = capture(clean, toy)
    for step, number in enumerate((2.0, 3.0, 4.0, 5.0)):
        slots[step % 2].fill_(number)
        toy.scales.copy_(slots[step % 2], non_blocking=True)
        graph.replay()
        if step:  # the step before has been waited for
            lagging.stream.advance(2)
        plain.scales.fill_(number)
        clean(plain)
    assert torch.equal(toy.out.cpu(), plain.out.cpu())


@pytest.mark.parametrize("reads_first", [False, True])
def test_host_memory_that_the_graph_writes_is_not_stale(lagging, reads_first):
    def step(toy, host):
        for reads in (reads_first, not reads_first):
            if reads:
                toy.out.copy_(host, non_blocking=True)
            else:
                host.copy_(toy.scales, non_blocking=True)
        return toy.out

    toy, host = Toy(), pinned([0.0] * ROWS)
    graph, out = capture(step, toy, host)
    for _ in range(3):
        toy.advance()
        graph.replay()
    assert out.cpu().tolist() == [2.0 if reads_first else 2.5] * ROWS


# -- pools -----------------------------------------------------------------------------


def doubled(tensor):
    return tensor * 2


def summed(tensor):
    scratch = tensor * 3
    return scratch.sum()


def test_a_graph_that_reads_what_another_one_dropped_is_named(device):
    tensor, pool = ones(), torch.cuda.graph_pool_handle()
    first, between = capture(doubled, tensor, pool=pool)
    second, out = capture(summed, between, pool=pool)
    first.replay()
    second.replay()
    assert values(out) == 6 * ROWS
    del between  # now the pool may give its memory to the next capture
    third, _ = capture(summed, tensor, pool=pool)
    first.replay()
    second.replay()
    third.replay()
    with pytest.raises(PoolReuse) as reuse:
        second.replay()
    assert str(reuse.value).startswith("mul argument self is another graph's, and the ")
    assert "in summed | scratch = tensor * 3" in str(reuse.value)


def test_code_that_reads_what_a_replay_may_have_overwritten_is_named(device):
    """Replayed in another order than captured: the first one's scratch is taken."""
    tensor, pool = ones(), torch.cuda.graph_pool_handle()
    first, _ = capture(summed, tensor, pool=pool)
    second, out = capture(doubled, tensor, pool=pool)
    second.replay()
    assert (out + 1).cpu().tolist() == [3.0] * ROWS
    first.replay()
    assert values(out).isnan().all()
    with pytest.raises(PoolReuse) as reuse:
        out + 1
    assert "add reads memory of a graph that the graph captured at" in str(reuse.value)
    assert "| out + 1" in str(reuse.value)
    second.replay()
    assert (out + 1).cpu().tolist() == [3.0] * ROWS


def test_graphs_of_two_pools_do_not_meet(device):
    tensor = ones()
    first, _ = capture(summed, tensor)
    second, out = capture(doubled, tensor)
    second.replay()
    first.replay()
    assert (out + 1).cpu().tolist() == [3.0] * ROWS
    assert first.pool() != second.pool()


def test_graphs_of_a_pool_that_hold_their_results_do_not_meet(device):
    tensor, pool = ones(), torch.cuda.graph_pool_handle()
    first, one = capture(doubled, tensor, pool=pool)
    second, two = capture(doubled, tensor, pool=pool)
    for _ in range(2):
        first.replay()
        second.replay()
        assert values(one).tolist() == values(two).tolist() == [2.0] * ROWS


def test_a_graph_that_is_reset_gives_its_memory_back(device):
    graph, out = capture(doubled, ones())
    out = out.view(-1)
    weak = [memory.weak for memory in graph.memories if memory.kept is not None]
    graph.reset()
    assert not any(each.expired() for each in weak)
    del out
    gc.collect()
    assert all(each.expired() for each in weak)


# -- in torch's place ------------------------------------------------------------------


def test_torch_has_the_stand_ins_only_while_there_is_a_device():
    stock = torch.cuda.CUDAGraph
    with PretendDevice():
        assert torch.cuda.CUDAGraph is Graph
        assert torch.cuda.graph is graphs.graph
        handle = torch.cuda.graph_pool_handle()
        assert handle != torch.cuda.graph_pool_handle()
    assert torch.cuda.CUDAGraph is stock


def test_code_can_ask_whether_it_is_captured(device):
    answers = []
    capture(lambda: answers.append(torch.cuda.is_current_stream_capturing()))
    answers.append(torch.cuda.is_current_stream_capturing())
    assert answers == [True, False]


def test_begin_and_end_can_be_called_by_hand(device):
    toy, stream, graph = Toy(), pretend.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        graph.capture_begin(pool=(7, 7), capture_error_mode="thread_local")
        clean(toy)
        graph.capture_end()
    graph.replay()
    assert graph.pool() == (7, 7)
    assert values(toy.out).tolist() == [5.0] * ROWS


def test_a_graph_can_be_dumped(device, tmp_path: Path):
    graph, _ = capture(clean, Toy())
    graph.debug_dump(str(tmp_path / "graph.txt"))
    lines = (tmp_path / "graph.txt").read_text().splitlines()
    assert len(lines) == len(graph.nodes)
    assert "toy.positions.add_(1)" in lines[-1]


# -- for people ------------------------------------------------------------------------


def test_a_description_has_every_node_and_its_memory(device):
    toy = Toy()
    graph, _ = capture(graphs_planted.takes_a_rotating_buffer, toy)
    toy.advance()
    moving = diff(graph, capture(graphs_planted.takes_a_rotating_buffer, toy)[0])
    found = graphs.describe(graph, moving)
    total, add = found["nodes"]
    assert (total["name"], add["name"]) == ("sum", "add")
    assert [each["name"] for each in add["arguments"] if each["moves"]] == ["other"]
    table = total["arguments"][0]["memory"]
    assert total["reads"] == [table]
    assert found["memories"][table]["shape"] == [8, 4]
    assert not found["memories"][table]["own"]
    assert [found["memories"][each]["own"] for each in add["writes"]] == [True]
    assert graph.counts() == {"launch": 2}


# -- kernels ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kernels():
    script = HERE / "graphs_triton.py"
    return run_script(script, lane_environment("interpret"), timeout=120)


def marked(function):
    """The marked line of a function of graphs_triton.py, as messages have it."""
    lines = (HERE / "graphs_triton.py").read_text().splitlines()
    begin = lines.index(f"def {function}():")
    at = next(n for n in range(begin, len(lines)) if "# here" in lines[n])
    return f"graphs_triton.py:{at + 1} in step | {lines[at].strip()}"


def test_kernels_replay_as_they_run(kernels):
    found = kernels["clean"]
    assert found["nothing_ran"] == [[0] * 4, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]]
    for replayed, run in found["pairs"]:
        assert replayed == run
    assert found["unwritten"] == []


def test_a_replay_shows_what_a_kernel_touches(kernels):
    found = kernels["clean"]
    assert found["flow"] == [["left_ptr", "right_ptr"], ["out_ptr"]]
    assert found["atomic"] == [["counts_ptr", "ids_ptr"], ["counts_ptr"]]
    assert found["names"] == ["counts", "ids", "left", "out", "right"]


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ("programs", "grid: (1,) -> (2,)"),
        ("factor", "argument factor is another number: 2.0 -> 3.0"),
        ("block", "argument BLOCK is another number: 4 -> 8"),
    ],
)
def test_what_a_launch_bakes_in_is_named(kernels, changed, says):
    [line] = kernels["baked"][changed]
    assert line.startswith(f"launch 0 _add_kernel {says} at ")
    assert line.endswith(marked("baked"))


def test_a_kernel_that_reads_what_nothing_wrote_is_named(kernels):
    [[note], masked] = kernels["unwritten"]
    assert note.startswith("_add_kernel argument left_ptr has 4 elements that are read")
    assert note.endswith(marked("unwritten"))
    assert masked == []


def test_freed_memory_behind_a_table_of_pointers_is_named(kernels):
    found = kernels["tables"]
    assert found["behind"] == 2
    kind, message = found["freed"]
    assert kind == "DeadInput"
    assert message.startswith(
        "_follow_kernel argument table_ptr[1] points to memory th"
    )
    assert message.endswith(marked("tables"))


def test_a_table_may_be_given_other_pointers(kernels):
    found = kernels["tables"]
    assert found["sums"] == [[4, 8], [4, 28], [28, 28]]
    assert "table_ptr (a table of pointers)" in found["reads"]


def test_a_wild_pointer_is_named_before_it_is_followed(kernels):
    kind, message = kernels["tables"]["wild"]
    assert kind == "DeadInput"
    assert message.startswith("_follow_kernel follows a pointer into memory that is no")
    assert message.endswith("capture(lambda: _follow_kernel[(2,)](late, out, BLOCK=4))")


def test_a_kernel_that_reads_what_the_host_wrote_too_early_is_named(kernels):
    kind, message = kernels["staged"]["early"]
    assert kind == "StaleInput"
    assert message.startswith("_add_kernel argument left_ptr was written by the host")
    assert message.endswith(marked("staged"))


def test_pinned_memory_may_be_written_when_it_was_read(kernels):
    assert kernels["staged"]["in_time"] == [["", ""], [10.0] * 4]
    assert kernels["staged"]["other_row"] == ["", ""]


# -- the decode step -------------------------------------------------------------------


@pytest.fixture(scope="module")
def found():
    """The decode step of stock, with one patch, and with all."""
    one = {"clean_sampler_writes": ["clean_sampler_writes"]}
    return stepgraph.look(lambda text: None, one | stepgraph.ALL)


@pytest.fixture(scope="module")
def stock(found):
    return found["stock"]


def places(entry, when="every step"):
    return Counter(
        each["buffer"] or each["operation"]
        for each in entry["moving"]
        if each["when"] == when
    )


def test_steps_out_of_graphs_give_the_tokens_of_steps_without(found, stock):
    assert len({tuple(tokens) for tokens in stock["eager"]}) > 1
    assert stock["steps"] >= 6
    for entry in found.values():
        assert entry["tokens"] == stock["eager"]
        assert entry["unwritten"] == []


def test_what_keeps_the_stock_step_from_being_one_graph(stock):
    assert places(stock) == {
        "idx_mapping": 8,
        "num_blocks": 1,
        "temperature": 2,
        "seeds": 1,
    }
    assert places(stock, "when a block is appended") == {"_apply_write_kernel": 1}
    assert places(stock, "when a request is replaced") == {"prefill_len": 2}
    assert stock["freed"] == 8
    assert {each["why"] for each in stock["moving"]} == {
        "allocated anew",
        "pinned memory, another slot of a pool each time",
        "launched in some steps only",
    }


def test_the_work_list_is_what_is_found_now(found, stock):
    text = (HERE.parents[1] / "docs" / "step-graph-work-list.md").read_text()
    now = stepgraph.work_list(stock, found["all patches"])
    assert now == text, "run: vllm-ext prove graphs --write FILE"


def test_a_patch_is_judged_against_stock(found, stock):
    verdict = stepgraph.judge_patch(
        "clean_sampler_writes", found["clean_sampler_writes"], stock
    )
    assert (verdict.outcome, verdict.fault) == ("proven on CPU", False)
    assert verdict.detail.endswith(
        "moving every step: 12 -> 9; temperature only when a request is replaced x2; "
        "seeds only when a request is replaced x1"
    )


def test_patches_are_judged_together(found, stock):
    verdict = stepgraph.judge_patch("all patches", found["all patches"], stock)
    assert (verdict.outcome, verdict.fault) == ("proven on CPU", False)
    assert places(found["all patches"]) == {"num_blocks": 1}


def test_stock_as_one_graph_is_not_proven(stock):
    verdict = stepgraph.judge_stock(stock)
    assert (verdict.outcome, verdict.fault) == ("not proven", False)
    assert verdict.detail == (
        "not one graph: 12 arguments move every step: idx_mapping x8, num_blocks x1, "
        "temperature x2, seeds x1"
    )


def test_the_page_has_every_launch(stock):
    text = page.draw(stock)
    assert text.count("<li data-reads") == sum(stock["launches"].values())
    assert "<h2 class=moves>Moves between two captures <b>4</b></h2>" in text


def test_a_patch_that_cannot_be_captured_is_named_and_ends_its_engine():
    lane = lane_environment("interpret") | {"VEXT": "0"}
    found = run_script(HERE / "graphs_refused.py", lane, timeout=120)
    assert list(found) == ["waits"]  # the engine is in the middle of a step
    lines = (HERE / "graphs_refused.py").read_text().splitlines()
    at = next(n for n, line in enumerate(lines, 1) if line.endswith("# marked"))
    assert found["waits"]["failed"].startswith("CaptureError: not possible while a gr")
    assert f"graphs_refused.py:{at} in waits" in found["waits"]["failed"]


def test_a_patch_that_does_not_fit_is_named(monkeypatch):
    @contextmanager
    def booted(*arguments, **options):
        yield None

    @contextmanager
    def all_applied(names):
        if names == ["unfit"]:
            raise PatchError("unfit does not fit: f has changed\nby much")
        yield [SimpleNamespace(calls={"f": 2})]

    monkeypatch.setattr(steprun.engine, "booted", booted)
    monkeypatch.setattr(steprun.engine, "model_runner", lambda llm: None)
    monkeypatch.setattr(steprun.gpupath, "graphs_that_replay", lambda runner: None)
    monkeypatch.setattr(steprun, "all_applied", all_applied)
    monkeypatch.setattr(steprun, "_decode", lambda llm, name: [[1, 2]])
    monkeypatch.setattr(steprun, "_finding", lambda *arguments: entry(calls=None))
    found = steprun.look({"fits": ["fits"], "no": ["unfit"], "left": []}, stock=True)
    assert list(found) == ["stock", "fits", "no"]
    assert found["fits"]["calls"] == 2
    assert found["no"] == {"failed": "unfit does not fit: f has changed"}


def recorded():
    """What `stepdrawing.look` finds where all is well."""
    copies = ["h2d", "copy"], ["d2h", "copy"]
    steps = {
        name: [copies[0], *[["graph", "replay"]] * replays, copies[1]]
        for name, replays in (("stock", 9), ("ours", 3), ("mono", 1))
    }
    return steps | {"tokens": dict.fromkeys(steps, [[1, 2]])}


class Engines:
    """Play children of `stepgraph.look`: they stop at patches in ``bad``."""

    def __init__(self, *bad):
        self.bad, self.asked = bad, []

    def __call__(self, stack, patches, stock):
        found = {"stock": entry()} if stock else {}
        for name in patches:
            found[name] = {"failed": f"{name}: no"} if name in self.bad else entry()
            if name in self.bad:
                break
        self.asked.append(list(patches))
        return SimpleNamespace(hear=lambda timeout: found)


def test_behind_a_patch_that_fails_another_engine_looks(monkeypatch):
    names = stepgraph.ALL[stepgraph.TOGETHER]
    assert {patch.name for patch in stepgraph.SERIES} - {*names} == {"step_graph"}
    bad = [names[0], names[-1]]
    engines = Engines(*bad)
    monkeypatch.setattr(stepgraph, "_start", engines)
    monkeypatch.setattr(stepdrawing, "look", lambda say: recorded())
    first, *rest, last = stepgraph.verdicts(lambda text: None)
    assert (last.subject, last.outcome) == ("step_graph", "proven on CPU")
    assert first.subject == "the stock step as one graph"
    assert first.outcome == "proven on CPU"
    assert [each.subject for each in rest] == [*names, "all patches"]
    assert [each.subject for each in rest if each.fault] == bad
    assert {each.detail for each in rest if each.fault} == {f"{n}: no" for n in bad}
    assert sum(each.outcome == "proven on CPU" for each in rest) == len(rest) - 2
    assert len(engines.asked) == 3
    assert engines.asked[-1][-1] == "all patches"
    assert not {*bad} & {*engines.asked[-1]}


def test_no_list_is_written_of_patches_that_fail(monkeypatch, tmp_path):
    monkeypatch.setattr(stepgraph, "_start", Engines("all patches"))
    with pytest.raises(CannotRunError, match="^all patches: all patches: no$"):
        stepgraph.write(tmp_path / "list.md", lambda text: None)
    assert list(tmp_path.iterdir()) == []


def test_what_was_found_is_written(found, tmp_path: Path):
    with mock.patch.object(stepgraph, "look", return_value=found):
        graphs.write(tmp_path / "list.md", print)
        graphs.html(tmp_path / "page.html", print)
    assert (tmp_path / "list.md").read_text().startswith("# What keeps the decode step")
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ours": [["graph", "model"]]}, "ours: the step was not one of its graphs"),
        ({"mono": recorded()["ours"]}, "mono: the step was not one of its graphs"),
        ({"tokens": {"mono": [[1, 3]]}}, "mono: other tokens than stock's"),
    ],
)
def test_a_step_graph_that_is_none_or_wrong_is_a_fault(changes, said):
    found = recorded()
    changes["tokens"] = found["tokens"] | changes.get("tokens", {})
    verdict = stepdrawing.judge(found | changes)
    assert (verdict.outcome, verdict.fault) == ("not proven", True)
    assert verdict.detail == said


def entry(**changes):
    return {
        **{"tokens": [[1, 2]], "eager": [[1, 2]], "steps": 3, "calls": 1},
        **{"launches": {"launch": 2}, "unwritten": [], "moving": [], **changes},
    }


def test_a_step_in_which_nothing_moves_is_proven():
    verdict = stepgraph.judge_stock(entry())
    assert verdict.outcome == "proven on CPU"
    assert "3 captured steps of 2 launches replay to stock's 2 tokens" in verdict.detail


@pytest.mark.parametrize(
    ("changes", "detail", "fault"),
    [
        ({"tokens": [[1, 3]]}, "differ from those of stock without graphs", True),
        ({"unwritten": ["k reads what nothing wrote"]}, "k reads what nothing", True),
        ({"calls": 0}, "not called in this decode step", False),
    ],
)
def test_a_patch_is_not_proven_if(changes, detail, fault):
    verdict = stepgraph.judge_patch("some_patch", entry(**changes), entry())
    assert (verdict.outcome, verdict.fault) == ("not proven", fault)
    assert detail in verdict.detail


def test_what_a_patch_adds_and_removes_is_said():
    def moving(argument, when="every step"):
        place = {"operation": "k", "argument": argument, "kind": "address"}
        return {**place, "when": when, "buffer": argument}

    verdict = stepgraph.judge_patch(
        "some_patch",
        entry(moving=[moving("b"), moving("c", "now and then")]),
        entry(moving=[moving("a"), moving("c")]),
    )
    assert verdict.detail.endswith(
        "moving every step: 2 -> 1; a no more x1; c only now and then x1; "
        "b new, every step x1"
    )
