"""``vllm-ext bench report``: result files as one HTML page that needs nothing else.

Of comparisons, the ratio with its interval, by case; of kernels, their share of the
bandwidth that a copy reached; of the host's cost, the parts of a step one after the
other, stock above patched. Below each plot stands its table: what is drawn can be read.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from vllm_ext import hostbench, jsonfile
from vllm_ext.bench import results
from vllm_ext.bench.compare import seconds

# A step on the host, in the order in which it happens.
PARTS = ("schedule", "execute_model", "sample_tokens", "update_from_output")
SHARE = "cold_share_of_copy"  # of a kernel: its bandwidth by that of a copy


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``vllm-ext bench report``."""
    parser.add_argument(
        "files",
        type=Path,
        nargs="*",
        metavar="FILE",
        help="result files (default: the newest kept of each machine and kind)",
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help="the page"
    )


def run(args: argparse.Namespace) -> int:
    """Read, draw, write; 1 with one line if a file is not one."""
    try:
        jsonfile.check(args.output)
        files = args.files or newest(results.RESULTS)
        if not files:
            raise results.BadResultError(
                f"no result files in {results.RESULTS}: name some, or run a benchmark"
            )
        page = draw([(results.shown(file), read(file)) for file in files])
        jsonfile.write_text(args.output, page)
    except (results.BadResultError, jsonfile.CannotWriteError) as error:
        print(f"vllm-ext: {error}", file=sys.stderr)
        return 1
    print(f"{args.output}: {len(files)} results")
    return 0


def newest(folder: Path) -> list[Path]:
    """The newest file of each machine and kind that can be drawn."""
    found: dict[tuple[Path, str], Path] = {}
    for file in sorted(folder.glob("*/*.json"), key=lambda file: file.name):
        kind = file.stem.rpartition("_")[2]
        if kind in (*results.MEASURED, "host"):
            found[file.parent, kind] = file
    return [found[each] for each in sorted(found)]


def read(path: Path) -> dict[str, Any]:
    """A result file of ``bench``, that of ``bench host`` among them.

    Raises:
        BadResultError: It is none.
    """
    try:
        found = json.loads(path.read_text())
        if isinstance(found, dict) and {"measured", "rows", "machine"} <= found.keys():
            for row in found["rows"]:
                hostbench.times(row)
            hostbench.describe_machine(found["machine"])
            return found
    except OSError:
        pass  # said below
    except (ValueError, KeyError, TypeError) as error:
        if path.stem.endswith("_host"):
            raise results.BadResultError(
                f"{path} is damaged ({error}): run vllm-ext bench host again"
            ) from None
    return results.read(path)


def draw(found: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """The page.

    Args:
        found: Paths to show, and what `read` gave for them.
    """
    title = "vllm-ext: what was measured"
    body = "".join(_section(name, each) for name, each in found)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{_STYLE}</style></head>"
        f"<body><h1>{title}</h1>{body}</body></html>\n"
    )


def _section(name: str, found: Mapping[str, Any]) -> str:
    if "rows" in found:
        head, parts = "Host cost of a decode step", list(_host(found))
        here, note = found["machine"], found["measured"]
    else:
        ours = found["vllm_ext"]
        head, here = ours["label"], ours["machine"]
        note = f"{' '.join(ours['command'])}"
        parts = [*_forests(ours["comparisons"]), *_roofline(found["benchmarks"])]
        watch = ours.get("watch")
        if watch and watch.get("reason"):
            note += f" - {watch['reason']}"
    return (
        f"<section><h2>{escape(head)}</h2>"
        f"<p class=machine>{escape(hostbench.describe_machine(here))}</p>"
        f"<p class=note>{escape(note)}</p>{''.join(parts)}"
        f"<p class=file>{escape(name)}</p></section>"
    )


# -- ratios, with their intervals ------------------------------------------------------


