"""``python -m vllm_ext.microbench.gpu_host.run STAGE...``: what the GPU host is for.

Started in a checkout on the offline GPU host, by its own Python; nothing but the
standard library is needed until the bundle is unpacked. Each stage (`stages`) is a
few commands with a time limit, in the environment of the bundle (`host`). Results are
written as they come: ``STAGE.json`` holds what each command found, ``status.jsonl`` a
line for each stage that was started, and how it ended. Both are kept below ``--home``
and copied to ``--out``.

A stage that is complete is not run again without ``--again``; of one that was stopped
at its limit, only the commands that had not come to their end are.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_ext import jsonfile, machine
from vllm_ext.machine import CHECKOUT
from vllm_ext.microbench.gpu_host import bundle, checkout, host, stages, switches
from vllm_ext.microbench.gpu_host.bundle import BundleError, IncompleteError
from vllm_ext.microbench.gpu_host.host import Host
from vllm_ext.microbench.gpu_host.stages import STAGES, Stage, Task
from vllm_ext.microbench.gpu_host.switches import Switches

STATUS = "status.jsonl"
CALL_S = 570.0  # of a call of ten minutes
LEAST_S = 20.0  # a stage with less than this is not started
RESERVE_S = 5.0  # for writing what there is
GRACE_S = 8.0  # between the request to stop and the end
POLL_S = 0.5
ATTEMPT_S = 120.0  # of a smoke test with a switch
SHOWN = 3000  # characters of what a failed command said

COMPLETE, STOPPED, FAILED, WAITING = "complete", "stopped", "failed", "not started"
STATUSES = {COMPLETE: 0, FAILED: 1, WAITING: 1, STOPPED: 3}

Json = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Run stages; 0: all complete, 1: one failed, 3: one has more to do."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.list:
        sys.stdout.write(f"{listing()}\n")
        return 0
    unknown = [name for name in args.stage if name not in STAGES]
    if unknown or not args.stage:
        wrong = f"no stage {unknown[0]}" if unknown else "name a stage"
        parser.error(f"{wrong}; there are {', '.join(STAGES)}")
    if args.out is None:
        parser.error("name a folder for the results with --out")
    # Whoever ends this call early, `timeout` say, is to leave no engine behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        runner = Runner(
            Host(args.home.resolve()),
            args.out,
            seconds=args.seconds,
            again=args.again,
            bundles=_bundle_folders(args.bundle),
            limits=dict(args.limit),
        )
        if args.earlier:
            runner.take_over(args.earlier)
        ended = [runner.run(stage) for stage in stages.chosen(args.stage)]
    except (OSError, jsonfile.CannotWriteError) as error:
        sys.stderr.write(f"run: {error}; fix that and run it again\n")
        return 1
    return max((STATUSES[each] for each in ended), key=lambda code: (code == 1, code))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vllm_ext.microbench.gpu_host.run",
        description="Run stages on an offline GPU host.",
        epilog="Exit status: 0 all complete, 1 one failed, 3 one has more to do.",
    )
    parser.add_argument("stage", nargs="*", metavar="STAGE")
    parser.add_argument("--out", type=Path, help="where results are copied to")
    parser.add_argument(
        "--home", type=Path, default=host.HOME, help="default: %(default)s"
    )
    parser.add_argument(
        "--bundle",
        type=Path,
        default=CHECKOUT / ".gpu-bundle",
        help="the folder that holds p0, p1, ...: as many as were carried; or one of "
        "these",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=CALL_S,
        help="that this call may take (default: %(default)s)",
    )
    parser.add_argument(
        "--limit",
        type=_limit,
        action="append",
        default=[],
        metavar="STAGE=S",
        help="another time limit for a stage, in seconds",
    )
    parser.add_argument(
        "--again", action="store_true", help="also what has a complete result"
    )
    parser.add_argument(
        "--earlier",
        type=Path,
        metavar="DIR",
        help="results of an earlier call, of a machine that is gone: go on from there",
    )
    parser.add_argument("--list", action="store_true", help="list the stages")
    return parser


def _limit(text: str) -> tuple[str, float]:
    name, _, seconds = text.partition("=")
    if name not in STAGES:
        raise argparse.ArgumentTypeError(f"no stage {name}")
    return name, float(seconds)


def _bundle_folders(folder: Path) -> list[Path]:
    found = [*folder.glob(bundle.MANIFEST), *folder.glob(f"*/{bundle.MANIFEST}")]
    return sorted(each.parent for each in found)


def listing() -> str:
    """The stages, for a terminal."""
    return "\n".join(
        f"{stage.name:<12} {stage.limit_s:>4.0f} s  {stage.what}"
        for stage in STAGES.values()
    )


@dataclass
class Runner:
    """Runs stages, and keeps the record of it.

    Attributes:
        host: Where things lie.
        out: Where results are copied to.
        seconds: That all stages of this call may take together.
        again: Also run what is complete.
        bundles: Folders of a bundle that were carried.
        limits: Seconds by stage, over the stage's own.
        interpreter: The Python to run the stages with.
    """

    host: Host
    out: Path
    seconds: float = CALL_S
    again: bool = False
    bundles: list[Path] = field(default_factory=list)
    limits: Mapping[str, float] = field(default_factory=dict)
    interpreter: str = sys.executable
    smoke: tuple[str, ...] = stages.python(
        f"{stages.OURS}.smoke", "--json", stages.RESULT
    )

    def __post_init__(self) -> None:
        self._ends = time.monotonic() + self.seconds - RESERVE_S
        self.host.results.mkdir(parents=True, exist_ok=True)
        self._copy(STATUS)
        for folder in self.bundles:
            if (note := folder / checkout.FILE).exists():
                self.host.checkout_note.write_bytes(note.read_bytes())
        self._here = machine.describe()
        self._code = checkout.digest(self.host.root)
        if self.host.unpacked:  # the checkout may have moved since
            host.link_checkout(self.host)

    # -- one stage ---------------------------------------------------------------------

    def run(self, stage: Stage) -> str:
        """Run ``stage``, or say why not; how it ended."""
        if not self.again and self._is_complete(stage):
            self._say(stage.name, "complete already; --again runs it anew")
            self._copy(f"{stage.name}.json")
            return COMPLETE
        if stage.needs and not self._is_complete(STAGES[stage.needs]):
            return self._ended(
                stage, WAITING, f"{stage.needs} has to be complete first", 0.0
            )
        limit = self.limits.get(stage.name, stage.limit_s)
        left = self._ends - time.monotonic()
        if left < min(LEAST_S, limit):
            return self._ended(
                stage, WAITING, f"{left:.0f} s are left of this call: run it next", 0.0
            )
        started = time.monotonic()
        self._record(stage, "running", "", 0.0)
        until = started + min(limit, left)
        try:
            how, why = self._special(stage)(stage, until)
        except BundleError as error:
            how = STOPPED if isinstance(error, IncompleteError) else FAILED
            why = str(error)
        return self._ended(stage, how, why, time.monotonic() - started)

    def _special(self, stage: Stage) -> Callable[[Stage, float], tuple[str, str]]:
        named = {"unpack": self._unpack, "smoke": self._smoke}
        return named.get(stage.name, self._tasks)

    def _unpack(self, stage: Stage, until: float) -> tuple[str, str]:
        manifest = bundle.collect(self.bundles, self.host.parts, self._teller(stage))
        unpacked = self.host.unpacked
        if self.again or not unpacked or unpacked.listing != manifest.listing:
            bundle.unpack(self.host.parts, self.host.tree)
        host.link_checkout(self.host)
        self._keep(stage, {"about": manifest.about, "files": manifest.files})
        return COMPLETE, f"{manifest.bytes / 2**20:.0f} MiB in {manifest.files} files"

    def _smoke(self, stage: Stage, until: float) -> tuple[str, str]:
        """Try one set of switches after the other, from where an earlier call was.

        The first boot on a machine fills all caches. It is without switches, may take
        what the stage has, and is tried again if that was too little: a switch that
        only came second would be kept for all stages.
        """
        tried = self._done(stage)
        for each in switches.ORDER:
            before = tried.get(each.name, {})
            if before.get("status") == FAILED:
                continue
            limit, chances = until - time.monotonic(), 2
            if each is not switches.NONE:
                limit, chances = min(ATTEMPT_S, limit), 1
            if limit < min(LEAST_S, ATTEMPT_S):
                return STOPPED, f"no time left to try {each.name!r}: run it again"
            task = Task(each.name, self.smoke)
            done = self._run(stage, task, each, limit, tried)
            if done["status"] == STOPPED:
                done["timeouts"] = before.get("timeouts", 0) + (limit >= ATTEMPT_S)
                if done["timeouts"] >= chances:  # one that hangs does not work either
                    done["status"] = FAILED
            self._keep(stage, {"tasks": tried})
            if done["status"] == STOPPED:
                return STOPPED, f"{each.name!r} took over {limit:.0f} s: run it again"
            if done["status"] == COMPLETE:
                self._keep(stage, {"tasks": tried, "switches": each.as_dict()})
                return COMPLETE, f"switches: {each.name}; {done['said']}"
        return FAILED, switches.THEN

    def _tasks(self, stage: Stage, until: float) -> tuple[str, str]:
        done = self._done(stage)
        for task in stage.tasks:
            if done.get(task.name, {}).get("status") == COMPLETE:
                continue
            if stages.missing_tool(task):
                done[task.name] = {
                    "status": WAITING,
                    "reason": f"there is no {task.tool} on this machine",
                }
                continue
            left = until - time.monotonic()
            if left <= 0:
                done.setdefault(
                    task.name, {"status": STOPPED, "reason": "no time left"}
                )
                continue
            limit = min(task.limit_s or left, left)
            self._run(stage, task, self.switches, limit, done)
        self._keep(stage, {"tasks": done})
        ended = {name: each["status"] for name, each in done.items()}
        for how in (FAILED, STOPPED):
            names = [name for name, status in ended.items() if status == how]
            if names:
                first = done[names[0]]
                why = first.get("reason") or first.get("said", "")
                return how, f"{', '.join(names)}: {why}"
        said = [each.get("said") or each.get("reason", "") for each in done.values()]
        return COMPLETE, "; ".join(filter(None, said))

    @property
    def switches(self) -> Switches:
        """Those that the smoke test turned out to need; none before it."""
        kept = self._kept(STAGES["smoke"])
        complete = kept.get("status") == COMPLETE
        return switches.read(kept["switches"]) if complete else switches.NONE

    # -- one command -------------------------------------------------------------------

    def _run(
        self, stage: Stage, task: Task, used: Switches, limit: float, done: Json
    ) -> Json:
        """Run one command; what became of it, which is in ``done`` all the while."""
        with tempfile.TemporaryDirectory(prefix="vllm-ext-stage-") as folder:
            file, log = Path(folder) / "result", Path(folder) / "log"
            earlier = done.get(task.name, {}).get("result")
            if earlier is not None and task.resumes:
                file.write_text(json.dumps(earlier))
            known = self._result_files() if task.kept else {}
            entry: Json = {"status": "running", "limit_s": round(limit)}
            done[task.name] = entry
            started = time.monotonic()
            errors = Path(folder) / "errors"
            with log.open("wb") as output, errors.open("wb") as apart:
                process = subprocess.Popen(
                    stages.command(task, self.interpreter, file),
                    cwd=self.host.root,
                    env=host.environment(self.host, used.variables, used.engine),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=apart if task.reads == "stdout" else output,
                    start_new_session=True,
                    preexec_fn=_hear_ctrl_c,
                )
                family = Family(process.pid)
                try:
                    seen = None
                    while time.monotonic() - started < limit:
                        with suppress(subprocess.TimeoutExpired):
                            process.wait(POLL_S)
                            break
                        family.look()
                        stamp = file.stat().st_mtime_ns if file.exists() else None
                        if stamp != seen:
                            seen = stamp
                            entry |= _found(task, file, log)
                            self._keep(stage, {"tasks": done})
                finally:
                    stopped = _end(process, family)
            entry |= _found(task, file, log)
            entry["seconds"] = round(time.monotonic() - started, 1)
            entry["exit"] = process.returncode
            text = _text(errors if task.reads == "stdout" else log)
            if stopped:
                entry["status"] = STOPPED
                entry["reason"] = f"stopped at its limit of {limit:.0f} s"
            elif process.returncode in task.fine and "result" in entry:
                entry["status"] = COMPLETE
            else:
                entry["status"] = FAILED
                entry["reason"] = _reason(process.returncode, text)
            if entry["status"] != COMPLETE:
                entry["log"] = text[-SHOWN:]
            entry["said"] = _said(task, entry.get("result"), text)
            if task.kept:
                entry["files"] = {
                    name: json.loads(path.read_text())
                    for name, path in self._added(known)
                }
        self._keep(stage, {"tasks": done})
        return entry

    def _result_files(self) -> dict[str, int]:
        root = self.host.root / "microbench" / "results"
        return {
            str(path.relative_to(root)): path.stat().st_mtime_ns
            for path in root.rglob("*.json")
        }

    def _added(self, known: Mapping[str, int]) -> list[tuple[str, Path]]:
        root = self.host.root / "microbench" / "results"
        return [
            (name, root / name)
            for name, stamp in self._result_files().items()
            if known.get(name) != stamp
        ]

    # -- the record --------------------------------------------------------------------

    def take_over(self, folder: Path) -> None:
        """Go on from the results of an earlier call, as far as they are of our stages.

        What is unpacked lies on the machine alone, so that stage starts anew.
        """
        for name in STAGES:
            file = folder / f"{name}.json"
            if name != "unpack" and file.exists():
                target = self.host.results / file.name
                if not target.exists():
                    target.write_bytes(file.read_bytes())

    def _kept(self, stage: Stage) -> Json:
        try:
            found: Json = json.loads(
                (self.host.results / f"{stage.name}.json").read_text()
            )
            return found
        except (OSError, ValueError):
            return {}

    def _done(self, stage: Stage) -> Json:
        """The commands of ``stage`` that an earlier call ran, and that still hold."""
        kept = self._kept(stage)
        fits = not self.again and self._fits(stage, kept)
        return dict(kept.get("tasks", {})) if fits else {}

    def _fits(self, stage: Stage, kept: Json) -> bool:
        """Whether a result is of the code and the switches that are here now."""
        if not stage.stock and kept.get("code") != self._code:
            return False
        after_smoke = stage.needs == "smoke"
        return not after_smoke or kept.get("switches") == self.switches.as_dict()

    def _is_complete(self, stage: Stage) -> bool:
        if stage.name == "unpack":
            unpacked = self.host.unpacked
            return unpacked is not None and self._carried() in (None, unpacked.listing)
        kept = self._kept(stage)
        return kept.get("status") == COMPLETE and self._fits(stage, kept)

    def _carried(self) -> str | None:
        """Which tree the bundle holds that came with this call."""
        try:
            found = [bundle.Manifest.read(folder).listing for folder in self.bundles]
        except BundleError:
            return "damaged"
        return found[0] if found else None

    def _machine(self) -> Json:
        """What every result says of where it is from."""
        unpacked = self.host.unpacked
        commit = checkout.told(self.host.root, self.host.checkout_note)
        told = {"commit": commit.removesuffix("+"), "dirty": commit.endswith("+")}
        return {
            **self._here,
            "vllm": unpacked.about.get("vllm") if unpacked else None,
            **(told if commit else {}),
        }

    def _keep(self, stage: Stage, found: Json) -> None:
        whole = {
            "stage": stage.name,
            "machine": self._machine(),
            "code": self._code,
            "switches": self.switches.as_dict(),
            "status": "running",
            **found,
        }
        jsonfile.write(self.host.results / f"{stage.name}.json", whole)
        self._copy(f"{stage.name}.json")

    def _ended(self, stage: Stage, how: str, why: str, seconds: float) -> str:
        if how != WAITING:
            self._keep(stage, {**self._kept(stage), "status": how, "reason": why})
        self._record(stage, how, why, seconds)
        self._say(stage.name, f"{how} after {seconds:.0f} s: {why}".rstrip(": "))
        return how

    def _record(self, stage: Stage, how: str, why: str, seconds: float) -> None:
        line = {
            "stage": stage.name,
            "status": how,
            "reason": why,
            "seconds": round(seconds, 1),
            "limit_s": self.limits.get(stage.name, stage.limit_s),
            "switches": self.switches.name,
            "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        with (self.host.results / STATUS).open("a") as file:
            file.write(json.dumps(line) + "\n")
        self._copy(STATUS)

    def _copy(self, name: str) -> None:
        source = self.host.results / name
        if source.exists():
            jsonfile.write_text(self.out / name, source.read_text())

    def _teller(self, stage: Stage) -> Callable[[str], None]:
        return lambda text: self._say(stage.name, text)

    def _say(self, name: str, text: str) -> None:
        sys.stdout.write(f"{name:<12} {text}\n")
        sys.stdout.flush()


class Family:
    """A process and all that it started, in whatever session they are.

    An engine that outlived its benchmark would hold the GPU that the next one needs.

    Args:
        pid: Of the first.
    """

    def __init__(self, pid: int) -> None:
        self._born: dict[int, str] = {}  # when, by number: numbers are used again
        self._pid = pid

    def look(self) -> None:
        """Take note of those that are there now."""
        parents: dict[int, tuple[int, str]] = {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                fields = path.read_text().rpartition(")")[2].split()
                parents[int(path.parent.name)] = (int(fields[1]), fields[19])
        known = {self._pid, *self._born}
        found = True
        while found:
            found = False
            for pid, (parent, born) in parents.items():
                if parent in known and pid not in known:
                    self._born[pid] = born
                    known.add(pid)
                    found = True

    def kill(self) -> None:
        """End those that are still there."""
        for pid, born in self._born.items():
            with suppress(OSError):
                fields = (
                    Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                )
                if fields[19] == born:
                    os.kill(pid, signal.SIGKILL)


def _hear_ctrl_c() -> None:
    """In the child: a shell's background job, and all it starts, would ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _end(process: "subprocess.Popen[bytes]", family: Family) -> bool:
    """End a command with all that it started; whether it still ran.

    It is asked first, as Ctrl-C would, so that it can write what it has.
    """
    running = process.poll() is None
    family.look()
    if running:
        os.killpg(process.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
        family.look()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    family.kill()
    return running


def _found(task: Task, file: Path, log: Path) -> Json:
    """The result as far as it is written; nothing if it cannot be read yet."""
    try:
        if task.reads == "junit":
            return {"result": junit(file.read_text())}
        return {
            "result": json.loads((log if task.reads == "stdout" else file).read_text())
        }
    except (OSError, ValueError, ElementTree.ParseError):
        return {}


def _said(task: Task, result: Any, text: str) -> str:
    """A line about what came out."""
    if task.reads == "file":
        return _last_line(text)
    if task.reads == "junit" and result:
        counts = [f"{result[what]} {what}" for what in ("passed", "failed", "not run")]
        return f"{task.name}: {', '.join(counts)}"
    return ""


def junit(text: str) -> Json:
    """Of pytest's report: how many of each outcome, and what failed or was not run."""
    counts = {"passed": 0, "failed": 0, "not run": 0}
    failed: list[Json] = []
    not_run: dict[str, int] = {}
    for case in ElementTree.fromstring(text).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        wrong = [each for each in case if each.tag in ("failure", "error")]
        skipped = case.find("skipped")
        if wrong:
            counts["failed"] += 1
            said = wrong[0].get("message") or wrong[0].text or ""
            failed.append({"test": name, "message": said[:500]})
        elif skipped is not None:
            counts["not run"] += 1
            reason = skipped.get("message") or "no reason"
            not_run[reason] = not_run.get(reason, 0) + 1
        else:
            counts["passed"] += 1
    return {**counts, "failures": failed, "reasons": not_run}


def _reason(status: int, text: str) -> str:
    if status == 0:
        return "it ended well but left no result"
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    return f"exit status {status}: {_last_line(text) or 'it said nothing'}"


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


if __name__ == "__main__":
    sys.exit(main())
