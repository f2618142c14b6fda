"""The pretend device: two places for data, one place that sees all, and a lag."""

import threading
from pathlib import Path

import pytest
import torch

from vllm_ext.prove.pretend import (
    DEVICE,
    PretendDevice,
    data_of,
    is_pinned,
    on_device,
    pin,
    uva_view,
    where,
)
from vllm_ext_cpulane.engine import run_script
from vllm_ext_cpulane.environment import lane_environment


@pytest.fixture(params=[False, True], ids=["plain", "inference"], autouse=True)
def mode(request):
    """vLLM's steps run in inference mode, where operations arrive in other pieces."""
    with torch.inference_mode(request.param):
        yield


@pytest.fixture(params=[False, True], ids=["prompt", "lagging"])
def device(request, mode):
    with PretendDevice(lags=request.param) as device:
        yield device


@pytest.fixture
def lagging(mode):
    with PretendDevice(lags=True) as device:
        yield device


def pinned(*values):
    return torch.tensor(values, pin_memory=True)


# -- host and device ---------------------------------------------------------------


def test_a_tensor_is_where_it_was_made(device):
    there = torch.arange(4, device=DEVICE)
    assert on_device(there)
    assert there.device == torch.device(DEVICE, 0)
    assert there.to("cpu").device == torch.device("cpu")
    assert not on_device(torch.arange(4))
    assert there.tolist() == [0, 1, 2, 3]


def test_the_host_cannot_look_at_device_memory(device):
    with pytest.raises(TypeError, match="Use Tensor.cpu"):
        torch.arange(4, device=DEVICE).numpy()


def test_host_and_device_tensors_do_not_mix(device):
    there, here = torch.arange(4, device=DEVICE), torch.arange(4)
    with pytest.raises(RuntimeError, match="at least two devices"):
        there + here
    with pytest.raises(RuntimeError, match="at least two devices"):
        torch.cat([there, here])
    assert (there + here[2]).tolist() == [2, 3, 4, 5]  # a number, as on CUDA


def test_a_tensor_like_another_may_lie_elsewhere(device):
    seen = []
    there, here = torch.arange(4, device=DEVICE), torch.arange(4)
    device.observers.append(seen.append)
    assert torch.zeros_like(here, device=DEVICE).tolist() == [0, 0, 0, 0]
    assert on_device(torch.empty_like(here, device=DEVICE))
    assert here.new_full((2,), 3, device=DEVICE).tolist() == [3, 3]
    del seen[:]
    assert torch.zeros_like(there, device="cpu").numpy().tolist() == [0, 0, 0, 0]
    assert there.new_ones(2, device="cpu").numpy().tolist() == [1, 1]
    pinned = torch.empty_like(there, device="cpu", pin_memory=True)
    assert pinned.is_pinned()
    assert seen == []


def test_a_tensor_needs_its_device():
    with PretendDevice():
        there = torch.arange(4, device=DEVICE)
    with pytest.raises(RuntimeError, match="outside of PretendDevice"):
        there + 1


def test_torch_is_itself_again_afterwards():
    before = (torch.tensor, torch.cuda.synchronize, torch.Event, torch.Tensor.is_pinned)
    with PretendDevice():
        assert torch.Event is not before[2]
    after = (torch.tensor, torch.cuda.synchronize, torch.Event, torch.Tensor.is_pinned)
    assert after == before


def test_fresh_memory_holds_poison(device):
    assert torch.empty(2, device=DEVICE).isnan().tolist() == [True, True]
    assert torch.empty(2, dtype=torch.int64, device=DEVICE).tolist() == [-1, -1]


def test_views_share_and_copies_do_not(device):
    base = torch.zeros(2, 3, device=DEVICE)
    base[1].fill_(5)
    base.view(-1)[0] = 7
    clone = base.clone()
    base.t()[2].add_(1)
    assert base.tolist() == [[7, 0, 1], [5, 5, 6]]
    assert clone.tolist() == [[7, 0, 0], [5, 5, 5]]


