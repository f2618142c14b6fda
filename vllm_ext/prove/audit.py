"""What every sampling feature of vLLM costs a decode step: waits, launches, copies.

Model Runner V1 and V2 of the installed vLLM are booted on the pretend device, each in
a process of its own, and asked for one feature after the other, first stock and then
with the patches applied. `document` says what was found; docs/audit-syncs.md is that,
kept, so that a new wait shows up as a failing test.
"""

import difflib
import json
import textwrap
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_ext import doctor, jsonfile, machine
from vllm_ext.bench import results
from vllm_ext.children import Child
from vllm_ext.hostbench import environment
from vllm_ext.patches import SERIES
from vllm_ext.prove import cuda
from vllm_ext.prove.verdict import Verdict

PREFACE = """
Real engines with a tiny model on the pretend device
([pretend.py](../vllm_ext/prove/pretend.py)), one feature at a time. Per steady decode
step, stock and, where it differs, patched (`→`). A host wait stalls the host until the
device has done all that was submitted; an event wait, until one copy is over. Tensors
are those that were made in memory of their own, on the device and in pinned memory. The
forward pass is the replay of a graph; where `graph` is 0 it runs piece by piece, and
its launches count. A device that lags runs nothing before the host waits for it, so
that what the host overwrites or reads too early gives other tokens. Blocks of the KV
cache are large here: with 16 tokens per block, every 16th step of a request adds one
Triton launch and one copy. A step that `step_graph` checks waits for the comparison:
none is checked here. Nothing ran on a GPU.
"""
ENDING = """
"Seen" is what this audit came by, on stock vLLM. On a GPU `VLLM_GPU_SYNC_CHECK=error`
raises where a step waits, which `make gpu` sets.
"""
COMMAND = "vllm-ext prove syncs --write docs/audit-syncs.md"
BOTH_CORES = 2
ON_RECORD = Path(__file__).with_name("waits.json")
TIMEOUT = 600  # seconds; an engine needs a tenth of that on a quiet machine

Say = Callable[[str], None]
Result = dict[str, dict[str, Any]]


def _without(modules: str) -> list[str]:
    """Patches that are not for the runner of these modules alone."""
    return [
        patch.name
        for patch in SERIES
        if not any(modules in module for module in patch.modules)
    ]


V1_PATCHES, V2_PATCHES = _without(".worker.gpu."), _without(".gpu_model_runner")
FROM_BOOT = [patch.name for patch in SERIES if patch.from_boot]


@dataclass(frozen=True)
class Run:
    """One engine.

    Attributes:
        runner: Model Runner 1 or 2.
        kind: Of the child's ``KINDS``.
        title: For people.
        patched: Features that are watched again under the runner's patches.
    """

    runner: int
    kind: str
    title: str
    patched: tuple[str, ...]

    @property
    def patches(self) -> list[str]:
        """What is applied: the patches of this runner."""
        if self.kind == "from boot":
            return FROM_BOOT
        mine = V2_PATCHES if self.runner == 2 else V1_PATCHES
        return [name for name in mine if name not in FROM_BOOT]


MAIN = (
    *("greedy", "temperature", "temperature, seed", "min-p", "top-k", "top-p"),
    *("top-k, top-p", "three penalties", "logit bias", "allowed ids", "bad words"),
    *("min_tokens, stop tokens", "JSON schema"),
    *("min_tokens, stop tokens, JSON schema", "logprobs", "prompt logprobs"),
    "thinking budget",
)
DRAFTS = (
    *("n-gram drafts", "n-gram drafts, logprobs", "n-gram drafts, JSON schema"),
    "n-gram drafts, thinking budget",
)
# An engine that may have budgets has no step graph.
STEPPED = tuple(name for name in MAIN if name != "thinking budget")
# The longest first: two run at a time. The patches for V1 concern few features.
RUNS = (
    Run(2, "asynchronous", "Model Runner V2, asynchronous scheduling", MAIN),
    Run(
        *(1, "asynchronous", "Model Runner V1, asynchronous scheduling"),
        (
            *("greedy", "three penalties", "allowed ids", "bad words"),
            *("min_tokens, stop tokens", "min_tokens, stop tokens, JSON schema"),
            "thinking budget",
        ),
    ),
    Run(
        2,
        "from boot",
        "Model Runner V2, patched from boot on, asynchronous scheduling",
        STEPPED,
    ),
    Run(2, "drafts", "Model Runner V2, speculation, synchronous scheduling", DRAFTS),
    Run(
        *(1, "drafts", "Model Runner V1, speculation, synchronous scheduling"),
        ("n-gram drafts", "n-gram drafts, logprobs"),
    ),
)


