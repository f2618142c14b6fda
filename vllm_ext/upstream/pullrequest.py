"""The text of a pull request, in vLLM's template, with what is known and what is not.

Its purpose is the message of the mail; the prose is that of ``upstream.py``; figures
come from kept result files, and a figure that is in none is "not measured".
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_ext import hostbench
from vllm_ext.bench import report, results
from vllm_ext.patching.declare import Patch
from vllm_ext.prove import gpu
from vllm_ext.upstream import binding, owners
from vllm_ext.upstream.declare import Upstream
from vllm_ext.upstream.mail import BadPatchError, Mail

LOW, HIGH, NEEDS_RFC = 50, 250, 500  # lines; vLLM's own bands
ON = ("applied", "in use")
OURS = "ours"  # the arm of a kernel benchmark
COUNTED = {
    "triton": "Triton launches",
    "aten": "ATen operators",
    "h2d": "host-to-device copies",
    "d2h": "device-to-host copies",
    "graph": "graph replays",
}
REPOSITORY = "vllm-project/vllm"
MODEL = "Qwen/Qwen2.5-1.5B-Instruct"


def text(patch: Patch, declared: Upstream, form: Mail, version: str) -> str:
    """PR.md.

    Args:
        patch: Whose form it is.
        declared: Its prose.
        form: What is sent.
        version: Of the vLLM that ``form`` is for.
    """
    parts = [
        f"<!-- Title: {patch.summary} -->",
        f"<!-- Drafted against v{version}; rebase it onto main. -->",
        "## Purpose",
        unwrapped(form.message),
        *_needs(declared),
        "**Why this is not a duplicate**",
        _duplicates(declared),
        "**What it costs, and what it leaves alone**",
        unwrapped(textwrap.dedent(declared.trade_offs)),
        "## Test Plan",
        _plan(declared),
        "## Test Result",
        "**Tests:** not run yet on the submitter's machine; paste the output of the "
        "commands above.",
        "**Performance**",
        _performance(patch),
        "**GPU syncs and run-time compilation**",
        _sync_check(patch),
        f"**Accuracy:** {unwrapped(declared.accuracy)}",
        "## Size and review",
        _size(form),
        _owners(form),
        "## AI assistance",
        "AI assistance was used to write this change, its tests and this text.",
        _ESSENTIAL,
        _BOXES,
    ]
    return "\n\n".join(parts) + "\n"


def unwrapped(said: str) -> str:
    """Prose with one line per paragraph or point, as GitHub keeps line breaks."""
    lines: list[str] = []
    code = False
    for line in said.strip().splitlines():
        fence = line.startswith("```")
        starts = re.match(r"\s*([-*|] |\d+\. |    |$)", line) or fence or code
        if starts or not lines or not lines[-1].strip() or lines[-1] == "```":
            lines.append(line)
        else:
            lines[-1] += f" {line.strip()}"
        code ^= fence
    return "\n".join(lines)


# -- what it says of others ------------------------------------------------------------


def _needs(declared: Upstream) -> list[str]:
    """That other pull requests come first, if so."""
    before = ", ".join(f"`{patch.summary}`" for patch in binding.needed(declared))
    return [f"**Stands on** {before}: to be reviewed after it."] if before else []


def _duplicates(declared: Upstream) -> str:
    known = [f"- {each.link}: {unwrapped(each.what)}" for each in declared.overlaps]
    if known:
        known = ["Closest to it, as of September 2026:", "", *known]
    searches = "\n".join(
        f'gh pr list --repo {REPOSITORY} --state open --search "{each}"'
        for each in declared.searches
    )
    return (
        ("\n".join(known) or "No pull request or issue that does the same is known.")
        + "\n\nTo be searched again on the day this is sent:\n\n"
        + _shell(searches)
    )


def _shell(commands: str) -> str:
    return f"```bash\n{commands}\n```"


def _plan(declared: Upstream) -> str:
    plan = _shell("\n".join(declared.tests))
    if declared.benchmark:
        plan += f"\n\nBenchmark:\n\n{_shell(declared.benchmark)}"
    serve = " ".join(["vllm serve", MODEL, *filter(None, [declared.serve])])
    if declared.environment:
        serve = f"{declared.environment} {serve}"
    bench = (
        f"vllm bench serve --model {MODEL} --ignore-eos \\\n"
        "    --random-input-len 1000 --random-output-len 100"
    )
    if declared.requests:
        bench += f" \\\n    {declared.requests}"
    rounds = "    --max-concurrency $n --num-prompts $((50 * n))"
    end_to_end = f"{serve}\nfor n in 1 8 32; do\n  {bench} \\\n{rounds}\ndone"
    listed = "No wait of the host and no compilation while serving:"
    mode = "error"
    if "V2_MODEL_RUNNER=0" in declared.environment:  # it has other waits
        listed = (
            "Fewer waits of the host than on main, and no compilation, while serving:"
        )
        mode = "warn"
    checked = f"VLLM_GPU_SYNC_CHECK={mode} {serve} --jit-monitor-mode=error\n{bench}"
    return "\n\n".join(
        [
            plan,
            "End to end, main and this branch in turns, five times each:",
            _shell(end_to_end),
            listed,
            _shell(f"{checked} --num-prompts 200"),
        ]
    )


# -- figures ---------------------------------------------------------------------------


def _performance(patch: Patch) -> str:
    """Every kept measurement of this patch alone, or that there is none."""
    found = list(_measured(patch))
    if not found:
        return "Not measured on its own."
    how = (
        "Measured against stock, with the same change made at run time in an "
        "unmodified vLLM rather than in its sources."
    )
    return "\n\n".join([how, *found])


def _measured(patch: Patch) -> Iterator[str]:
    """Of each machine and kind of measurement the newest that is of this patch."""
    told: set[tuple[str, str]] = set()
    newest_first = sorted(results.RESULTS.glob("*/*.json"), key=lambda it: it.name)
    for path in newest_first[::-1]:
        kind = (path.parent.name, path.stem.rpartition("_")[2])
        if kind in told:
            continue
        try:
            is_ours = "vllm_ext" in json.loads(path.read_text())
            result = results.read(path) if is_ours else json.loads(path.read_text())
            said = (_compared if is_ours else _host_cost)(patch, path, result)
        except (OSError, ValueError, KeyError, TypeError, results.BadResultError) as it:
            raise BadPatchError(f"{path} cannot be read: {it}") from None
        if said:
            told.add(kind)
            yield said


def _host_cost(patch: Patch, path: Path, result: Mapping[str, Any]) -> str:
    """What `vllm-ext bench host` measured, if of this patch alone."""
    if not {"patches", "rows", "blocks"} <= result.keys():
        return ""  # another kind of measurement
    on = [each["name"] for each in result["patches"] if each["state"] in ON]
    if on != [patch.name]:
        return ""
    rows = [
        (
            str(row["batch"]),
            row["mode"],
            f"{row['stock_us']:.0f}",
            f"{row['patched_us']:.0f}",
            f"{row['ratio']:.3f} ({row['ci95'][0]:.3f}-{row['ci95'][1]:.3f})",
            f"{row['control_ratio']:.3f}" if "control_ratio" in row else "-",
        )
        for row in result["rows"]
        if row["part"] == "step"
    ]
    head = ("batch", "requests", "stock, us", "this, us", "ratio (95 % interval)")
    counts = _counts(result["rows"])
    return (
        f"Host time of one decode step, {result['blocks']} blocks of "
        f"{result['steps']} steps for each side, in turns; the last column is stock "
        f"against stock in the same run. {result['measured']}\n\n"
        + _table((*head, "stock again"), rows)
        + (f"\n{counts}\n" if counts else "")
        + _source(path, result["machine"])
    )


def _counts(rows: Sequence[Mapping[str, Any]]) -> str:
    """What a step hands to the GPU, where that differs."""
    told = []
    for row in rows:
        before, after = row["submissions_stock"], row["submissions_patched"]
        changed = [
            f"{COUNTED[kind]} {before.get(kind, 0)} → {after.get(kind, 0)}"
            for kind in COUNTED
            if before.get(kind, 0) != after.get(kind, 0)
        ]
        if changed and row["part"] == "step":
            told.append(f"- batch {row['batch']}, {row['mode']}: {', '.join(changed)}")
    return "\n".join(["Per step:", "", *told]) if told else ""


def _compared(patch: Patch, path: Path, result: Mapping[str, Any]) -> str:
    """What a benchmark with verdicts says of this patch's arm, or of its kernels."""
    ours = result["vllm_ext"]
    kernels = [each.rpartition(".")[2] for each in binding.kernels_of(patch)]
    same_code = ours.get("digests", {}).get(patch.name) == results.digest(patch.name)
    found = [
        each
        for each in ours["comparisons"]
        if each["arm"] in (patch.name, f"A4-{patch.name}")
        or (each["arm"] == OURS and each["case"].partition(" ")[0] in kernels)
    ]
    if not found:
        return ""
    rows = [
        (
            each["case"],
            each["metric"],
            f"{each['against']}: {each['against_value']:.4g} {each['unit']}",
            f"{each['value']:.4g} {each['unit']}",
            report.interval(each),
            str(each["n"]),
            each["verdict"] + (f": {each['reason']}" if each["reason"] else ""),
        )
        for each in found
    ]
    head = ("case", "metric", "before", "this", "ratio (95 % interval)", "runs")
    earlier = "" if same_code else "Measured with an earlier state of this change.\n\n"
    return (
        f"{ours['label']}:\n\n{earlier}"
        + _table((*head, "verdict"), rows)
        + _source(path, ours["machine"])
    )