def test_what_was_written_to_is_the_argument_itself(device):
    target = torch.zeros(3, device=DEVICE)
    assert target.add_(1) is target
    out = torch.empty(3, device=DEVICE)
    assert torch.add(target, target, out=out) is out
    assert out.tolist() == [2, 2, 2]


def test_several_results_and_none(device):
    values, indices = torch.tensor([3.0, 1, 2], device=DEVICE).sort()
    assert (values.tolist(), indices.tolist()) == ([1, 2, 3], [1, 2, 0])
    torch._foreach_add_([values], 1.0)
    assert values.tolist() == [2, 3, 4]


def test_random_numbers_are_drawn_on_the_device(device):
    torch.manual_seed(3)
    drawn = torch.empty(4, device=DEVICE).exponential_()
    data = drawn.cpu()
    torch.manual_seed(3)
    assert torch.equal(data, torch.empty(4).exponential_())


# -- pinned memory -----------------------------------------------------------------


def test_who_is_pinned(device):
    assert torch.zeros(3, pin_memory=True).is_pinned()
    assert torch.tensor([1, 2], pin_memory=True).is_pinned()
    assert torch.zeros(3).pin_memory().is_pinned()
    assert torch.zeros(4, pin_memory=True)[1:].is_pinned()  # a part of it
    assert torch.zeros(3, device=DEVICE).to("cpu", non_blocking=True).is_pinned()
    assert not torch.zeros(3).is_pinned()
    assert not torch.zeros(4, pin_memory=True).clone().is_pinned()
    assert not torch.zeros(3, device=DEVICE).is_pinned()
    assert is_pinned(pin(torch.zeros(3)))


def test_the_device_sees_what_the_host_writes_to_pinned_memory(device):
    host = torch.zeros(3, pin_memory=True)
    there = uva_view(host)
    host[1] = 5
    assert there.tolist() == [0, 5, 0]
    there.add_(1)
    torch.cuda.synchronize()
    assert host.tolist() == [1, 6, 1]
    with pytest.raises(ValueError, match="only pinned host memory"):
        uva_view(torch.zeros(3))


# -- one place that sees all ----------------------------------------------------------


def test_operations_say_who_asked(device):
    seen = []
    there = torch.zeros(3, device=DEVICE)
    device.observers.append(seen.append)
    there.add_(1)
    [operation] = seen
    assert (operation.kind, operation.name) == ("launch", "add_")
    assert operation.where.file == __file__
    assert operation.where.text == "there.add_(1)"
    assert operation.args[0] is there
    assert operation.result is there
    assert "test_operations_say_who_asked | there.add_(1)" in str(operation)


def test_nobody_is_nowhere():
    found = []
    code = compile("found.append(where())", "<string>", "exec")
    thread = threading.Thread(
        target=lambda: exec(code, {"found": found, "where": where})
    )
    thread.start()
    thread.join()
    assert found[0].file.endswith(("threading.py", "test_pretend.py"))


@pytest.mark.parametrize(
    ("make", "waits"),
    [
        (lambda: pinned(1, 2).to(DEVICE, non_blocking=True), False),
        (lambda: pinned(1, 2).to(DEVICE, torch.float32, non_blocking=True), False),
        (lambda: pinned(1, 2, 3, 4)[::2].to(DEVICE, non_blocking=True), True),
        (lambda: there().copy_(pinned(1), non_blocking=True), True),
        (lambda: there().t()[0].copy_(pinned(1, 2), non_blocking=True), False),
        (lambda: there().to("cpu", non_blocking=True), False),
        (lambda: there().to("cpu", torch.int32, non_blocking=True), False),
        (lambda: pinned(0.5, 0.5).copy_(there()[0], non_blocking=True), False),
        (lambda: pinned(1, 2, 3, 4)[::2].copy_(there()[0], non_blocking=True), True),
    ],
    ids=[
        *("plain", "converted", "gaps", "spread", "into gaps", "back"),
        *("back converted", "back converted into pinned", "back into gaps"),
    ],
)
def test_a_copy_is_direct_or_passes_pageable_memory(device, make, waits):
    seen = []
    device.observers.append(seen.append)
    made = make()
    assert [bool(each.wait) for each in seen if each.kind in ("h2d", "d2h")] == [waits]
    assert made.numel()


