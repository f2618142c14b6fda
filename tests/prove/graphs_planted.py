"""A decode step in small, and steps with one bug each that a CUDA graph would have.

The line to blame is marked ``# here``. See test_graphs.py.
"""

import inspect

import torch

from vllm_ext.prove.pretend import DEVICE, pin

ROWS = 3


def line_of(function):
    """The marked line of ``function``: number and text."""
    lines, first = inspect.getsourcelines(function)
    [at] = [number for number, line in enumerate(lines) if "# here" in line]
    return first + at, lines[at].strip()


def pinned(values, dtype=torch.float32):
    """Host memory that the device may copy from while the host goes on."""
    return pin(torch.tensor(values, dtype=dtype))


class Toy:
    """State of the step, on the device but for what its name says.

    ``staging`` is pinned, its size that of ``scales``.
    """

    def __init__(self):
        self.table = torch.arange(32.0, device=DEVICE).view(8, 4)
        self.positions = torch.zeros(ROWS, dtype=torch.int64, device=DEVICE)
        self.scales = torch.ones(ROWS, device=DEVICE)
        self.out = torch.zeros(ROWS, device=DEVICE)
        self.slots = [torch.full((ROWS,), 1.0 + i, device=DEVICE) for i in range(2)]
        self.staging = pinned([1.0] * ROWS)
        self.host_steps = 0
        self.host_flag = False

    def advance(self):
        """What the host does between two steps, and a graph's owner too."""
        self.host_steps += 1
        self.scales.add_(0.5)


def clean(toy):
    """Reads and writes memory that stays where it is, and memory of its own."""
    chosen = toy.table[toy.positions]
    scratch = torch.empty(ROWS, device=DEVICE)
    scratch.copy_(chosen.sum(-1))
    toy.out.copy_(torch.relu(scratch * toy.scales - 1))
    toy.positions.add_(1)
    return toy.out


# -- what cannot be captured ---------------------------------------------------------


def reads_an_item(toy):
    return toy.table * toy.out.sum().item()  # here


def branches_on_a_tensor(toy):
    if toy.out.sum() > 1e9:  # here
        toy.out.zero_()
    return toy.out


def indexes_with_a_mask(toy):
    return toy.table[toy.table > 3]  # here


def writes_through_a_mask(toy):
    toy.out[toy.out > 3] = toy.scales[:1]  # here
    return toy.out


def asks_which_are_not_zero(toy):
    return toy.out.nonzero()  # here


def slices_by_a_tensor(toy):
    return toy.table[: toy.positions.max()]  # here


def copies_from_pageable_memory(toy):
    toy.scales.copy_(torch.ones(ROWS), non_blocking=True)  # here
    return toy.scales


def makes_a_tensor_of_a_list(toy):
    return toy.out + torch.tensor([1.0, 2.0, 3.0], device=DEVICE)  # here


def copies_and_blocks(toy):
    toy.scales.copy_(toy.staging)  # here
    return toy.scales


def reads_back(toy):
    return toy.out.cpu()  # here


def waits_for_the_device(toy):
    torch.cuda.synchronize()  # here
    return toy.out


def waits_for_its_stream(toy):
    torch.cuda.current_stream().synchronize()  # here
    return toy.out


def waits_for_an_event(toy):
    event = torch.cuda.Event()
    event.record()
    event.synchronize()  # here
    return toy.out


def asks_for_an_event(toy):
    torch.cuda.Event().query()  # here
    return toy.out


def asks_for_a_stream(toy):
    torch.cuda.current_stream().query()  # here
    return toy.out


def leaves_a_stream_unjoined(toy):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        toy.out.add_(1)  # here
    return toy.out


REFUSED = {
    function.__name__: (function, what)
    for function, what in (
        (reads_an_item, "reads a value"),
        (branches_on_a_tensor, "reads a value"),
        (indexes_with_a_mask, "has a boolean mask as its index"),
        (writes_through_a_mask, "has a boolean mask as its index"),
        (asks_which_are_not_zero, "has a result whose size depends on data"),
        (slices_by_a_tensor, "reads a value"),
        (copies_from_pageable_memory, "copies from pageable host memory"),
        (makes_a_tensor_of_a_list, "copies from pageable host memory"),
        (copies_and_blocks, "copies from the host and blocks"),
        (reads_back, "copies to pageable host memory"),
        (waits_for_the_device, "waits for the device"),
        (waits_for_its_stream, "waits for a stream"),
        (waits_for_an_event, "waits for an event"),
        (asks_for_an_event, "asks for an event"),
        (asks_for_a_stream, "asks for a stream"),
        (leaves_a_stream_unjoined, "unjoined work"),
    )
}


# -- what a graph bakes in -------------------------------------------------------------


def bakes_a_host_counter(toy):
    return toy.table * toy.host_steps  # here


def bakes_a_python_counter(toy):
    return toy.table[toy.host_steps] * 2  # here


def bakes_a_number_in_a_host_tensor(toy):
    return toy.table * torch.tensor(float(toy.host_steps))  # here


def takes_a_rotating_buffer(toy):
    return toy.table.sum() + toy.slots[toy.host_steps % 2]  # here


def has_a_size_of_the_host(toy):
    return toy.table[: toy.host_steps + 1].sum(0)  # here


def branches_on_the_host(toy):
    if toy.host_steps % 2:
        return toy.table * 1
    return toy.table + 1  # here


# What differs: operation, kind, argument.
BAKED = {
    function.__name__: (function, *what)
    for function, *what in (
        (bakes_a_host_counter, "mul", "number", "other"),
        (bakes_a_python_counter, "mul", "address", "self"),
        (bakes_a_number_in_a_host_tensor, "mul", "number", "other"),
        (takes_a_rotating_buffer, "add", "address", "other"),
        (has_a_size_of_the_host, "sum", "shape", "self"),
        (branches_on_the_host, "add", "operation", ""),
    )
}


# -- what a replay would read or write ------------------------------------------------


def reads_what_it_never_wrote(toy):
    scratch = torch.empty(ROWS, device=DEVICE)
    scratch[:1].copy_(toy.scales[:1])
    return scratch * 2  # here


def writes_some_rows(toy):
    scratch = torch.empty(ROWS, 2, device=DEVICE)
    scratch.index_copy_(0, toy.positions[:1], toy.table[:1, :2])
    return scratch * 2  # here


def picks_the_rows_it_wrote(toy):
    scratch = torch.empty(ROWS, 2, device=DEVICE)
    scratch.index_copy_(0, toy.positions[:1], toy.table[:1, :2])
    return scratch[toy.positions] * 2


def fills_what_it_allocates(toy):
    filled = torch.empty(ROWS, device=DEVICE).fill_(2)
    return torch.empty(ROWS, device=DEVICE).zero_() + filled


def copies_from_its_staging(toy):
    toy.scales.copy_(toy.staging, non_blocking=True)  # here
    return clean(toy)
