"""Operations that cross between host and device: does the host wait in each?

Small functions, most with one line that makes the host wait, marked ``# waits``. Each
gets the tensors of `Tensors` and returns something comparable. The pretend device's
answers are what the sync detector is built on; `vllm_ext.prove.cuda` asks CUDA for its
own, where there is a GPU, and compares.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F


class Tensors:
    """What a planted function works on; ``floats`` and ``ids`` lie on the device."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.host_ids = torch.arange(4).pin_memory()
        self.host_float = torch.tensor(2.5)
        self.floats = torch.linspace(-1, 1, 32).view(4, 8).to(device)
        self.ids = torch.arange(4).to(device)
        self.mask = self.floats > 0
        self.one = torch.ones((), device=device)
        self.four = torch.full((), 4, device=device)


Planted = Callable[[Tensors], Any]
WAITS: dict[str, Planted] = {}
CLEAN: dict[str, Planted] = {}


def waits(function: Planted) -> Planted:
    WAITS[function.__name__] = function
    return function


def clean(function: Planted) -> Planted:
    CLEAN[function.__name__] = function
    return function


def marked_line(function: Planted) -> int:
    """The number of the line marked ``# waits``."""
    lines, first = inspect.getsourcelines(function)
    [offset] = [at for at, line in enumerate(lines) if "# waits" in line]
    return first + offset


# -- reading a value ---------------------------------------------------------------


@waits
def item(t: Tensors) -> Any:
    total = t.floats.sum()
    return total.item()  # waits


@waits
def formatted(t: Tensors) -> Any:
    return f"{t.floats.sum()}"  # waits


@waits
def as_bool(t: Tensors) -> Any:
    small = t.floats.max() < 5
    if small:  # waits
        return 1
    return 0


@waits
def as_int(t: Tensors) -> Any:
    return int(t.four)  # waits


@waits
def as_float(t: Tensors) -> Any:
    return float(t.one)  # waits


@waits
def tolist(t: Tensors) -> Any:
    return t.ids.tolist()  # waits


@waits
def equal(t: Tensors) -> Any:
    return torch.equal(t.ids, t.ids)  # waits


@waits
def tensor_as_slice_bound(t: Tensors) -> Any:
    bound = t.ids.max()
    return t.floats[:bound]  # waits


@waits
def tensor_as_index(t: Tensors) -> Any:
    return t.floats[t.four - 1]  # waits


@waits
def tensor_as_top_k(t: Tensors) -> Any:
    return t.floats.topk(t.four).indices  # waits


@waits
def tensor_as_fill_value(t: Tensors) -> Any:
    return t.floats.masked_fill(t.mask, t.one)  # waits


@waits
def tensor_as_size(t: Tensors) -> Any:
    return torch.zeros(t.four, device=t.device)  # waits


@waits
def in_a_range(t: Tensors) -> Any:
    return [at for at in range(t.four)]  # waits


# -- results whose size depends on data ------------------------------------------------


@waits
def nonzero(t: Tensors) -> Any:
    return t.mask.nonzero()  # waits


@waits
def where_of_one(t: Tensors) -> Any:
    return torch.where(t.mask)[0]  # waits


@waits
def unique(t: Tensors) -> Any:
    return t.ids.unique()  # waits


@waits
def unique_consecutive(t: Tensors) -> Any:
    return torch.unique_consecutive(t.ids)  # waits


@waits
def masked_select(t: Tensors) -> Any:
    return t.floats.masked_select(t.mask)  # waits


@waits
def bincount(t: Tensors) -> Any:
    return torch.bincount(t.ids)  # waits


@waits
def mask_read(t: Tensors) -> Any:
    return t.floats[t.mask]  # waits


@waits
def mask_write(t: Tensors) -> Any:
    t.floats[t.mask] = t.one  # waits
    return t.floats


@waits
def mask_and_index_write(t: Tensors) -> Any:
    t.floats[t.mask[:, 0], t.ids[:1]] = 5.0  # waits
    return t.floats


@waits
def repeat_interleave(t: Tensors) -> Any:
    return torch.repeat_interleave(t.ids, t.ids)  # waits


