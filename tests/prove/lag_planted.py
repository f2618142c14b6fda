"""A stock engine, sound and with bugs that show only when the device lags."""

import sys
from unittest import mock

import torch

from vllm_ext.prove.engine import booted
from vllm_ext.prove.pretend import Event, PretendDevice, Stream
from vllm_ext_cpulane.engine import report

RUNNER = "vllm.v1.worker.gpu.model_runner"


def one_staging_buffer():
    """The host overwrites what a step in flight has yet to copy."""
    kept = {}

    def async_tensor_h2d(data, device=None, dtype=None, out=None):
        data = torch.as_tensor(data, dtype=dtype if out is None else out.dtype)
        size = (data.shape, data.dtype)
        if size not in kept:
            kept[size] = torch.empty(*size[:1], dtype=data.dtype, pin_memory=True)
        kept[size].copy_(data)
        if out is not None:
            return out.copy_(kept[size], non_blocking=True)
        return kept[size].to(device, non_blocking=True)

    return mock.patch(f"{RUNNER}.async_tensor_h2d", async_tensor_h2d)


def decode(llm):
    from vllm import SamplingParams

    engine = llm.llm_engine
    answers = {}
    for step in range(24):
        if step % 3 == 0 and step < 12:  # joins and leaves change what is staged
            params = SamplingParams(
                **{"max_tokens": 5 + step, "ignore_eos": True, "seed": step},
                temperature=step % 6 / 3,
                detokenize=False,
            )
            prompt = {"prompt_token_ids": [4 + step, 9, 60 + step]}
            engine.add_request(str(step), prompt, params)
        for answer in engine.step():
            answers[answer.request_id] = list(answer.outputs[0].token_ids)
    if engine.has_unfinished_requests():  # a step's tokens were lost
        engine.abort_request([str(step) for step in range(0, 12, 3)])
    return answers


found = {}
with PretendDevice(lags=sys.argv[1] == "lags") as device, booted(device) as llm:
    found["sound"] = decode(llm)
    with mock.patch.object(Stream, "wait_stream", return_value=None):
        found["a copy that starts early"] = decode(llm)
    with one_staging_buffer():
        found["one staging buffer"] = decode(llm)
    with mock.patch.object(Event, "synchronize", return_value=None):
        found["no wait for the output"] = decode(llm)
report(found)