@dataclass(frozen=True)
class Site:
    """A place in vLLM that is known to make the host wait.

    Attributes:
        file: From ``vllm/`` on.
        function: Its name.
        when: What has to be asked for.
        note: What became of it; or why the audit does not come by.
    """

    file: str
    function: str
    when: str
    note: str


GPU1 = "vllm/v1/worker/gpu_model_runner.py"
SITES = (
    Site(
        "vllm/v1/worker/gpu/async_utils.py",
        "get_output",
        "V2, every step: the event of the sampled tokens' copy",
        "the one wait that a step needs; asynchronous scheduling hides it",
    ),
    Site(
        *(GPU1, "get_output", "V1, every step: the event of the sampled tokens' copy"),
        "the one wait that a step needs; asynchronous scheduling hides it",
    ),
    Site(
        *(GPU1, "synchronize_input_prep"),
        "V1, asynchronous, every step: the last step's input copies",
        "an event that is over as a rule",
    ),
    Site(
        *("vllm/v1/worker/gpu_input_batch.py", "update_async_output_token_ids"),
        "V1, asynchronous: penalties, bad words, thinking budgets",
        "an event of the last step's tokens; `v1_last_token` leaves it to budgets",
    ),
    Site(
        *("vllm/v1/sample/logits_processor/builtin.py", "_mask_stop_token_logits"),
        "V1: min_tokens with stop tokens and a grammar, every step",
        "four waits; `min_tokens_restore` removes them",
    ),
    Site(
        *(GPU1, "_to_list", "V1, synchronous scheduling, every step"),
        "an event: asynchronous scheduling or V2",
    ),
    Site(
        *("vllm/v1/sample/rejection_sampler.py", "parse_output"),
        "V1, synchronous scheduling, speculation, every step",
        "an event, under `v1_copy_back`; asynchronous scheduling or V2",
    ),
    Site(
        *("vllm/v1/outputs.py", "tolists"),
        "V1, synchronous scheduling, logprobs, every step",
        "an event instead of three waits, under `v1_copy_back`",
    ),
    Site(
        *("vllm/v1/outputs.py", "filter"),
        "V1, synchronous scheduling, speculation with logprobs, every step",
        "six waits for a mask made on the host; `v1_copy_back` removes them",
    ),
    Site(
        *(GPU1, "_prepare_inputs", "V1, speculation: counts of accepted tokens"),
        "an event that only hybrid models record: over at once for others",
    ),
    Site(
        *("vllm/v1/worker/gpu/spec_decode/utils.py", "get_draft_tokens"),
        "V2, speculation with a grammar, every step",
        "an event: the host's grammar has to see the drafts",
    ),
    Site(
        *("vllm/v1/sample/ops/topk_topp_triton.py", "apply_top_k_top_p_triton"),
        "top-k or top-p, first use: two constant tables",
        "build them before the first request, and before a graph is captured",
    ),
    Site(
        *(GPU1, "_sync_device", "V1: prompt logprobs, at the end of a prefill"),
        "V2, which copies them asynchronously",
    ),
    Site(
        *("vllm/v1/utils.py", "copy_slice"),
        "V1: allowed ids, when such a request arrives",
        "its mask lies in memory that is not pinned; `v1_pinned_mask` pins it",
    ),
    Site(
        *("vllm/v1/sample/thinking_budget_state.py", "update_state"),
        "V1: thinking budget with speculation",
        "nobody passes the indices that it would read back",
    ),
    Site(
        *("vllm/v1/attention/backends/flashinfer.py", "build"),
        "FlashInfer's own decode kernel with speculation, every step",
        "FlashInfer has no CPU build",
    ),
    Site(
        "vllm/v1/attention/backends/utils.py",
        "make_local_attention_virtual_batches",
        "chunked local attention, every step",
        "the tiny model has none; Llama 4 has",
    ),
    Site(
        "vllm/v1/worker/gpu/spec_decode/adaptive_verification.py",
        "record_confidences",
        "V2, adaptive verification: an event, every step",
        "needs a model that drafts",
    ),
    Site(
        *(GPU1, "_get_draft_token_ids_cpu"),
        "V1, asynchronous, a model that drafts, grammars: an event",
        "needs a model that drafts",
    ),
    Site(
        *(GPU1, "_get_valid_sampled_token_count"),
        "V1, asynchronous, a model that drafts: an event, every step",
        "needs a model that drafts",
    ),
    Site(
        *("vllm/lora/punica_wrapper/punica_gpu.py", "update_metadata"),
        "LoRA, when the batch's adapters change",
        "the CPU platform has a wrapper of its own",
    ),
    Site(
        *("vllm/lora/worker_manager.py", "add_adapter"),
        "LoRA, when an adapter is loaded",
        "no adapter is loaded",
    ),
    Site(
        *(GPU1, "_get_nans_in_logits", "V1, VLLM_COMPUTE_NANS_IN_LOGITS, synchronous"),
        "a debugging aid that is off",
    ),
    Site(
        *("vllm/v1/sample/sampler.py", "gather_logprobs"),
        "V1: logprobs, first use, when torch compiles",
        "torch compiles nothing here",
    ),
    Site(
        *("vllm/v1/worker/dp_utils.py", "_synchronize_dp_ranks"),
        "V1: data parallelism over NCCL, every step",
        "one process has no ranks",
    ),
    Site(
        "vllm/v1/worker/mamba_utils.py",
        "initialize_from_forward_context",
        "Mamba, once",
        "the tiny model is none",
    ),
    Site(
        *("vllm/v1/attention/backends/mla/prefill/flashinfer.py", "prepare_metadata"),
        "MLA, prefill",
        "the tiny model has no MLA",
    ),
    Site(
        *("vllm/v1/attention/ops/vit_attn_wrappers.py", "flash_attn_maxseqlen_wrapper"),
        "images, prefill",
        "the tiny model sees none",
    ),
)


