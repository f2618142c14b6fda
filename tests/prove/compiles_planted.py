"""Steps that compile again and again, and steps that do not."""

import torch
import triton
import triton.language as tl
from triton import knobs

from vllm_ext.prove.compiles import Compiles
from vllm_ext_cpulane import discard
from vllm_ext_cpulane.engine import report

discard.install()


@triton.jit
def _scale_kernel(x_ptr, factor, STEP: tl.constexpr):
    at = tl.program_id(0)
    tl.store(x_ptr + at, tl.load(x_ptr + at) * factor + STEP)


x = torch.zeros(8)


def compiled(launch, rounds=4):
    launch(0)  # the warm-up
    with Compiles() as seen:
        for step in range(1, rounds):
            launch(step)
    return seen.names


heard = []


def own_hook(**details):
    heard.append(details["fn"].name)


knobs.runtime.jit_post_compile_hook = own_hook
found = {
    "clean": compiled(lambda step: _scale_kernel[(8,)](x, 3 + 2 * step, STEP=7)),
    "a constant that counts": compiled(
        lambda step: _scale_kernel[(8,)](x, 3, STEP=step)
    ),
    "an integer that becomes divisible by 16": compiled(
        lambda step: _scale_kernel[(8,)](x, 13 + step, STEP=7)
    ),
    "another dtype": compiled(
        lambda step: _scale_kernel[(8,)](
            x.to([torch.float32, torch.float16, torch.float64][step % 3]), 3, STEP=7
        )
    ),
    "hook restored": knobs.runtime.jit_post_compile_hook is own_hook,
}
found["the hook before heard too"] = len(heard)
report(found)
