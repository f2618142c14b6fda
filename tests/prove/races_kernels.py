"""Kernels with planted bugs, and clean ones, launched under the sanitizer.

Run in a process whose kernels are interpreted. Reports for each case the faults that
were found, the results, and the results of the same launch unwatched. The line on
which a case has its bug carries the case's name as a comment.
"""

import dataclasses
import os
import time
import warnings

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

from vllm_ext.prove.sanitizer import KernelFault, Sanitizer
from vllm_ext_cpulane.engine import report
from vllm_ext_cpulane.hook import platform_hook

platform_hook()
warnings.simplefilter("ignore")
CASES = {}


def case(**options):
    """Add a function that makes tensors and a launch: returns both."""

    def add(make):
        CASES[make.__name__] = make, options
        return make

    return add


# -- out of bounds -----------------------------------------------------------------


@triton.jit
def _copy_kernel(x_ptr, y_ptr, n, B: tl.constexpr):
    at = tl.program_id(0) * B + tl.arange(0, B)
    x = tl.load(x_ptr + at)  # load_past_the_end
    tl.store(y_ptr + at, x, mask=at < n)


@case()
def load_past_the_end():
    x, y = torch.arange(10.0), torch.zeros(10)
    return (x, y), lambda: _copy_kernel[(3,)](x, y, 10, B=4)


@triton.jit
def _fill_kernel(y_ptr, value, B: tl.constexpr):
    at = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(  # store_past_the_end
        y_ptr + at,
        value,
    )


@case()
def store_past_the_end():
    whole = torch.zeros(16)
    y = whole[:10]
    return (whole,), lambda: _fill_kernel[(3,)](y, 1.0, B=4)


@triton.jit
def _previous_kernel(x_ptr, y_ptr):
    row = tl.program_id(0)
    tl.store(y_ptr + row, tl.load(x_ptr + row - 1))  # before_a_view before_a_tensor


@case()
def before_a_view():
    x, y = torch.arange(5), torch.zeros(4, dtype=torch.int64)
    return (x, y), lambda: _previous_kernel[(4,)](x[1:], y)


@case()
def before_a_tensor():
    x, y = torch.arange(4), torch.zeros(4, dtype=torch.int64)
    return (x, y), lambda: _previous_kernel[(4,)](x, y)


@triton.jit
def _row_kernel(y_ptr, stride, n, B: tl.constexpr):
    row = tl.program_id(0)
    at = tl.arange(0, B)
    cells = y_ptr + row * stride + at
    tl.store(cells, row, at < n)  # neighbour_row between_rows past_the_last_row


@case()
def neighbour_row():
    whole = torch.zeros(4, 8, dtype=torch.int32)
    return (whole,), lambda: _row_kernel[(2,)](whole[2:3], 8, 8, B=8)


@case()
def between_rows():
    whole = torch.zeros(4, 8, dtype=torch.int32)
    return (whole,), lambda: _row_kernel[(4,)](whole[:, :6], 8, 7, B=8)


@case()
def past_the_last_row():
    whole = torch.zeros(4, 8, dtype=torch.int32)
    return (whole,), lambda: _row_kernel[(4,)](whole[:3, :6], 8, 6, B=8)


@case()
def rows_with_gaps():
    whole = torch.zeros(4, 8, dtype=torch.int32)
    return (whole,), lambda: _row_kernel[(4,)](whole[:, :6], 8, 6, B=8)


@triton.jit
def _sum_kernel(x_ptr, y_ptr, n, B: tl.constexpr):
    at = tl.arange(0, B)
    x = tl.load(x_ptr + at, mask=at < n, other=0)  # into_another_argument
    tl.store(y_ptr + tl.program_id(0), tl.sum(x))


@case()
def into_another_argument():
    whole = torch.arange(16)
    return (whole,), lambda: _sum_kernel[(1,)](whole[:8], whole[8:], 9, B=16)


@triton.jit
def _helper(pointer, at):
    return tl.load(pointer + at)  # in_a_helper


