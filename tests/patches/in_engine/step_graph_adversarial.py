"""What step graphs might get wrong, in a real engine on the emulator's device.

Argument: the case. ``groups`` has a model with two kinds of attention, and so two
groups of KV cache, of which one forgets; its graphs are captured again while requests
run. ``everything`` has all patches on, grammars and bad words.
"""

import sys
import tempfile
from typing import Any

import workload
from step_graph import Watch

from vllm_ext.prove import engine
from vllm_ext.prove.pretend import PretendDevice
from vllm_ext_cpulane.engine import report
from vllm_ext_cpulane.tinymodel import write_model

workload.VOCAB = 512
WINDOW = 20
AGAIN = 24  # a step


def decode(case: str) -> dict[str, Any]:
    folder = tempfile.mkdtemp()
    shape: dict[str, Any] = {"heads": 1, "head_dim": 64}
    shape |= {"tokenizer": True, "weights": True}
    options: dict[str, Any] = {"enable_prefix_caching": False}
    if case == "groups":
        shape |= {"layers": 2, "window": WINDOW}
        options |= {"num_gpu_blocks_override": 30}
        options["disable_hybrid_kv_cache_manager"] = False
    else:
        shape["layers"] = 1
        options |= {"num_gpu_blocks_override": 16}
    options["model"] = str(write_model(folder, workload.VOCAB, **shape))
    with PretendDevice() as device, engine.booted(device, **options) as llm:
        runner = engine.model_runner(llm)
        requests = workload.requests(11, 6, longest=24, last_arrival=6)
        for request in requests:
            request.params["max_tokens"] = 16 + int(request.name)
            request.params.pop("logprobs", None)
            request.aborted = None
        # Under way when the graphs are captured again.
        requests[2].params |= {"logprobs": 1, "max_tokens": 5}
        requests[2].arrives = AGAIN - 3
        if case == "everything":
            add_what_is_stocks(requests)
        graph, runner.step_graph = runner.step_graph, None
        stock = workload.run(llm, requests)
        runner.step_graph = graph
        found: dict[str, Any] = {"groups": len(runner.kv_cache_config.kv_cache_groups)}
        if graph is None:
            return found | workload.findings(stock)
        watch = Watch(runner, device, canaries=False)

        def between(step: int) -> None:
            if case == "groups" and step == AGAIN:
                runner.capture_step_graph()

        ours = workload.run(llm, requests, between=between)
        different = {
            name: [vars(answer), vars(stock[name])]
            for name, answer in ours.items()
            if answer != stock[name]
        }
        counts = {k: v for k, v in vars(watch).items() if k[0] != "_"}
        return {**workload.findings(ours), **found, **counts, "different": different}


def add_what_is_stocks(requests: list[workload.Request]) -> None:
    """Two of them, which come late and do not stay."""
    from vllm.sampling_params import StructuredOutputsParams

    grammar, words = requests[0], requests[1]
    choice = StructuredOutputsParams(choice=["yes", "nope"])
    grammar.params = {"temperature": 0.7, "seed": 3, "max_tokens": 4}
    grammar.params["structured_outputs"] = choice
    words.params = {"temperature": 0.0, "max_tokens": 4, "bad_words": ["a", "bc"]}
    grammar.arrives, words.arrives = 12, 15


if __name__ == "__main__":
    report(decode(sys.argv[1]))
