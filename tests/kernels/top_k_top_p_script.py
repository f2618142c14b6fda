"""Run in a process of the lane: the launchers on the pretend device. See
test_top_k_top_p_proofs.py."""

import sys
from pathlib import Path

import torch

from vllm_ext_cpulane import interpret
from vllm_ext_cpulane.engine import report

interpret.install()
sys.path.insert(0, str(Path(__file__).parents[1]))

from filtering_batch import Filtered, asked, scratch_for  # noqa: E402

from vllm_ext.kernels import top_k_top_p as module  # noqa: E402
from vllm_ext.kernels.sample import Requests  # noqa: E402
from vllm_ext.prove import graphs  # noqa: E402
from vllm_ext.prove.pretend import DEVICE, PretendDevice, data_of  # noqa: E402
from vllm_ext.prove.syncs import watch  # noqa: E402

ROWS, VOCABULARY = 4, 150
BATCHES = [
    [Filtered(), Filtered(2.0, 5, top_k=5)] * 2,
    [Filtered(1.7, 1, top_p=0.6), Filtered(2.0, 2, top_k=60, top_p=0.8)] * 2,
    [Filtered(2.9, 3, top_k=9, logit_bias={7: 3.0}, min_p=0.1), Filtered(1.0, 4)] * 2,
]


def state(step):
    """Rows, seats, positions, limits, shares, logits and requests of a step."""
    generator = torch.Generator().manual_seed(step)
    return [
        torch.randn(ROWS, VOCABULARY, generator=generator),
        torch.tensor([ROWS - step], dtype=torch.int32),
        torch.arange(ROWS).flip(0).to(torch.int32),
        torch.arange(ROWS) * 7 + step,
        torch.arange(3, 3 + ROWS, dtype=torch.int32) * (1 + step),
        torch.arange(1, 1 + ROWS) / 5,
        *vars(asked(BATCHES[step], VOCABULARY, "cpu")).values(),
    ]


def main():
    found = {"replays": []}
    with PretendDevice() as device:
        memory = [tensor.to(DEVICE) for tensor in state(0)]
        logits, number, seats, positions, k, p, *fields = memory
        requests = Requests(*fields)
        each = torch.arange(ROWS, device=DEVICE)
        out = torch.full((ROWS,), -1, device=DEVICE)
        masked = torch.empty(ROWS, VOCABULARY, device=DEVICE)
        scratch = scratch_for(ROWS, VOCABULARY, DEVICE)
        given = (logits, number, requests, seats, positions, each, out, scratch)

        def step():
            module.sample_top_k_top_p(*given)

        def mask():
            masked.copy_(logits)
            module.mask_top_k_top_p(masked, k, p, scratch)

        for name, work in {"sample": step, "mask": mask}.items():
            work()
            with watch(device) as seen:
                work()
            found[name] = [[str(wait) for wait in seen.waits], seen.counts]
        captured = []
        for _ in range(2):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
                mask()
            captured.append(graph)
        found["differences"] = [str(each) for each in graphs.diff(*captured)]
        for number_of_step in range(len(BATCHES)):
            fresh = state(number_of_step)
            for tensor, values in zip(memory, fresh, strict=True):
                tensor.copy_(values)
            out.fill_(-1)
            captured[0].replay()
            logits_, number_, seats_, positions_, k_, p_, *fields_ = fresh
            expected = module.sample_top_k_top_p_reference(
                *(logits_, number_, Requests(*fields_), seats_, positions_),
                *(torch.arange(ROWS), torch.full((ROWS,), -1)),
            )
            rest = module.mask_top_k_top_p_reference(logits_, k_, p_)
            same = torch.equal(data_of(masked), rest)
            found["replays"].append([data_of(out).tolist(), expected.tolist(), same])
    report(found)


main()