# -- finding out -------------------------------------------------------------------


def gather(say: Say, runs: Sequence[Run] = RUNS) -> Result:
    """Boot the engines, two at a time, and return what each found, by title.

    Raises:
        CannotRunError: The CPU lane is not installed.
        ChildError: An engine failed.
    """
    lane = {
        **environment("interpret"),
        "VEXT": "0",  # the child applies patches by itself, after stock was seen
        "NUMBA_DISABLE_JIT": "1",  # V1 drafts in Python; compiling it takes longer
        "VEXT_STEP_GRAPH": None,
        "VEXT_STEP_GRAPH_CHECK": "0",  # a checked step waits, by design
    }

    def answer(run: Run) -> Any:
        variables = {"VLLM_USE_V2_MODEL_RUNNER": str(int(run.runner == 2))}
        child = Child("vllm_ext.prove.auditrun", {**lane, **variables}, run.title)
        with closing(child):
            found = child.ask(
                "audit",
                TIMEOUT,
                kind=run.kind,
                patches=run.patches,
                patched=list(run.patched),
            )
        say(f"{run.title}: {len(found['stock'])} features")
        return found

    say(f"booting {len(runs)} engines on the pretend device, two at a time")
    with ThreadPoolExecutor(BOTH_CORES) as pool:
        answers = pool.map(answer, runs)
        return dict(zip((run.title for run in runs), answers, strict=True))


