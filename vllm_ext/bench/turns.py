"""Engines that take turns: how an engine benchmark is measured.

Every arm (`vllm_ext.bench.arms`) is an engine in a process of its own. They live
together and take turns: a block of requests of one, the same requests of the next, in
an order that is drawn anew for every two blocks, the second of which runs it backwards
(A B B A), so that a drift of the machine falls on all alike. Only one works at a time.
Living engines make neighbouring blocks close in time, which booting an engine for each
block cannot; what a boot leaves to chance, where memory lies say, is what more boots
draw anew, and what the control shows: a second stock engine, which has to come out
like the first.

Nothing is timed that is wrong: greedy and seeded requests get the tokens that stock
gives them, in every block, or the arm has no figures.
"""

import importlib.util
import math
import os
import random
import time
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import chain, pairwise, zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from vllm_ext import hostbench, machine
from vllm_ext.bench import models, results
from vllm_ext.bench.arms import Arm, runnable
from vllm_ext.bench.results import CONTROL
from vllm_ext.bench.watch import Watch
from vllm_ext.children import Child, ChildError
from vllm_ext.hostbench import CannotRunError
from vllm_ext.patching.engine import APPLIED, IN_USE, OFF
from vllm_ext.stats import median, paired_ratio, pairs_needed, tolerance

