"""The pretend device against CUDA: does a GPU wait where the sync detector says?

Where there is a GPU, ``vllm-ext prove syncs`` asks it three things, each in a process
of its own, and keeps the answers in ``microbench/results/<gpu>/``:

- every operation of `vllm_ext.prove.crossings`: does ``torch.cuda.set_sync_debug_mode``
  (and what `vllm_ext.prove.syncs.watch` adds to it) see a wait at the lines at which
  the pretend device does, and at no others;
- every feature of `vllm_ext.prove.audit`, with stock engines on the GPU: does a steady
  step wait in the functions in which it does on the pretend device;
- the same features with ``VLLM_GPU_SYNC_CHECK=error``: a feature that waits for nothing
  on the pretend device has to pass.

Where there is none, the newest file speaks, if it was made by this code.

Limits: vLLM's check looks into two calls of the worker only and lets some waits pass
on purpose, so a feature that waits need not be stopped by it. The engines differ in
what the platforms differ in: attention backend, compiled layers.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import (
    AbstractContextManager,
    ExitStack,
    closing,
    contextmanager,
    nullcontext,
)
from pathlib import Path
from typing import Any

from vllm_ext import jsonfile, machine
from vllm_ext.bench import results
from vllm_ext.children import Child, serve
from vllm_ext.prove import crossings
from vllm_ext.prove.verdict import Verdict

KIND = "syncs"
NO_FILE = "no result file of this code; run `vllm-ext prove syncs` where there is a GPU"
OPERATIONS = "pretend device against CUDA: operations"
FEATURES = "pretend device against CUDA: features"
CHECKED = "VLLM_GPU_SYNC_CHECK=error: features"
CODE = ("crossings.py", "pretend.py", "syncs.py", "auditrun.py", "cuda.py")
TIMEOUT = 550
BASE: dict[str, str | None] = {
    "VEXT": "0",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # FlashInfer's sampler is another one than the audit's.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_PLUGINS": None,
    "HF_HUB_OFFLINE": "1",
    "NUMBA_DISABLE_JIT": "1",  # as in the audit: V1 drafts in Python
}

Say = Callable[[str], None]


def verdicts(audited: Sequence[Mapping[str, Any]], say: Say) -> list[Verdict]:
    """Ask the GPU that is here, and keep what it answers.

    Args:
        audited: What the pretend device found, for each engine: ``runner`` (1 or 2),
            ``kind`` (of `auditrun.KINDS`) and ``stock``, by feature the ``waits``.
        say: Told what is going on.

    Returns:
        One for each of the three questions.

    Raises:
        ChildError: An engine failed for a reason of its own.
        CannotWriteError: The result cannot be kept.
    """
    here = machine.describe()
    found = {"machine": here, "digest": digest(), **measure(audited, say)}
    file = results.kept_as(KIND, here)
    file.parent.mkdir(parents=True, exist_ok=True)
    jsonfile.write(file, found)
    return judge(found, results.shown(file))


def measure(audited: Sequence[Mapping[str, Any]], say: Say) -> dict[str, Any]:
    """What both devices answer.

    Returns:
        ``operations``, by name ``pretend`` and ``cuda``, lines as text; ``features``
        and ``checked``: see `judge`.
    """
    say("syncs: operations on the pretend device and on CUDA")
    lines = {}
    for device in ("pretend", "cuda"):
        with closing(Child("vllm_ext.prove.cuda", BASE, f"{device} device")) as child:
            lines[device] = child.ask("operations", TIMEOUT, device=device)
    operations = {
        name: {device: lines[device][name] for device in lines}
        for name in lines["pretend"]
    }
    features, checked = [], []
    for run in audited:
        title = f"V{run['runner']} {run['kind']}"
        expected = {name: _functions(seen) for name, seen in run["stock"].items()}
        say(f"syncs: {title} on the GPU")
        with closing(_engine_child(run["runner"], {})) as child:
            seen = child.ask("waits", TIMEOUT, kind=run["kind"])
        features += [
            {
                "feature": f"{title}: {name}",
                "pretend": expected[name],
                "cuda": _functions(seen[name]),
            }
            for name in expected
        ]
        clean = [name for name, waits in expected.items() if not waits]
        say(f"syncs: {title} with VLLM_GPU_SYNC_CHECK=error")
        with closing(
            _engine_child(run["runner"], {"VLLM_GPU_SYNC_CHECK": "error"})
        ) as child:
            stopped = child.ask("checked", TIMEOUT, kind=run["kind"], names=clean)
        checked.append({"engine": title, "passed": clean, **stopped})
    return {"operations": operations, "features": features, "checked": checked}


def judge(found: Mapping[str, Any], file: str) -> list[Verdict]:
    """What an answer of both devices says.

    Args:
        found: ``operations`` by name, with the lines at which each device waits;
            ``features``, a list of ``feature`` and the functions in which each device
            waits; ``checked``, for each engine the features that ``passed`` and
            the one that was ``stopped``, with the last line that was said, or "".
        file: Where it is kept.
    """
    gpu = found["machine"]["gpu"]
    operations = [
        f"{name}: pretend device {_shown(its['pretend'])}, CUDA {_shown(its['cuda'])}"
        for name, its in found["operations"].items()
        if its["pretend"] != its["cuda"]
    ]
    features = [
        f"{its['feature']}: pretend device {_shown(its['pretend'])}, "
        f"CUDA {_shown(its['cuda'])}"
        for its in found["features"]
        if its["pretend"] != its["cuda"]
    ]
    stopped = [
        f"{its['engine']}: {its['stopped']}"
        for its in found["checked"]
        if its["stopped"]
    ]
    passed = sum(len(its["passed"]) for its in found["checked"])
    return [
        _verdict(OPERATIONS, operations, len(found["operations"]), gpu, file),
        _verdict(FEATURES, features, len(found["features"]), gpu, file),
        _verdict(CHECKED, stopped, passed, gpu, file),
    ]


def from_files(folder: Path) -> list[Verdict]:
    """What the newest kept answer of this code says."""
    files = sorted(folder.glob(f"*/*_{KIND}.json"), key=lambda file: file.name)
    for file in reversed(files):
        try:
            found = json.loads(file.read_text())
            if found["digest"] == digest():
                return judge(found, results.shown(file))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            why = f"cannot be read ({type(error).__name__}: {error}); run it again"
            return [
                Verdict("syncs", results.shown(file), "not proven", why, fault=True)
            ]
    return [
        Verdict("syncs", subject, "not proven", NO_FILE)
        for subject in (OPERATIONS, FEATURES, CHECKED)
    ]


def digest() -> str:
    """Of the code that asks: 16 digits."""
    code = hashlib.sha256()
    for name in CODE:
        code.update((Path(__file__).parent / name).read_bytes())
    return code.hexdigest()[:16]


def _verdict(
    subject: str, differences: list[str], looked_at: int, gpu: str, file: str
) -> Verdict:
    if not differences:
        detail = f"{looked_at} agree on {gpu}"
        return Verdict("syncs", subject, "proven on GPU", detail, file)
    more = f", and {len(differences) - 1} more" if len(differences) > 1 else ""
    what = f"{differences[0]}{more}"
    return Verdict("syncs", subject, "not proven", what, file, fault=True)


def _shown(places: Sequence[str]) -> str:
    return f"waits at {', '.join(places)}" if places else "does not wait"


def _functions(seen: Mapping[str, Any]) -> list[str]:
    """The functions in which steady steps wait."""
    return sorted({f"{wait['file']} {wait['function']}" for wait in seen["waits"]})


def _engine_child(runner: int, settings: dict[str, str | None]) -> Child:
    chosen = {"VLLM_USE_V2_MODEL_RUNNER": str(int(runner == 2))}
    return Child(
        "vllm_ext.prove.cuda", {**BASE, **chosen, **settings}, "engine on the GPU"
    )


# -- in the child ------------------------------------------------------------------


def main() -> None:
    """Serve ``operations(device)``, ``waits(kind)``, ``checked(kind, names)``."""
    serve({"operations": operations, "waits": waits, "checked": checked})


def operations(device: str) -> dict[str, list[str]]:
    """At which lines each operation of `crossings` makes the host wait.

    Args:
        device: ``pretend`` or ``cuda``.
    """
    import torch

    from vllm_ext.prove.pretend import DEVICE, PretendDevice
    from vllm_ext.prove.syncs import watch

    def lines(function: crossings.Planted, place: str, pretend: Any) -> list[str]:
        tensors = crossings.Tensors(place)
        if not pretend:
            function(tensors)  # first uses may wait
            tensors = crossings.Tensors(place)
            torch.cuda.synchronize()
        with watch(pretend) as found:
            function(tensors)
        told = {
            *(f"{wait.where.line} {wait.where.text}" for wait in found.waits),
            *(f"{wait.where.line} {wait.where.text} (event)" for wait in found.events),
        }
        return sorted(told)

    answers = {}
    for mode in ("plain", "inference"):
        for name, function in (crossings.WAITS | crossings.CLEAN).items():
            with ExitStack() as stack:
                stack.enter_context(torch.inference_mode(mode == "inference"))
                pretend = None
                if device == "pretend":
                    pretend = stack.enter_context(PretendDevice())
                place = DEVICE if pretend else device
                answers[f"{name} ({mode})"] = lines(function, place, pretend)
    return answers


def waits(kind: str) -> dict[str, Any]:
    """What `auditrun.observe` sees on CUDA, feature by feature."""
    from vllm_ext.prove import auditrun

    features, options = auditrun.KINDS[kind]
    with _engine(options) as llm_engine:
        return {
            name: auditrun.observe(llm_engine, None, wanted)
            for name, wanted in features.items()
        }


def checked(kind: str, names: list[str]) -> dict[str, str]:
    """Run features one after the other, until a check stops the engine.

    Returns:
        ``stopped``: which feature was, and what was said; or nothing.
    """
    from vllm_ext.prove import auditrun

    features, options = auditrun.KINDS[kind]
    with _engine(options) as llm_engine:
        for name in names:
            try:
                auditrun.observe(llm_engine, None, features[name], _unwatched)
            except RuntimeError as error:
                said = str(error).splitlines() or [type(error).__name__]
                return {"stopped": f"{name}: {said[0]}"}
    return {"stopped": ""}


def _unwatched(device: Any) -> AbstractContextManager[Any]:
    """Two who listen to torch's warnings would hear only half of them."""
    from vllm_ext.prove.syncs import Found

    return nullcontext(Found())


@contextmanager
def _engine(options: Mapping[str, Any]) -> Iterator[Any]:
    """The audit's engine, on the GPU."""
    from vllm import LLM
    from vllm.config.reasoning import ReasoningConfig

    from vllm_ext.prove import auditrun, engine
    from vllm_ext_cpulane.tinymodel import write_model

    with tempfile.TemporaryDirectory(prefix="vllm-ext-cuda-") as folder:
        shape = {"hidden_size": 512, "layers": 2, "heads": 8, "kv_heads": 2}
        model = write_model(
            *(folder, auditrun.VOCABULARY),
            **shape,
            head_dim=64,
            tokenizer=True,
            weights=True,
        )
        llm = LLM(
            model=str(model),
            max_model_len=engine.MAX_LENGTH,
            max_num_seqs=engine.SEATS,
            block_size=auditrun.BLOCK_SIZE,
            max_logprobs=-1,
            gpu_memory_utilization=0.3,
            enable_prefix_caching=False,
            disable_log_stats=True,
            reasoning_config=ReasoningConfig(**auditrun.THINKING),
            structured_outputs_config={"backend": "xgrammar"},
            seed=0,
            **options,
        )
        try:
            yield llm.llm_engine
        finally:
            llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