def _forests(comparisons: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """One plot for each metric: a line for each case and arm, by batch."""
    for metric in dict.fromkeys(each["metric"] for each in comparisons):
        rows = [each for each in comparisons if each["metric"] == metric]
        yield f"<h3>{escape(metric)}: cost of each arm by that of its stock</h3>"
        said = dict.fromkeys(each["verdict"] for each in rows)
        yield f"<p class=legend>{''.join(_key(verdict) for verdict in said)}</p>"
        yield _forest(sorted(rows, key=_place))
        yield _table(
            ("case", "arm", "against", "", "", "ratio (95 %)", "verdict"),
            [
                (
                    each["case"],
                    each["arm"],
                    each["against"],
                    f"{each['against_value']:.4g} {each['unit']}",
                    f"{each['value']:.4g} {each['unit']}",
                    interval(each),
                    each["verdict"],
                )
                for each in rows
            ],
        )


def _key(verdict: str) -> str:
    return f"<span><i class='mark {verdict}'></i>{verdict}</span>"


def interval(each: Mapping[str, Any]) -> str:
    """A ratio and where it lies, as tables show it."""
    low, high = each["ci95"]
    return f"{each['ratio']:.3f} ({low:.3f}-{high:.3f})"


def _place(each: Mapping[str, Any]) -> tuple[str, str, int]:
    """Where a case stands: what is alike but for the batch stands together."""
    batch = re.search(r"batch (\d+)", each["case"])
    alike = re.sub(r"batch \d+", "", each["case"])
    return alike, each["arm"], int(batch[1]) if batch else 0


def _forest(rows: Sequence[Mapping[str, Any]]) -> str:
    edges = [bound for each in rows for bound in each["ci95"]]
    low, high = min([0.9, *edges]) / 1.02, max([1.1, *edges]) * 1.02

    def at(ratio: float) -> float:
        return 560 * math.log(ratio / low) / math.log(high / low)

    step, top = 22, 8
    height = step * len(rows) + 34
    ticks = [tick for tick in _TICKS if low <= tick <= high]
    lines = [
        f"<line class={'one' if tick == 1 else 'grid'} x1={at(tick):.1f} "
        f"x2={at(tick):.1f} y1={top} y2={height - 24} />"
        f"<text x={at(tick):.1f} y={height - 8} text-anchor=middle>{tick:g}</text>"
        for tick in ticks
    ]
    marks = []
    for number, each in enumerate(rows):
        y = top + step * number + step / 2
        first, last = (at(bound) for bound in each["ci95"])
        label = f"{each['case']}, {each['arm']}"
        marks.append(
            f"<g class={each['verdict']}><title>{escape(label)}: {interval(each)}, "
            f"{each['verdict']}</title>"
            f"<line x1={first:.1f} x2={last:.1f} y1={y} y2={y} />"
            f"<circle cx={at(each['ratio']):.1f} cy={y} r=4.5 />"
            f"<text class=label x=-12 y={y + 4} text-anchor=end>{escape(label)}</text>"
            "</g>"
        )
    return (
        f"<svg class=forest viewBox='-330 0 920 {height}' role=img "
        f"aria-label='ratios'>{''.join(lines)}{''.join(marks)}</svg>"
    )


_TICKS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.5, 2, 3, 5, 10)


# -- kernels -------------------------------------------------------------------------


