"""Answers of one engine that decodes as on CUDA, and which lines of vLLM gave them.

Argument: a JSON file, file of vLLM -> numbers of the lines that are asked about.
"""

import json
import sys
import threading
from contextlib import nullcontext
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import vllm

from vllm_ext import gpupath
from vllm_ext_cpulane.engine import report, tiny_engine

sys.path.append(str(Path(__file__).parents[2] / "patches" / "in_engine"))
import workload

asked = {
    file: set(lines)
    for file, lines in json.loads(Path(sys.argv[1]).read_text()).items()
}
ran: dict[str, set[int]] = {file: set() for file in asked}


def of_call(frame, event, arg):
    """Look at the lines of functions in these files, at no others."""
    file = frame.f_code.co_filename
    return of_line if file in asked else None


def of_line(frame, event, arg):
    if event == "line":
        file = frame.f_code.co_filename
        if frame.f_lineno in asked[file]:
            ran[file].add(frame.f_lineno)
    return of_line


def recorded():
    """Whoever records graphs beside vLLM's own gets some that replay, too."""
    module = "vllm.v1.worker.gpu.step_graph.graphs"
    if find_spec(module.rpartition(".")[0]) is None:  # the plugin's are known there
        return nullcontext()
    return mock.patch(f"{module}.record", lambda work, *_: gpupath.Graph(work))


def main() -> None:
    gpupath.enable([1, 2, 4, 8])
    llm = tiny_engine(dtype="float32", enable_prefix_caching=False)
    with recorded():
        graphs = gpupath.graphs_that_replay(workload.model_runner(llm))
    threading.settrace(of_call)
    sys.settrace(of_call)
    # Bad words keep their steps from the path that the fused sampler takes.
    words = {"temperature": 0.0, "bad_words": ["a"], "max_tokens": 10}
    requests = [
        *workload.requests(7, 8),
        workload.Request("words", [5, 6, 7], words, arrives=8),
    ]
    answers = workload.run(llm, requests)
    sys.settrace(None)
    plugin = sys.modules.get("vllm_ext.plugin")
    report(
        {
            "vllm": vllm.__file__,
            "version": vllm.__version__,
            "ours": [name for name in sys.modules if name.startswith("vllm_ext.patch")],
            "used": [
                name
                for name, outcome in (plugin.engine.outcomes if plugin else {}).items()
                if outcome.state == "in use"
            ],
            "answers": {name: asdict(answer) for name, answer in answers.items()},
            "ran": {file: sorted(lines) for file, lines in ran.items()},
            **graphs,
        }
    )


if __name__ == "__main__":
    main()
