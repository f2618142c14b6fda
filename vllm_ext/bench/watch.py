"""The machine gate: what the GPU did while it was measured, by NVML.

A sample that was taken while the card held its clocks back says how warm the card was,
not how fast the code is. `Watch` looks at the card twenty times a second, says of each
sample whether it must be dropped, and of the run whether enough of it is left. It only
reads: clocks, limits and modes stay as they were found.

Throttled means a clock event reason other than idleness or clocks that a person set,
or an SM clock below 0.75 of the steady maximum seen in this run, which is NVBench's
threshold.
"""

import hashlib
import os
import threading
import time
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from vllm_ext import machine

T = TypeVar("T")

PERIOD_S = 0.05
PROCESSES_PERIOD_S = 1.0
STEADY_SHARE = 0.75
DROPPED_SHARE = 0.20

SM, MEMORY, CORE = 1, 2, 0  # NVML's numbers of two clocks and of one sensor
UNCORRECTED, VOLATILE = 1, 0  # and of which ECC errors
CUDA_FILE = Path("/dev/nvidia-uvm")  # held by all who have a CUDA context

IDLE = "GpuIdle"
HARMLESS = {IDLE, "ApplicationsClocksSetting", "UserDefinedClocks"}
SETTINGS = (
    "power_limit_w",
    "persistence",
    "ecc",
    "mig",
    "sm_max_mhz",
    "memory_max_mhz",
)
RANGES = ("sm_mhz", "memory_mhz", "power_w", "temperature_c")


@dataclass(frozen=True)
class Look:
    """The card at one moment; what NVML does not tell is ``None``.

    Attributes:
        at: When, of `time.monotonic`.
        sm_mhz: The SM clock.
        memory_mhz: The memory clock.
        power_w: The board's power.
        temperature_c: The GPU's temperature.
        reasons: Why clocks are not at their highest, in NVML's words.
    """

    at: float
    sm_mhz: int | None
    memory_mhz: int | None
    power_w: float | None
    temperature_c: int | None
    reasons: tuple[str, ...] | None

    @property
    def blind(self) -> bool:
        """Whether nothing could be read."""
        fields = (self.sm_mhz, self.memory_mhz, self.power_w, self.temperature_c)
        return self.reasons is None and all(field is None for field in fields)

    @property
    def idle(self) -> bool:
        return IDLE in (self.reasons or ())

    @property
    def held_back(self) -> list[str]:
        """The reasons that make a sample worthless."""
        return [reason for reason in self.reasons or () if reason not in HARMLESS]


