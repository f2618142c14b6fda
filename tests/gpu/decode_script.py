"""Answers to one workload on a GPU, with vLLM's own checks armed: stock or patched.

Graphs are captured as vLLM does by default, so decode steps are FULL replays. A wait
of the host for the device inside a step is an error, as is a kernel compiled in one.
Argument: the seed of the workload.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "patches" / "in_engine"))

import workload
from vllm import LLM

from vllm_ext_cpulane.engine import report
from vllm_ext_cpulane.tinymodel import write_model


def main() -> None:
    model = write_model(
        tempfile.mkdtemp(prefix="vllm-ext-gpu-"),
        *(workload.VOCAB,),
        hidden_size=512,
        layers=4,
        heads=8,
        kv_heads=2,
        head_dim=64,
        tokenizer=True,
        weights=True,
    )
    llm = LLM(
        model=str(model),
        max_model_len=512,
        max_num_seqs=16,
        max_logprobs=-1,
        enable_prefix_caching=False,
        gpu_memory_utilization=0.3,
        jit_monitor_mode="error",
    )
    answers = workload.run(llm, workload.requests(int(sys.argv[1]), 48))
    report(workload.findings(answers))


if __name__ == "__main__":
    main()