def write(path: Path, say: Say) -> None:
    """Write `document` of what is found now to ``path``, and `ON_RECORD` anew."""
    result = gather(say)
    jsonfile.write_text(path, document(result))
    jsonfile.write(ON_RECORD, waiting(result))


def verdicts(say: Say) -> list[Verdict]:
    """A verdict for each patch, for stock V2 and V1, and for CUDA beside them.

    Where there is a GPU, it is asked; the pretend device needs the CPU lane, which
    cannot be installed beside vLLM for a GPU, so it speaks as it did on record.
    """
    if machine.describe()["gpu"] != machine.NO_GPU:
        return cuda.verdicts(json.loads(ON_RECORD.read_text()), say)
    return [*judge(gather(say)), *cuda.from_files(results.RESULTS)]


def waiting(result: Result, runs: Sequence[Run] = RUNS) -> list[dict[str, Any]]:
    """Where stock's steady steps wait, as `cuda.verdicts` takes it."""
    return [
        {
            "runner": run.runner,
            "kind": run.kind,
            "stock": {
                feature: {
                    "waits": [
                        {"file": wait["file"], "function": wait["function"]}
                        for wait in seen["waits"]
                    ]
                }
                for feature, seen in result[run.title]["stock"].items()
            },
        }
        for run in runs
        if run.kind != "from boot"  # stock there is what it is elsewhere
    ]


# -- judging -----------------------------------------------------------------------


def judge(result: Result, runs: Sequence[Run] = RUNS) -> list[Verdict]:
    """What `gather` found, patch by patch.

    A patch is proven if it was called, no steady step under the patches of its model
    runner waits, where it ran asynchronously, and a device that lags gives the same
    tokens; a wait or another token under a patch is a fault. Stock is proven if it
    waits at none but known `SITES` and a device that lags gives the same tokens.
    """
    found: list[Verdict] = []
    for run in runs:
        if run.kind != "drafts":
            found += [_patch_verdict(name, result[run.title]) for name in run.patches]
    for runner in (2, 1):
        its = [
            result[run.title]
            for run in runs
            if run.runner == runner and run.kind != "from boot"
        ]
        found.append(_stock_verdict(f"stock Model Runner V{runner}", its))
    return found


def _patch_verdict(name: str, found: dict[str, Any]) -> Verdict:
    features, calls = found["patched"], found["patches"][name]["calls"]
    waits = [
        (feature, wait) for feature, each in features.items() for wait in each["waits"]
    ]
    steps = sum(each["steps"] for each in features.values())
    seen = f"{steps} steady steps over {len(features)} features"
    if waits:
        feature, wait = waits[0]
        more = f", and {len(waits) - 1} more" if len(waits) > 1 else ""
        what = f"{feature}: {wait['why']} at {_place(wait)}{more}"
        return Verdict("syncs", name, "not proven", what, fault=True)
    if found["patched_lags"]:
        what = f"on a device that lags, {_other_tokens(found['patched_lags'])}"
        return Verdict("syncs", name, "not proven", what, fault=True)
    # A runner is called where it is built; its steps are others than stock's.
    used = [
        feature
        for feature, each in features.items()
        if each["submitted"] != found["stock"][feature]["submitted"]
    ]
    if not calls or (name in FROM_BOOT and not used):
        return Verdict("syncs", name, "not proven", f"never called in {seen}")
    if name in FROM_BOOT:
        seen += f", {len(used)} of them by its graphs"
    detail = f"0 host waits in {seen}, called {calls} times; {_same_tokens([found])}"
    return Verdict("syncs", name, "proven on CPU", detail)