class Watch:
    """Samples NVML in a thread while it is entered.

    Enter it before this process, or a child of it, uses the card: in a container NVML
    knows processes by numbers that cannot be compared with one's own, and those that
    were there before are then known to be somebody else's.

    The card is the first of ``CUDA_VISIBLE_DEVICES``, else NVML's first.
    """

    def __init__(self) -> None:
        self._nvml: Any = None
        self._device: Any = None
        self._missing = "not started"
        self._lost = ""
        self._looks: list[Look] = []
        self._asked: list[tuple[float, float]] = []
        self._last_mhz: int | None = None
        self._highest_mhz: int | None = None  # of the lower of two in a row
        self._before: dict[str, Any] = {}
        self._after: dict[str, Any] = {}
        self._foreign: set[int] = set()
        self._ours: set[int] = set()
        self._processes_at = 0.0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        try:
            import pynvml
        except ImportError:
            self._missing = "no NVML: nvidia-ml-py is not installed"
            return self
        try:
            pynvml.nvmlInit()
        except Exception as error:
            self._missing = f"no NVML: {_line(error)}"
            return self
        self._nvml = pynvml
        try:
            self._device = machine.visible_device(pynvml)
        except Exception as error:
            self._missing = f"no GPU that NVML can read: {_line(error)}"
            self._shut_down()
            return self
        self._missing = ""
        self._before = self._state()
        self._foreign |= set(self._compute_pids() or ()) - self._own()
        self._look()
        self._thread = threading.Thread(
            target=self._run, name="vllm-ext-watch", daemon=True
        )
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        self._look(processes=True)
        self._after = self._state()
        self._shut_down()

    def throttled(self, start: float, end: float) -> bool:
        """Whether a sample taken from ``start`` to ``end`` must be dropped.

        Args:
            start: When it began, of `time.monotonic`.
            end: When it ended.
        """
        if self._missing:
            return False
        if self._thread is not None and self._looks[-1].at < end:
            self._look()
        with self._lock:
            self._asked.append((start, end))
        return self._held_back(start, end, self._steady_mhz())

    def summary(self) -> dict[str, Any]:
        """What a result file keeps of it.

        Keys: ``valid``, ``reason`` (empty when there is nothing to say), ``gpu`` (its
        name, or ``None`` without one), ``before`` and ``after`` (the card's state),
        ``during`` (lowest and highest of each figure, and in how many looks each
        throttle reason was set), ``looks``, ``samples`` that `throttled` was asked
        about and, as it stands at the end, how many of them were ``dropped``.
        """
        if self._missing:
            return {"valid": True, "gpu": None, "reason": self._missing}
        steady = self._steady_mhz()
        dropped = sum(self._held_back(*sample, steady) for sample in self._asked)
        after = self._after or self._state()
        reason = self._invalid(dropped, steady, after)
        return {
            "valid": not reason,
            "reason": reason or self._blind_spot(),
            "gpu": self._before["gpu"],
            "before": self._before,
            "during": self._during(),
            "after": after,
            "steady_sm_mhz": steady,
            "foreign_processes": sorted(self._foreign),
            "looks": len(self._looks),
            "samples": len(self._asked),
            "dropped": dropped,
        }

    def _run(self) -> None:
        while not self._stop.wait(PERIOD_S):
            due = time.monotonic() - self._processes_at >= PROCESSES_PERIOD_S
            self._look(processes=due)
            if self._lost:
                return

    def _look(self, processes: bool = False) -> None:
        nvml, device = self._nvml, self._device
        power = _try(lambda: nvml.nvmlDeviceGetPowerUsage(device))
        look = Look(
            at=time.monotonic(),
            sm_mhz=_try(lambda: nvml.nvmlDeviceGetClockInfo(device, SM)),
            memory_mhz=_try(lambda: nvml.nvmlDeviceGetClockInfo(device, MEMORY)),
            power_w=None if power is None else power / 1000,
            temperature_c=_try(lambda: nvml.nvmlDeviceGetTemperature(device, CORE)),
            reasons=self._reasons(),
        )
        with self._lock:
            if look.blind and any(not earlier.blind for earlier in self._looks):
                self._lost = f"NVML stopped answering after {len(self._looks)} looks"
                return
            self._looks.append(look)
            self._note_clock(look.sm_mhz)
        if processes:
            self._processes_at = look.at
            self._look_at_processes()

    def _note_clock(self, mhz: int | None) -> None:
        if mhz is None:
            return
        if self._last_mhz is not None:
            both = min(mhz, self._last_mhz)
            self._highest_mhz = max(both, self._highest_mhz or both)
        self._last_mhz = mhz

    def _reasons(self) -> tuple[str, ...] | None:
        nvml, device = self._nvml, self._device
        # The old name is all that drivers before 535 have; the new one is to stay.
        mask = _try(lambda: nvml.nvmlDeviceGetCurrentClocksEventReasons(device))
        if mask is None:
            mask = _try(lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(device))
        return None if mask is None else _named(nvml, mask)

    def _compute_pids(self) -> list[int] | None:
        listed = _try(
            lambda: self._nvml.nvmlDeviceGetComputeRunningProcesses(self._device)
        )
        return None if listed is None else [process.pid for process in listed]

    def _look_at_processes(self) -> None:
        unseen = []
        for pid in self._compute_pids() or ():
            if pid in self._ours or _descends_from_us(pid):
                self._ours.add(pid)
            elif Path(f"/proc/{pid}").exists():
                self._foreign.add(pid)
            elif pid not in self._foreign:
                unseen.append(pid)
        # Numbers of another namespace: as many of them may be ours as use the card.
        if len(unseen) > (len(_users_of_cuda()) if unseen else 0):
            self._foreign.update(unseen)

    def _own(self) -> set[int]:
        return {pid for pid in self._compute_pids() or () if _descends_from_us(pid)}

    def _state(self) -> dict[str, Any]:
        nvml, device = self._nvml, self._device

        def read(name: str, *arguments: Any) -> Any:
            return _try(lambda: getattr(nvml, name)(device, *arguments))

        def watts(name: str) -> float | None:
            milliwatts = read(name)
            return None if milliwatts is None else milliwatts / 1000

        uuid, mig, ecc = (
            read(f"nvmlDeviceGet{what}") for what in ("UUID", "MigMode", "EccMode")
        )
        persistence = read("nvmlDeviceGetPersistenceMode")
        reasons = self._reasons()
        pids = self._compute_pids()
        return {
            "gpu": _text(read("nvmlDeviceGetName")) or "a GPU without a name",
            "gpu_id": uuid and hashlib.sha256(_text(uuid).encode()).hexdigest()[:12],
            "driver": _text(_try(nvml.nvmlSystemGetDriverVersion)),
            "sm_mhz": read("nvmlDeviceGetClockInfo", SM),
            "sm_max_mhz": read("nvmlDeviceGetMaxClockInfo", SM),
            "memory_mhz": read("nvmlDeviceGetClockInfo", MEMORY),
            "memory_max_mhz": read("nvmlDeviceGetMaxClockInfo", MEMORY),
            "power_w": watts("nvmlDeviceGetPowerUsage"),
            "power_limit_w": watts("nvmlDeviceGetEnforcedPowerLimit"),
            "temperature_c": read("nvmlDeviceGetTemperature", CORE),
            "throttle": None if reasons is None else list(reasons),
            "compute_processes": None if pids is None else len(pids),
            "persistence": None if persistence is None else bool(persistence),
            "mig": None if mig is None else bool(mig[0]),
            "ecc": None if ecc is None else bool(ecc[0]),
            "uncorrected_ecc_errors": read(
                "nvmlDeviceGetTotalEccErrors", UNCORRECTED, VOLATILE
            ),
        }

    def _steady_mhz(self) -> int | None:
        """The highest SM clock that two looks in a row reached."""
        return self._last_mhz if self._highest_mhz is None else self._highest_mhz

    def _held_back(self, start: float, end: float, steady: int | None) -> bool:
        """Whether a look in that time, or the nearest around it, was slow."""
        with self._lock:
            first = bisect_left(self._looks, start, key=_moment)
            last = bisect_right(self._looks, end, key=_moment)
            looks = self._looks[max(first - 1, 0) : last + 1]
        return any(
            _slow(look, steady)
            for look in looks
            if start - PERIOD_S <= look.at <= end + PERIOD_S
        )

    def _invalid(self, dropped: int, steady: int | None, after: dict[str, Any]) -> str:
        """Why the run cannot be used, or nothing."""
        if self._foreign:
            pids = ", ".join(map(str, sorted(self._foreign)))
            return f"another process uses the GPU (pid {pids})"
        if self._lost:
            return self._lost
        for name in SETTINGS:
            old, new = self._before[name], after[name]
            if None not in (old, new) and old != new:
                return f"{name} of the GPU changed during the run, {old} to {new}"
        errors = self._before["uncorrected_ecc_errors"], after["uncorrected_ecc_errors"]
        if None not in errors and errors[0] != errors[1]:
            return "uncorrected ECC errors during the run"
        counted, what = len(self._asked), "samples"
        if not counted:
            busy = [look for look in self._looks if not look.idle]
            dropped = sum(_slow(look, steady) for look in busy)
            counted, what = len(busy), "looks at the GPU"
        if dropped > DROPPED_SHARE * counted:
            why = Counter(name for look in self._looks for name in look.held_back)
            named = ", ".join(name for name, _ in why.most_common()) or "low SM clock"
            return f"the GPU throttled in {dropped} of {counted} {what} ({named})"
        return ""

    def _blind_spot(self) -> str:
        unread = [
            text
            for text, seen in (
                ("SM clock", any(look.sm_mhz is not None for look in self._looks)),
                (
                    "throttle reasons",
                    any(look.reasons is not None for look in self._looks),
                ),
                ("compute processes", self._before["compute_processes"] is not None),
            )
            if not seen
        ]
        return f"NVML does not tell here: {', '.join(unread)}" if unread else ""

    def _during(self) -> dict[str, Any]:
        with self._lock:
            looks = list(self._looks)
        ranges = {
            name: [
                value for look in looks if (value := getattr(look, name)) is not None
            ]
            for name in RANGES
        }
        return {
            **{
                name: [min(values), max(values)] if values else None
                for name, values in ranges.items()
            },
            "throttle": dict(
                Counter(reason for look in looks for reason in look.reasons or ())
            ),
        }

    def _shut_down(self) -> None:
        _try(self._nvml.nvmlShutdown)