@triton.jit
def _helped_kernel(x_ptr, y_ptr):
    row = tl.program_id(0)
    tl.store(y_ptr + row, _helper(x_ptr, row + 1))


@case()
def in_a_helper():
    x, y = torch.arange(3), torch.zeros(3, dtype=torch.int64)
    return (x, y), lambda: _helped_kernel[(3,)](x, y)


@triton.jit
def _atomics_kernel(x_ptr, y_ptr):
    row = tl.program_id(0)
    old = tl.atomic_add(x_ptr + row, 1)  # atomics_past_the_end
    old += tl.atomic_cas(x_ptr + row, 7, 8)  # atomics_past_the_end
    tl.store(y_ptr + row, old)


@case()
def atomics_past_the_end():
    x = torch.zeros(2, dtype=torch.int32)
    y = torch.zeros(3, dtype=torch.int32)
    return (x, y), lambda: _atomics_kernel[(3,)](x, y)


@triton.jit
def _cas_block_kernel(x_ptr, B: tl.constexpr):
    at = tl.arange(0, B)
    zero = tl.zeros((B,), tl.int32)
    tl.atomic_cas(x_ptr + at, zero, zero + 5)  # cas_past_the_end


@case()
def cas_past_the_end():
    x = torch.tensor([0, 1, 0], dtype=torch.int32)
    return (x,), lambda: _cas_block_kernel[(1,)](x, B=4)


@triton.jit
def _wide_kernel(x_ptr, y_ptr):
    words = (x_ptr + 1).to(tl.pointer_type(tl.int32))
    tl.store(y_ptr, tl.load(words))  # misaligned


@case()
def misaligned():
    x = torch.zeros(8, dtype=torch.int8)
    y = torch.zeros(1, dtype=torch.int32)
    return (x, y), lambda: _wide_kernel[(1,)](x, y)


@triton.jit
def _table_kernel(table_ptr, y_ptr, n, B: tl.constexpr):
    group = tl.program_id(0)
    pointer = tl.load(table_ptr + group).to(tl.pointer_type(tl.int32))
    at = tl.arange(0, B)
    x = tl.load(pointer + at, mask=at < n, other=0)  # unnamed_target past_a_target
    tl.store(y_ptr + group, tl.sum(x))


TARGETS = [torch.arange(8, dtype=torch.int32) + i for i in range(2)]


def table(n):
    y = torch.zeros(2, dtype=torch.int32)
    addresses = torch.tensor([t.data_ptr() for t in TARGETS], dtype=torch.uint64)
    return (y,), lambda: _table_kernel[(2,)](addresses, y, n, B=16)


@case()
def unnamed_target():
    return table(8)


@case(reachable=TARGETS)
def past_a_target():
    return table(9)


@case(reachable=TARGETS)
def named_targets():
    return table(8)


@triton.jit
def _address_kernel(x_ptr, y_ptr):
    tl.store(y_ptr, x_ptr.to(tl.int64))


@case()
def an_address_as_a_number():
    x, y = torch.zeros(4), torch.zeros(1, dtype=torch.int64)
    made = (y, torch.tensor(x.data_ptr()))
    return made, lambda: _address_kernel[(1,)](x, y)


@triton.jit
def _either_kernel(x_ptr, y_ptr, out_ptr, n, B: tl.constexpr):
    at = tl.arange(0, B)
    pointers = tl.where(at % 2 == 0, x_ptr + at, y_ptr + at)
    x = tl.load(pointers, mask=at < n, other=0)  # past_the_second_of_two
    tl.store(out_ptr + at, x, mask=at < n)


def either(n):
    x, y = torch.arange(8), torch.arange(6) + 100
    out = torch.zeros(8, dtype=torch.int64)
    return (x, y, out), lambda: _either_kernel[(1,)](x, y, out, n, B=8)


@case()
def past_the_second_of_two():
    return either(8)


@case()
def the_first_or_the_second():
    return either(6)


