"""The pretend device: kernels are really compiled, launches really vanish."""

import pytest

from vllm_ext_cpulane.engine import ScriptFailedError, run_script
from vllm_ext_cpulane.environment import lane_environment

# A kernel of vLLM's, since Triton reads the source of a kernel from its file.
SCRIPT = """
    import torch
    from vllm.triton_utils import HAS_TRITON
    from vllm.v1.worker.gpu import input_batch
    from vllm_ext_cpulane.discard import EFFECTS, LAUNCHES, OffClock
    from vllm_ext_cpulane.engine import report

    NAME = "_prepare_pos_seq_lens_kernel"
    kernel = input_batch._prepare_pos_seq_lens_kernel
    rows = 3
    inputs = (
        torch.arange(rows),
        torch.arange(rows + 1, dtype=torch.int32),
        torch.full((8,), 5, dtype=torch.int32),
    )
    positions = torch.full((16,), -1)
    lengths = torch.full((8,), -1, dtype=torch.int32)

    def launch():
        input_batch.prepare_pos_seq_lens(*inputs, positions, lengths)

    launch()
    launch()
    [compiled] = kernel.device_caches[0][0].values()
    found = {
        "has triton": HAS_TRITON,
        "launches": dict(LAUNCHES),
        "written": bool((positions != -1).any() or (lengths != -1).any()),
        "stages": sorted(compiled.asm),
        "target": ".target sm_90" in compiled.asm["ptx"],
        "off clock before": OffClock.seconds,
    }
    EFFECTS[NAME] = lambda *arguments: lengths.fill_(len(arguments))
    launch()
    found["effect saw"] = int(lengths[0])
    found["arguments"] = len(kernel.arg_names)
    found["off clock"] = OffClock.seconds
    found["launches after"] = LAUNCHES[NAME]
    report(found)
"""


@pytest.fixture(scope="module")
def found():
    return run_script(SCRIPT, lane_environment("discard") | {"VEXT": "0"})


def test_a_kernel_is_compiled_to_machine_code_for_sm_90(found):
    assert found["has triton"]
    assert {"ttir", "ptx", "cubin"} <= set(found["stages"])
    assert found["target"]


def test_a_launch_is_counted_by_name_and_writes_nothing(found):
    assert found["launches"] == {"_prepare_pos_seq_lens_kernel": 2}
    assert not found["written"]


def test_an_effect_gets_every_argument_and_its_time_is_set_aside(found):
    assert found["effect saw"] == found["arguments"]
    assert found["off clock before"] == 0.0 < found["off clock"]
    assert found["launches after"] == 3


def test_an_interpreting_triton_is_refused():
    script = "from vllm_ext_cpulane import discard; discard.install()"
    with pytest.raises(ScriptFailedError, match="imported as an interpreter"):
        run_script(script, {"TRITON_INTERPRET": "1", "VEXT_CPULANE": ""})
