"""One engine whose decode steps cost only host time: the child of ``bench host``.

Real: vLLM's engine core, scheduler, Model Runner V2, sampler, Triton attention's
metadata builder, CUDA-graph dispatch, and the whole launch path of Triton. Stubbed is
what `STUBBED` says. Runs on the CPU lane, in a process that serves questions:

``boot(cpu)``           build it, and stay on one CPU core from then on
``start(batch, mode)``  have that many requests decode, every one of them in each step;
                       in the mode ``turnover`` some come and some end in each step
``count(steps)``        submissions of a step
``time(settling, steps)``  microseconds of each step, by part
``patches()``           what became of each patch in this process
"""

import ctypes
import os
import resource
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import process_time, thread_time
from typing import TYPE_CHECKING, Any

from vllm_ext import gpupath
from vllm_ext.children import serve
from vllm_ext.patching.report import snapshot
from vllm_ext_cpulane.discard import EFFECTS, LAUNCHES, OffClock

if TYPE_CHECKING:
    from vllm_ext.submissions import Submissions

STUBBED = (
    "kernel launches stop before the CUDA driver and nothing is computed",
    "the forward pass and lm_head return fixed tensors; a graph replay does nothing",
    "sampled tokens are set to one valid id: the kernels that choose them are dropped",
    "tensors live on the CPU, so aten kernels run there, on a vocabulary of 256, inside"
    " the time that is reported; a GPU's driver calls, copies and events do not happen",
    "tokenizing, detokenizing and the HTTP server are left out",
)

WORKER = "worker"  # execute_model and sample_tokens of the model runner, together
PARTS = (
    *("schedule", "execute_model", "sample_tokens", "update_from_output"),
    *(WORKER, "step"),
)
ALL_THREADS = "step, all threads"

# Sizes: as many layers as Qwen2.5-0.5B has, and an H200's default of concurrent
# requests.
LAYERS = 24
VOCABULARY = 256
MAX_REQUESTS = 1024
MAX_LENGTH = 4096
MAX_TOKENS = 8192
GRAPH_SIZES = (1, 2, 4, *range(8, 256, 8), *range(256, 513, 16))  # vLLM's defaults

TOKEN = 5
REQUESTS_AT_ONCE = 64  # prompts that fit into one step
WARM_UP_STEPS = 12

MODES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "filtered": {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "seed": 7},
    "penalties": {
        **{"temperature": 0.8, "top_k": 50, "top_p": 0.9, "seed": 7},
        **{"repetition_penalty": 1.1, "presence_penalty": 0.2},
        "frequency_penalty": 0.1,
    },
    "logprobs": {"temperature": 0.0, "logprobs": 5},
    "turnover": {"temperature": 0.0},
}
TURNOVER = "turnover"  # never the same requests in two steps: greedy, short answers
SHORT = 4  # tokens of such an answer


def main() -> None:
    """Serve questions about one engine, built with the first of them."""
    loop: HostLoop | None = None

    def boot(cpu: int) -> dict[str, Any]:
        nonlocal loop
        loop = HostLoop()
        os.sched_setaffinity(0, {cpu})  # vLLM's CPU worker had its own idea
        return {"parts": [*PARTS, ALL_THREADS], "stubbed": STUBBED}

    def of(name: str) -> Callable[..., Any]:
        return lambda **details: getattr(loop, name)(**details)

    asked = {name: of(name) for name in ("start", "count", "time")}
    serve({"boot": boot, "patches": patches, **asked})


def patches() -> list[dict[str, Any]]:
    """Name, state and reason of every patch of this process."""
    from vllm_ext import plugin

    if plugin.engine is None:
        return []
    return [
        {"name": each["name"], "state": each["state"], "reason": each["reason"]}
        for each in snapshot(plugin.engine)["patches"]
    ]


