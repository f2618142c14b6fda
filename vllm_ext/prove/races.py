"""vLLM's kernels and this project's patches under the `Sanitizer`.

A real engine of the CPU lane decodes requests of every kind, stock and with all patches
on, and each launch of Model Runner V2 and its sampler is watched. Kernels that these
requests do not reach, at the sizes that matter, are launched beside it.
"""

import importlib
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from vllm_ext import gpupath, hostbench
from vllm_ext.children import Child, ChildError, serve
from vllm_ext.patches import SERIES
from vllm_ext.patching.report import snapshot
from vllm_ext.prove.sanitizer import ORDERS, Kernel, Sanitizer, counted
from vllm_ext.prove.verdict import Verdict

SEATS = 8
MULTIPROCESSORS = 4  # what kernels are told: some take several rows per program
STEPS = 40  # at most; a run takes about 20
PROGRESS, LONGEST = 20, 400  # seconds: between words about an engine, and until it ends
ABORTED = {"aborted": 9}  # step

# Where the model runner and the sampler have their kernels.
KERNEL_MODULES = (
    *(f"vllm.v1.worker.gpu.{name}" for name in ("input_batch", "block_table")),
    *(f"vllm.v1.worker.gpu.{name}" for name in ("buffer_utils", "structured_outputs")),
    *(f"vllm.v1.worker.gpu.sample.{name}" for name in ("gumbel", "min_p", "penalties")),
    *(f"vllm.v1.worker.gpu.sample.{name}" for name in ("logit_bias", "bad_words")),
    *(f"vllm.v1.worker.gpu.sample.{name}" for name in ("logprob", "prompt_logprob")),
    "vllm.v1.sample.ops.topk_topp_triton",
)

DRAWN: dict[str, Any] = {"temperature": 0.9}
GREEDY: dict[str, Any] = {"temperature": 0.0}
# Parameters, and the step in which the request arrives.
REQUESTS: dict[str, tuple[int, dict[str, Any]]] = {
    "greedy": (0, {**GREEDY, "logprobs": 3, "max_tokens": 12}),
    "filtered": (0, {**DRAWN, "seed": 1, "top_k": 20, "top_p": 0.9, "min_p": 0.02}),
    "repetition": (1, {**DRAWN, "seed": 2, "repetition_penalty": 1.2}),
    "penalties": (
        1,
        {**GREEDY, "presence_penalty": 0.5, "frequency_penalty": 0.3, "max_tokens": 10},
    ),
    "bias": (2, {**GREEDY, "logit_bias": {77: 5.0, 78: 4.0}, "bad_words": ["a", "bc"]}),
    "minimum": (
        2,
        {**DRAWN, "seed": 3, "min_tokens": 4, "stop_token_ids": [*range(4, 100)]},
    ),
    "aborted": (2, {**DRAWN, "max_tokens": 40}),
    "prompt": (3, {**DRAWN, "seed": 4, "prompt_logprobs": 2, "logprobs": 2}),
    "choice": (4, {**GREEDY, "choice": ["yes", "no"]}),
    "scored": (6, {**DRAWN, "seed": 5, "top_p": 0.8, "logprob_token_ids": [5, 6, 7]}),
    "plain": (7, {"temperature": 1.0, "choice": ["left", "right"]}),
}
DEFAULT_TOKENS = 7


def verdicts(say: Callable[[str], None]) -> list[Verdict]:
    """Decode with real vLLM under the sanitizer, stock and with every patch on.

    Two engines on a tiny model, each in a process of its own, with Triton's attention
    and replays of captured steps as on CUDA. Patches that run in no such decode cannot
    be judged by it.

    Args:
        say: Told what goes on.

    Returns:
        One for each kernel of Model Runner V2 and its sampler, and for each that was
        launched beside them; and one for each patch.

    Raises:
        CannotRunError: The CPU lane is not installed.
    """
    lane = {**hostbench.environment("interpret"), "VLLM_CPU_KVCACHE_SPACE": None}
    names = [patch.name for patch in SERIES]
    with ExitStack() as stack:
        say("two engines decode under the sanitizer: stock, and all patches on")
        engines = [_start(stack, lane, []), _start(stack, lane, names)]
        stock, patched = (_hear(engine, say) for engine in engines)
    alone = {}
    if _new_faults(patched, stock):
        for name in names:
            say(f"faults with patches on: {name} alone")
            with ExitStack() as stack:
                alone[name] = _hear(_start(stack, lane, [name]), say)
    return [*kernel_verdicts(stock), *patch_verdicts(stock, patched, alone)]


def _start(stack: ExitStack, lane: dict[str, str | None], patches: list[str]) -> Child:
    """An engine that decodes; closed with ``stack``."""
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="vllm-ext-"))
    settings = {"VEXT": "0"}
    if patches:
        # Calls are counted where a state file is asked for.
        settings = {"VEXT": "1", "VEXT_STATE_DIR": folder}
        settings["VEXT_PATCHES"] = ",".join(patches)
    of = patches[0] if len(patches) == 1 else "all patches"
    name = f"the engine with {of}" if patches else "the stock engine"
    child = Child("vllm_ext.prove.races", {**lane, **settings}, name)
    stack.callback(child.close)
    child.tell("decode", beside=not patches)
    return child


