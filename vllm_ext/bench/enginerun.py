"""One engine that decodes when it is asked: the child of ``vllm-ext bench engine``.

The engine core runs in this process, stepped as its own loop steps it in a server:
requests go in ready-made, tokens are read from its outputs. The frontend (HTTP,
tokenizer, detokenizer) has a process of its own in a server, and is not measured.

``boot(...)``      build it; what it turned out to be
``closed(...)``    as many requests at once as the batch is large, decoded to their end
``arrivals(...)``  requests that arrive one by one at random moments
``trace(...)``     what steady decode steps hand to the device, and how long it works
``patches()``      what became of each patch in this process

On a CUDA GPU vLLM is all that is needed. Without one the CPU lane has to be in the
environment (`vllm_ext.hostbench.environment`): vLLM then decodes on the CPU, on the
path that it takes on a GPU as far as `vllm_ext.gpupath` can arrange.
"""

import json
import os
import random
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from vllm_ext import gpupath
from vllm_ext.bench import legacy, models
from vllm_ext.bench.arms import SAMPLING, repeats
from vllm_ext.children import serve
from vllm_ext.patching.engine import IN_USE, WAITING
from vllm_ext.patching.report import snapshot

FIRST_ID = 3  # those below are special tokens
SETTLING = 4  # decode steps before those that are traced
GRAPH_SIZES = (1, 2, 4, *range(8, 129, 8))  # on the CPU
STEPS = "vllm-ext steps"  # what a profile calls the time in which they run


def main() -> None:
    """Serve questions about one engine, built with the first of them."""
    loop: EngineLoop | None = None

    def boot(**details: Any) -> dict[str, Any]:
        nonlocal loop
        loop = EngineLoop(**details)
        return loop.description

    def of(name: str) -> Callable[..., Any]:
        return lambda **details: getattr(loop, name)(**details)

    def states() -> list[dict[str, Any]]:
        return patches(loop.form if loop else "")

    asked = {name: of(name) for name in ("closed", "arrivals", "trace")}
    serve({"boot": boot, "patches": states, **asked})


def patches(form: str) -> list[dict[str, Any]]:
    """Name, state and reason of every patch of this process.

    Args:
        form: Of `vllm_ext.bench.legacy`; counts as a patch.
    """
    from vllm_ext import plugin

    found = []
    if form:
        state = IN_USE if legacy.CALLS[form] else WAITING
        reason = "" if legacy.CALLS[form] else "the engine never called them"
        name = f"{form} penalties (reproduction only)"
        found.append({"name": name, "state": state, "reason": reason})
    if plugin.engine is not None:
        found += [
            {name: each[name] for name in ("name", "state", "reason")}
            for each in snapshot(plugin.engine)["patches"]
        ]
    return found