def _stock_verdict(subject: str, found: Sequence[dict[str, Any]]) -> Verdict:
    seen = [(name, each) for its in found for name, each in its["stock"].items()]
    known = {(site.file, site.function) for site in SITES}
    new = [
        f"{feature}: {wait['why']} at {_place(wait)}"
        for feature, each in seen
        for wait in (*each["waits"], *each["events"], *each["first"])
        if (wait["file"], wait["function"]) not in known
    ]
    if new:
        what = f"{len(new)} waits that are not on record; {new[0]}"
        return Verdict("syncs", subject, "not proven", what, fault=True)
    other = [feature for its in found for feature in its["stock_lags"]]
    if other:
        what = f"on a device that lags, {_other_tokens(other)}"
        return Verdict("syncs", subject, "not proven", what, fault=True)
    steps = sum(each["steps"] for _, each in seen)
    detail = f"0 host waits in {steps} steady steps over {len(seen)} features"
    waiting = [
        f"{feature} {_number(_times(each['waits']) / each['steps'])}"
        for feature, each in seen
        if each["waits"]
    ]
    if waiting:
        detail = f"host waits per step, all on record: {'; '.join(waiting)}"
        detail += f"; none in the other {len(seen) - len(waiting)} features"
    detail = f"{detail}; {_same_tokens(found)}"
    return Verdict("syncs", subject, "proven on CPU", detail)


def _same_tokens(found: Sequence[dict[str, Any]]) -> str:
    tokens = sum(its["tokens"] for its in found)
    return f"{tokens} tokens the same on a device that lags"


def _other_tokens(features: Sequence[str]) -> str:
    return f"other tokens for {', '.join(features)}"


def changes(before: str, after: str) -> list[str]:
    """The lines in which two documents differ, as a difference is written."""
    lines = difflib.unified_diff(
        before.splitlines(), after.splitlines(), "on record", "found now", "", "", 0, ""
    )
    return [line for line in lines if not line.startswith("@@")]


# -- saying so ---------------------------------------------------------------------


def document(result: Result, runs: Sequence[Run] = RUNS) -> str:
    """What was found, as Markdown."""
    return "\n".join(_document(result, runs))


def _document(result: Result, runs: Sequence[Run]) -> Iterator[str]:
    version = doctor.open_source(None).version
    yield f"# What makes the host wait: vLLM {version}\n"
    yield f"Made by `{COMMAND}`; a test compares it with what is found now.\n"
    yield from textwrap.wrap(PREFACE.strip(), 88)
    yield ""
    for run in runs:
        yield f"## {run.title}\n"
        yield from _table(result[run.title])
        if run.patched:
            yield _patches(run, result[run.title])
        for side in ("stock", "patched")[: 1 + bool(run.patched)]:
            other = result[run.title][f"{side}_lags"]
            same = _other_tokens(other) if other else "the same tokens"
            yield f"On a device that lags, {side}: {same}.\n"
    yield "## Host waits of steady steps\n"
    yield from _places(result, runs, "waits")
    yield "## Host waits when requests arrive or leave, and at first use\n"
    yield from _places(result, runs, "first")
    yield "## Event waits of steady steps\n"
    yield from _places(result, runs, "events")
    yield "## Known places\n"
    yield from _sites(result)


def _patches(run: Run, found: dict[str, Any]) -> str:
    """What was applied, and in which features."""
    names = [
        f"`{name}`{'' if each['calls'] else ' (never called)'}"
        for name, each in found["patches"].items()
    ]
    features = ", ".join(f"*{feature}*" for feature in run.patched)
    few = len(run.patched) < len(found["stock"])
    where = f", watched in {features}" if few else ""
    return f"Patched: {', '.join(names)}{where}.\n"


