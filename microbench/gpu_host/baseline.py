"""What one steady decode step of stock vLLM is made of, on a GPU: a result per case.

``python -m vllm_ext.microbench.gpu_host.baseline --model NAME --batch N,N --json FILE``
boots one engine and decodes each batch in it: first without a profiler, for the time
of a step and its parts, then a few steps under torch's profiler, of whose trace only
the table (`trace`) is kept. The file is written after each batch; batches that it has
already are left out. The stage ``baseline`` of `run` calls this for each model.

The engine's core runs in this process, so its step is that of a server without HTTP,
tokenizer and the hop between processes.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

from vllm_ext import jsonfile, machine
from vllm_ext.bench import models
from vllm_ext.microbench.gpu_host import smoke, trace
from vllm_ext.stats import median, quartiles

BATCHES = (1, 8, 32, 128)
PROMPT = 32  # tokens
MAX_LENGTH = 2048
SETTLING_STEPS = 20
TIMED_STEPS = 200
TRACED_STEPS = 24
SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.7, "top_p": 0.8, "top_k": 20},
}
WAIT = "wait for the GPU"
PARTS = (
    ("scheduler", "schedule"),
    ("model_executor", "execute_model"),
    ("model_executor", "sample_tokens"),
    ("scheduler", "update_from_output"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the batches that are still missing; the exit status."""
    args = _parser().parse_args(argv)
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ["VEXT"] = "0"  # stock
    found = _earlier(args.json)
    missing = [
        (batch, sampling)
        for sampling in args.sampling
        for batch in args.batch
        if case(args.model, batch, sampling) not in found["cases"]
    ]
    if not missing:
        return 0
    started = time.monotonic()
    stepper = Stepper(args.model, max(args.batch))
    found["machine"] = machine.describe()
    found["engine"][args.model] = stepper.description | {
        "boot_s": round(time.monotonic() - started, 1)
    }
    for batch, sampling in missing:
        name = case(args.model, batch, sampling)
        found["cases"][name] = {
            **{"model": args.model, "batch": batch, "sampling": sampling},
            **stepper.measure(batch, sampling, args.steps, args.traced),
        }
        jsonfile.write(args.json, found)
        sys.stdout.write(f"{line(name, found['cases'][name])}\n")
        sys.stdout.flush()
    sys.stdout.flush()
    os._exit(0)  # an engine's threads would hold the process


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="baseline", description=__doc__)
    parser.add_argument("--model", choices=models.MODELS, required=True)
    parser.add_argument("--batch", type=_numbers, default=BATCHES)
    parser.add_argument(
        "--sampling", type=lambda text: text.split(","), default=SAMPLING
    )
    parser.add_argument("--steps", type=int, default=TIMED_STEPS)
    parser.add_argument("--traced", type=int, default=TRACED_STEPS)
    parser.add_argument("--json", type=Path, required=True)
    return parser


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _earlier(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
        return {"engine": found["engine"], "cases": found["cases"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {"engine": {}, "cases": {}}


def case(model: str, batch: int, sampling: str) -> str:
    """What a case is called."""
    return f"{model}, batch {batch}, {sampling}"


def line(name: str, result: dict[str, Any]) -> str:
    """A case for a terminal."""
    gpu = result["trace"]["gpu"]
    busy = "no GPU work" if gpu is None else f"GPU busy {gpu['busy_us']:.0f} us"
    return (
        f"{name}: {result['step_us']['median']:.0f} us a step, {busy}, "
        f"{result['trace']['launches_per_step']:.0f} launches"
    )


class Stepper:
    """A stock engine in this process, and clocks on the parts of its step.

    Args:
        model: A name of `models.MODELS`.
        seats: The largest batch.
    """

    def __init__(self, model: str, seats: int) -> None:
        llm = smoke.boot(
            model,
            max_model_len=MAX_LENGTH,
            max_num_seqs=seats,
            gpu_memory_utilization=0.5,
            disable_log_stats=True,
        )
        self.description = smoke.describe(llm)
        self._engine = llm.llm_engine
        self._core = self._engine.engine_core.engine_core
        self._clocks: dict[str, list[float]] = {}  # microseconds, by part
        self._marked: Callable[[str], Any] = nullcontext

    def measure(
        self, batch: int, sampling: str, steps: int, traced: int
    ) -> dict[str, Any]:
        """One case; times in microseconds.

        Returns:
            ``step_us`` and ``parts_us``: median and quartiles of ``steps`` steps that
            no profiler watched. ``trace``: `trace.table` of ``traced`` steps.
        """
        self._start(batch, sampling)
        with self._timed_parts():
            for _ in range(SETTLING_STEPS):
                self._step()
            self._clocks.clear()
            for _ in range(steps):
                self._step()
            clocks = {name: list(taken) for name, taken in self._clocks.items()}
            found = self._trace(traced)
        self._finish()
        return {
            "step_us": _summary(clocks.pop("step")),
            "parts_us": {name: _summary(taken) for name, taken in clocks.items()},
            "tokens_per_step": batch,
            "trace": found,
        }

    def _start(self, batch: int, sampling: str) -> None:
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=MAX_LENGTH - PROMPT - 1,
            ignore_eos=True,
            detokenize=False,
            **SAMPLING[sampling],
        )
        self._running = [f"{sampling}-{batch}-{number}" for number in range(batch)]
        vocabulary = self._engine.model_config.get_vocab_size()
        for number, name in enumerate(self._running):
            prompt = [
                3 + (7 * number + 11 * at) % (vocabulary - 3) for at in range(PROMPT)
            ]
            self._engine.add_request(name, {"prompt_token_ids": prompt}, params.clone())

    def _step(self) -> None:
        started = time.perf_counter()
        with self._marked(trace.STEP):
            self._engine.step()
        self._took("step", started)

    def _took(self, part: str, started: float) -> None:
        taken = 1e6 * (time.perf_counter() - started)
        self._clocks.setdefault(part, []).append(taken)

    def _finish(self) -> None:
        self._engine.abort_request(self._running)
        while self._core.scheduler.has_requests() or self._core.batch_queue:
            self._engine.step()

    @contextmanager
    def _timed_parts(self) -> Iterator[None]:
        """Clocks on `PARTS`, on the wait for a result, and on the output's way out."""
        with ExitStack() as stack:
            holders = [(getattr(self._core, name), part) for name, part in PARTS]
            holders.append((self._engine.output_processor, "process_outputs"))
            for holder, part in holders:
                clocked = self._clocked(getattr(holder, part), part)
                stack.enter_context(mock.patch.object(holder, part, clocked))
            yield

    def _clocked(self, method: Callable[..., Any], part: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            with self._marked(f"{trace.MARK}{part}"):
                answer = method(*args, **kwargs)
            self._took(part, started)
            if part == "sample_tokens" and hasattr(answer, "result"):
                answer.result = self._clocked(answer.result, WAIT)
            return answer

        return call

    def _trace(self, steps: int) -> dict[str, Any]:
        import torch
        from torch.profiler import ProfilerActivity, profile

        kinds = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            kinds.append(ProfilerActivity.CUDA)
        profiler = profile(activities=kinds)
        self._marked = torch.profiler.record_function
        profiler.start()
        try:
            # One more than is looked at on either side: the first pays for the
            # profiler's start, the last only ends the one before it.
            for _ in range(steps + 2):
                self._step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        finally:
            profiler.stop()
            self._marked = nullcontext
        with tempfile.TemporaryDirectory(prefix="vllm-ext-trace-") as folder:
            file = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(file))
            return trace.table(json.loads(file.read_text()), skip=1)


def _summary(taken: Sequence[float]) -> dict[str, Any]:
    return {
        "median": median(taken),
        "quartiles": list(quartiles(taken)),
        "steps": len(taken),
    }


if __name__ == "__main__":
    sys.exit(main())