def _hear(engine: Child, say: Callable[[str], None]) -> dict[str, Any]:
    """What it found; an engine that failed found that."""
    try:
        for waited in range(PROGRESS, LONGEST, PROGRESS):
            if engine.ready(PROGRESS):
                break
            say(f"{engine.name} boots or decodes ({waited} s)")
        found: dict[str, Any] = engine.hear(PROGRESS)
    except ChildError as error:
        found = {"kernels": {}, "faults": [], "patches": [], "stopped": error.line}
    faults = counted(len(found["faults"]), "fault")
    say(f"{engine.name}: {_launches(found)}, {faults}")
    return found


def kernel_verdicts(found: dict[str, Any]) -> list[Verdict]:
    """Of stock kernels, from what `decode` found."""
    judged = []
    for name, kernel in found["kernels"].items():
        faults = [fault for fault in found["faults"] if fault["kernel"] == name]
        if faults:
            verdict = _faulty(f"stock {name}", _texts(faults))
        elif kernel["problem"]:
            verdict = _unknown(f"stock {name}", kernel["problem"])
        elif not kernel["launches"]:
            verdict = _unknown(f"stock {name}", "not launched in this decode")
        else:
            verdict = _proven(f"stock {name}", _watched(kernel))
        judged.append(verdict)
    if found["stopped"]:
        judged.append(_faulty("stock decode step", f"stopped: {found['stopped']}"))
    return judged


def patch_verdicts(
    stock: dict[str, Any], patched: dict[str, Any], alone: dict[str, dict[str, Any]]
) -> list[Verdict]:
    """Of patches, from what `decode` found.

    Args:
        stock: Without patches: its faults are no patch's.
        patched: With all of them.
        alone: With one of them, by its name, where ``patched`` has faults.
    """
    own = {name: _new_faults(found, stock) for name, found in alone.items()}
    shared = [] if any(own.values()) else _new_faults(patched, stock)
    states = {each["name"]: each for each in patched["patches"]}
    idle = {"calls": 0, "state": "off", "reason": "", "aside": {}}
    judged = []
    for patch in SERIES:
        name = patch.name
        state = states.get(name, idle)
        if patched["stopped"]:
            verdict = _faulty(name, f"stopped: {patched['stopped']}")
        elif state["reason"]:
            verdict = _unknown(name, f"{state['state']}: {state['reason']}")
        elif not state["calls"]:
            verdict = _unknown(name, "not called in a decode of Model Runner V2")
        elif sum(state["aside"].values()) >= state["calls"]:
            verdict = _unknown(name, f"left all to stock: {next(iter(state['aside']))}")
        elif own.get(name):
            verdict = _faulty(name, _texts(own[name]))
        elif shared:
            where = "with all patches on, though with none alone"
            verdict = _faulty(name, f"{where}: {_texts(shared)}")
        else:
            calls = counted(state["calls"], "call")
            launches = _launches(patched)
            verdict = _proven(name, f"{calls}; {launches} with all patches on")
        judged.append(verdict)
    return judged


def _proven(subject: str, detail: str) -> Verdict:
    return Verdict("races", subject, "proven on CPU", detail)


def _unknown(subject: str, detail: str) -> Verdict:
    return Verdict("races", subject, "not proven", " ".join(detail.split()))


def _faulty(subject: str, detail: str) -> Verdict:
    return replace(_unknown(subject, detail), fault=True)


def _watched(kernel: dict[str, Any]) -> str:
    orders = f"{kernel['reordered']} of them in {len(ORDERS)} orders"
    if kernel["reordered"] == kernel["launches"]:
        orders = f"in {len(ORDERS)} orders"
    if not kernel["reordered"]:
        orders = "of one program each"
    launches = f"{kernel['launches']} launch{'es' * (kernel['launches'] > 1)}"
    return f"{launches}, {counted(kernel['sizes'], 'size')}, {orders}"


def _launches(found: dict[str, Any]) -> str:
    numbers = [kernel["launches"] for kernel in found["kernels"].values()]
    kernels = counted(sum(number > 0 for number in numbers), "kernel")
    return f"{sum(numbers)} launches of {kernels}"


def _texts(faults: list[dict[str, Any]]) -> str:
    more = f"; and {len(faults) - 1} more" if len(faults) > 1 else ""
    return f"{faults[0]['text']}{more}"


def _new_faults(found: dict[str, Any], stock: dict[str, Any]) -> list[dict[str, Any]]:
    """Those that stock does not have."""
    known = [fault["key"] for fault in stock["faults"]]
    return [fault for fault in found["faults"] if fault["key"] not in known]