class HostLoop:
    """An engine, its stubs and its clocks."""

    def __init__(self) -> None:
        from vllm_ext.submissions import HostMemory

        # The only kernel whose result the host uses, as an index into hidden states.
        EFFECTS["_combine_sampled_and_draft_tokens_kernel"] = _clear_logits_indices
        gpupath.enable(GRAPH_SIZES)
        self._host = HostMemory()
        self._counting: Submissions | None = None
        with self._host.watching():
            self._engine = _build_engine()
            self._core = self._engine.engine_core.engine_core
            worker = self._core.model_executor.driver_worker.worker
            self._runner: Any = worker.model_runner
            self._replays = 0
            self._stub()
        self._clocks: dict[str, list[float]] | None = None  # seconds, by part
        self._disturbed: list[bool] = []  # by step that is timed
        self._in_worker: list[float] = []  # seconds, of the step that is timed
        self._running: list[str] = []
        self._params: Any = None
        self._arrivals = 0  # before each step
        self._arrived = 0

    # -- what is asked ----------------------------------------------------------------

    def start(self, batch: int, mode: str) -> None:
        """Let ``batch`` requests of one sampling ``mode`` be decoded, and nothing else.

        With ``turnover`` about ``batch`` requests at once, a quarter of them new.

        Raises:
            ValueError: They do not fit into a captured graph, or the mode is unknown.
        """
        from vllm import SamplingParams

        if mode not in MODES:
            raise ValueError(f"no mode {mode}; there are {', '.join(MODES)}")
        if not 1 <= batch <= GRAPH_SIZES[-1]:
            raise ValueError(f"batch {batch} is not within 1 to {GRAPH_SIZES[-1]}")
        self._finish()
        turnover = mode == TURNOVER
        self._params = SamplingParams(
            max_tokens=min(SHORT, batch) if turnover else MAX_LENGTH - 64,
            ignore_eos=True,
            detokenize=False,
            **MODES[mode],
        )
        self._arrivals = max(batch // SHORT, 1) if turnover else 0
        with self._submissions():
            for i in range(0 if turnover else batch):
                self._arrive()
                if i % REQUESTS_AT_ONCE == REQUESTS_AT_ONCE - 1:
                    self._step()
            for _ in range(WARM_UP_STEPS):
                self._step()
        self.decode(WARM_UP_STEPS)

    def count(self, steps: int) -> dict[str, Any]:
        """Submissions of the most common of ``steps`` decode steps.

        Returns:
            ``kinds``: number by kind; ``names``: number by kind and name, as text;
            ``share``: of the steps that had just these.
        """
        seen: Counter[tuple[tuple[tuple[str, str], int], ...]] = Counter()
        kinds = {}
        for _ in range(steps):
            with self._submissions() as counted:
                self.decode(1)
            names = tuple(sorted(counted.names.items()))
            seen[names] += 1
            kinds[names] = counted.kinds
        names, times = seen.most_common(1)[0]
        return {
            "kinds": kinds[names],
            "names": {f"{kind} {name}": number for (kind, name), number in names},
            "share": times / steps,
        }

    def time(self, settling: int, steps: int) -> dict[str, list[float]]:
        """CPU microseconds of decode steps, by part.

        Steps in which the machine took the core away are left out, since they also
        pay for the caches that somebody else filled; unless that is most of them.

        Args:
            settling: Steps before the first that is timed.
            steps: Undisturbed steps to time; gives up after twice as many.
        """
        clocks = self._clocks = {part: [] for part in (*PARTS, ALL_THREADS)}
        self._disturbed = []
        in_worker = self._in_worker = []
        timed = (
            (self._core.scheduler, "schedule", clocks["schedule"]),
            *(
                (holder, name, samples.get(name, in_worker))
                for holder, samples in (
                    (self._core.model_executor, clocks),
                    (self._runner, {}),
                )
                for name in ("execute_model", "sample_tokens")
            ),
        )
        for holder, name, samples in timed:
            setattr(holder, name, _timed(getattr(holder, name), samples))
        try:
            self.decode(settling)
            for _ in range(2 * steps):
                self.decode(1)
                if self._disturbed[settling:].count(False) == steps:
                    break
        finally:
            for holder, name, _ in timed:
                delattr(holder, name)
            self._clocks = None
        flags = self._disturbed[settling:]
        if flags.count(False) < steps // 2:
            flags = [False] * len(flags)
        return {
            part: [
                1e6 * seconds
                for seconds, disturbed in zip(samples[settling:], flags, strict=True)
                if not disturbed
            ]
            for part, samples in clocks.items()
        }

    # -- how it is done ---------------------------------------------------------------

    def _step(self) -> None:
        for _ in range(self._arrivals):
            self._arrive()
        self._core.step_fn()

    def _arrive(self) -> None:
        """One more request; what the frontend keeps of those that ended goes now."""
        if self._arrivals and len(self._running) >= MAX_REQUESTS:
            gone = self._running[: MAX_REQUESTS // 2]
            self._engine.abort_request(gone)
            del self._running[: len(gone)]
        i = self._arrived
        self._arrived += 1
        # No prompt twice: one that the prefix cache holds needs no prefill.
        unique = [10 + i % 200, 10 + i // 200 % 200]
        prompt = unique + [10 + (7 * i + j) % 200 for j in range(22 + i % 32)]
        name = f"request-{self._arrived}"
        self._engine.add_request(
            name, {"prompt_token_ids": prompt}, self._params.clone()
        )
        self._running.append(name)

    def decode(self, steps: int) -> None:
        """Run ``steps`` steps, each of which must be a decode step of every request.

        With ``turnover`` each of them has requests that come, and some that end.
        """
        replays = self._replays
        for _ in range(steps):
            for _ in range(self._arrivals):
                self._arrive()
            off = OffClock.seconds
            lost = _times_core_was_lost()
            everyone = process_time()
            started = thread_time()
            self._core.step_fn()
            mine = thread_time() - started
            all_threads = process_time() - everyone
            if self._clocks is not None:
                off = OffClock.seconds - off
                self._disturbed.append(_times_core_was_lost() != lost)
                self._clocks["step"].append(mine - off)
                self._clocks[WORKER].append(sum(self._in_worker))
                self._in_worker.clear()
                self._clocks[ALL_THREADS].append(all_threads - off)
        running = len(self._core.scheduler.running)
        if self._arrivals:
            if self._replays != replays:
                raise ValueError("a step of this mode only decoded: not a turnover")
            return
        if self._replays - replays != steps or running != len(self._running):
            raise ValueError(
                f"{self._replays - replays} of {steps} steps replayed a graph, with "
                f"{running} of {len(self._running)} requests: not a steady decode"
            )

    def _finish(self) -> None:
        """Drop the requests that run, and step until nothing is in flight."""
        self._arrivals = 0
        self._engine.abort_request(self._running)
        while self._core.scheduler.has_requests() or self._core.batch_queue:
            self._step()
        self._running = []

    @contextmanager
    def _submissions(self) -> Iterator["Submissions"]:
        from vllm_ext.submissions import Submissions

        with Submissions(self._host, LAUNCHES) as self._counting:
            yield self._counting
        self._counting = None

    def _submitted(self, kind: str, name: str) -> None:
        if self._counting is not None:
            self._counting.add(kind, name)

    def _stub(self) -> None:
        import torch

        runner, scheduler = self._runner, self._core.scheduler
        width = runner.model_config.get_hidden_size()
        hidden = torch.zeros(MAX_TOKENS, width, dtype=torch.bfloat16)
        logits = torch.zeros(MAX_REQUESTS, VOCABULARY, dtype=torch.bfloat16)

        def forward(positions: torch.Tensor, **_: Any) -> torch.Tensor:
            return hidden[: positions.shape[0]]

        def compute_logits(states: torch.Tensor, *_: Any) -> torch.Tensor:
            self._submitted("aten", "lm_head (stubbed)")
            return logits[: states.shape[0]]

        runner.model.forward = forward
        runner.model.compute_logits = compute_logits

        def submit_graph() -> None:
            self._submitted("graph", "replay (stubbed)")

        def replay() -> None:
            self._replays += 1
            submit_graph()

        graphs = runner.cudagraph_manager
        for described in graphs._capture_descs.values():
            graphs.graphs.update(dict.fromkeys(described, gpupath.Graph(replay)))
        graphs.hidden_states = hidden
        graphs._graphs_captured = True
        if hasattr(runner, "capture_step_graph"):
            from vllm_ext.patches.step_graph.graphs import asked_for_mono

            # One graph of a step has its forward pass, too.
            submit = replay if asked_for_mono() else submit_graph
            gpupath.step_graphs(runner, lambda work: submit)

        def update_from_output(scheduled: Any, output: Any) -> Any:
            started = thread_time()
            output.sampled_token_ids = [[TOKEN] for _ in output.req_ids]
            ready = thread_time()
            OffClock.seconds += ready - started
            result = type(scheduler).update_from_output(scheduler, scheduled, output)
            if self._clocks is not None:
                self._clocks["update_from_output"].append(thread_time() - ready)
            return result

        scheduler.update_from_output = update_from_output


def _timed(method: Callable[..., Any], samples: list[float]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        off = OffClock.seconds
        started = thread_time()
        try:
            return method(*args, **kwargs)
        finally:
            samples.append(thread_time() - started - (OffClock.seconds - off))

    return call


def _times_core_was_lost() -> int:
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nivcsw


def _clear_logits_indices(*arguments: Any) -> None:
    """What the kernel of that name does, as far as its result must be a valid index."""
    indices = arguments[9]
    ctypes.memset(indices.data_ptr(), 0, indices.nbytes)


def _build_engine() -> Any:
    """An ``LLMEngine`` in this process."""
    from vllm import LLM

    from vllm_ext_cpulane.tinymodel import write_model

    with tempfile.TemporaryDirectory(prefix="vllm-ext-host-") as folder:
        model = write_model(folder, VOCABULARY, layers=LAYERS, max_length=MAX_LENGTH)
        return LLM(
            model=str(model),
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=MAX_LENGTH,
            max_num_seqs=MAX_REQUESTS,
            max_num_batched_tokens=MAX_TOKENS,
            block_size=gpupath.BLOCK_SIZE,
            enforce_eager=True,  # nothing is compiled; the graphs are pretended
            disable_log_stats=True,
        ).llm_engine


if __name__ == "__main__":
    main()