@triton.jit
def _signs_kernel(x_ptr, y_ptr, B: tl.constexpr):
    at = tl.arange(0, B)
    tl.store(y_ptr + at, tl.load(x_ptr + at) < 0)  # past_a_reinterpretation


def signs(block):
    x = torch.arange(4, dtype=torch.uint8) + 126
    y = torch.zeros(block, dtype=torch.bool)
    return (x, y), lambda: _signs_kernel[(1,)](
        triton.reinterpret(x, tl.int8), y, B=block
    )


@case()
def past_a_reinterpretation():
    return signs(8)


@case()
def a_reinterpretation():
    return signs(4)


# -- races -------------------------------------------------------------------------


@triton.jit
def _lost_kernel(x_ptr, y_ptr):
    x = tl.load(x_ptr + tl.program_id(0))
    total = tl.load(y_ptr)  # lost_update
    tl.store(y_ptr, total + x)  # lost_update


@case()
def lost_update():
    x, y = torch.arange(4), torch.zeros(1, dtype=torch.int64)
    return (x, y), lambda: _lost_kernel[(4,)](x, y)


@triton.jit
def _claim_kernel(y_ptr):
    tl.store(y_ptr + 1, tl.program_id(0) + 7)  # two_values


@case()
def two_values():
    y = torch.zeros(2, dtype=torch.int32)
    return (y,), lambda: _claim_kernel[(2,)](y)


@triton.jit
def _then_another_kernel(y_ptr):
    tl.store(y_ptr, 7)  # the_same_value_and_then_another
    if tl.program_id(0) == 1:
        tl.store(y_ptr, 8)  # the_same_value_and_then_another


@case()
def the_same_value_and_then_another():
    y = torch.zeros(1, dtype=torch.int32)
    return (y,), lambda: _then_another_kernel[(2,)](y)


@triton.jit
def _neighbour_kernel(x_ptr, y_ptr, n):
    row = tl.program_id(0)
    tl.store(x_ptr + row, row)  # load_of_what_another_stores
    x = tl.load(x_ptr + (row + 1) % n)  # load_of_what_another_stores
    tl.store(y_ptr + row, x)  # load_of_what_another_stores