def _source(path: Path, machine: dict[str, Any]) -> str:
    driver = f"driver {machine['driver']}; " if machine.get("driver") else ""
    return (
        f"\n{hostbench.describe_machine(machine)}; {driver}"
        f"result file `{results.shown(path)}`"
    )


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _sync_check(patch: Patch) -> str:
    for verdict in gpu.from_files(results.RESULTS):
        if verdict.subject == patch.name and verdict.outcome == "proven on GPU":
            return (
                "With `VLLM_GPU_SYNC_CHECK=error` and `--jit-monitor-mode=error`: "
                f"{verdict.detail} (result file `{verdict.evidence}`)."
            )
    return (
        "Not run on a GPU yet: paste what the commands of the test plan say, or that "
        "they said nothing."
    )


# -- size, owners, boxes ---------------------------------------------------------------


def _size(form: Mail) -> str:
    rows = [
        (f"`{file.path}`", f"+{len(file.added)}", f"-{len(file.removed)}")
        for file in form.files
    ]
    if form.size < LOW:
        band = f"low complexity (under {LOW})"
    elif form.size <= HIGH:
        band = f"medium complexity ({LOW} to {HIGH})"
    else:
        band = f"high complexity (over {HIGH}), which the purpose has to justify"
    if form.size > NEEDS_RFC:
        band += f"; over {NEEDS_RFC} lines need an RFC issue first"
    return (
        _table(("file", "added", "removed"), rows)
        + f"\nLines changed in vLLM itself: {form.size}, {band}."
    )