class EngineLoop:
    """An engine and the loop that steps it.

    Args:
        model: A name of `models.MODELS`.
        arguments: For ``vllm.LLM``, over the ones that every arm gets.
        form: Of `vllm_ext.bench.legacy`; empty leaves stock's penalties in place.
        seats: Requests that it has to decode at once.
        length: Tokens of the longest request, prompt and output.
        cpu: The core to stay on; ``None``: where the system puts it.
    """

    def __init__(
        self,
        model: str,
        arguments: Mapping[str, Any],
        form: str,
        seats: int,
        length: int,
        cpu: int | None,
    ) -> None:
        started = time.monotonic()
        self._model = models.MODELS[model]
        self._has_gpu = _has_gpu()
        self._host: Any = None
        self.form = form
        if form:
            legacy.put_in_place(form)
        with ExitStack() as stack:
            stack.enter_context(_lively_weights())
            if not self._has_gpu:
                from vllm_ext.submissions import HostMemory

                self._host = HostMemory()
                stack.enter_context(self._host.watching())
            self._engine = self._build(dict(arguments), seats, length)
            self._client = self._engine.engine_core
            self._core = self._client.engine_core
            worker = self._core.model_executor.driver_worker.worker
            self._runner: Any = worker.model_runner
            if not self._has_gpu and self._has_graphs:
                gpupath.graphs_that_replay(self._runner)
        if cpu is not None:
            os.sched_setaffinity(0, {cpu})
        self._number = 0  # of the next request
        self.description = self._describe() | {"boot_s": time.monotonic() - started}

    # -- what is asked ----------------------------------------------------------------

    def closed(
        self, batch: int, sampling: str, prompt: int, output: int, seed: int
    ) -> dict[str, Any]:
        """Decode ``batch`` requests that are all there at the start.

        Args:
            batch: How many.
            sampling: A name of `SAMPLING`.
            prompt: Tokens of each prompt, drawn with ``seed``.
            output: Tokens of each answer.

        Returns:
            See `_run`; ``host`` is of the steps in which every request got a token.
        """
        requests = self._requests(batch, sampling, prompt, output, seed)
        return self._run(requests, [0.0] * batch, every=batch)

    def arrivals(
        self,
        rate: float,
        requests: int,
        sampling: str,
        prompt: int,
        output: int,
        seed: int,
    ) -> dict[str, Any]:
        """Decode requests that arrive as a Poisson process, ``rate`` in a second.

        The same ``seed`` makes the same requests arrive at the same moments. Times are
        counted from the moment at which a request was due, even if the engine was busy
        then.

        Returns:
            See `_run`; ``host`` is of all steps.
        """
        draw = random.Random(f"arrivals {seed}")
        moments, now = [], 0.0
        for _ in range(requests):
            moments.append(now)
            now += draw.expovariate(rate)
        made = self._requests(requests, sampling, prompt, output, seed)
        return self._run(made, moments, every=1)

    def trace(
        self, batch: int, sampling: str, prompt: int, steps: int
    ) -> dict[str, Any]:
        """Look at ``steps`` decode steps of ``batch`` requests.

        Returns:
            ``steps``; ``submissions``, by kind, per step; ``waits``, calls that wait
            for the device, and ``busy_us``, in which the device works, both per step.
            What cannot be found out here is ``None``, and ``why`` says so.
        """
        # Those that are prefilled first go on decoding until the last one is.
        output = self._engine.vllm_config.model_config.max_model_len - prompt
        made = self._requests(batch, sampling, prompt, output, seed=0)
        waiting = {request.request_id for request, _ in made}
        running = [*waiting]
        for request, _ in made:
            self._client.add_request(request)
        while waiting:
            waiting -= {each.request_id for each in self._step()}
        for _ in range(SETTLING):
            self._step()
        trace = self._device_trace if self._has_gpu else self._counted
        found = trace(steps)
        if len(self._core.scheduler.running) != batch:
            found |= dict.fromkeys(("submissions", "waits", "busy_us"))
            found["why"] = "no steps in which all requests decode: raise --output"
        self._client.abort_requests(running)
        self._drain()
        return found

    # -- how it is done ---------------------------------------------------------------

    def _requests(
        self, number: int, sampling: str, prompt: int, output: int, seed: int
    ) -> list[tuple[Any, bool]]:
        """Ready-made requests, and of each whether its tokens repeat."""
        from vllm import SamplingParams

        chosen = SAMPLING[sampling]
        last = self._model.config["vocab_size"] - 1
        tasks = self._engine.get_supported_tasks()
        made = []
        for index in range(number):
            draw = random.Random(f"prompt {seed} {index}")
            parameters = chosen.of(index)
            request = self._engine.input_processor.process_inputs(
                f"{self._number}",
                {
                    "prompt_token_ids": [
                        draw.randint(FIRST_ID, last) for _ in range(prompt)
                    ]
                },
                SamplingParams(
                    max_tokens=output, ignore_eos=True, detokenize=False, **parameters
                ),
                supported_tasks=tasks,
            )
            made.append((request, repeats(parameters)))
            self._number += 1
        return made

    def _run(
        self,
        requests: Sequence[tuple[Any, bool]],
        moments: Sequence[float],
        every: int,
    ) -> dict[str, Any]:
        """Decode requests that arrive at ``moments``, seconds from now.

        Returns:
            ``start`` and ``end``, of the monotonic clock; ``ttft`` and ``tpot`` of
            each request and ``itl`` of each token but the first ones, in seconds;
            ``generated``, tokens; ``host``, seconds of this thread's CPU time for each
            step that gave ``every`` or more requests a token; ``tokens`` of each
            request, ``None`` where they do not repeat.
        """
        order = {
            request.request_id: index for index, (request, _) in enumerate(requests)
        }
        times: list[list[float]] = [[] for _ in requests]
        tokens: list[list[int]] = [[] for _ in requests]
        waiting = deque(zip(moments, requests, strict=True))
        host: list[float] = []
        running = 0
        started = time.monotonic()
        while waiting or running:
            now = time.monotonic() - started
            while waiting and waiting[0][0] <= now:
                self._client.add_request(waiting.popleft()[1][0])
                running += 1
            if not running:
                time.sleep(max(0.0, waiting[0][0] - now))
                continue
            mine = time.thread_time()
            outputs = self._step()
            mine = time.thread_time() - mine
            now = time.monotonic() - started
            if len(outputs) >= every:
                host.append(mine)
            for each in outputs:
                index = order[each.request_id]
                tokens[index] += each.new_token_ids
                times[index] += [now] * len(each.new_token_ids)
                running -= each.finish_reason is not None
        ended = time.monotonic()
        self._drain()
        first = [row[0] - due for row, due in zip(times, moments, strict=True)]
        gaps = [
            [after - before for before, after in zip(row, row[1:], strict=False)]
            for row in times
        ]
        return {
            "start": started,
            "end": ended,
            "generated": sum(map(len, tokens)),
            "ttft": first,
            "tpot": [sum(row) / len(row) for row in gaps if row],
            "itl": [round(gap, 7) for row in gaps for gap in row],
            "host": host,
            "tokens": [
                row if repeating else None
                for row, (_, repeating) in zip(tokens, requests, strict=True)
            ],
        }

    def _step(self) -> Sequence[Any]:
        """One step of the engine; what it has to say of requests, perhaps nothing."""
        said: Sequence[Any] = self._client.get_output().outputs
        return said

    def _drain(self) -> None:
        """Step until nothing is in flight."""
        while self._core.scheduler.has_requests() or self._core.batch_queue:
            self._step()

    def _counted(self, steps: int) -> dict[str, Any]:
        from vllm_ext.submissions import Submissions

        found = {"steps": steps, "submissions": None, "waits": None, "busy_us": None}
        if not self._has_graphs:
            why = "no graphs: the CPU's forward pass is not what a GPU would be handed"
            return found | {"why": why}
        seen: Counter[tuple[tuple[str, int], ...]] = Counter()
        for _ in range(steps):
            with Submissions(self._host, {}) as counting, self._watched(counting):
                self._step()
            seen[tuple(counting.kinds.items())] += 1
        [(kinds, _)] = seen.most_common(1)
        why = "there is no device whose work could be seen"
        return found | {"submissions": dict(kinds), "why": why}

    @contextmanager
    def _watched(self, counting: Any) -> Iterator[None]:
        """Count launches that are interpreted, and graphs that are run as calls."""
        from triton.runtime.interpreter import GridExecutor

        launch = GridExecutor.__call__
        graphs = self._runner.cudagraph_manager.graphs.values()

        def launched(executor: Any, *args: Any, **kwargs: Any) -> Any:
            counting.add("triton", executor.fn.__name__)
            with counting.paused():
                return launch(executor, *args, **kwargs)

        def replaying(replay: Callable[[], None]) -> Callable[[], None]:
            def replayed() -> None:
                counting.add("graph", "replay")
                with counting.paused():
                    replay()

            return replayed

        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(GridExecutor, "__call__", launched))
            for graph in graphs:
                watched = replaying(graph.replay)
                stack.enter_context(mock.patch.object(graph, "replay", watched))
            yield

    def _device_trace(self, steps: int) -> dict[str, Any]:
        import torch
        from torch.profiler import ProfilerActivity, profile, record_function

        torch.accelerator.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            with record_function(STEPS):
                for _ in range(steps):
                    self._step()
            torch.accelerator.synchronize()
        with tempfile.TemporaryDirectory(prefix="vllm-ext-") as folder:
            path = Path(folder) / "trace.json"
            seen.export_chrome_trace(str(path))
            events = json.loads(path.read_text())["traceEvents"]
        return reduced(events, steps)

    @property
    def _has_graphs(self) -> bool:
        graphs = getattr(self._runner, "cudagraph_manager", None)
        if graphs is None:
            return False
        return bool(graphs._capture_descs if not self._has_gpu else graphs.graphs)

    def _build(self, arguments: dict[str, Any], seats: int, length: int) -> Any:
        from vllm import LLM

        kv_bytes = (
            seats * (length + 2 * gpupath.BLOCK_SIZE) * self._model.kv_bytes_per_token
        )
        options: dict[str, Any] = {
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "max_model_len": length,
            "enable_prefix_caching": False,
            "disable_log_stats": True,
            # Several engines lie on the device side by side, so each is told what it
            # may take; the share only has to be free when it starts.
            "kv_cache_memory_bytes": max(kv_bytes * 5 // 4, 1 << 24),
            "gpu_memory_utilization": 0.05,
            "seed": 0,
        }
        if not self._has_gpu:
            # The engine's own setting decides how large its KV cache is.
            os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
            options |= {"max_num_seqs": seats, "enforce_eager": True}  # compile nothing
            if _takes_gpu_path(arguments):
                gpupath.enable([size for size in GRAPH_SIZES if size <= seats])
                options["block_size"] = gpupath.BLOCK_SIZE
            del options["gpu_memory_utilization"]
        with tempfile.TemporaryDirectory(prefix="vllm-ext-") as folder:
            model = models.write(self._model.name, Path(folder))
            return LLM(model=str(model), **(options | arguments)).llm_engine

    def _describe(self) -> dict[str, Any]:
        config = self._engine.vllm_config
        return {
            "device": "GPU" if self._has_gpu else "CPU",
            "runner": "V2" if config.use_v2_model_runner else "V1",
            "async_scheduling": bool(config.scheduler_config.async_scheduling),
            "graphs": config.compilation_config.cudagraph_mode.name,
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            **self._step_graph(),
        }

    def _step_graph(self) -> dict[str, Any]:
        """What the graphs of the patch ``step_graph`` cost, if it has some."""
        graph = getattr(self._runner, "step_graph", None)
        return {} if graph is None else {"step_graph": graph.cost}


# A launch, a copy and so on, by what CUDA's runtime and driver call it.
_CALLS = {
    "graph": ("GraphLaunch",),
    "launch": ("LaunchKernel", "LaunchCooperativeKernel"),
    "copy": ("Memcpy",),
    "memset": ("Memset",),
}
_WAITS = ("StreamSynchronize", "EventSynchronize", "DeviceSynchronize")


def reduced(events: Sequence[Mapping[str, Any]], steps: int) -> dict[str, Any]:
    """What a profile says of a step.

    Args:
        events: ``traceEvents`` of a Chrome trace of torch's profiler.
        steps: Steps that were profiled, within `STEPS`.

    Returns:
        As `EngineLoop.trace`. Time in which several kernels run at once counts once.
    """
    kinds = dict.fromkeys(_CALLS, 0)
    waits = 0
    spans = []
    [inside] = [
        (event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("cat") == "user_annotation" and event["name"] == STEPS
    ]
    for event in events:
        category, name = event.get("cat"), str(event.get("name"))
        if category in ("cuda_runtime", "cuda_driver"):
            if not inside[0] <= event["ts"] <= inside[1]:
                continue
            waits += any(call in name for call in _WAITS)
            for kind, calls in _CALLS.items():
                kinds[kind] += any(call in name for call in calls)
        elif category in ("kernel", "gpu_memcpy", "gpu_memset"):
            spans.append((float(event["ts"]), float(event["ts"] + event["dur"])))
    busy, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return {
        "steps": steps,
        "submissions": {kind: number / steps for kind, number in kinds.items()},
        "waits": waits / steps,
        "busy_us": busy / steps,
        "why": "",
    }


def _has_gpu() -> bool:
    import torch

    found: bool = torch.cuda.is_available()
    return found


def _takes_gpu_path(arguments: Mapping[str, Any]) -> bool:
    """Whether a CPU engine is what `gpupath` makes: V2, graphs, asynchronous."""
    return (
        os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"
        and not arguments.get("enforce_eager")
        and arguments.get("async_scheduling") is not False
    )


@contextmanager
def _lively_weights() -> Iterator[None]:
    """Give vLLM's dummy weights the size that trained ones have.

    As vLLM makes them all logits are equal to three digits: a greedy request gets the
    same token for ever, and wrong positions or a wrong KV cache change nothing. Scaled
    by its number of columns, each matrix keeps the size of what it is given, and a few
    tokens are likely. The embedding, which also makes the logits, gives them a
    standard deviation of 2.4.
    """
    import torch
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    stock = DummyModelLoader.load_weights

    def load_weights(loader: Any, model: Any, config: Any) -> None:
        stock(loader, model, config)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.dim() < 2:
                    weight.fill_(0.0 if name.endswith("bias") else 1.0)
                    continue
                gains = {"embed_tokens": 2.4, "o_proj": 3.0, "down_proj": 3.0}
                gain = next((gains[part] for part in gains if part in name), 1.0)
                size = weight.float().pow(2).mean().sqrt().item()
                weight.mul_(gain / (weight.shape[1] ** 0.5 * size))

    with mock.patch.object(DummyModelLoader, "load_weights", load_weights):
        yield


if __name__ == "__main__":
    main()