@case()
def load_of_what_another_stores():
    x, y = torch.zeros(3, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    return (x, y), lambda: _neighbour_kernel[(3,)](x, y, 3)


@triton.jit
def _overwrite_kernel(x_ptr, y_ptr):
    row = tl.program_id(0)
    x = tl.load(x_ptr + row + 1)  # store_of_what_another_loads
    tl.store(y_ptr + row, x)  # store_of_what_another_loads
    tl.store(x_ptr + row, -row)  # store_of_what_another_loads


@case()
def store_of_what_another_loads():
    x, y = torch.arange(5), torch.zeros(4, dtype=torch.int64)
    return (x, y), lambda: _overwrite_kernel[(4,)](x, y)


@triton.jit
def _aliases_kernel(x_ptr, y_ptr):
    row = tl.program_id(0)
    tl.store(y_ptr + row, row)  # through_two_arguments through_two_storages
    tl.load(x_ptr + row)  # through_two_arguments through_two_storages


@case()
def through_two_arguments():
    whole = torch.zeros(4, dtype=torch.int32)
    return (whole,), lambda: _aliases_kernel[(3,)](whole[:3], whole[1:])


@case()
def through_two_storages():
    whole = np.zeros(4, np.int32)
    x, y = torch.from_numpy(whole[:3]), torch.from_numpy(whole[1:])
    return (x, y), lambda: _aliases_kernel[(3,)](x, y)


@triton.jit
def _plain_read_kernel(count_ptr, y_ptr):
    row = tl.program_id(0)
    tl.atomic_add(count_ptr, 1, sem="relaxed")  # atomic_and_plain_load
    count = tl.load(count_ptr)  # atomic_and_plain_load
    tl.store(y_ptr + row, count)  # atomic_and_plain_load


@case()
def atomic_and_plain_load():
    count = torch.zeros(1, dtype=torch.int32)
    y = torch.zeros(3, dtype=torch.int32)
    return (count, y), lambda: _plain_read_kernel[(3,)](count, y)


@triton.jit
def _zeroing_kernel(count_ptr):
    if tl.program_id(0) == 0:
        tl.store(count_ptr, 0)  # zeroed_by_one
    tl.atomic_add(count_ptr, 1)  # zeroed_by_one


@case()
def zeroed_by_one():
    count = torch.ones(1, dtype=torch.int32)
    return (count,), lambda: _zeroing_kernel[(3,)](count)


@triton.jit
def _scope_kernel(count_ptr):
    tl.atomic_add(count_ptr, 1, scope="cta")  # atomic_of_one_program


@case()
def atomic_of_one_program():
    count = torch.zeros(1, dtype=torch.int32)
    return (count,), lambda: _scope_kernel[(3,)](count)


@triton.jit
def _bytes_kernel(x_ptr, y_ptr):
    row = tl.program_id(0)
    if row == 0:
        tl.store(x_ptr.to(tl.pointer_type(tl.int32)), 1)  # a_byte_of_a_word
    else:
        tl.store(y_ptr + row, tl.load(x_ptr + row))  # a_byte_of_a_word


@case()
def a_byte_of_a_word():
    x, y = torch.zeros(4, dtype=torch.int8), torch.zeros(3, dtype=torch.int8)
    return (x, y), lambda: _bytes_kernel[(3,)](x, y)


@triton.jit
def _word_kernel(x_ptr):
    row = tl.program_id(0)
    if row < 2:
        tl.store(x_ptr + row, row.to(tl.int8))  # a_word_over_bytes
    else:
        tl.store(x_ptr.to(tl.pointer_type(tl.int32)), 513)  # a_word_over_bytes


@case()
def a_word_over_bytes():
    x = torch.zeros(4, dtype=torch.int8)
    return (x,), lambda: _word_kernel[(3,)](x)


@triton.jit
def _halves_kernel(x_ptr, y_ptr):
    row = tl.program_id(0)
    if row == 0:
        tl.store((x_ptr + 1).to(tl.pointer_type(tl.int64)), 1)  # half_a_word
    elif row == 1:
        tl.store(y_ptr, tl.load(x_ptr + 2))  # half_a_word
    else:
        tl.store(y_ptr + 1, tl.load(x_ptr) + tl.load(x_ptr + 3))


@case()
def half_a_word():
    whole = np.zeros(5, np.int32)  # the tensor begins in the middle of a word
    x, y = torch.from_numpy(whole[1:]), torch.zeros(2, dtype=torch.int32)
    return (x, y), lambda: _halves_kernel[(3,)](x, y)


@triton.jit
def _lanes_kernel(y_ptr, B: tl.constexpr):
    at = tl.arange(0, B)
    tl.store(y_ptr + at // 2, at)  # lanes_of_one_store


@case()
def lanes_of_one_store():
    y = torch.zeros(4, dtype=torch.int32)
    return (y,), lambda: _lanes_kernel[(1,)](y, B=8)


@triton.jit
def _last_done_kernel(x_ptr, part_ptr, count_ptr, y_ptr, SEM: tl.constexpr):
    row, rows = tl.program_id(0), tl.num_programs(0)
    tl.store(part_ptr + row, tl.load(x_ptr + row) * 2)
    arrived = tl.atomic_add(count_ptr, 1, sem=SEM)
    if arrived == rows - 1:
        total = 0
        for i in range(rows):
            total += tl.load(part_ptr + i)  # relaxed_only acquires_only releases_only
        tl.store(y_ptr, total)
        tl.store(count_ptr, 0)  # relaxed_only acquires_only releases_only


def last_done(semantic):
    x, part = torch.arange(5), torch.zeros(5, dtype=torch.int64)
    count, y = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    return (y, part, count), lambda: _last_done_kernel[(5,)](
        x, part, count, y, SEM=semantic
    )


@case()
def relaxed_only():
    return last_done("relaxed")


@case()
def acquires_only():
    return last_done("acquire")


@case()
def releases_only():
    return last_done("release")


@triton.jit
def _first_done_kernel(part_ptr, count_ptr, y_ptr):
    row, rows = tl.program_id(0), tl.num_programs(0)
    arrived = tl.atomic_add(count_ptr, 1)
    tl.store(part_ptr + row, 3)
    if arrived == rows - 1:
        total = 0
        for i in range(rows):
            total += tl.load(part_ptr + i)  # stored_after_arrival
        tl.store(y_ptr, total)


@case()
def stored_after_arrival():
    part, y = torch.zeros(4, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    count = torch.zeros(1, dtype=torch.int32)
    return (y, part, count), lambda: _first_done_kernel[(4,)](part, count, y)


# -- order -------------------------------------------------------------------------


@triton.jit
def _exchange_kernel(y_ptr):
    tl.atomic_xchg(y_ptr, tl.program_id(0) + 1)  # exchange


@case()
def exchange():
    y = torch.zeros(1, dtype=torch.int32)
    return (y,), lambda: _exchange_kernel[(3,)](y)


@triton.jit
def _middle_kernel(y_ptr):
    row, rows = tl.program_id(0), tl.num_programs(0)
    inside = (row > 0) & (row < rows - 1)
    tl.atomic_xchg(y_ptr, inside.to(tl.int32))  # as_in_reverse


@case()
def as_in_reverse():
    y = torch.zeros(1, dtype=torch.int32)
    return (y,), lambda: _middle_kernel[(20,)](y)


@triton.jit
def _early_kernel(count_ptr, y_ptr):
    arrived = tl.atomic_add(count_ptr, 1)
    if (arrived == 0) & (tl.program_id(0) == 2):
        tl.store(y_ptr, 1)  # written_in_another_order


@case()
def written_in_another_order():
    count, y = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    return (count, y), lambda: _early_kernel[(3,)](count, y)


@triton.jit
def _float_sum_kernel(x_ptr, y_ptr):
    tl.atomic_add(y_ptr, tl.load(x_ptr + tl.program_id(0)))  # sum_of_floats


@case()
def sum_of_floats():
    x, y = torch.tensor([1e8, 1.0, -1e8, 1.0]), torch.zeros(1)
    return (x, y), lambda: _float_sum_kernel[(4,)](x, y)


@triton.jit
def _ticket_kernel(count_ptr, y_ptr):
    at = tl.atomic_add(count_ptr, 1)
    tl.store(y_ptr + at, tl.program_id(0))  # ticket


@case()
def ticket():
    count = torch.zeros(1, dtype=torch.int32)
    y = torch.zeros(4, dtype=torch.int32)
    return (count, y), lambda: _ticket_kernel[(4,)](count, y)


@triton.jit
def _wait_kernel(flag_ptr, y_ptr):
    row = tl.program_id(0)
    if row > 0:
        while tl.atomic_add(flag_ptr + row - 1, 0) == 0:  # waits
            pass
    tl.atomic_xchg(flag_ptr + row, 1)
    tl.store(y_ptr + row, 1)


@case()
def waits():
    flag, y = torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    return (flag, y), lambda: _wait_kernel[(2,)](flag, y)


# -- clean -------------------------------------------------------------------------


@triton.jit
def _masked_kernel(x_ptr, y_ptr, n, B: tl.constexpr):
    at = tl.program_id(0) * B + tl.arange(0, B)
    x = tl.load(x_ptr + at, mask=at < n, other=0.0)
    tl.store(y_ptr + at, x + x, mask=at < n)


@case()
def masked_tail():
    x, y = torch.randn(1000).bfloat16(), torch.zeros(1000, dtype=torch.bfloat16)
    return (x, y), lambda: _masked_kernel[(4,)](x, y, 1000, B=256)


@case()
def in_place():
    x = torch.randn(1000)
    return (x,), lambda: _masked_kernel[(4,)](x, x, 1000, B=256)


@triton.jit
def _count_kernel(y_ptr, B: tl.constexpr):
    at = tl.arange(0, B)
    tl.atomic_add(y_ptr + at % 3, tl.program_id(0))


@case()
def atomic_sum_of_integers():
    y = torch.zeros(3, dtype=torch.int32)
    return (y,), lambda: _count_kernel[(5,)](y, B=8)


@case()
def last_done_finishes():
    return last_done("acq_rel")


@triton.jit
def _flag_kernel(x_ptr, y_ptr):
    if tl.load(x_ptr + tl.program_id(0)) > 0:
        tl.store(y_ptr, 1)


@case()
def same_value():
    x, y = torch.tensor([1, 0, 1, 1]), torch.zeros(1, dtype=torch.int32)
    return (x, y), lambda: _flag_kernel[(4,)](x, y)


@triton.jit
def _lock_kernel(lock_ptr, y_ptr):
    while tl.atomic_cas(lock_ptr, 0, 1) == 1:
        pass
    tl.store(y_ptr, tl.load(y_ptr) + tl.program_id(0))
    tl.atomic_xchg(lock_ptr, 0)


@case()
def under_a_lock():
    lock, y = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    return (lock, y), lambda: _lock_kernel[(4,)](lock, y)


@triton.jit
def _optional_kernel(x_ptr, nothing_ptr, empty_ptr, y_ptr):
    row = tl.program_id(0)
    if nothing_ptr is not None:
        tl.store(nothing_ptr + row, 1)
    tl.store(y_ptr + row, tl.load(x_ptr + row) > 0)


@case()
def arguments_that_are_not_used():
    x, y = torch.tensor([1.0, -1.0]), torch.zeros(2, dtype=torch.bool)
    empty = torch.zeros(2, 0)
    return (y,), lambda: _optional_kernel[(2,)](x, None, empty, y_ptr=y)


@triton.jit
def _column_kernel(x_ptr, y_ptr, stride, B: tl.constexpr):
    at = tl.arange(0, B)
    tl.store(y_ptr + at, tl.load(x_ptr + at * stride))


@case()
def a_column():
    x, y = torch.arange(12).view(4, 3), torch.zeros(4, dtype=torch.int64)
    return (y,), lambda: _column_kernel[(1,)](x[:, 2], y, 3, B=4)


@triton.jit
def _block_kernel(x_ptr, y_ptr, n, B: tl.constexpr):
    start = tl.program_id(0) * B
    x = tl.make_block_ptr(x_ptr, (n,), (1,), (start,), (B,), (0,))
    y = tl.make_block_ptr(y_ptr, (n,), (1,), (start,), (B,), (0,))
    tl.store(y, tl.load(x, boundary_check=(0,)), boundary_check=(0,))


@case()
def block_pointers():
    x, y = torch.arange(10), torch.zeros(10, dtype=torch.int64)
    return (y,), lambda: _block_kernel[(3,)](x, y, 10, B=4)


@triton.jit
def _descriptor_kernel(x, y_ptr):
    at = tl.program_id(0) * 4
    loaded = x.load([at, 0])
    tl.store(y_ptr + at * 4 + tl.arange(0, 16), loaded.reshape(16))


@case()
def descriptors():
    x, y = torch.arange(32.0).view(8, 4), torch.zeros(32)
    descriptor = TensorDescriptor.from_tensor(x, [4, 4])
    return (y,), lambda: _descriptor_kernel[(2,)](descriptor, y)


@triton.jit
def _pair_kernel(pair, y_ptr):
    row = tl.program_id(0)
    tl.store(y_ptr + row, tl.load(pair[0] + row) + tl.load(pair[1] + row))


@case()
def tuples():
    pair, y = (torch.arange(3), torch.arange(3)), torch.zeros(3, dtype=torch.int64)
    return (y,), lambda: _pair_kernel[(3,)](pair, y)


@triton.jit
def _grid_kernel(y_ptr):
    x, y, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    height, depth = tl.num_programs(1), tl.num_programs(2)
    at = (x * height + y) * depth + z
    tl.store(y_ptr + at, 100 * x + 10 * y + z)  # the_last_of_a_grid


@case()
def a_grid_of_three():
    y = torch.zeros(2, 3, 4, dtype=torch.int32)
    return (y,), lambda: _grid_kernel[(2, 3, 4)](y)


@case()
def the_last_of_a_grid():
    y = torch.zeros(23, dtype=torch.int32)
    return (y,), lambda: _grid_kernel[(2, 3, 4)](y)


@triton.jit
def _two_bugs_kernel(y_ptr):
    tl.store(y_ptr + 3 + tl.program_id(0), 1)  # two_bugs
    tl.store(y_ptr + 2, tl.program_id(0))  # two_bugs


@case()
def two_bugs():
    y = torch.zeros(3, dtype=torch.int32)
    return (y,), lambda: [_two_bugs_kernel[(2,)](y) for _ in range(3)]


# -- the sanitizer itself ------------------------------------------------------------


def bits(tensors):
    return [t.reshape(-1).view(torch.uint8).tolist() for t in tensors]


def run(make, options):
    torch.manual_seed(0)
    tensors, launch = make()
    with Sanitizer(**options) as sanitizer:
        launch()
    watched = bits(tensors)
    found = {
        "faults": [dataclasses.asdict(fault) for fault in sanitizer.faults],
        "texts": [str(fault) for fault in sanitizer.faults],
        "kernels": {
            name: dataclasses.asdict(kernel) | {"sizes": len(kernel.sizes)}
            for name, kernel in sanitizer.kernels.items()
        },
        "watched": watched,
        "results": [t.tolist() for t in tensors],
    }
    kinds = {fault.kind for fault in sanitizer.faults}
    if not kinds & {"out of bounds", "misaligned"}:  # these are not carried out
        torch.manual_seed(0)
        tensors, launch = make()
        launch()
        found["unwatched"] = bits(tensors)
    return found


def hooks():
    """Everything that a sanitizer replaces or might."""
    owners = (interpreter, interpreter.GridExecutor, interpreter.InterpreterBuilder)
    return {
        (index, name): value
        for index, owner in enumerate(owners)
        for name, value in vars(owner).items()
    }


def raising():
    """At the first fault, nothing of it done, and all is as before afterwards."""
    before = hooks()
    whole = torch.zeros(16)
    sanitizer = Sanitizer(raises=True)
    found = {}
    try:
        with sanitizer:
            _fill_kernel[(4,)](whole[:10], 1.0, B=4)
    except KernelFault as error:
        found["raised"] = str(error)
    found["stored"] = whole.tolist()
    try:
        with sanitizer:
            _fill_kernel[(4,)](whole[:10], 1.0, B=4)
    except KernelFault as error:
        found["raised again"] = str(error)
    found["restored"] = hooks() == before
    y = torch.zeros(2, dtype=torch.int32)
    try:
        with Sanitizer(raises=True):
            _exchange_kernel[(3,)](y)
    except KernelFault as error:
        found["raised in another order"] = str(error)
    found["kept"] = y.tolist()
    found["restored after an order"] = hooks() == before
    try:
        with Sanitizer():
            raise KeyError("of the caller")
    except KeyError:
        found["restored after an error"] = hooks() == before
    with Sanitizer():
        try:
            with Sanitizer():
                pass
        except RuntimeError as error:
            found["two"] = str(error)
    found["restored after two"] = hooks() == before
    return found


@triton.jit
def _failing_kernel(y_ptr):
    tl.store(y_ptr, 1)
    if tl.program_id(0) == 1:
        tl.static_assert(False, "a mistake of the kernel")


def failing():
    """An error of a kernel comes out, and is said; the next launch is watched."""
    y = torch.zeros(1, dtype=torch.int32)
    with Sanitizer() as sanitizer:
        try:
            _failing_kernel[(2,)](y)
        except interpreter.InterpreterError as error:
            message = str(error)
        _exchange_kernel[(3,)](y)
    try:
        sanitizer.check()
    except KernelFault as error:
        checked = str(error)
    return {"message": message, "checked": checked.splitlines()}


def reordering():
    """How many launches also ran in other orders, out of three of each of two sizes."""
    x, y = torch.randn(8), torch.zeros(8)
    found = {}
    for most in (0, 2, 9):
        with Sanitizer(reorder=most) as sanitizer:
            for n in (8, 8, 8, 7, 7, 7):
                _masked_kernel[(2,)](x[:n], y[:n], n, B=4)
        kernel = sanitizer.kernels["_masked_kernel"]
        found[most] = [kernel.launches, kernel.reordered, len(kernel.sizes)]
    return found


def elsewhere():
    """Tensors whose memory the interpreter copies, as those of a device are."""

    class Storage:
        def __init__(self, storage):
            self.storage = storage

        def data_ptr(self):
            return self.storage.data_ptr()

        def cpu(self):
            return self.storage.clone()

        def copy_(self, other):
            self.storage.copy_(other)

    class Elsewhere:
        def __init__(self, tensor):
            self.tensor = tensor

        def untyped_storage(self):
            return Storage(self.tensor.untyped_storage())

        def __getattr__(self, name):
            return getattr(self.tensor, name)

    y = torch.zeros(1, dtype=torch.int32)
    with Sanitizer() as sanitizer:
        _exchange_kernel[(3,)](Elsewhere(y))
        _claim_kernel[(2,)](torch.zeros(2, dtype=torch.int32))
    return {
        "result": y.tolist(),
        "problems": {name: k.problem for name, k in sanitizer.kernels.items()},
        "faults": sorted({fault.kernel for fault in sanitizer.faults}),
    }


def on_a_device(lags):
    """Tensors of the pretend device, whose launches run when the host waits."""
    from vllm_ext.prove.pretend import DEVICE, PretendDevice

    seen = []
    with Sanitizer() as sanitizer, PretendDevice(lags=lags) as device:
        device.observers.append(lambda operation: seen.append(operation.kind))
        x = torch.arange(8.0, device=DEVICE)
        y = torch.zeros(6, device=DEVICE)
        _copy_kernel[(2,)](x, y, 8, B=4)
        result = y.tolist()
    return {
        "result": result,
        "faults": [str(fault) for fault in sanitizer.faults],
        "launches": seen.count("triton"),
    }


@triton.jit
def _wide_rows_kernel(x_ptr, counts_ptr, scale_ptr, stride, n, B: tl.constexpr):
    row = tl.program_id(0)
    scale = tl.load(scale_ptr + row)
    at = tl.program_id(1) * B + tl.arange(0, B)
    mask = at < n
    x = tl.load(x_ptr + row * stride + at, mask=mask)
    counts = tl.load(counts_ptr + row * stride + at, mask=mask, other=0)
    tl.store(x_ptr + row * stride + at, x * scale + counts, mask=mask)


def wide():
    """Milliseconds of 8 rows of 32,000 in blocks of 8192, watched in three orders."""
    x = torch.randn(8, 32000)
    counts = torch.ones(8, 32000, dtype=torch.int32)
    scale = torch.randn(8)

    def milliseconds():
        started = time.thread_time()
        _wide_rows_kernel[(8, 4)](x, counts, scale, 32000, 32000, B=8192)
        return 1e3 * (time.thread_time() - started)

    milliseconds()
    unwatched = min(milliseconds() for _ in range(3))
    with Sanitizer() as sanitizer:
        watched = min(milliseconds() for _ in range(3))
    return {
        "unwatched": unwatched,
        "watched": watched,
        "faults": [str(fault) for fault in sanitizer.faults],
    }


if __name__ == "__main__":
    before = hooks()
    found = {name: run(*made) for name, made in CASES.items()}
    report(
        {
            "cases": found,
            "restored": hooks() == before,
            "lane": bool(os.environ.get("VEXT_CPULANE")),
            "raising": raising(),
            "failing": failing(),
            "reordering": reordering(),
            "elsewhere": elsewhere(),
            "wide": wide(),
            "on a device": [on_a_device(lags) for lags in (False, True)],
        }
    )