def _owners(form: Mail) -> str:
    by_owners: dict[str, list[str]] = {}
    for file in form.files:
        by_owners.setdefault(owners.owners(file.path), []).append(f"`{file.path}`")
    told = [f"- {', '.join(paths)}: {names}" for names, paths in by_owners.items()]
    return f"Owners, from {owners.AS_OF}:\n\n" + "\n".join(told)


_ESSENTIAL = """\
---
<details>
<summary> Essential Elements of an Effective PR Description Checklist </summary>

- [ ] The purpose of the PR, such as "Fix some issue (link existing issues this PR \
will resolve)".
- [ ] The test plan, such as providing test command.
- [ ] The test results, such as pasting the results comparison before and after, or \
e2e results
- [ ] (Optional) The necessary documentation update, such as updating \
`supported_models.md` and `examples` for a new model.
</details>"""

_BOXES = """\
**Only a person can tick these; delete the list before sending**

- [ ] I ran the searches above: no open pull request does this, and I know why those \
that were closed were.
- [ ] I have read every changed line, understand it, and will defend it in review.
- [ ] I applied it with `git am --keep-non-patch` and rebased it onto main.
- [ ] I ran the test plan on a GPU; the results above are mine.
- [ ] `pre-commit run --all-files` passes.
- [ ] I put my name to it (`git commit --amend --reset-author --signoff`) and named \
the assistant in a `Co-authored-by:` trailer."""
