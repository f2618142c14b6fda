"""``vllm-ext bench kernels``: our kernels beside their competitors, answers first.

Runs the files of `vllm_ext.microbench`, from wherever the package is installed, with
pytest in a process of its own. On a GPU they are timed; without one the same files run
on Triton's interpreter at small shapes, and what they say is how many answers were
right and how much each competitor would hand to a GPU.
"""

import argparse
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from vllm_ext import hostbench, jsonfile
from vllm_ext.bench import results
from vllm_ext.hostbench import CannotRunError

SETTINGS = """\
[pytest]
python_files = bench_*.py
python_functions = bench_*
addopts = --import-mode=importlib -p no:cacheprovider -p pytest_benchmark.plugin -q -s
"""
NOTHING_SELECTED, USAGE, INTERRUPTED = 5, 4, 2  # of pytest's exit statuses
PATIENCE = 6.0  # seconds, for a pytest that was interrupted
SHOWN_LINES = 3
PROGRESS = "["  # how a line of it begins


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``vllm-ext bench kernels``."""
    parser.add_argument(
        "-k",
        dest="select",
        default="",
        metavar="EXPRESSION",
        help="which, as pytest's -k: 'sample and greedy and b1-v151936'",
    )
    parser.add_argument(
        "--full", action="store_true", help="every combination of shapes: hours"
    )
    parser.add_argument(
        "--seconds",
        type=int,
        metavar="S",
        help="begin no case after that long; what is left is listed as not run",
    )
    parser.add_argument(
        "--save", action="store_true", help="keep the result among those of the project"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result")


def run(args: argparse.Namespace) -> int:
    """Run, print, and write the file that was asked for; the exit status."""
    try:
        has_gpu = _has_gpu()
        if args.save and not has_gpu:
            raise CannotRunError(
                "--save keeps timings, and without a GPU there are none"
            )
        if args.json:
            jsonfile.check(args.json)
        seconds = math.inf if args.seconds is None else args.seconds
        result = measure(args.select, full=args.full, seconds=seconds, has_gpu=has_gpu)
        result["vllm_ext"]["command"] = ["vllm-ext", *sys.argv[1:]]
        print(table(result))
        if args.json:
            results.save(result, args.json)
        if args.save:
            print(f"kept as {results.shown(results.save(result))}")
    except (CannotRunError, jsonfile.CannotWriteError) as error:
        print(f"vllm-ext: {error}", file=sys.stderr)
        return 1
    ours = result["vllm_ext"]
    bad = ours["wrong"] or ours["interrupted"] or not ours["watch"]["valid"]
    return 1 if bad else 0


def measure(
    select: str = "",
    *,
    full: bool = False,
    seconds: float = math.inf,
    has_gpu: bool,
) -> dict[str, Any]:
    """Run the benchmarks; the result as `results.read` gives it.

    Args:
        select: For pytest's ``-k``.
        full: Every combination of shapes.
        seconds: After which no case is begun.
        has_gpu: Time them, instead of interpreting them.

    Raises:
        CannotRunError: Something is not installed, nothing is selected, or pytest
            ended before the benchmarks did.
    """
    for name in ("pytest", "pytest_benchmark"):
        if not importlib.util.find_spec(name):
            raise CannotRunError(f"{name} is missing: pip install 'vllm-ext[bench]'")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        settings, found = folder / "pytest.ini", folder / "report.json"
        timed = folder / "timed.json"
        settings.write_text(SETTINGS)
        command = [
            *(sys.executable, "-m", "pytest", "-c", settings, _benchmarks()),
            *("--vext-report", found, "--vext-seconds", str(seconds)),
            *(("--benchmark-json", timed) if has_gpu else ("--benchmark-disable",)),
            *(("--vext-full",) if full else ()),
            *(("-k", select) if select else ()),
        ]
        with (folder / "log").open("w+") as log:
            status, noise = _passed_on(command, folder, _environment(has_gpu), log)
            log.seek(0)
            said = [*noise, *log.read().splitlines()]
        if status == NOTHING_SELECTED:
            raise CannotRunError(f"no benchmark is selected by -k {select!r}")
        if status == USAGE or not found.is_file():
            errors = [line for line in said if line.startswith("E")] or said
            raise CannotRunError(
                f"pytest ended with {status}: {' '.join(errors[-SHOWN_LINES:]).strip()}"
            )
        path = timed if timed.is_file() and timed.stat().st_size else found
        result: dict[str, Any] = json.loads(path.read_text())
    result["vllm_ext"]["interrupted"] = status == INTERRUPTED
    return result


def _passed_on(
    command: Sequence[str | Path],
    folder: Path,
    environment: Mapping[str, str],
    log: IO[str],
) -> tuple[int, list[str]]:
    """Run ``command``, its lines of progress passed on; its status and other lines."""
    noise = []
    with subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=log,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stderr is not None
            for line in process.stderr:
                if line.startswith(PROGRESS):
                    sys.stderr.write(line)
                elif line.strip():
                    noise.append(line.strip())
        except KeyboardInterrupt:
            # Ctrl-C is for pytest too, which writes what it has; wait for that.
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                raise KeyboardInterrupt from None
        except BaseException:
            process.kill()
            raise
    return process.returncode, noise


def table(result: Mapping[str, Any]) -> str:
    """The result for a terminal."""
    ours = result["vllm_ext"]
    checks = len(ours["parity"])
    lines = [hostbench.describe_machine(ours["machine"])]
    lines += _timings(result) if ours["timed"] else _submissions(ours["parity"])
    lines += _not_run(ours["not_run"])
    lines += [
        f"WRONG: {each['provider']}, {each['case']}: {each['why']}"
        for each in ours["wrong"]
    ]
    watch = ours["watch"]
    if ours["interrupted"]:
        lines.append("interrupted: not all that was selected was run")
    if not watch["valid"]:
        lines.append(f"INVALID: {watch['reason']}")
    elif watch["reason"]:
        lines.append(watch["reason"])
    timings = len(result["benchmarks"])
    ending = "" if ours["timed"] else "; no GPU"
    return "\n".join((*lines, f"{timings} timings, {checks} parity checks{ending}"))


def _timings(result: Mapping[str, Any]) -> list[str]:
    cases: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for entry in result["benchmarks"]:
        params = entry["params"]
        shape = f"B={params['batch']} V={params['vocabulary']}"
        kind = f"{params['dtype']} {params['kind']}"
        cases[f"{entry['group']} {params['mode']} {shape} {kind}"].append(entry)
    verdicts = {
        (each["case"], each["arm"], each["metric"]): each
        for each in result["vllm_ext"]["comparisons"]
    }
    lines = [
        "Medians; in brackets the middle half. Cold: arguments in memory, hot: in the "
        "L2 cache.",
        "GB/s is of what any implementation has to move, and its share of a copy here.",
    ]
    for case, entries in cases.items():
        lines += [
            "",
            case,
            f"  {'':15}{'cold us':>16}{'hot us':>9}{'host us':>9}"
            f"{'launches':>9}{'GB/s':>7}{'share':>7}",
        ]
        for entry in entries:
            info = entry["extra_info"]
            cold = f"{info['cold_us']:.1f} ({info['cold_iqr_us']:.1f})"
            launches = info["launches"]
            lines.append(
                f"  {entry['params']['provider']:15}{cold:>16}{info['hot_us']:>9.1f}"
                f"{info['host_us']:>9.0f}"
                f"{'?' if launches is None else f'{launches:.0f}':>9}"
                f"{info['cold_gbs']:>7.0f}{info['cold_share_of_copy']:>7.0%}"
                + ("" if info["clock"] == "graph" else f"  {info['clock']}")
            )
        lines += [
            f"  {arm} against {each['against']}, {metric}: {each['ratio']:.3f} "
            f"({each['ci95'][0]:.3f}-{each['ci95'][1]:.3f}) {each['verdict']}"
            for (named, arm, metric), each in verdicts.items()
            if named == case
        ]
    return lines


def _submissions(parity: Sequence[Mapping[str, Any]]) -> list[str]:
    """How much a call hands to a GPU: the most of any shape."""
    most: dict[str, dict[str, int | None]] = defaultdict(dict)
    for each in parity:
        row = most[each["case"].partition(" B=")[0]]
        before = row.get(each["provider"]) or 0
        number = each["submissions"]
        row[each["provider"]] = None if number is None else max(number, before)
    providers = list(dict.fromkeys(each["provider"] for each in parity))
    lines = [
        "Interpreted, at small shapes. Submissions of a call, counted on the CPU:",
        f"{'':24}" + "".join(f"{name:>{len(name) + 2}}" for name in providers),
    ]
    for case, row in most.items():
        cells = (f"{_cell(row, name):>{len(name) + 2}}" for name in providers)
        lines.append(f"{case:24}" + "".join(cells))
    return lines


def _cell(row: Mapping[str, int | None], name: str) -> str:
    if name not in row:
        return "-"
    return "right" if row[name] is None else str(row[name])


def _not_run(not_run: Sequence[Mapping[str, str]]) -> list[str]:
    number: dict[tuple[str, str], int] = defaultdict(int)
    for each in not_run:
        number[each["provider"], each["why"]] += 1
    return [
        f"not run: {provider}, {count} case{'s' if count > 1 else ''}: {why}"
        for (provider, why), count in number.items()
    ]


def _benchmarks() -> Path:
    spec = importlib.util.find_spec("vllm_ext.microbench")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def _has_gpu() -> bool:
    try:
        import torch
    except ImportError:
        raise CannotRunError(
            "torch is missing: pip install 'vllm-ext[kernels]'"
        ) from None
    found: bool = torch.cuda.is_available()
    return found


def _environment(has_gpu: bool) -> dict[str, str]:
    """For the process of pytest: stock vLLM, and no plugins of pytest but ours."""
    lane: Mapping[str, str] = {}
    if not has_gpu:
        lane = {"TRITON_INTERPRET": "1"}
        if importlib.util.find_spec("vllm_ext_cpulane"):
            from vllm_ext_cpulane.environment import lane_environment

            lane = lane_environment("interpret")
    kept = {key: value for key, value in os.environ.items() if key != "PYTEST_ADDOPTS"}
    return {
        **kept,
        **lane,
        "VEXT": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