def there():
    return torch.zeros(2, 2, dtype=torch.int64, device=DEVICE)


@pytest.mark.parametrize(
    "shown",
    [
        str,
        repr,
        lambda t: f"{t}",
        lambda t: f"{t[0, 0]:.2f}",
        lambda t: ", ".join(map(str, t)),
    ],
)
def test_to_print_a_tensor_is_to_wait_for_it(device, shown):
    seen = []
    device.observers.append(seen.append)
    assert "7" in shown(torch.full((1, 1), 7.0, device=DEVICE))
    assert [each for each in seen if each.wait]


def test_streams_of_the_accelerator_are_the_devices(device):
    seen = []
    device.observers.append(seen.append)
    torch.accelerator.current_stream().synchronize()
    torch.Stream(DEVICE).synchronize()
    assert [each.wait for each in seen] == ["waits for a stream"] * 2


def test_a_stream_that_is_entered_within_itself_is_left_as_often(device):
    """As vLLM's `graph_capture` does, once for each of its groups of ranks."""
    outer, inner = device.stream, torch.cuda.Stream()
    with torch.cuda.stream(inner), torch.cuda.stream(inner):
        assert device.stream is inner
    assert device.stream is outer


def test_a_host_tensor_takes_no_index_of_the_device(device):
    host = torch.arange(4.0)
    with pytest.raises(RuntimeError, match="same device as the indexed"):
        host[torch.ones(2, dtype=torch.int64, device=DEVICE)]
    with pytest.raises(RuntimeError, match="same device as the indexed"):
        host[torch.ones(2, dtype=torch.int64, device=DEVICE)] = 5.0


def test_a_capture_and_the_rest_do_not_wait_for_each_other(device):
    x, outside = torch.zeros(2, device=DEVICE), torch.cuda.Event()
    torch.cuda.current_stream().record_event(outside)
    refused = pytest.raises(RuntimeError, match="from outside the capture")
    with refused, torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.cuda.current_stream().wait_event(outside)
    inside = torch.cuda.Event()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        x.add_(1)
        torch.cuda.current_stream().record_event(inside)
    with pytest.raises(RuntimeError, match="an event of a capture"):
        inside.synchronize()


def test_what_is_pending_may_fail_and_torch_is_torch_again():
    def boom():
        raise ValueError("late")

    stock = torch.tensor, torch.cuda.Event
    with pytest.raises(ValueError, match="late"), PretendDevice(lags=True) as device:
        device.stream.pending.append(boom)
    assert (torch.tensor, torch.cuda.Event) == stock
    with pytest.raises(KeyError), PretendDevice(lags=True) as device:
        device.stream.pending.append(boom) or {}["nothing"]
    assert (torch.tensor, torch.cuda.Event) == stock


def test_one_device_is_not_in_use_twice(device):
    with pytest.raises(RuntimeError, match="in use already"), device:
        pass
    assert torch.zeros(1, device=DEVICE).item() == 0


# -- a device that lags ----------------------------------------------------------------


def test_nothing_runs_before_somebody_waits(lagging):
    total = torch.zeros(3, device=DEVICE)
    total.add_(1)
    assert data_of(total).isnan().all()
    torch.cuda.synchronize()
    assert data_of(total).tolist() == [1, 1, 1]


