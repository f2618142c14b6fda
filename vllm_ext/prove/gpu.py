"""The patches on a GPU, with vLLM's own checks armed; and the files that say so.

Where there is a GPU, a stock and a patched engine decode the requests of
`vllm_ext.tokenrun`, one after the other, with CUDA graphs. Tokens have to be equal; a
wait of the host inside a step (``VLLM_GPU_SYNC_CHECK=error``) or a kernel compiled
after the warm-up (``--jit-monitor-mode=error``) ends the engine. What was found is
written to ``microbench/results/<gpu>/``.

Where there is none, the files that are there speak: of each patch whose code is still
the code that ran.

Limits: one tiny model with random weights, Model Runner V2, FlashInfer's sampler off
because it draws from the host's generator. What a patch leaves to stock code there, as
``late_metadata`` does with FlashAttention 3, is no proof of it, and is said.
"""

import json
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from vllm_ext import demo, jsonfile, machine, tokenrun
from vllm_ext.bench import results
from vllm_ext.children import Child, ChildError, serve
from vllm_ext.patches import SERIES
from vllm_ext.patching.report import read_states
from vllm_ext.prove.verdict import Verdict

KIND = "prove"
ARMED: dict[str, str | None] = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "VLLM_GPU_SYNC_CHECK": "error",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_PLUGINS": None,
    "HF_HUB_OFFLINE": "1",
}
NO_FILE = "no result file of this code; run `vllm-ext prove gpu` where there is a GPU"


def verdicts(say: Callable[[str], None]) -> list[Verdict]:
    """Run on the GPU that is here, or read the files of those who had one.

    Args:
        say: Told what is going on.

    Returns:
        One for each patch.

    Raises:
        ChildError: The stock engine failed.
        CannotWriteError: The result cannot be kept.
    """
    here = machine.describe()
    if here["gpu"] == machine.NO_GPU:
        say("gpu: none here; looking for result files")
        return from_files(results.RESULTS)
    result = {"machine": here, **measure(say)}
    file = results.kept_as(KIND, here)
    file.parent.mkdir(parents=True, exist_ok=True)
    jsonfile.write(file, result)
    return judge(result, results.shown(file))


def measure(say: Callable[[str], None]) -> dict[str, Any]:
    """Decode with a stock and a patched engine.

    Returns:
        ``tokens``, a `demo.difference`; ``stopped``, why the patched engine did not
        come to an end, or nothing; ``patches``, by name ``digest``, ``state``,
        ``calls``, ``aside`` and ``reason``.
    """
    names = ",".join(patch.name for patch in SERIES)
    with tempfile.TemporaryDirectory(prefix="vllm-ext-") as folder:
        say("gpu: stock engine")
        stock = _decode({"VEXT": "0"})
        say("gpu: patched engine")
        settings: dict[str, str | None] = {"VEXT": "1", "VEXT_PATCHES": names}
        stopped = ""
        patched: dict[str, Any] = {}
        try:
            patched = _decode({**settings, "VEXT_STATE_DIR": folder})
        except ChildError as error:
            stopped = error.line
        states = {each["name"]: each for each in demo.merged(read_states(Path(folder)))}
    return {
        "tokens": demo.difference(stock, patched),
        "stopped": stopped,
        "patches": {
            patch.name: {
                "digest": results.digest(patch.name),
                **states.get(patch.name, {"state": "waiting", "calls": 0, "aside": {}}),
            }
            for patch in SERIES
        },
    }


def judge(result: dict[str, Any], file: str) -> list[Verdict]:
    """What a result says of each patch."""
    return [_judge(result, patch.name, file) for patch in SERIES]


def from_files(folder: Path) -> list[Verdict]:
    """What the kept results say of each patch as it is now, the newest first."""
    found: dict[str, Verdict] = {}
    by_day = sorted(folder.glob(f"*/*_{KIND}.json"), key=lambda file: file.name)
    for file in by_day:
        try:
            result = json.loads(file.read_text())
            known = result["patches"]
            for patch in SERIES:
                if known.get(patch.name, {}).get("digest") == results.digest(
                    patch.name
                ):
                    found[patch.name] = _judge(result, patch.name, results.shown(file))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            why = f"cannot be read ({type(error).__name__}: {error}); run it again"
            return [Verdict("gpu", results.shown(file), "not proven", why, fault=True)]
    return [
        found.get(patch.name, Verdict("gpu", patch.name, "not proven", NO_FILE))
        for patch in SERIES
    ]


def _judge(result: dict[str, Any], name: str, file: str) -> Verdict:
    tokens, patch = result["tokens"], result["patches"][name]
    if result["stopped"]:
        why = f"the patched engine stopped: {result['stopped']}"
        return Verdict("gpu", name, "not proven", why, file, fault=True)
    if tokens["different"]:
        why = f"{tokens['different']} of {tokens['compared']} tokens differ"
        return Verdict("gpu", name, "not proven", why, file, fault=True)
    aside = sum(patch["aside"].values())
    if patch["state"] != "in use" or aside >= patch["calls"]:
        reasons = "; ".join([patch.get("reason", ""), *patch["aside"]]).strip("; ")
        why = f"{patch['state']}, {patch['calls']} calls, {aside} left to stock"
        return Verdict(
            "gpu", name, "not proven", f"{why}: {reasons}".rstrip(": "), file
        )
    detail = (
        f"{tokens['compared']} tokens are stock's, no wait and no compilation in "
        f"{patch['calls']} calls on {result['machine']['gpu']}"
    )
    return Verdict("gpu", name, "proven on GPU", detail, file)


def _decode(settings: dict[str, str | None]) -> dict[str, Any]:
    with ExitStack() as stack:
        child = Child("vllm_ext.prove.gpu", {**ARMED, **settings}, "engine on the GPU")
        stack.callback(child.close)
        answers: dict[str, Any] = child.ask("decode", 550)
        return answers


# -- in the child ------------------------------------------------------------------


def main() -> None:
    """Serve ``decode()``."""
    serve({"decode": decode})


def decode() -> dict[str, Any]:
    """What `tokenrun.REQUESTS` are given by an engine on the GPU."""
    from vllm import LLM

    from vllm_ext_cpulane.tinymodel import write_model

    with tempfile.TemporaryDirectory(prefix="vllm-ext-gpu-") as folder:
        shape = {"hidden_size": 512, "layers": 4, "heads": 8, "kv_heads": 2}
        model = write_model(folder, **shape, head_dim=64, weights=True)
        engine = LLM(
            model=str(model),
            skip_tokenizer_init=True,
            max_model_len=tokenrun.MAX_LENGTH,
            max_num_seqs=tokenrun.SEATS,
            gpu_memory_utilization=0.3,
            enable_prefix_caching=False,
            disable_log_stats=True,
            jit_monitor_mode="error",
            seed=0,
        ).llm_engine
    answers, _ = tokenrun.run(engine)
    return answers


if __name__ == "__main__":
    main()
