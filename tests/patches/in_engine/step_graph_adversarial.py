"""What step graphs might get wrong, in a real engine on the emulator's device.

Argument: the case. ``groups`` has a model with two kinds of attention, and so two
groups of KV cache, of which one forgets; its graphs are captured again while requests
run. ``everything`` has all patches on, grammars and bad words.
"""

import json
import sys
import tempfile
from pathlib import Path
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


def interleaved(folder: str) -> Path:
    """A model that attends to everything in one layer, to a window in the other."""
    from safetensors.numpy import load_file, save_file

    path = write_model(
        *(folder, workload.VOCAB),
        **{"layers": 2, "heads": 1, "head_dim": 64, "tokenizer": True, "weights": True},
    )
    config = json.loads((path / "config.json").read_text())
    config |= {
        **{"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
        **{"layer_types": ["full_attention", "sliding_attention"]},
        **{"sliding_window": WINDOW, "attention_bias": False},
    }
    (path / "config.json").write_text(json.dumps(config))
    weights = load_file(path / "model.safetensors")
    weights = {k: v for k, v in weights.items() if not k.endswith(".bias")}
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


def decode(case: str) -> dict[str, Any]:
    folder = tempfile.mkdtemp()
    options: dict[str, Any] = {"enable_prefix_caching": False}
    if case == "groups":
        options |= {"model": str(interleaved(folder)), "num_gpu_blocks_override": 30}
        options["disable_hybrid_kv_cache_manager"] = False
    else:
        path = write_model(
            *(folder, workload.VOCAB),
            **{"layers": 1, "heads": 1, "head_dim": 64},
            **{"tokenizer": True, "weights": True},
        )
        options |= {"model": str(path), "num_gpu_blocks_override": 16}
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
