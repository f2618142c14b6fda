"""What README.md and other pages hold that is made from the code.

``python -m vllm_ext.tables`` writes them anew; ``tests/test_readme.py`` fails when they
are not what it would write.
"""

from __future__ import annotations

import ast
import json
import re
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vllm_ext import demo, hostbench, settings
from vllm_ext.bench import arms, report, results
from vllm_ext.patches import SERIES
from vllm_ext.patching.declare import Patch
from vllm_ext.prove import kernels
from vllm_ext.upstream import forms, mail

ROOT = Path(__file__).resolve().parent.parent
ON_CPU = "cpu"
SCHEDULER_PARTS = ("schedule", "update_from_output", "step")
WORKER_PART = "worker"
NO_GPU = "Not yet measured on a GPU.\n"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _upstream(patch: Patch) -> str:
    return f"[yes]({patch.upstream})" if patch.upstream else "no"


def _form(patch: Patch) -> str:
    """The stored forms, with how many lines each changes in vLLM."""
    links = [
        f"[{label}]({patch.name}/{path.name}), {_counted(mail.read(path).size)}"
        for label, path in forms.stored(patch).items()
    ]
    return "; ".join(links) or "no"


def _counted(lines: int) -> str:
    return f"{lines} line{'' if lines == 1 else 's'}"


def patches() -> str:
    """One line per patch: for README.md."""
    return _table(
        ("patch", "on", "what it does"),
        [
            (
                f"[`{patch.name}`](patches/{patch.name}/__init__.py)",
                "yes" if patch.default else "no",
                patch.summary.rpartition("] ")[2],
            )
            for patch in SERIES
        ],
    )


def weights() -> str:
    """Every patch with its weight and its end: for patches/README.md."""
    rows = []
    for patch in SERIES:
        folder = ROOT / "patches" / patch.name
        lines = sum(
            len(path.read_text().splitlines())
            for path in folder.glob("*.py")
            if path.name not in ("__init__.py", "upstream.py")
        )
        rows.append(
            (
                f"[`{patch.name}`]({patch.name}/__init__.py)",
                patch.summary,
                ", ".join(dict.fromkeys(edit.how for edit in patch.edits)),
                f"{len(patch.edits)} + {len(patch.relies_on)}",
                str(lines),
                _form(patch),
                _upstream(patch),
                patch.merged_in or " ".join(patch.retire_when.split()),
            )
        )
    head = ("patch", "summary", "how", "edits + relied on", "lines", "upstream form")
    return _table((*head, "sent", "until"), rows)


def stories() -> str:
    """Why each patch exists: for patches/README.md."""
    return "\n".join(
        f"### {patch.name}\n\n{textwrap.dedent(patch.why).strip()}\n"
        for patch in SERIES
    )


def variables() -> str:
    """The environment variables: for README.md."""
    return _table(
        ("variable", "default", "meaning"),
        [
            (f"`{name}`", f"`{default}`" if default[0] != "(" else default, meaning)
            for name, (default, meaning) in settings.VARIABLES.items()
        ],
    )


def _newest(kind: str) -> tuple[dict[str, Any], str]:
    """The newest kept result of a kind, and a line that links its file."""
    path = sorted((results.RESULTS / ON_CPU).glob(f"*_{kind}.json"))[-1]
    return json.loads(path.read_text()), _link(path)


def _link(path: Path) -> str:
    return f"Result file: [{path.name}]({results.shown(path)}).\n"


def demo_screen() -> str:
    """What the newest kept result of `make demo` showed: for README.md."""
    result, link = _newest("demo")
    return f"```\n$ make demo\n{demo.screen(result)}\n```\n\n{link}"


def host_cost() -> str:
    """The whole step in the newest kept result of `bench host`: for README.md."""
    return _part_of("host", "step", 2)


def all_cost() -> str:
    """The same with every patch on: for README.md."""
    return _part_of("all-host", "step", 2)


def worker_cost() -> str:
    """The worker's part of a step under `step_graph`: for README.md."""
    return _part_of("step-graph-host", WORKER_PART, 3)


def mono_cost() -> str:
    """The same with one graph per step: for README.md."""
    return _part_of("step-graph-mono-host", WORKER_PART, 3)


