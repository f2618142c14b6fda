"""What counts as a submission: known operations, known numbers."""

import pytest

from vllm_ext_cpulane.engine import run_script
from vllm_ext_cpulane.environment import lane_environment

# As in an engine: the CPU worker's replacements are in place, a pool of buffers was
# made while somebody watched.
SCRIPT = """
    import numpy as np
    import torch
    import vllm.v1.worker.cpu.shm
    from vllm.utils import torch_utils
    from vllm.v1.outputs import LogprobsTensors
    from vllm.v1.worker.gpu import input_batch
    from vllm.v1.worker.gpu.async_utils import async_copy_to_np
    from vllm.v1.worker.gpu.buffer_utils import UvaBackedTensor
    from vllm_ext_cpulane.discard import LAUNCHES
    from vllm_ext_cpulane.engine import report

    from vllm_ext.submissions import HostMemory, Submissions

    host = HostMemory()
    with host.watching():
        uva = UvaBackedTensor(8, dtype=torch.float32)
        pinned = torch.zeros(4)
        pinned.numpy()
    device, other = torch.ones(4), torch.ones(4)
    index = torch.tensor([0, 1])
    logprobs = LogprobsTensors(torch.ones(2, 3), torch.ones(2, 3), torch.ones(2))
    starts = torch.arange(3, dtype=torch.int32)
    lengths = torch.zeros(8, dtype=torch.int32)

    def launch():
        input_batch.prepare_pos_seq_lens(
            index, starts, lengths, torch.zeros(16, dtype=torch.int64), lengths
        )

    def host_arithmetic():
        row = torch.from_numpy(np.arange(4))
        return (row + 1).max().item()

    def repeated_h2d():
        first = torch_utils.async_tensor_h2d(np.arange(4), device="cpu")
        return first + 1

    cases = {
        "nothing": lambda: None,
        "view": lambda: device[1:].view(-1).unsqueeze(0),
        "allocation": lambda: (torch.empty(3), device.new_empty(2), device.detach()),
        "fill": lambda: torch.zeros(3),
        "new ones": lambda: device.new_ones(2),
        "arithmetic": lambda: device + other,
        "gather by index": lambda: device[index],
        "two": lambda: (device * 2).sum(),
        "device to device": lambda: device.copy_(other),
        "host to device": lambda: device.copy_(pinned),
        "device to host": lambda: pinned.copy_(device),
        "host to host": lambda: pinned.copy_(torch.from_numpy(np.ones(4, "f4"))),
        "host arithmetic": host_arithmetic,
        "read": lambda: device[0].item(),
        "vllm h2d": lambda: torch_utils.async_tensor_h2d(np.arange(4), device="cpu"),
        "vllm h2d into": lambda: torch_utils.async_tensor_h2d(
            np.arange(4, dtype="f4"), out=other
        ),
        "vllm h2d, then a kernel": repeated_h2d,
        "vllm d2h": lambda: async_copy_to_np(device),
        "to the host, no copy": lambda: device.to("cpu", non_blocking=True),
        "logprobs": lambda: logprobs.to_cpu_nonblocking(),
        "uva staging": lambda: uva.copy_to_uva(),
        "uva staging of a tensor": lambda: uva.pool.copy_to_uva(uva.cpu),
        "reshape to a view": lambda: device.reshape(2, 2).contiguous(),
        "reshape to a copy": lambda: device.expand(2, 4).reshape(8),
        "branch": lambda: bool(device.sum() > 3),
        "convert to the same": lambda: device.to(torch.float32),
        "convert": lambda: device.to(torch.float64),
        "kernel reads uva": lambda: uva.gpu[index],
        "kernel reads nothing else": lambda: uva.gpu + 1,
        "triton": launch,
    }
    found = {}
    for name, case in cases.items():
        with torch.inference_mode(), Submissions(host, LAUNCHES) as counted:
            case()
        found[name] = {kind: n for kind, n in counted.kinds.items() if n}

    # None of that made the device's memory look like the host's.
    with Submissions(host, LAUNCHES) as counted:
        device + other
        with counted.paused():
            device + other
        counted.add("graph", "replay")
    found["afterwards"] = {kind: n for kind, n in counted.kinds.items() if n}
    with torch.inference_mode():
        device + other
    found["left"] = counted.kinds["aten"]
    found["stock again"] = [
        "numpy" in vars(torch.Tensor),
        "to" in vars(torch.Tensor),
        torch_utils.async_tensor_h2d.__module__,
    ]
    report(found)
"""


@pytest.fixture(scope="module")
def found():
    return run_script(SCRIPT, lane_environment("discard") | {"VEXT": "0"})


@pytest.mark.parametrize(
    ("case", "counted"),
    [
        ("nothing", {}),
        ("view", {}),
        ("allocation", {}),
        ("fill", {"aten": 1}),
        ("new ones", {"aten": 1}),
        ("arithmetic", {"aten": 1}),
        ("gather by index", {"aten": 1}),
        ("two", {"aten": 2}),
        ("device to device", {"aten": 1}),
        ("host to device", {"h2d": 1}),
        ("device to host", {"d2h": 1}),
        ("host to host", {}),
        ("host arithmetic", {}),
        ("read", {"d2h": 1}),
        ("vllm h2d", {"h2d": 1}),
        ("vllm h2d into", {"h2d": 1}),
        ("vllm h2d, then a kernel", {"h2d": 1, "aten": 1}),
        ("vllm d2h", {"d2h": 1}),
        ("to the host, no copy", {"d2h": 1}),
        ("logprobs", {"d2h": 3}),
        ("uva staging", {}),
        ("uva staging of a tensor", {}),
        ("reshape to a view", {}),
        ("reshape to a copy", {"aten": 1}),
        ("branch", {"aten": 2, "d2h": 1}),
        ("convert to the same", {}),
        ("convert", {"aten": 1}),
        ("kernel reads uva", {"aten": 1}),
        ("kernel reads nothing else", {"aten": 1}),
        ("triton", {"triton": 1, "aten": 1}),  # its caller makes one tensor
        ("afterwards", {"aten": 1, "graph": 1}),
    ],
)
def test_known_operations_give_known_numbers(found, case, counted):
    assert found[case] == counted


def test_nothing_is_counted_or_replaced_once_it_was_left(found):
    assert found["left"] == 1
    assert found["stock again"] == [False, False, "vllm.v1.worker.cpu.shm"]