def test_a_number_on_the_host_is_handed_over_as_it_is(lagging):
    number, ones = torch.tensor(1.0), torch.ones(2, device=DEVICE)
    mask = torch.tensor([True, False])
    made = []
    for value in (0.0, 1.0, 2.0):
        number.fill_(value)
        made.append(ones * number)
        made.append(ones.masked_fill(mask.to(DEVICE), number))
    number.fill_(9.0)
    assert [each.tolist() for each in made] == (
        [[0, 0], [0, 1], [1, 1], [1, 1], [2, 2], [2, 1]]
    )


def test_a_mask_on_the_host_is_expanded_there(lagging):
    x = torch.arange(4.0, device=DEVICE)
    mask = torch.tensor([True, False, True, False])
    picked = x[mask]
    mask.fill_(False)
    assert picked.tolist() == [0, 2]


def test_whatever_reads_waits_for_what_was_submitted(lagging):
    total = torch.ones(3, device=DEVICE) * 2
    assert total.sum().item() == 6
    assert total.nonzero().numel() == 3
    assert total.cpu().tolist() == [2, 2, 2]


def step(staging, out, rounds, *, wait_before_reuse):
    """Send numbers through one staging buffer; what the device made of them."""
    event = torch.Event()
    results = []
    for number in range(rounds):
        if wait_before_reuse:
            event.synchronize()
        staging.fill_(number)
        out.copy_(staging, non_blocking=True)
        event.record()
        results.append(out * 10)
    return [each.cpu().tolist()[0] for each in results]


def test_a_staging_buffer_written_again_too_early_is_wrong(device):
    staging, out = torch.zeros(2, pin_memory=True), torch.zeros(2, device=DEVICE)
    wrong = step(staging, out, 3, wait_before_reuse=False)
    assert wrong == ([20, 20, 20] if device.lags else [0, 10, 20])
    right = step(staging, out, 3, wait_before_reuse=True)
    assert right == [0, 10, 20]


def test_a_result_read_before_its_event_is_poison(lagging):
    result = torch.arange(3, device=DEVICE).to("cpu", non_blocking=True)
    event = torch.Event()
    event.record()
    assert not event.query()
    assert result.tolist() == [-1, -1, -1]
    event.synchronize()
    assert event.query()
    assert result.tolist() == [0, 1, 2]


def test_an_event_is_a_point_and_not_the_end(lagging):
    first, second = torch.zeros(1, device=DEVICE), torch.zeros(1, device=DEVICE)
    first.fill_(1)
    event = torch.cuda.current_stream().record_event()
    second.fill_(2)
    event.synchronize()
    assert data_of(first).item() == 1
    assert data_of(second).item() != 2


def copy_on_another_stream(*, wait):
    """A copy out on a stream of its own, as asynchronous outputs are made."""
    result = torch.arange(3, device=DEVICE) * 2
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        if wait:
            side.wait_stream(torch.cuda.default_stream())
        copy = result.to("cpu", non_blocking=True)
        event = side.record_event()
    event.synchronize()
    return copy.tolist()


def test_a_stream_that_forgets_to_wait_reads_poison(device):
    expected = [-1, -1, -1] if device.lags else [0, 2, 4]
    assert copy_on_another_stream(wait=False) == expected
    assert copy_on_another_stream(wait=True) == [0, 2, 4]


def test_waiting_for_one_stream_leaves_the_other(lagging):
    side = torch.cuda.Stream()
    there = torch.zeros(1, device=DEVICE)
    with torch.cuda.stream(side):
        there.fill_(4)
    torch.cuda.current_stream().synchronize()
    assert not side.query()
    assert there.item() == 0
    side.synchronize()
    assert there.item() == 4


def test_another_thread_may_wait_for_an_event(lagging):
    copy = torch.arange(3, device=DEVICE).to("cpu", non_blocking=True)
    event = torch.cuda.current_stream().record_event()
    seen = []
    lagging.observers.append(seen.append)
    thread = threading.Thread(target=event.synchronize)
    thread.start()
    thread.join()
    assert copy.tolist() == [0, 1, 2]
    assert [each.name for each in seen] == ["Event.synchronize"]