@waits
def one_hot(t: Tensors) -> Any:
    return F.one_hot(t.ids)  # waits


# -- copies that block -------------------------------------------------------------


@waits
def cpu(t: Tensors) -> Any:
    return t.ids.cpu()  # waits


@waits
def to_pageable(t: Tensors) -> Any:
    target = torch.empty(4, dtype=torch.int64)
    return target.copy_(t.ids, non_blocking=True)  # waits


@waits
def to_pinned_but_blocking(t: Tensors) -> Any:
    target = torch.empty(4, dtype=torch.int64, pin_memory=True)
    return target.copy_(t.ids)  # waits


@waits
def from_pageable(t: Tensors) -> Any:
    source = torch.arange(4)
    return source.to(t.device, non_blocking=True)  # waits


@waits
def from_pinned_but_blocking(t: Tensors) -> Any:
    return t.host_ids.to(t.device)  # waits


@waits
def from_a_list(t: Tensors) -> Any:
    return torch.tensor([1, 2, 3], device=t.device)  # waits


@waits
def from_a_list_of_indices(t: Tensors) -> Any:
    return t.floats[[0, 2]]  # waits


@waits
def host_indices(t: Tensors) -> Any:
    return t.floats[t.host_ids]  # waits


@waits
def number_into_one_element(t: Tensors) -> Any:
    t.ids[0] = 7  # waits
    return t.ids


@waits
def number_through_indices(t: Tensors) -> Any:
    t.floats[t.ids] = 7.0  # waits
    return t.floats


@waits
def where_with_a_host_tensor(t: Tensors) -> Any:
    return torch.where(t.mask, t.floats, t.host_float)  # waits


# -- saying so ---------------------------------------------------------------------


@waits
def synchronize(t: Tensors) -> Any:
    torch.cuda.synchronize()  # waits


@waits
def synchronize_stream(t: Tensors) -> Any:
    torch.cuda.current_stream().synchronize()  # waits


# -- what does not wait ------------------------------------------------------------


@clean
def arithmetic(t: Tensors) -> Any:
    return (t.floats * 2 + t.host_float).softmax(-1).argmax(-1)


@clean
def where_with_a_number(t: Tensors) -> Any:
    return torch.where(t.mask, t.floats, 5.0)


@clean
def mask_write_of_a_number(t: Tensors) -> Any:
    t.floats[t.mask] = float("-inf")
    return t.floats


@clean
def number_into_a_row(t: Tensors) -> Any:
    t.floats[0] = 7
    return t.floats


@clean
def fill_with_a_host_tensor(t: Tensors) -> Any:
    return t.floats.masked_fill(t.mask, t.host_float)


@clean
def device_indices(t: Tensors) -> Any:
    return t.floats[t.ids]


@clean
def host_mask(t: Tensors) -> Any:
    return t.floats[torch.tensor([True, False, True, False])]


@clean
def host_number_as_index(t: Tensors) -> Any:
    return t.floats[torch.tensor(2)] + 1


@clean
def repeat_interleave_of_known_size(t: Tensors) -> Any:
    return torch.repeat_interleave(t.ids, t.ids, output_size=6)


@clean
def one_hot_of_known_size(t: Tensors) -> Any:
    return F.one_hot(t.ids, 9)


@clean
def eager_copies(t: Tensors) -> Any:
    there = t.host_ids.to(t.device, non_blocking=True)
    back = there.to("cpu", non_blocking=True)
    torch.cuda.current_stream().record_event().synchronize()  # an event: told apart
    return back


@clean
def eager_copies_that_convert(t: Tensors) -> Any:
    there = t.host_ids.to(t.device, torch.int32, non_blocking=True)
    back = torch.empty(there.shape, dtype=torch.int64, pin_memory=True)
    back.copy_(there, non_blocking=True)
    torch.cuda.current_stream().record_event().synchronize()
    return back


@clean
def multinomial(t: Tensors) -> Any:
    return t.floats.softmax(-1).multinomial(1) * 0  # torch asserts on the device


@clean
def in_place(t: Tensors) -> Any:
    t.ids.add_(1)
    t.floats[:2].zero_()
    return t.floats.scatter_(1, t.ids[:, None], 3.0)