def _roofline(entries: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A bar for each kernel and shape: its share of what a copy reaches."""
    bars = [
        each for each in entries if isinstance(each["extra_info"].get(SHARE), float)
    ]
    for group in dict.fromkeys(each["group"] for each in bars):
        rows = [each for each in bars if each["group"] == group]
        yield f"<h3>{escape(str(group))}: share of the bandwidth of a copy</h3>"
        yield "<div class=bars>"
        for each in rows:
            share = each["extra_info"][SHARE]
            yield (
                f"<span>{escape(each['name'])}</span>"
                f"<b><i style='width:{min(100, 100 * share):.1f}%'></i></b>"
                f"<span>{share:.0%}, {seconds(each['stats']['median'])}</span>"
            )
        yield "</div>"


# -- the host ------------------------------------------------------------------------


def _host(found: Mapping[str, Any]) -> Iterator[str]:
    """A step's parts in their order, stock above patched, for each batch and mode."""
    cases: dict[tuple[int, str], dict[str, Mapping[str, Any]]] = {}
    for row in found["rows"]:
        cases.setdefault((row["batch"], row["mode"]), {})[row["part"]] = row
    sides = ("stock", "patched")
    longest = max(
        sum(parts[part][f"{side}_us"] for part in PARTS if part in parts)
        for parts in cases.values()
        for side in sides
    )
    legend = "".join(
        f"<span><i class=p{number}></i>{part}</span>"
        for number, part in enumerate(PARTS)
    )
    yield f"<h3>One step on the host, before and after</h3><p class=legend>{legend}</p>"
    yield "<div class=steps>"
    for (batch, mode), parts in cases.items():
        yield f"<b>batch {batch}, {escape(mode)}</b>"
        for side in sides:
            pieces = "".join(
                f"<i class=p{number} title='{part}: {parts[part][f'{side}_us']:.0f} us'"
                f" style='width:{100 * parts[part][f'{side}_us'] / longest:.2f}%'></i>"
                for number, part in enumerate(PARTS)
                if part in parts
            )
            whole = parts.get("step")
            time = f"{whole[f'{side}_us']:.0f} us" if whole else ""
            yield f"<span>{side}</span><div>{pieces}</div><span>{time}</span>"
    yield "</div>"
    yield _table(
        ("batch, sampling", "part", "stock us", "patched us", "ratio (95 %)"),
        [
            (
                f"{row['batch']}, {row['mode']}",
                row["part"],
                f"{row['stock_us']:.0f}",
                f"{row['patched_us']:.0f}",
                interval(row),
            )
            for row in found["rows"]
        ],
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells)

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return (
        f"<details><summary>{len(rows)} rows</summary><table>"
        f"<tr>{line(head, 'th')}</tr>{body}</table></details>"
    )


_STYLE = """
:root { --ink: #23272e; --soft: #6b7280; --line: #e4e6ea; --paper: #fbfbfa;
  --card: #fff; --good: #2b8a5f; --bad: #c0392b; --open: #8f97a3; --same: #2f6db3;
  --p0: #2f6db3; --p1: #2b8a5f; --p2: #c2571a; --p3: #8457a8;
  color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --ink: #d9dce1; --soft: #8f97a3;
  --line: #31353c; --paper: #191b1f; --card: #212429; --good: #5fc294;
  --bad: #ef7a6d; --open: #6b7280; --same: #6ba6ea; --p0: #6ba6ea; --p1: #5fc294;
  --p2: #ef9357; --p3: #b48ad6; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 28px 32px 64px; max-width: 1080px;
  background: var(--paper); color: var(--ink);
  font: 14px/1.45 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 22px; font-weight: 600; margin: 0 0 20px; letter-spacing: -.01em; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 18px 22px 12px; margin: 0 0 22px; }
h2 { font-size: 17px; font-weight: 600; margin: 0 0 4px; }
h3 { font-size: 13px; font-weight: 600; margin: 20px 0 6px; }
.machine, .note, .file, .legend { margin: 0 0 4px; color: var(--soft);
  font-size: 12.5px; max-width: 90ch; }
.file { margin-top: 12px; font-family: ui-monospace, "DejaVu Sans Mono", monospace; }
.forest { width: 100%; height: auto; display: block; }
.forest text { font-size: 11px; fill: var(--soft); }
.forest text.label { fill: var(--ink); font-size: 11.5px; }
.forest line { stroke-width: 2; stroke: var(--open); }
.forest line.grid { stroke: var(--line); stroke-width: 1; }
.forest line.one { stroke: var(--ink); stroke-width: 1; }
.forest circle { fill: var(--open); }
.IMPROVED line { stroke: var(--good); } .IMPROVED circle { fill: var(--good); }
.REGRESSED line { stroke: var(--bad); } .REGRESSED circle { fill: var(--bad); }
.SAME line { stroke: var(--same); } .SAME circle { fill: var(--same); }
.mark { background: var(--open); border-radius: 5px !important; }
.mark.IMPROVED { background: var(--good); } .mark.SAME { background: var(--same); }
.mark.REGRESSED { background: var(--bad); }
.INVALID { opacity: .45; } .INVALID line { stroke-dasharray: 3 3; }
.bars { display: grid; gap: 3px 12px; align-items: center; font-size: 12.5px;
  grid-template-columns: minmax(0, 2fr) minmax(0, 3fr) 110px; }
.bars span { overflow-wrap: anywhere; }
.bars b { background: var(--line); border-radius: 3px; height: 12px; }
.bars i { display: block; height: 12px; border-radius: 3px; background: var(--same); }
.steps { display: grid; grid-template-columns: 64px minmax(0, 1fr) 74px;
  gap: 2px 10px; align-items: center; font-size: 12.5px; }
.steps b { grid-column: 1 / -1; font-weight: 500; margin-top: 8px; }
.steps span { color: var(--soft); text-align: right; }
.steps div { display: flex; height: 14px; }
.steps i:first-child { border-radius: 3px 0 0 3px; }
.steps i:last-child { border-radius: 0 3px 3px 0; }
.legend span { margin-right: 14px; white-space: nowrap; }
.legend i { display: inline-block; width: 10px; height: 10px; border-radius: 2px;
  margin-right: 5px; }
.p0 { background: var(--p0); } .p1 { background: var(--p1); }
.p2 { background: var(--p2); } .p3 { background: var(--p3); }
details { margin: 6px 0 0; } summary { color: var(--soft); cursor: pointer;
  font-size: 12.5px; }
table { border-collapse: collapse; margin-top: 6px; font-size: 12.5px;
  font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 3px 14px 3px 0;
  border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 500; }
"""