def test_leaving_finishes_what_is_pending():
    with PretendDevice(lags=True):
        there = torch.zeros(2, device=DEVICE).add_(3)
    assert data_of(there).tolist() == [3, 3]


@pytest.mark.parametrize("lags", [False, True])
def test_a_shape_changed_in_place_is_changed(lags):
    with PretendDevice(lags=lags):
        tensor = torch.arange(6, device=DEVICE).view(2, 3)
        doubled = tensor * 2  # pending, with the shape that it has now
        tensor.t_().unsqueeze_(0)
        assert tensor.shape == (1, 3, 2)
        assert tensor.tolist() == [[[0, 3], [1, 4], [2, 5]]]
        assert (tensor + 1).shape == (1, 3, 2)
        assert doubled.tolist() == [[0, 2, 4], [6, 8, 10]]
        with pytest.raises(NotImplementedError, match="resize_"):
            tensor.resize_(8)


@pytest.fixture
def shapeless():
    """A custom operation that cannot say what shape it will give."""
    library = torch.library.Library("pretend_test", "DEF")
    library.define("shapeless(Tensor x) -> Tensor")
    library.impl("shapeless", lambda x: x + 1, "CPU")
    yield torch.ops.pretend_test.shapeless
    library._destroy()


def test_a_custom_operation_is_one_launch(shapeless):
    with PretendDevice() as device:
        there = torch.zeros(2, device=DEVICE)
        seen = []
        device.observers.append(seen.append)
        assert shapeless(there).tolist() == [1, 1]
    assert [each.name for each in seen] == ["shapeless", "to"]


def test_what_cannot_be_put_off_says_so(lagging, shapeless):
    with pytest.raises(NotImplementedError, match="cannot be run later"):
        shapeless(torch.zeros(2, device=DEVICE))


def test_correct_code_gives_the_same_with_and_without_lag():
    def decode(lags):
        with PretendDevice(lags=lags):
            torch.manual_seed(0)
            table = torch.randn(16, 16, device=DEVICE)
            token = torch.tensor([3], device=DEVICE)
            staging = [torch.zeros(1, pin_memory=True) for _ in range(2)]
            copies, events = [], [torch.Event(), torch.Event()]
            side = torch.cuda.Stream()
            for number in range(6):
                events[number % 2].synchronize()
                staging[number % 2].fill_(0.5 * number)
                bias = staging[number % 2].to(DEVICE, non_blocking=True)
                logits = table[token] + bias
                logits[logits > 1] = 0.25
                token = torch.where(logits > 0, logits, -1.0).argmax(-1)
                with torch.cuda.stream(side):
                    side.wait_stream(torch.cuda.default_stream())
                    copies.append(token.to("cpu", non_blocking=True))
                    events[number % 2] = side.record_event()
            torch.cuda.synchronize()
            return [copy.item() for copy in copies]

    assert decode(lags=True) == decode(lags=False)
    assert len(set(decode(lags=True))) > 1


# -- Triton, in a process of its own ---------------------------------------------------


@pytest.fixture(scope="module")
def launches():
    script = Path(__file__).with_name("syncs_triton.py")
    return run_script(script, lane_environment("interpret") | {"VEXT": "0"})


def test_a_launch_is_seen_once_with_its_line(launches):
    assert launches["seen"] == [["triton", "_add_kernel", [2], "_add_kernel[(2,)]("]]
    assert launches["sum"] == [0, 2, 4, 6]


def test_a_launch_cannot_be_given_pageable_memory(launches):
    assert "cannot be accessed from Triton" in launches["refused"]


def test_a_launch_reads_pinned_memory_when_it_runs(launches):
    """So a slot that is overwritten before it ran is what the kernel sees."""
    assert launches["overwritten"] == {"prompt": [1, 1], "lagging": [9, 9]}
    assert launches["waited"] == {"prompt": [1, 1], "lagging": [1, 1]}