def decode(beside: bool = False, steps: int = STEPS) -> dict[str, Any]:
    """In a process of the lane: decode `REQUESTS` under the sanitizer.

    Args:
        beside: Also launch the kernels that only a wide vocabulary or a GPU launches.
        steps: At most.

    Returns:
        ``kernels`` by name, as `Kernel`, the number of ``sizes``; ``faults`` with
        ``kernel``, ``key`` and ``text``; ``patches`` of this process, as in a state
        file; ``stopped``, why the decode ended early.
    """
    from vllm.platforms import current_platform

    from vllm_ext import plugin

    platform = type(current_platform)
    platform.num_compute_units = classmethod(lambda cls, device=0: MULTIPROCESSORS)
    engine = _build_engine()
    core = engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    gpupath.graphs_that_replay(runner)
    tables = runner.block_tables
    targets = [table.gpu for table in tables.block_tables] + tables.input_block_tables
    stopped = ""
    with Sanitizer(targets) as sanitizer, np.errstate(all="ignore"):
        try:
            _run(engine, steps)
            if beside:
                _launch_beside()
        except Exception as error:
            stopped = f"{type(error).__name__}: {error}"
    kernels = dict.fromkeys(_kernel_names(), Kernel()) | sanitizer.kernels
    return {
        "kernels": {
            name: {**asdict(replace(kernel, sizes={})), "sizes": len(kernel.sizes)}
            for name, kernel in kernels.items()
        },
        "faults": [
            {
                "kernel": fault.kernel,
                "key": [fault.kind, fault.kernel, fault.file, fault.line],
                "text": str(fault),
            }
            for fault in sanitizer.faults
        ],
        "patches": snapshot(plugin.engine)["patches"] if plugin.engine else [],
        "stopped": stopped,
    }


def _build_engine() -> Any:
    gpupath.enable([1, 2, 4, SEATS])
    from vllm import LLM

    from vllm_ext_cpulane.tinymodel import write_model

    with tempfile.TemporaryDirectory(prefix="vllm-ext-races-") as folder:
        path = write_model(folder, layers=1, tokenizer=True, weights=True)
        return LLM(
            model=str(path),
            max_model_len=96,
            max_num_seqs=SEATS,
            max_num_batched_tokens=32,  # prompts come in chunks
            block_size=gpupath.BLOCK_SIZE,
            kv_cache_memory_bytes=2**20,
            enable_prefix_caching=False,
            enforce_eager=True,  # nothing is compiled; `gpupath` makes the graphs
            disable_log_stats=True,
            seed=0,
        ).llm_engine


def _run(engine: Any, steps: int) -> None:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    for step in range(steps):
        for number, (name, (arrives, wanted)) in enumerate(REQUESTS.items()):
            if arrives != step:
                continue
            wanted = {"max_tokens": DEFAULT_TOKENS, "ignore_eos": True, **wanted}
            if choice := wanted.pop("choice", None):
                params = StructuredOutputsParams(choice=choice)
                wanted["structured_outputs"] = params
            prompt = [4 + (31 * number + 7 * i) % 1000 for i in range(3 + 4 * number)]
            engine.add_request(
                name,
                {"prompt_token_ids": prompt},
                SamplingParams(detokenize=False, **wanted),
            )
        engine.abort_request([name for name, when in ABORTED.items() if when == step])
        engine.step()
        waiting = any(arrives > step for arrives, _ in REQUESTS.values())
        if not waiting and not engine.has_unfinished_requests():
            return


def _launch_beside() -> None:
    """Several tiles per row, and top-p as it is split on a GPU."""
    import torch
    from vllm.v1.sample.ops import topk_topp_triton
    from vllm.v1.worker.gpu.sample.gumbel import apply_temperature
    from vllm.v1.worker.gpu.sample.penalties import apply_penalties

    rows, vocabulary = 3, 8192 + 40  # a tile, and part of another
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, vocabulary, generator=generator)
    each = torch.arange(rows)
    apply_temperature(logits, each, torch.tensor([0.7, 1.0, 1.3]))
    apply_penalties(
        logits,
        each,
        token_ids=torch.tensor([5, 8200, 8231]),
        expanded_local_pos=torch.tensor([0, 1, 2], dtype=torch.int32),
        repetition_penalty=torch.tensor([1.0, 1.2, 1.2]),
        frequency_penalty=torch.tensor([0.0, 0.0, 0.3]),
        presence_penalty=torch.tensor([0.0, 0.5, 0.0]),
        prompt_bin_mask=torch.ones(rows, -(-vocabulary // 32), dtype=torch.int32),
        output_bin_counts=torch.ones(rows, vocabulary, dtype=torch.int32),
    )
    top_p = torch.tensor([0.5, 0.9, 1.0])
    for top_k in (None, torch.tensor([20, vocabulary, 5], dtype=torch.int32)):
        topk_topp_triton._apply_topp_split(
            logits.clone(), top_k, top_p, float("-inf"), 4 * rows
        )


def _kernel_names() -> list[str]:
    """The kernels of `KERNEL_MODULES`."""
    from triton.runtime.interpreter import InterpretedFunction

    return [
        name
        for module in KERNEL_MODULES
        for name, value in vars(importlib.import_module(module)).items()
        if isinstance(value, InterpretedFunction)
        and name.endswith("_kernel")
        and value.fn.__module__ == module
    ]


if __name__ == "__main__":
    serve({"decode": decode})