BOOT_TIMEOUT = 1800.0  # seconds: a first boot on a GPU compiles
BLOCK_TIMEOUT = 900.0
TRACED_STEPS = 8
SAYS_EVERY = 15.0  # seconds
PATCHES_TIMEOUT = 300.0
HASTE = 3.0  # for all engines together, when somebody waits for the end
INTERRUPTED = "interrupted: what was measured before stands"
LATE = "no time was left: what was measured before stands"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Case:
    """What every arm decodes: ``batch`` requests at once, or ``rate`` of them a second.

    Attributes:
        model: A name of `models.MODELS`.
        sampling: A name of `SAMPLING`.
        prompt: Tokens of a prompt.
        output: Tokens of an answer.
        batch: Requests that are there at the start of a block.
        rate: Requests per second, if they arrive one by one.
        requests: How many arrive in a block.
    """

    model: str
    sampling: str
    prompt: int
    output: int
    batch: int = 0
    rate: float = 0.0
    requests: int = 0

    @property
    def name(self) -> str:
        """What results call it."""
        load = f"{self.rate:g} requests/s" if self.rate else f"batch {self.batch}"
        return f"{self.model}, {load}, {self.sampling}"

    @property
    def seats(self) -> int:
        """Requests that run at once, at most."""
        return self.requests if self.rate else self.batch

    @property
    def length(self) -> int:
        """Tokens of the longest request, of those that are traced too."""
        return self.prompt + max(self.output, 3 * TRACED_STEPS)

    @property
    def metrics(self) -> tuple[str, ...]:
        """What verdicts are given on.

        The first token of a closed batch waits for all of its prompts, which is
        nobody's latency: there only the figure is shown.
        """
        return ("TPOT", "TTFT") if self.rate else ("TPOT",)


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        blocks: Of each case and arm.
        boots: Over how many boots of the engines they are spread.
        seed: Of the order of the blocks, of the prompts and of the arrivals.
        until: When it has to have ended, in `time.monotonic` seconds: a boot or a
            block that would take longer, going by the last one, is not begun.
    """

    blocks: int
    boots: int = 1
    seed: int = 0
    until: float = math.inf


@dataclass
class Measured:
    """What was found in a case.

    Attributes:
        case: The case.
        blocks: By arm and number, what each block gave; those of one number belong
            together.
        traces: By arm, what a steady step hands to the device.
        refused: By arm, why it has no figures.
        agreement: By arm whose tokens need not be its partner's, the share that is.
        compared: Tokens that were compared with those that they have to be.
        dropped: Blocks that were left out, because the machine throttled.
        done: Blocks that were run, those left out among them.
        seconds: That these took, and what had to be done before them.
    """

    case: Case
    blocks: dict[str, dict[int, dict[str, Any]]] = field(default_factory=dict)
    traces: dict[str, dict[str, Any]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    agreement: dict[str, float] = field(default_factory=dict)
    compared: int = 0
    dropped: int = 0
    done: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Group:
    """Arms that are compared with each other, in some cases.

    Attributes:
        arms: Also those that this machine cannot run.
        cases: Of different names, also between groups.
    """

    arms: Sequence[Arm]
    cases: Sequence[Case]


@dataclass(frozen=True)
class Lane:
    """Where engines run on this machine.

    Attributes:
        has_gpu: On a CUDA GPU; otherwise on the CPU lane.
        environment: Of every engine's process.
        module: What that process runs.
    """

    has_gpu: bool
    environment: Mapping[str, str | None]
    module: str = "vllm_ext.bench.enginerun"

    @property
    def label(self) -> str:
        """What every figure is called."""
        return "GPU engine" if self.has_gpu else "CPU engine"

    @property
    def cpu(self) -> int | None:
        """The core that engines share on a CPU, so that all are disturbed alike."""
        return None if self.has_gpu else max(os.sched_getaffinity(0))

    @classmethod
    def here(cls) -> "Lane":
        """That of this machine.

        Raises:
            CannotRunError: There is no vLLM, or neither a GPU nor the CPU lane.
        """
        if not importlib.util.find_spec("vllm"):
            raise CannotRunError("this command needs vLLM: install it beside vllm-ext")
        import torch

        if not torch.cuda.is_available():
            return cls(False, hostbench.environment("interpret"))
        return cls(
            True,
            {
                **{
                    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                    "VLLM_LOGGING_LEVEL": "ERROR",
                },
                **{"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"},
                # Counting every call of a patch would cost the patched side time.
                **{"VEXT_STATE_DIR": None, "VLLM_PLUGINS": None},
                # Both sides hash alike: the order of a set is no difference.
                "PYTHONHASHSEED": "0",
            },
        )


def order(arms: Sequence[str], blocks: int, seed: int) -> list[list[str]]:
    """In which order the arms run in each block: drawn, then the same backwards."""
    draw = random.Random(f"order {seed}")
    orders: list[list[str]] = []
    while len(orders) < blocks:
        drawn = list(arms)
        draw.shuffle(drawn)
        orders += [drawn, drawn[::-1]]
    return orders[:blocks]


def evidence(
    kind: str,
    groups: Sequence[Group],
    plan: Plan,
    lane: Lane,
    *,
    say: Say,
    command: Sequence[str],
) -> dict[str, Any]:
    """Measure, and once more with twice the blocks what that left undecided.

    The second measurement takes the place of the first: adding to it until something
    shows would find differences where there are none.

    Args:
        kind: Of the result, see `results.document`.
        groups: What to compare; each has its engines to itself, and as much of the
            time as those after it.
        plan: How much.
        lane: Where.
        say: Told what goes on.
        command: What was typed.

    Returns:
        A result, with a few more keys in its ``vllm_ext``: ``arms``, ``refused`` and
        ``not_run`` (which and why), ``rerun`` (names of cases), ``tokens_compared``,
        ``dropped_blocks``, ``settings`` (vLLM's variables), ``load``, ``plan``,
        ``engines`` (by arm, what vLLM made of it).

    Raises:
        CannotRunError: Nothing is left to compare.
    """
    load = os.getloadavg()[0]
    found: dict[Case, Measured] = {}
    missing: list[dict[str, str]] = []
    problems: list[CannotRunError] = []
    states: dict[str, list[dict[str, Any]]] = {}
    engines: dict[str, dict[str, Any]] = {}
    boots: list[float] = []  # seconds of one, by measurement
    rerun: list[str] = []
    every = [case for group in groups for case in group.cases]
    titles = {
        case: f"case {number} of {len(every)}: {case.name}"
        for number, case in enumerate(every, 1)
    }

    def measure(group: Group, cases: Sequence[Case], plan: Plan, later: int) -> None:
        chosen, absent = runnable(group.arms, lane.has_gpu)
        bench = Bench(chosen, plan, lane, say, watch.throttled, titles, later)
        before = {*found}
        try:
            bench.measure(cases)
            found.update(bench.found)
            rerun.extend(sorted(case.name for case in before & {*cases}))
        except (CannotRunError, KeyboardInterrupt) as error:
            # What was found before stands.
            if isinstance(error, KeyboardInterrupt):
                error = CannotRunError(INTERRUPTED)
            problems.append(error)
            for case, each in bench.found.items():
                if each.blocks:
                    found.setdefault(case, each)
            # Who raises the error says it too.
            if found or not (stopped() or group is groups[-1]):
                say(str(error))
            lacking(bench.left(cases, before), str(error))
        states.update(bench.states)
        engines.update(bench.engines)
        boots.append(bench.boot_seconds)
        missing.extend(each for each in absent + bench.lost if each not in missing)

    def lacking(what: Sequence[str], why: str) -> None:
        if what:
            missing.append({"arm": "every arm", "what": ", ".join(what), "why": why})

    def stopped() -> bool:
        return any(str(problem) == INTERRUPTED for problem in problems)

    def again_takes(cases: Sequence[Case]) -> float:
        booting = max(boots) * plan.boots * len({case.model for case in cases})
        return booting + 2 * sum(found[case].seconds for case in cases)

    def said() -> dict[str, Any]:
        summary = watch.summary()
        return assembled(kind, groups, found, lane, summary, states, command)

    with Watch() as watch:
        ahead = len(every) * plan.blocks
        for number, group in enumerate(groups):
            ahead -= len(group.cases) * plan.blocks
            now = time.monotonic()
            share = (plan.until - now) / (len(groups) - number)
            measure(group, group.cases, replace(plan, until=now + share), ahead)
            if stopped():
                break
        if not found:
            raise problems[-1]
        first = [
            each for each in said()["vllm_ext"]["comparisons"] if each["arm"] != CONTROL
        ]
        more = replace(plan, blocks=2 * plan.blocks, seed=plan.seed + 1)
        undecided = {each["case"] for each in first if each["verdict"] == "UNDECIDED"}
        # What ended early was short of time, not of blocks.
        undecided &= {case.name for case in found if found[case].done == plan.blocks}
        if stopped() or more.blocks < pairs_needed(max(1, len(first))):
            undecided = set()  # nor would twice as many decide anything
        if undecided:
            say(f"{len(undecided)} undecided, so again with twice the blocks")
        for group in groups:
            cases = [case for case in group.cases if case.name in undecided]
            if not cases or stopped():
                continue
            # Half of a second measurement would be thrown away.
            if time.monotonic() + again_takes(cases) > plan.until:
                say(LATE)
                lacking([f"{case.name} once more" for case in cases], LATE)
                continue
            measure(group, cases, more, 0)
    result = said()
    result["vllm_ext"] |= {
        **{"not_run": missing, "rerun": sorted(rerun), "load": round(load, 1)},
        "plan": {"blocks": plan.blocks, "boots": plan.boots, "seed": plan.seed},
        "engines": engines,
    }
    return result


class Bench:
    """Engines that take turns.

    Args:
        arms: That this machine can run.
        plan: How much.
        lane: Where.
        say: Told what goes on.
        throttled: Whether what was measured between two moments must be dropped.
        titles: What the cases are called while they run.
        later: Blocks that others will run afterwards.

    Attributes:
        found: By case.
        lost: Arms that could not be run, and why.
        states: By arm, what became of each patch.
        engines: By arm, what vLLM made of it.
        boot_seconds: That the last boot of all engines took.
    """

    def __init__(
        self,
        arms: Sequence[Arm],
        plan: Plan,
        lane: Lane,
        say: Say,
        throttled: Callable[[float, float], bool],
        titles: Mapping[Case, str],
        later: int,
    ) -> None:
        self._arms = {arm.name: arm for arm in arms}
        self._plan = plan
        self._lane = lane
        self._say = say
        self._throttled = throttled
        self._titles = titles
        self.found: dict[Case, Measured] = {}
        self.lost: list[dict[str, str]] = []
        self.states: dict[str, list[dict[str, Any]]] = {}
        self.engines: dict[str, dict[str, Any]] = {}
        self._last_said = 0.0
        self._done, self._ahead, self._boots_ahead = 0, later, 0
        self._block_seconds = self.boot_seconds = 0.0  # of all done, of the last
        self._last_block = self._last_start = 0.0  # seconds of it, of a case's start
        self._owes = ""  # the engine that has not answered its question yet

    def measure(self, cases: Sequence[Case]) -> None:
        """Run all blocks of all ``cases``.

        Raises:
            CannotRunError: What is left has nothing to be compared with, or no time is
                left for it.
        """
        self._ahead += len(cases) * self._plan.blocks
        orders = {
            case: order([*self._arms], self._plan.blocks, self._plan.seed + number)
            for number, case in enumerate(cases)
        }
        boots = self._plan.boots
        edges = [round(self._plan.blocks * boot / boots) for boot in range(boots + 1)]
        by_model: dict[str, list[Case]] = {case.model: [] for case in cases}
        for case in cases:
            by_model[case.model].append(case)
        self._boots_ahead = len(by_model) * boots
        for model, mine in by_model.items():
            for boot, edge in enumerate(pairwise(edges)):
                self._check_time(
                    self.boot_seconds + self._last_start + self._last_block
                )
                with ExitStack() as stack:
                    started = time.monotonic()
                    engines = self._boot(stack, model, mine, boot)
                    self.boot_seconds = time.monotonic() - started
                    self._boots_ahead -= 1
                    patience = PATCHES_TIMEOUT
                    try:
                        for case in mine:
                            self._case(engines, case, orders[case], range(*edge))
                    except KeyboardInterrupt:
                        patience = HASTE
                        raise
                    finally:
                        self._check_patches(engines, mine, patience)

    def left(self, cases: Sequence[Case], before: Container[Case]) -> list[str]:
        """What was not run of ``cases``; ``before``: those measured once already."""
        left = []
        for case in cases:
            done = self.found[case].done if case in self.found else 0
            if case in before:
                left.append(f"{case.name} once more")
            elif not done:
                left.append(case.name)
            elif done < self._plan.blocks:
                left.append(f"{case.name} after {done} of {self._plan.blocks} blocks")
        return left

    def _check_time(self, seconds: float) -> None:
        """End where what takes that long would end too late.

        Raises:
            CannotRunError: It would.
        """
        if time.monotonic() + seconds > self._plan.until:
            raise CannotRunError(LATE)

    def _check_patches(
        self, engines: Mapping[str, Child], cases: Sequence[Case], timeout: float
    ) -> None:
        """Refuse an arm that ran without any of its patches, or does not tell."""
        until = time.monotonic() + timeout
        silent = {name for name in self._arms if name not in self.states} | {*engines}
        try:
            for name, child in engines.items():
                states = _states(child, self._owes == name, until)
                if states is not None:
                    self.states[name] = states
                    silent.remove(name)
        finally:
            for name, states in self.states.items():
                self._check_states(name, states, cases)
            for name in silent:
                if self._arms[name].patches is not None:
                    self._refuse(name, "it did not tell whether it was patched", cases)

    def _check_states(
        self, name: str, states: Sequence[Mapping[str, Any]], cases: Sequence[Case]
    ) -> None:
        on = [each for each in states if each["state"] != OFF]
        if on and not any(each["state"] in (APPLIED, IN_USE) for each in on):
            why = f"{on[0]['name']} is {on[0]['state']}: {on[0]['reason']}"
            self._refuse(name, why, cases)

    def _refuse(self, name: str, why: str, cases: Sequence[Case]) -> None:
        for case in cases:
            found = self.found.get(case)
            if found and name in found.blocks:
                _refuse(found, name, why)

    # -- engines ----------------------------------------------------------------------

    def _boot(
        self, stack: ExitStack, model: str, cases: Sequence[Case], boot: int
    ) -> dict[str, Child]:
        """An engine for each arm, one after the other: a boot works on all cores."""
        engines: dict[str, Child] = {}
        lost = {each["arm"] for each in self.lost}
        arms = [arm for name, arm in self._arms.items() if name not in lost]
        self._check_memory(model, cases, len(arms))
        again = f", boot {boot + 1} of {self._plan.boots}" if boot else ""
        for number, arm in enumerate(arms, 1):
            self._say(f"{model}: engine {number} of {len(arms)}, {arm.name}{again}")
            child = Child(
                self._lane.module,
                {**self._lane.environment, **arm.variables},
                f"the engine of {arm.name}",
            )
            stack.callback(child.close)
            stack.push(partial(_kill_if_interrupted, child))
            engines[arm.name] = child
            try:
                made = child.ask(
                    "boot",
                    BOOT_TIMEOUT,
                    model=model,
                    arguments=dict(arm.arguments),
                    form=arm.legacy,
                    seats=max(case.seats for case in cases),
                    length=max(case.length for case in cases),
                    cpu=self._lane.cpu,
                )
            except ChildError as error:
                self._lose(engines, arm.name, error.line)
                continue
            self.engines[arm.name] = made
            wrong = differs(arm, made)
            if wrong:
                self._lose(engines, arm.name, wrong)
        return engines

    def _lose(self, engines: dict[str, Child], name: str, why: str) -> None:
        """Go on without an engine.

        Raises:
            CannotRunError: What is left has nothing to be compared with.
        """
        engines.pop(name).kill()
        self.lost.append({"arm": name, "what": self._arms[name].what, "why": why})
        lost = {each["arm"] for each in self.lost}
        left = [arm for arm in self._arms.values() if arm.name not in lost]
        if not any(arm.against in self._arms.keys() - lost for arm in left):
            raise CannotRunError(f"{name} cannot be run: {why}")
        self._say(f"{name} is left out: {why}")

    def _check_memory(self, model: str, cases: Sequence[Case], engines: int) -> None:
        """Refuse early what would run out of memory in the middle.

        Raises:
            CannotRunError: The engines do not fit side by side.
        """
        shape = models.MODELS[model]
        tokens = max(case.seats * case.length for case in cases)
        apart = 4e9 if self._lane.has_gpu else 1e9  # graphs, workspaces, libraries
        each = 2 * shape.parameters + 1.25 * tokens * shape.kv_bytes_per_token + apart
        free = free_memory(self._lane.has_gpu)
        if free is not None and engines * each > free:
            raise CannotRunError(
                f"{engines} engines of about {each / 1e9:.1f} GB each do not fit into "
                f"{free / 1e9:.1f} GB: name fewer --arms, or a smaller model or batch"
            )

    # -- a case -----------------------------------------------------------------------

    def _case(
        self,
        engines: dict[str, Child],
        case: Case,
        orders: Sequence[Sequence[str]],
        numbers: Sequence[int],
    ) -> None:
        """Run the blocks with those ``numbers``; adds to what was found."""
        self._check_time(self._last_start + self._last_block)
        found = self.found.setdefault(case, Measured(case))
        title = self._titles[case]
        started = time.monotonic()
        self._say(f"{title}{self._left()}")
        # What is compiled or allocated at first use is so before the clock runs.
        taken = self._ask(engines, found, [*engines], "closed", _closed(case, -1))
        self._compare(found, taken)
        if case.rate:  # batches of every size that arrivals make, too
            self._ask(engines, found, [*engines], *_question(case, -1))
        elif not found.traces:
            details = {"steps": TRACED_STEPS, **_closed(case, -1)}
            for name in ("output", "seed"):
                del details[name]
            found.traces = self._ask(engines, found, [*engines], "trace", details)
        self._last_start = time.monotonic() - started
        found.seconds += self._last_start
        for number in numbers:
            self._check_time(self._last_block)
            started = time.monotonic()
            what, details = _question(case, self._plan.seed + number)
            taken = self._ask(engines, found, orders[number], what, details)
            self._ahead -= 1
            self._done += 1
            self._last_block = time.monotonic() - started
            self._block_seconds += self._last_block
            found.done += 1
            found.seconds += self._last_block
            if time.monotonic() - self._last_said > SAYS_EVERY:
                place = f"block {number + 1} of {self._plan.blocks}"
                self._say(f"{title}, {place}{self._left()}")
            if not case.rate:  # which requests meet in a step is up to the clock
                self._compare(found, taken)
            # Each is asked about, so that the gate knows how many there were.
            throttled = [
                self._throttled(each["start"], each["end"]) for each in taken.values()
            ]
            if any(throttled):
                found.dropped += 1
                continue
            for name, each in taken.items():
                if name not in found.refused:
                    found.blocks.setdefault(name, {})[number] = each

    def _ask(
        self,
        engines: dict[str, Child],
        found: Measured,
        names: Sequence[str],
        what: str,
        details: Mapping[str, Any],
    ) -> dict[str, Any]:
        """One engine after the other; an engine that fails is refused from then on."""
        answers = {}
        for name in names:
            if name in found.refused or name not in engines:
                continue
            self._owes = name
            try:
                answers[name] = engines[name].ask(what, BLOCK_TIMEOUT, **details)
            except ChildError as error:
                self._lose(engines, name, error.line)
                _refuse(found, name, "its engine failed")
            self._owes = ""
        return answers

    def _compare(self, found: Measured, taken: Mapping[str, Any]) -> None:
        """Refuse each arm whose tokens are not those that they have to be."""
        for name, each in taken.items():
            arm = self._arms[name]
            partner = taken.get(arm.against)
            if partner is None or name in found.refused:
                continue
            equal, of, first = agreement(partner["tokens"], each["tokens"])
            if not arm.same_tokens:
                if of:
                    found.agreement.setdefault(name, equal / of)
                continue
            found.compared += of
            if equal == of:
                continue
            if name == CONTROL:
                for other in self._arms:
                    _refuse(found, other, f"{arm.against} does not repeat its tokens")
            _refuse(found, name, f"other tokens than {arm.against}: {first}")
            self._say(f"{found.case.name}: {name} gives {found.refused[name]}")

    def _left(self) -> str:
        """How long it will go on, if it goes on as it did; empty before it can tell."""
        self._last_said = time.monotonic()
        if not self._done:
            return ""
        seconds = self._block_seconds / self._done * self._ahead
        seconds += self.boot_seconds * self._boots_ahead
        if seconds > 90:
            return f", about {seconds / 60:.0f} min left"
        return f", about {seconds:.0f} s left"


def _states(child: Child, owes: bool, until: float) -> list[dict[str, Any]] | None:
    """What an engine says of its patches; ``None`` if it does not, or too late.

    Args:
        child: The engine.
        owes: Whether it has another question to answer first.
        until: The moment that is too late, in `time.monotonic` seconds.
    """
    states: list[dict[str, Any]] | None = None
    with suppress(ChildError):
        child.tell("patches")
        for _ in range(1 + owes):
            states = None
            if not child.ready(max(0.0, until - time.monotonic())):
                break
            states = child.hear()
    return states


def _kill_if_interrupted(
    child: Child, error: type[BaseException] | None, *_: Any
) -> None:
    """Whoever interrupts does not wait for engines to end by themselves."""
    if error is KeyboardInterrupt:
        child.kill()


def _refuse(found: Measured, name: str, why: str) -> None:
    found.refused.setdefault(name, why)
    found.blocks.pop(name, None)
    found.traces.pop(name, None)
    found.agreement.pop(name, None)


def _closed(case: Case, seed: int) -> dict[str, Any]:
    return {
        "batch": case.batch or min(case.requests, 8),
        **{"sampling": case.sampling, "seed": seed},
        **{"prompt": case.prompt, "output": case.output},
    }


def _question(case: Case, seed: int) -> tuple[str, dict[str, Any]]:
    """What a block of a case is for an engine."""
    details = _closed(case, seed)
    if not case.rate:
        return "closed", details
    del details["batch"]
    return "arrivals", {"rate": case.rate, "requests": case.requests, **details}


def agreement(
    ours: Sequence[list[int] | None], theirs: Sequence[list[int] | None]
) -> tuple[int, int, str]:
    """How many tokens two engines agree on, of how many, and where they first differ.

    Args:
        ours: Of each request its tokens, ``None`` if they do not repeat.
        theirs: Those of the other engine for the same requests.
    """
    equal, of, first = 0, 0, ""
    for request, (left, right) in enumerate(zip_longest(ours, theirs)):
        for at, (one, other) in enumerate(zip_longest(left or [], right or [])):
            of += 1
            equal += one == other
            if one != other and not first:
                first = f"request {request + 1}, token {at + 1}: {other}, not {one}"
    return equal, of, first


def differs(arm: Arm, made: Mapping[str, Any]) -> str:
    """What an engine is not, of what its arm asks for; empty if it is all of that."""
    asked: dict[str, Any] = {}
    if "async_scheduling" in arm.arguments:
        asked["async_scheduling"] = arm.arguments["async_scheduling"]
    graphs = arm.arguments.get("compilation_config", {}).get("cudagraph_mode")
    if graphs:
        asked["graphs"] = graphs
    runner = arm.environment.get("VLLM_USE_V2_MODEL_RUNNER")
    if runner is not None:
        asked["runner"] = "V2" if runner == "1" else "V1"
    wrong = [
        f"{name} {made[name]} instead of {wanted}"
        for name, wanted in asked.items()
        if made[name] != wanted
    ]
    return "vLLM made an engine with " + ", ".join(wrong) if wrong else ""


def free_memory(has_gpu: bool) -> float | None:
    """Bytes that engines may take, where that can be found out."""
    try:
        if has_gpu:
            import pynvml

            pynvml.nvmlInit()
            device = machine.visible_device(pynvml)
            return float(pynvml.nvmlDeviceGetMemoryInfo(device).free)
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * float(line.split()[1])
    except Exception:
        return None
    return None


# -- what was found ---------------------------------------------------------------


def assembled(
    kind: str,
    groups: Sequence[Group],
    found: Mapping[Case, Measured],
    lane: Lane,
    watch: Mapping[str, Any],
    states: Mapping[str, list[dict[str, Any]]],
    command: Sequence[str],
) -> dict[str, Any]:
    """The result file; see `evidence`."""
    pairs = [
        (found[case], group.arms)
        for group in groups
        for case in group.cases
        if case in found
    ]
    said = results.document(
        kind,
        [
            entry(each, arm)
            for each, arms in pairs
            for arm in arms
            if each.blocks.get(arm.name)
        ],
        [one for each, arms in pairs for one in comparisons(each, arms)],
        patches=[
            {"arm": arm, **patch}
            for arm, listed in states.items()
            for patch in listed
            if patch["state"] != OFF
        ],
        watch=watch,
        command=["vllm-ext", *command],
        label=lane.label,
    )
    said["vllm_ext"] |= {
        "arms": [asdict(arm) for group in groups for arm in group.arms],
        "settings": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith("VLLM_")
        },
        "refused": [
            {"case": each.case.name, "arm": arm, "why": why}
            for each, _ in pairs
            for arm, why in each.refused.items()
        ],
        "tokens_compared": sum(each.compared for each, _ in pairs),
        "dropped_blocks": sum(each.dropped for each, _ in pairs),
    }
    return said


def entry(found: Measured, arm: Arm) -> dict[str, Any]:
    """The figures of an arm in a case; its timings are the TPOT of each block."""
    case, blocks = found.case, [*found.blocks[arm.name].values()]
    seconds = [sample(each, "TPOT") for each in blocks]

    def pooled(what: str, at: float) -> float:
        values = list(chain.from_iterable(each[what] for each in blocks))
        return round(float(np.percentile(values, at)), 7)

    took = sum(each["end"] - each["start"] for each in blocks)
    trace = found.traces.get(arm.name, {})
    submissions = trace.get("submissions")
    busy = trace.get("busy_us")
    return results.entry(
        f"{case.name}, {arm.name}",
        case.name,
        {
            **{"model": case.model, "arm": arm.name, "sampling": case.sampling},
            **{"prompt": case.prompt, "output": case.output},
            **(
                {"rate": case.rate, "requests": case.requests}
                if case.rate
                else {"batch": case.batch}
            ),
        },
        seconds,
        ttft_median_s=pooled("ttft", 50),
        ttft_p99_s=pooled("ttft", 99),
        tpot_median_s=pooled("tpot", 50),
        tpot_p99_s=pooled("tpot", 99),
        itl_median_s=pooled("itl", 50),
        itl_p99_s=pooled("itl", 99),
        tokens_per_s=round(sum(each["generated"] for each in blocks) / took, 3),
        host_median_s=pooled("host", 50),
        busy_share=None if busy is None else round(busy / 1e6 / median(seconds), 4),
        submissions_per_step=submissions,
        waits_per_step=trace.get("waits"),
        not_measured=trace.get("why", "steady steps are looked at with --batch"),
        token_agreement=found.agreement.get(arm.name),
    )


def comparisons(found: Measured, arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """Each arm against its partner, on each metric of the case."""

    def samples(arm: Arm, metric: str) -> tuple[list[float], list[float]]:
        """Those of an arm's partner and its own, of the blocks that both have."""
        ours, theirs = (found.blocks.get(each, {}) for each in (arm.name, arm.against))
        both = sorted(ours.keys() & theirs.keys())
        return (
            [sample(theirs[number], metric) for number in both],
            [sample(ours[number], metric) for number in both],
        )

    compared = []
    control = next((arm for arm in arms if arm.name == CONTROL), None)
    for metric in found.case.metrics:
        again = None
        if control and all(samples(control, metric)):
            again = paired_ratio(*samples(control, metric))
        for arm in arms:
            before, after = samples(arm, metric)
            if after:
                compared.append(
                    results.comparison(
                        case=found.case.name,
                        metric=metric,
                        unit="s",
                        arm=arm.name,
                        against=arm.against,
                        arm_samples=after,
                        against_samples=before,
                        tolerance=tolerance(None if arm is control else again),
                    )
                )
    return compared


def sample(block: Mapping[str, Any], metric: str) -> float:
    """What a block says of a metric, in seconds: the median of its requests."""
    return median(block[metric.lower()])