def _table(found: dict[str, Any]) -> Iterator[str]:
    kinds = {
        "launch": "aten",
        "triton": "Triton",
        "graph": "graph",
        "h2d": "to device",
        "d2h": "to host",
    }
    memory = {"device": "device tensors", "pinned": "pinned"}
    heads = ("feature", "host waits", "event waits", *kinds.values(), *memory.values())
    yield f"| {' | '.join(heads)} |"
    yield f"| {' | '.join('---' for _ in heads)} |"
    for feature, stock in found["stock"].items():
        cells = _cells(stock, kinds, memory)
        if feature in found["patched"]:
            patched = _cells(found["patched"][feature], kinds, memory)
            cells = [
                old if old == new else f"{old} → {new}"
                for old, new in zip(cells, patched, strict=True)
            ]
        yield f"| {' | '.join([feature, *cells])} |"
    yield ""


def _cells(
    seen: dict[str, Any], kinds: dict[str, str], memory: dict[str, str]
) -> list[str]:
    counts = [seen["submitted"][kind] for kind in kinds]
    counts += [seen["allocated"][kind] for kind in memory]
    return [
        *(_number(_times(seen[what]) / seen["steps"]) for what in ("waits", "events")),
        *(f"{n[0]} to {n[1]}" if isinstance(n, list) else str(n) for n in counts),
    ]


def _places(result: Result, runs: Sequence[Run], what: str) -> Iterator[str]:
    """Each line that waits, with the features that come by, stock or patched."""
    features: dict[tuple[str, str], list[str]] = {}
    for run in runs:
        found = result[run.title]
        for side in ("stock", "patched"):
            for feature, each in found[side].items():
                steady = {_place(wait) for wait in each["waits"]}
                for wait in each[what]:
                    if what == "first" and _place(wait) in steady:
                        continue
                    why = "" if what == "events" else f": {wait['why']}"
                    key = _place(wait), f"`{wait['text']}`{why}"
                    name = f"V{run.runner} {side}: {feature}"
                    features.setdefault(key, []).append(name)
    if not features:
        yield "None.\n"
        return
    heads = ("where", "what", "features")
    yield f"| {' | '.join(heads)} |"
    yield f"| {' | '.join('---' for _ in heads)} |"
    for (place, text), names in features.items():
        yield f"| {place} | {text} | {_grouped(names)} |"
    yield ""


def _grouped(names: Sequence[str]) -> str:
    """``V2 stock: a; V2 stock: b`` without saying the same twice."""
    groups: dict[str, dict[str, None]] = {}
    for name in names:
        who, _, feature = name.partition(": ")
        groups.setdefault(who, {})[feature] = None
    return "; ".join(
        f"{who}: {', '.join(f'*{each}*' for each in features)}"
        if len(features) < ALL
        else f"{who}: {len(features)} features"
        for who, features in groups.items()
    )


ALL = 8  # as many features need not be named


def _sites(result: Result) -> Iterator[str]:
    seen = {
        (wait["file"], wait["function"])
        for found in result.values()
        for each in found["stock"].values()
        for wait in (*each["waits"], *each["events"], *each["first"])
    }
    yield "| where | when | seen | note |\n| --- | --- | --- | --- |"
    for site in SITES:
        mark = "yes" if (site.file, site.function) in seen else "no"
        yield (
            f"| {site.file.removeprefix('vllm/')} `{site.function}` | {site.when} "
            f"| {mark} | {site.note} |"
        )
    yield ""
    yield from textwrap.wrap(ENDING.strip(), 88)
    yield ""


def _times(waits: Sequence[dict[str, Any]]) -> int:
    return sum(wait["times"] for wait in waits)


def _place(wait: dict[str, Any]) -> str:
    name = wait["file"].removeprefix("vllm/")
    if name == wait["file"]:  # ours, where lines move
        return f"{name} `{wait['function']}`"
    return f"{name}:{wait['line']} `{wait['function']}`"


def _number(value: float) -> str:
    return f"{value:g}"
