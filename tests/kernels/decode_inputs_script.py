"""Run in a process of the lane: ``prep`` and ``post`` on the pretend device.

See test_decode_inputs_proofs.py.
"""

import numpy as np
import torch

from vllm_ext_cpulane import interpret
from vllm_ext_cpulane.engine import report

interpret.install()

from vllm_ext.kernels import decode_inputs as module  # noqa: E402
from vllm_ext.prove import graphs  # noqa: E402
from vllm_ext.prove.pretend import DEVICE, PretendDevice, data_of  # noqa: E402
from vllm_ext.prove.syncs import watch  # noqa: E402

SEATS, PADDED, LENGTH, V = 7, 4, 60, 50
SIZES, REACHES = [16, 4], [0, 9]
# Seats, row of the ring, and blocks, of steps one after the other.
STEPS = [
    ([3, 0], 0, [(0, 0, 1, 70), (0, 1, 4, 71)]),
    ([0, 3, 5, 6], 1, []),
    ([], 2, []),
    ([6], 0, [(0, 1, 11, 72)]),
]


def memory(device):
    """What is kept between steps, and what a step writes, by name."""
    generator = torch.Generator().manual_seed(1)

    def numbers(*shape):
        values = torch.randint(1, V, shape, generator=generator)
        return values.to(torch.int32)

    computed = torch.tensor([22, 0, 0, 16, 0, 5, 42], dtype=torch.int32)
    made = {
        "computed": computed,
        "total": computed + 1,
        "last": numbers(SEATS, 1).long(),
        "all_tokens": numbers(SEATS, LENGTH),
        "counts": numbers(SEATS, V),
        "table 0": numbers(SEATS, LENGTH // 16 + 1),
        "table 1": numbers(SEATS, LENGTH // 4 + 1),
        "input table 0": numbers(PADDED + 1, LENGTH // 16 + 1),
        "input table 1": numbers(PADDED + 1, LENGTH // 4 + 1),
        "slots": numbers(2, PADDED + 1).long(),
        "input_ids": numbers(PADDED + 1),
        "positions": numbers(PADDED + 1).long(),
        "seq_lens": numbers(PADDED + 1),
        "query_start_loc": numbers(PADDED + 2),
        "is_padding": numbers(PADDED + 1) > 20,
        "ring": numbers(3, PADDED),
        "tokens": numbers(PADDED).long(),
    }
    return {name: tensor.to(device) for name, tensor in made.items()}


def groups_of(memory):
    return module.make_groups(
        [memory["table 0"], memory["table 1"]],
        [memory["input table 0"], memory["input table 1"]],
        *(memory["slots"], SIZES, REACHES),
    )


def step(memory, staging, groups, prep=module.prep, post=module.post):
    prep(
        *(staging, PADDED, memory["computed"], memory["last"], groups),
        *(memory["input_ids"], memory["positions"], memory["seq_lens"]),
        *(memory["query_start_loc"], memory["is_padding"]),
    )
    post(
        *(staging, PADDED, memory["tokens"], memory["ring"], memory["last"]),
        *(memory["all_tokens"], memory["total"], memory["computed"]),
        memory["counts"],
    )


def main():
    found = {"replays": []}
    with PretendDevice() as device:
        ours = memory(DEVICE)
        groups = groups_of(ours)
        pinned = torch.zeros(module.words(PADDED, 2), dtype=torch.int32).pin_memory()
        staging = pinned.to(DEVICE)
        packed = pinned.numpy()
        step(ours, staging, groups)  # of no request: it warms up and does nothing
        with watch(device) as seen:
            step(ours, staging, groups)
        found["waits"] = [str(wait) for wait in seen.waits]
        found["counts"] = seen.counts
        captured = []
        for _ in range(2):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step(ours, staging, groups)
            captured.append(graph)
        found["differences"] = [str(each) for each in graphs.diff(*captured)]
        fresh = memory(DEVICE)  # capturing runs nothing, warming up writes padding
        for name, tensor in ours.items():
            tensor.copy_(fresh[name])
        theirs = memory("cpu")
        plain = groups_of(theirs)
        for number, (seats, slot, appended) in enumerate(STEPS):
            tokens = (torch.arange(PADDED) * 13 + number) % V
            for memory_ in (ours, theirs):
                memory_["tokens"].copy_(tokens)
            module.pack(packed, PADDED, 2, seats, slot, appended)
            staging.copy_(pinned, non_blocking=True)
            captured[0].replay()
            torch.cuda.synchronize()
            step(
                *(theirs, torch.from_numpy(np.array(packed)), plain),
                *(module.prep_reference, module.post_reference),
            )
            found["replays"].append(
                [
                    name
                    for name, tensor in theirs.items()
                    if not torch.equal(data_of(ours[name]), tensor)
                ]
            )
        found["computed"] = theirs["computed"].tolist()
    report(found)


main()
