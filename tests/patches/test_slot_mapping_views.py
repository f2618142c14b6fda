"""The remembered slot mappings are the ones that stock would build."""

import gc
import random
import weakref
from types import SimpleNamespace

import pytest
import torch

from vllm_ext.patches.slot_mapping_views import PATCH
from vllm_ext.patches.slot_mapping_views.replacement import MAX_SIZES, remember_views
from vllm_ext.testing import applied


class Config:
    """As much of a KV cache configuration as is read."""

    def __init__(self, *groups):
        self.kv_cache_groups = [SimpleNamespace(layer_names=list(g)) for g in groups]


@pytest.fixture(scope="module")
def stock():
    from vllm.v1.worker.gpu.attn_utils import build_slot_mappings_by_layer

    return build_slot_mappings_by_layer


@pytest.fixture
def counted(stock):
    """The patched function, and the arguments with which stock was called."""
    calls = []

    def build(slot_mappings, config):
        calls.append(slot_mappings.shape[1])
        return stock(slot_mappings, config)

    return remember_views(build), calls


def assert_same(ours, theirs):
    assert list(ours) == list(theirs)
    for name, view in theirs.items():
        assert ours[name].data_ptr() == view.data_ptr()
        assert (ours[name].shape, ours[name].stride()) == (view.shape, view.stride())
        assert ours[name].dtype == view.dtype


def test_same_views_as_stock(counted, stock):
    """Several groups, sizes and buffers, whatever came before."""
    patched, calls = counted
    choose = random.Random(0)
    configs = [Config("ab"), Config("ab", "c"), Config("", "cde", "f")]
    buffers = [torch.zeros(3, 64, dtype=torch.int64) for _ in range(2)]
    config = configs[0]
    for _ in range(400):
        if choose.random() < 0.1:
            config = choose.choice(configs)
        buffer = choose.choice(buffers)[: len(config.kv_cache_groups)]
        first, last = sorted((choose.randint(0, 3), choose.randint(1, 9)))
        slots = buffer[:, first:last]
        assert_same(patched(slots, config), stock(slots, config))
    assert len(calls) < 400


def test_a_view_shows_what_is_written_later(counted):
    patched, calls = counted
    buffer, config = torch.zeros(1, 8, dtype=torch.int64), Config("a")
    patched(buffer[:, :4], config)
    buffer.fill_(5)
    assert patched(buffer[:, :4], config)["a"].tolist() == [5] * 4
    assert calls == [4]


def test_what_a_caller_does_to_it_stays_there(counted):
    patched, _ = counted
    buffer, config = torch.zeros(1, 8, dtype=torch.int64), Config("ab")
    patched(buffer, config).clear()
    assert list(patched(buffer, config)) == ["a", "b"]


def test_a_layer_that_was_added_is_there(counted):
    patched, _ = counted
    buffer, config = torch.zeros(1, 8, dtype=torch.int64), Config("a")
    patched(buffer, config)
    config.kv_cache_groups[0].layer_names.append("b")
    assert list(patched(buffer, config)) == ["a", "b"]


def test_sizes_that_do_not_come_back_are_dropped(counted):
    """Prefills of every size: the sizes in use stay, and nothing grows."""
    patched, calls = counted
    buffer, config = torch.zeros(1, 4 * MAX_SIZES, dtype=torch.int64), Config("a")
    kept = [weakref.ref(patched(buffer[:, :n], config)["a"]) for n in range(1, 301)]
    patched(buffer[:, :300], config)
    gc.collect()
    assert sum(view() is not None for view in kept) == MAX_SIZES
    assert len(calls) == 300
    patched(buffer[:, :1], config)
    assert calls[-1] == 1


def test_nothing_outlives_the_configuration(counted):
    patched, _ = counted
    buffer, config = torch.zeros(1, 8, dtype=torch.int64), Config("a")
    view = weakref.ref(patched(buffer, config)["a"])
    assert view() is not None
    del config
    gc.collect()
    assert view() is None


def test_it_is_found_where_vllm_calls_it(stock):
    from vllm.v1.worker.gpu import cudagraph_utils, model_runner

    buffer, config = torch.zeros(1, 8, dtype=torch.int64), Config("a")
    with applied(PATCH) as outcome:
        for module in (model_runner, cudagraph_utils):
            assert module.build_slot_mappings_by_layer is not stock
            views = module.build_slot_mappings_by_layer(buffer, config)
            assert_same(views, stock(buffer, config))
        assert sum(outcome.calls.values()) == 2
    assert model_runner.build_slot_mappings_by_layer is stock