def _part_of(kind: str, part: str, digits: int) -> str:
    """One part of a step in the newest kept result of a kind, by batch and mode."""
    result, link = _newest(kind)
    rows = []
    for row in result["rows"]:
        if row["part"] != part:
            continue
        ratio, *bounds = (f"{x:.{digits}f}" for x in (row["ratio"], *row["ci95"]))
        rows.append(
            (
                f"{row['batch']}, {row['mode']}",
                f"{row['stock_us']:.0f}",
                f"{row['patched_us']:.0f}",
                f"{ratio} ({'-'.join(bounds)})",
                f"{row['control_ratio']:.2f}",
                f"{sum(row['submissions_stock'].values())} → "
                f"{sum(row['submissions_patched'].values())}",
            )
        )
    head = ("batch, sampling", "stock us", "patched us", "ratio (95 %)")
    return _table((*head, "stock again", "submissions"), rows) + f"\n{link}"


def scheduler_cost() -> str:
    """Scheduler parts of a step in the newest kept result: for README.md."""
    result, link = _newest("scheduler-host")
    rows: dict[tuple[str, str], list[str]] = {}
    for row in result["rows"]:
        if row["part"] in SCHEDULER_PARTS:
            cells = rows.setdefault((f"{row['batch']}", row["mode"]), [])
            cells.append(
                f"{row['stock_us']:.0f} → {row['patched_us']:.0f} ({row['ratio']:.2f})"
            )
    head = ("batch", "mix", *(f"{part}, us" for part in SCHEDULER_PARTS))
    return _table(head, [(*key, *cells) for key, cells in rows.items()]) + f"\n{link}"


def on_gpus() -> str:
    """All patches against stock, on every GPU of which there is a result."""
    files = {
        path.parent.name: path
        for path in sorted(results.RESULTS.glob("*/*_engine.json"))
        if path.parent.name != ON_CPU
    }
    return "\n".join(_engines(path) for path in files.values()) or NO_GPU


def _engines(path: Path) -> str:
    """What all patches together change, in one engine benchmark."""
    found = results.read(path)["vllm_ext"]
    rows = [
        (
            each["case"],
            each["metric"],
            f"{each['against_value']:.4g} {each['unit']}",
            f"{each['value']:.4g} {each['unit']}",
            report.interval(each),
            each["verdict"],
        )
        for each in found["comparisons"]
        if each["arm"] == arms.ALL
    ]
    here = hostbench.describe_machine(found["machine"])
    head = ("case", "metric", "stock", "all patches", "ratio (95 %)", "verdict")
    return f"{found['label']}: {here}\n\n{_table(head, rows)}\n{_link(path)}"


def docstring(module: str) -> Callable[[], str]:
    """What a module of `vllm_ext.prove` says of itself: for docs/proofs.md."""

    def read() -> str:
        tree = ast.parse((ROOT / "vllm_ext" / "prove" / f"{module}.py").read_text())
        text = ast.get_docstring(tree) or ""
        return f"{text.replace('``', '`')}\n"

    return read


SECTIONS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {
        "demo": demo_screen,
        "gpu": on_gpus,
        "host": host_cost,
        "scheduler": scheduler_cost,
        "all": all_cost,
        "worker": worker_cost,
        "mono": mono_cost,
        "patches": patches,
        "variables": variables,
    },
    "docs/proofs.md": {
        module: docstring(module)
        for module in (
            *("pretend", "syncs", "graphs", "sanitizer", "kernels", "traffic"),
            *("compiles", "lag", "gpu", "cuda", "engine"),
        )
    },
    "docs/kernel-report.md": {"kernels": kernels.recorded},
    "patches/README.md": {"weights": weights, "stories": stories},
}


def filled(text: str, sections: dict[str, Callable[[], str]]) -> str:
    """``text`` with each marked section made anew.

    Raises:
        ValueError: A section's marks are not there exactly once.
    """
    for name, make in sections.items():
        marked = re.compile(rf"(<!-- {name}\b.*?-->\n).*?(<!-- end -->)", re.DOTALL)
        if len(marked.findall(text)) != 1:
            raise ValueError(f"there is not one section marked {name}")
        made = make()
        text = marked.sub(lambda m, made=made: f"{m[1]}{made}{m[2]}", text)  # type: ignore[misc]
    return text


def main() -> None:
    """Write the tables anew."""
    for name, sections in SECTIONS.items():
        path = ROOT / name
        path.write_text(filled(path.read_text(), sections))


if __name__ == "__main__":
    main()
