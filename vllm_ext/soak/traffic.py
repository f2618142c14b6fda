"""Random traffic for a scheduler, and the smallest traffic that still shows a fault.

A `Traffic` is data: everything that happens in a run follows from it, so it can be run
again, on another scheduler or with a part left out. Requests do not know of each
other: leaving one out leaves the tokens of the others as they are.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

VOCABULARY = 24  # few tokens, so that stop tokens and repetitions happen


@dataclass(frozen=True)
class Setup:
    """How a scheduler is configured.

    Attributes:
        ahead: Asynchronous scheduling.
        blocks: Of the KV cache, the null block included.
        budget: Tokens per step, which may be fewer than the seats.
        priority: Scheduling by priority instead of by arrival.
        second: For Model Runner V2, whose outputs carry less.
        reports: Record events of the prefix cache.
        interval: Steps between two with prompts, where vLLM has that (0.33).
        split: Rows from which the patch evaluates a step in two parts.
    """

    ahead: bool = True
    blocks: int = 64
    block_size: int = 4
    seats: int = 8
    budget: int = 64
    longest: int = 96
    caching: bool = True
    priority: bool = False
    second: bool = True
    reports: bool = True
    stats: bool = True
    finished_sets: bool = False
    chunk: int = 0
    interval: int = 1
    split: int = 1


@dataclass(frozen=True)
class Arrival:
    """One request.

    Attributes:
        name: Decides, with the position, which tokens it samples.
        step: When it arrives.
        family: Requests of one family have the same first tokens.
        shared: How many of them.
        length: Tokens of the prompt.
        stops: Tokens that end it.
        aborted: Steps after its arrival, if so.
        within: Whether it is aborted while a step is in flight.
    """

    name: int
    step: int
    length: int = 1
    max_tokens: int = 8
    family: int = 0
    shared: int = 0
    stops: tuple[int, ...] = ()
    eos: int | None = None
    min_tokens: int = 0
    priority: int = 0
    client: int = 0
    logprobs: bool = False
    repetition: bool = False
    traced: bool = False
    salt: bool = False
    aborted: int | None = None
    within: bool = False

    def prompt(self) -> list[int]:
        """Its tokens."""
        common = random.Random(f"family {self.family}")
        own = random.Random(f"request {self.name}")
        first = [common.randrange(VOCABULARY) for _ in range(self.shared)]
        rest = [own.randrange(VOCABULARY) for _ in range(self.length)]
        return (first + rest)[: self.length]


@dataclass(frozen=True)
class Event:
    """Something that happens before a step.

    Attributes:
        kind: ``reset`` empties the prefix cache, ``preempt`` all running requests
            with it, ``pause`` and ``resume`` stop and start scheduling, ``hold``
            admits nobody, ``throttle`` puts prompts off for a step, ``stall`` has no
            output ready, ``drain`` waits for all that is in flight. ``few tokens`` and
            ``small input`` leave two to a step from then on: nothing of vLLM's does
            so today, and without it those who run always fit a step.
    """

    step: int
    kind: str


@dataclass(frozen=True)
class Traffic:
    """A run: a setup, and what happens in each of ``steps`` steps."""

    setup: Setup
    steps: int
    arrivals: tuple[Arrival, ...]
    events: tuple[Event, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.steps} steps of {_said(self.setup, Setup())}"]
        lines += [f"  {_said(each, Arrival(0, 0))}" for each in self.arrivals]
        lines += [f"  step {each.step}: {each.kind}" for each in self.events]
        return "\n".join(lines)


def _said(thing: object, usual: object) -> str:
    """A dataclass by the fields that are not as usual."""
    shown = {
        name: value
        for name, value in vars(thing).items()
        if value != vars(usual)[name] or name in ("name", "step")
    }
    return (
        f"{type(thing).__name__}({', '.join(f'{k}={v!r}' for k, v in shown.items())})"
    )


# -- making it -------------------------------------------------------------------------


@dataclass
class Mix:
    """What kind of traffic: `random_traffic` draws from it."""

    rate: float  # arrivals per step
    lengths: Sequence[int]
    outputs: Sequence[int]
    early: float = 0.5  # share of requests that may stop by themselves
    aborts: float = 0.1
    events: float = 0.04
    setup: dict[str, Sequence[object]] = field(default_factory=dict)


MIXES = {
    # Mostly steady: few requests, long outputs.
    "steady": Mix(0.08, (1, 3, 8, 17), (20, 60, 90), early=0.2, aborts=0.05),
    # Requests come and go in most steps.
    "churn": Mix(0.4, (1, 2, 5, 9, 30), (1, 2, 4, 9, 20)),
    # The cache is too small for the requests that run.
    "preempting": Mix(
        *(0.12, (4, 12, 30), (8, 30, 60)),
        early=0.1,
        setup={"blocks": (12, 18, 25), "seats": (4, 8, 12)},
    ),
    # Prompts longer than a step's budget.
    "chunks": Mix(
        *(0.1, (20, 50, 80), (2, 10, 30)),
        setup={"budget": (8, 16), "chunk": (0, 0, 6), "seats": (4, 8)},
    ),
    # More requests than seats, or than tokens in a step.
    "crowded": Mix(
        *(0.25, (1, 2, 6), (5, 20, 40)),
        setup={"seats": (2, 4, 16), "budget": (3, 8, 64)},
    ),
}


def random_traffic(seed: int, steps: int, mix: str | None = None) -> Traffic:
    """Traffic of one of `MIXES`; which one follows from ``seed`` unless given."""
    choose = random.Random(seed)
    kind = MIXES[mix or choose.choice(("steady", *MIXES))]
    fields: dict[str, object] = {
        "ahead": choose.random() < 0.6,
        "blocks": choose.choice((40, 64, 200)),
        "block_size": choose.choice((1, 4, 4, 16)),
        "seats": choose.choice((2, 8, 16, 24)),
        "caching": choose.random() < 0.75,
        "priority": choose.random() < 0.4,
        "second": choose.random() < 0.7,
        "reports": choose.random() < 0.7,
        "stats": choose.random() < 0.8,
        "finished_sets": choose.random() < 0.3,
        "longest": choose.choice((48, 96)),
        "split": choose.choice((1, 1, 4)),
        "interval": choose.choice((1, 1, 1, 3)),
    }
    fields |= {name: choose.choice(options) for name, options in kind.setup.items()}
    setup = Setup(**fields)  # type: ignore[arg-type]
    # Enough for one request of the greatest length, or it would wait for ever.
    least = setup.longest // setup.block_size + 3
    setup = replace(setup, blocks=max(setup.blocks, least))
    arrivals = tuple(_arrivals(choose, kind, setup, steps))
    return Traffic(setup, steps, arrivals, tuple(_events(choose, kind, steps)))


def _arrivals(
    choose: random.Random, kind: Mix, setup: Setup, steps: int
) -> Iterator[Arrival]:
    name = 0
    for step in range(steps):
        while choose.random() < kind.rate / (1 + kind.rate):
            length = max(1, choose.choice(kind.lengths) + choose.randint(-1, 1))
            length = min(length, setup.longest - 2)
            ends = choose.random() < kind.early
            yield Arrival(
                name,
                step,
                length,
                max_tokens=max(1, choose.choice(kind.outputs) + choose.randint(-1, 1)),
                family=choose.randrange(3),
                shared=choose.choice((0, 0, 4, 16, 40)),
                stops=tuple(choose.sample(range(VOCABULARY), 2)) if ends else (),
                eos=choose.randrange(VOCABULARY)
                if ends and choose.random() < 0.5
                else None,
                min_tokens=choose.choice((0, 0, 3)),
                priority=choose.randrange(3),
                client=choose.choice((0, 0, 0, 1)),
                logprobs=choose.random() < 0.15,
                repetition=choose.random() < 0.1,
                traced=choose.random() < 0.1,
                salt=choose.random() < 0.1,
                aborted=choose.randint(0, 25)
                if choose.random() < kind.aborts
                else None,
                within=choose.random() < 0.5,
            )
            name += 1


def _events(choose: random.Random, kind: Mix, steps: int) -> Iterator[Event]:
    kinds = (
        *("reset", "preempt", "stall", "stall", "stall", "pause", "hold"),
        *("drain", "drain", "drain"),
        *("throttle", "throttle"),
    )
    for step in range(steps):
        if choose.random() < kind.events:
            what = choose.choice(kinds)
            yield Event(step, what)
            if what in ("pause", "hold"):
                yield Event(step + choose.randint(1, 4), "resume")


# -- making it smaller -----------------------------------------------------------------

Fails = Callable[[Traffic], int | None]
"""The step in which a traffic fails, or ``None``."""


def smallest(traffic: Traffic, fails: Fails, tries: int = 600) -> Traffic:
    """The smallest traffic found that still fails.

    Cuts off what comes after the failing step, leaves out requests and events, half
    of them at first, and then makes the requests and the setup plain: until none of
    that helps any more.

    Args:
        tries: How many traffics to run at most.

    Raises:
        ValueError: ``traffic`` does not fail.
    """
    left = tries

    def failing(candidate: Traffic) -> Traffic | None:
        nonlocal left
        left -= 1
        step = fails(candidate) if left >= 0 else None
        return None if step is None else replace(candidate, steps=step + 1)

    best = failing(traffic)
    if best is None:
        raise ValueError("this traffic does not fail")
    before = None
    while best != before and left > 0:
        before = best
        best = _fewer(best, failing)
        for simpler in (_earlier, _plain_requests, _plain_setup):
            best = _simpler(best, simpler, failing)
    return best


def _simpler(
    traffic: Traffic,
    simpler: Callable[[Traffic], Iterator[Traffic]],
    failing: Callable[[Traffic], Traffic | None],
) -> Traffic:
    """With every simplification of one kind that it still fails with."""
    number = 0
    while candidates := list(simpler(traffic))[number:]:
        found = failing(candidates[0])
        if found is None:
            number += 1  # those before it have been tried in vain
        else:
            traffic = found
    return traffic


def _fewer(traffic: Traffic, failing: Callable[[Traffic], Traffic | None]) -> Traffic:
    """Without the requests and events that it does not need."""
    things = [each for each in _things(traffic) if each.step < traffic.steps]
    size = len(things)
    while size:
        start = 0
        while start < len(things):
            rest = things[:start] + things[start + size :]
            found = failing(_with(traffic, rest))
            if found is None:
                start += size
            else:
                traffic, things = found, rest
        size //= 2
    return _with(traffic, things)


def _things(traffic: Traffic) -> list[Arrival | Event]:
    return [*traffic.arrivals, *traffic.events]


def _with(traffic: Traffic, things: Sequence[Arrival | Event]) -> Traffic:
    return replace(
        traffic,
        arrivals=tuple(each for each in things if isinstance(each, Arrival)),
        events=tuple(each for each in things if isinstance(each, Event)),
    )


def _earlier(traffic: Traffic) -> Iterator[Traffic]:
    """Without the steps in which nothing has happened yet."""
    things = _things(traffic)
    first = min((each.step for each in things), default=0)
    if first:
        yield _with(traffic, [replace(each, step=each.step - first) for each in things])


def _plain_requests(traffic: Traffic) -> Iterator[Traffic]:
    """With one request that is shorter, comes earlier, or lacks something special."""
    for i, each in enumerate(traffic.arrivals):
        usual = vars(Arrival(each.name, each.step, each.length, each.max_tokens))
        changes = [
            usual,
            *({key: value} for key, value in usual.items()),
            *(
                {key: getattr(each, key) // 2}
                for key in ("step", "length", "max_tokens")
            ),
            *(
                {key: getattr(each, key) - 1}
                for key in ("step", "length", "max_tokens")
            ),
        ]
        for change in changes:
            simpler = replace(each, **change)
            simpler = replace(
                simpler,
                step=max(simpler.step, 0),
                length=max(simpler.length, 1),
                max_tokens=max(simpler.max_tokens, 1),
            )
            if simpler != each:
                arrivals = (*traffic.arrivals[:i], simpler, *traffic.arrivals[i + 1 :])
                yield replace(traffic, arrivals=arrivals)


def _plain_setup(traffic: Traffic) -> Iterator[Traffic]:
    """With one setting that is the usual one."""
    for key, value in vars(Setup()).items():
        if getattr(traffic.setup, key) != value:
            yield replace(traffic, setup=replace(traffic.setup, **{key: value}))
