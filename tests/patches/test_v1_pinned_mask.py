"""The mask of allowed tokens: stock's, pinned, and copied without a wait."""

from __future__ import annotations

import pytest
import torch

from vllm_ext.patches.v1_pinned_mask import PATCH
from vllm_ext.prove.pretend import DEVICE, PretendDevice
from vllm_ext.prove.syncs import watch
from vllm_ext.testing import applied

VOCAB = 24
ROWS = 4


@pytest.fixture
def device(monkeypatch):
    """A pretend device, on a vLLM that takes host memory to be pinnable."""
    from vllm.v1.worker import gpu_input_batch

    from vllm_ext.patches.v1_pinned_mask import replacement

    for module in (gpu_input_batch, replacement):
        monkeypatch.setattr(module, "PIN_MEMORY", True)
    with PretendDevice() as device:
        yield device


def batch():
    from vllm.v1.worker.gpu_input_batch import InputBatch

    return InputBatch(
        max_num_reqs=ROWS,
        max_model_len=64,
        max_num_batched_tokens=64,
        device=torch.device(DEVICE, 0),
        vocab_size=VOCAB,
        block_sizes=[16],
        max_num_blocks_per_req=[4],
    )


def request(name, allowed):
    from vllm import SamplingParams
    from vllm.v1.worker.gpu_input_batch import CachedRequestState

    return CachedRequestState(
        req_id=name,
        prompt_token_ids=[1, 2],
        mm_features=[],
        sampling_params=SamplingParams(allowed_token_ids=allowed),
        generator=None,
        block_ids=([0],),
        num_computed_tokens=0,
        output_token_ids=[],
    )


def come_and_go(device):
    """Requests with and without allowed tokens; the masks, and what waited."""
    side, masks, waits = batch(), [], []

    def look():
        side.condense()
        with watch(device) as found:
            side.refresh_metadata()
        mask = side.sampling_metadata.allowed_token_ids_mask
        masks.append(None if mask is None else mask.cpu().tolist())
        waits.extend(found.waits)

    side.add_request(request("a", None))
    look()
    side.add_request(request("b", [3, 4]))
    side.add_request(request("c", [23]))
    look()
    side.remove_request("b")
    look()
    side.add_request(request("d", [0]))
    side.add_request(request("e", None))
    side.swap_states(0, 2)
    look()
    for name in "acd":
        side.remove_request(name)
    look()
    return side, masks, waits


def test_same_masks_and_no_wait(device):
    _, expected, stock = come_and_go(device)
    with applied(PATCH):
        side, actual, ours = come_and_go(device)
    assert actual == expected
    assert [mask is None for mask in actual] == [True, False, False, False, True]
    assert {wait.where.function for wait in stock} == {"copy_slice"}
    assert ours == []
    assert side.allowed_token_ids_mask_cpu_tensor.is_pinned()


def test_a_mask_from_before_is_pinned_when_the_next_request_comes(device):
    side = batch()
    side.add_request(request("a", [5]))
    with applied(PATCH):
        side.add_request(request("b", [6]))
    mask = side.allowed_token_ids_mask_cpu_tensor
    assert mask.is_pinned()
    assert (~mask).nonzero().tolist()[:2] == [[0, 5], [1, 6]]


def test_nothing_is_pinned_for_other_requests_or_without_pinned_memory(
    device, monkeypatch
):
    from vllm_ext.patches.v1_pinned_mask import replacement

    side = batch()
    with applied(PATCH):
        side.add_request(request("a", None))
        assert side.allowed_token_ids_mask_cpu_tensor is None
        monkeypatch.setattr(replacement, "PIN_MEMORY", False)
        side.add_request(request("b", [5]))
    assert not side.allowed_token_ids_mask_cpu_tensor.is_pinned()