def _slow(look: Look, steady: int | None) -> bool:
    if look.held_back:
        return True
    if look.sm_mhz is None or steady is None:
        return False
    return look.sm_mhz < STEADY_SHARE * steady


def _moment(look: Look) -> float:
    return look.at


def _named(nvml: Any, mask: int) -> tuple[str, ...]:
    """The set bits of ``mask`` by NVML's names; an unknown one by its number."""
    names: dict[int, str] = {}
    for prefix in ("nvmlClocksThrottleReason", "nvmlClocksEventReason"):
        for attribute in dir(nvml):
            value = getattr(nvml, attribute)
            if attribute.startswith(prefix) and isinstance(value, int):
                names.setdefault(value, attribute.removeprefix(prefix))
    bits = (1 << place for place in range(mask.bit_length()))
    return tuple(names.get(bit, f"bit {bit:#x}") for bit in bits if mask & bit)


def _descends_from_us(pid: int) -> bool:
    """Whether ``pid``, of this namespace, is this process or was started under it."""
    while pid > 1 and pid != os.getpid():
        pid = _parent(pid)
    return pid == os.getpid()


def _parent(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    # The name, in brackets, may itself hold spaces and brackets.
    return int(text.rpartition(")")[2].split()[1])


def _users_of_cuda() -> list[int]:
    """Processes of ours that have a CUDA context."""
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    return [pid for pid in pids if _descends_from_us(pid) and _uses_cuda(pid)]


def _uses_cuda(pid: int) -> bool:
    def links() -> bool:
        files = Path(f"/proc/{pid}/fd").iterdir()
        return any(_try(file.readlink) == CUDA_FILE for file in files)

    return bool(_try(links))


def _try(probe: Callable[[], T]) -> T | None:
    try:
        return probe()
    except Exception:
        return None


def _text(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
