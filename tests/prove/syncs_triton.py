"""Run in a process of the lane: launches on the pretend device. See test_pretend.py."""

import torch

from vllm_ext_cpulane import interpret
from vllm_ext_cpulane.engine import report

interpret.install()

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from vllm_ext.prove.pretend import DEVICE, PretendDevice, uva_view  # noqa: E402


@triton.jit
def _add_kernel(left_ptr, right_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(left_ptr + at) + tl.load(right_ptr + at))


def plain():
    """A launch, who saw it, and what comes of host memory."""
    with PretendDevice() as device:
        left, out = torch.arange(4, device=DEVICE), torch.arange(4, device=DEVICE)
        seen = []
        device.observers.append(seen.append)
        _add_kernel[(2,)](left, left, out, BLOCK=2)
        device.observers.clear()
        try:
            _add_kernel[(2,)](torch.arange(4), left, out, BLOCK=2)
            refused = "not refused"
        except ValueError as error:
            refused = str(error)
        return {
            "seen": [[o.kind, o.name, [*o.grid], o.where.text[:18]] for o in seen],
            "sum": out.tolist(),
            "refused": refused,
        }


def overwrite(lags, wait):
    """One pinned slot, overwritten after the launch that reads it."""
    with PretendDevice(lags=lags):
        slot = torch.ones(2, dtype=torch.int64, pin_memory=True)
        nothing = torch.zeros(2, dtype=torch.int64, device=DEVICE)
        out = torch.empty(2, dtype=torch.int64, device=DEVICE)
        _add_kernel[(1,)](uva_view(slot), nothing, out, BLOCK=2)
        if wait:
            torch.cuda.current_stream().record_event().synchronize()
        slot.fill_(9)
        return out.tolist()


def both(wait):
    return {
        "prompt": overwrite(lags=False, wait=wait),
        "lagging": overwrite(lags=True, wait=wait),
    }


report(plain() | {"overwritten": both(wait=False), "waited": both(wait=True)})
