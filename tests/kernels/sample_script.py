"""Run in a process of the lane: ``sample`` and ``logprobs`` on the pretend device.

See test_sample_proofs.py.
"""

import sys
from pathlib import Path

import torch

from vllm_ext_cpulane import interpret
from vllm_ext_cpulane.engine import report

interpret.install()
sys.path.insert(0, str(Path(__file__).parents[1]))

from sampling_batch import Request, ours  # noqa: E402

from vllm_ext.kernels import logprobs  # noqa: E402
from vllm_ext.kernels import sample as module  # noqa: E402
from vllm_ext.prove import graphs  # noqa: E402
from vllm_ext.prove.pretend import DEVICE, PretendDevice, data_of  # noqa: E402
from vllm_ext.prove.syncs import watch  # noqa: E402

ROWS, VOCABULARY = 6, 300
BATCHES = [
    [Request()] * 3 + [Request(1.0, 5)] * 3,
    [Request(0.7, 1, min_p=0.1), Request(1.2, 2, logit_bias={7: 3.0})] * 3,
    [Request(0.9, 3, repetition_penalty=1.3, prompt=range(9), output=[4, 4])] * 6,
    [Request(1.0, 4, allowed_token_ids=[3, 60, 200])] * 6,
]


def state(step, device):
    """Rows, seats, positions, logits and requests of a step."""
    generator = torch.Generator().manual_seed(step)
    logits = torch.randn(ROWS, VOCABULARY, generator=generator).bfloat16()
    made = ours(module, BATCHES[step], VOCABULARY, "cpu")
    return [
        *(logits, torch.tensor([ROWS - step], dtype=torch.int32)),
        *(torch.arange(ROWS).flip(0).to(torch.int32), torch.arange(ROWS) * 7 + step),
        *vars(made).values(),
    ]


def main():
    found = {"replays": []}
    with PretendDevice() as device:
        memory = [tensor.to(DEVICE) for tensor in state(0, DEVICE)]
        logits, number, seats, positions, *fields = memory
        requests = module.Requests(*fields)
        each = torch.arange(ROWS, device=DEVICE)
        out = torch.full((ROWS,), -1, device=DEVICE)
        scratch = module.make_scratch(ROWS, VOCABULARY, DEVICE, tile=64, programs=20)
        wanted = torch.tensor([0, 3, 2, -1, 1, 3], dtype=torch.int32, device=DEVICE)
        ids = torch.full((ROWS, 4), -1, device=DEVICE)
        scores = torch.zeros(ROWS, 4, device=DEVICE)
        ranks = torch.full((ROWS,), -1, device=DEVICE)
        scratches = (
            scratch,
            logprobs.make_scratch(ROWS, VOCABULARY, DEVICE, tile=64, programs=20),
        )

        def step():
            module.sample(
                logits, number, requests, seats, positions, each, out, scratches[0]
            )
            logprobs.logprobs(
                *(logits, number, wanted, seats, out, ids, scores, ranks),
                scratches[1],
            )

        step()
        with watch(device) as seen:
            step()
        found["waits"] = [str(wait) for wait in seen.waits]
        found["counts"] = seen.counts
        captured = []
        for _ in range(2):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            captured.append(graph)
        found["differences"] = [str(each) for each in graphs.diff(*captured)]
        for number_of_step in range(len(BATCHES)):
            fresh = state(number_of_step, DEVICE)
            for tensor, values in zip(memory, fresh, strict=True):
                tensor.copy_(values)
            for written in (out, ids, ranks):
                written.fill_(-1)
            captured[0].replay()
            logits_, number_, seats_, positions_, *fields_ = fresh
            expected = module.sample_reference(
                *(logits_, number_, module.Requests(*fields_), seats_, positions_),
                *(torch.arange(ROWS), torch.full((ROWS,), -1)),
            )
            arguments = (logits_, number_, data_of(wanted), seats_, expected)
            likeliest = [torch.full_like(data_of(x), -1) for x in (ids, scores, ranks)]
            logprobs.logprobs_reference(*arguments, *likeliest)
            replayed = [data_of(written).tolist() for written in (out, ids, ranks)]
            drawn = (expected, likeliest[0], likeliest[2])
            found["replays"].append([replayed, [tokens.tolist() for tokens in drawn]])
    report(found)


main()
