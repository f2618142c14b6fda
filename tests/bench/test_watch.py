"""The machine gate, on an NVML that plays a script."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from vllm_ext.bench import watch as module
from vllm_ext.bench.watch import Watch, _named

IDLE = pynvml.nvmlClocksEventReasonGpuIdle
SET_BY_HAND = pynvml.nvmlClocksEventReasonApplicationsClocksSetting
HOT = pynvml.nvmlClocksEventReasonSwThermalSlowdown
POWER = pynvml.nvmlClocksEventReasonSwPowerCap


class Nvml:
    """Answers as the attributes say; ``lacks`` and ``gone`` raise as NVML does."""

    def __init__(self) -> None:
        self.sm, self.memory, self.watts, self.celsius = 1755, 2619, 300.5, 41
        self.limit, self.reasons, self.pids = 700.0, 0, [os.getpid()]
        self.ecc_errors, self.mig = 0, 0
        self.lacks: set[str] = set()
        self.gone = False
        self.opened: list[Any] = []
        self.shut = 0
        self.calls: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        real = getattr(pynvml, name)
        if not name.startswith("nvml") or not callable(real):
            return real

        def call(*arguments: Any) -> Any:
            self.calls.add(name)
            if self.gone:
                raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
            if name in self.lacks:
                raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
            return self._answer(name, arguments)

        return call

    def __dir__(self) -> list[str]:
        return dir(pynvml)

    def _answer(self, name: str, arguments: tuple[Any, ...]) -> Any:
        if name in ("nvmlDeviceGetHandleByIndex", "nvmlDeviceGetHandleByUUID"):
            self.opened.append(arguments[0])
        if name == "nvmlShutdown":
            self.shut += 1
        clocks = {pynvml.NVML_CLOCK_SM: self.sm, pynvml.NVML_CLOCK_MEM: self.memory}
        return {
            "nvmlDeviceGetClockInfo": lambda: clocks[arguments[1]],
            "nvmlDeviceGetMaxClockInfo": lambda: clocks[arguments[1]] + 225,
            "nvmlDeviceGetPowerUsage": lambda: int(self.watts * 1000),
            "nvmlDeviceGetEnforcedPowerLimit": lambda: int(self.limit * 1000),
            "nvmlDeviceGetTemperature": lambda: self.celsius,
            "nvmlDeviceGetCurrentClocksEventReasons": lambda: self.reasons,
            "nvmlDeviceGetCurrentClocksThrottleReasons": lambda: self.reasons,
            "nvmlDeviceGetComputeRunningProcesses": lambda: [
                SimpleNamespace(pid=pid) for pid in self.pids
            ],
            "nvmlDeviceGetName": lambda: b"NVIDIA H200",
            "nvmlDeviceGetUUID": lambda: "GPU-1234",
            "nvmlSystemGetDriverVersion": lambda: "580.82.07",
            "nvmlDeviceGetMigMode": lambda: [self.mig, self.mig],
            "nvmlDeviceGetEccMode": lambda: [1, 1],
            "nvmlDeviceGetPersistenceMode": lambda: 1,
            "nvmlDeviceGetTotalEccErrors": lambda: self.ecc_errors,
        }.get(name, lambda: None)()


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Nvml:
    fake = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return fake


@pytest.fixture
def sample(nvml: Nvml, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Takes one sample, far from the last one, and asks whether to drop it.

    On a clock of its own, with no looks at the card but those that it causes.
    """
    now = [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(module, "PERIOD_S", 60.0)

    def take(watch: Watch) -> bool:
        start = now[0] + 1000
        now[0] = start + 10
        return watch.throttled(start, now[0])

    return take


@pytest.fixture
def stranger() -> Iterator[int]:
    """A process that does not descend from this one any more."""
    started = subprocess.run(
        ["sh", "-c", "sleep 60 >/dev/null 2>&1 & echo $!"],
        capture_output=True,
        text=True,
        check=True,
    )
    pid = int(started.stdout)
    yield pid
    os.kill(pid, 9)


def test_a_quiet_card_is_fit_to_measure_on(nvml: Nvml, sample: Any):
    with Watch() as watch:
        assert not any(sample(watch) for _ in range(10))
    found = watch.summary()
    assert (found["valid"], found["reason"]) == (True, "")
    assert found["gpu"] == "NVIDIA H200"
    assert (found["samples"], found["dropped"], found["looks"]) == (10, 0, 12)
    assert found["before"] == found["after"]
    assert found["before"] == {
        "gpu": "NVIDIA H200",
        "gpu_id": found["before"]["gpu_id"],
        "driver": "580.82.07",
        "sm_mhz": 1755,
        "sm_max_mhz": 1980,
        "memory_mhz": 2619,
        "memory_max_mhz": 2844,
        "power_w": 300.5,
        "power_limit_w": 700.0,
        "temperature_c": 41,
        "throttle": [],
        "compute_processes": 1,
        "persistence": True,
        "mig": False,
        "ecc": True,
        "uncorrected_ecc_errors": 0,
    }
    assert "1234" not in found["before"]["gpu_id"]
    assert nvml.shut == 1


def test_what_is_seen_between_is_given_as_ranges(nvml: Nvml, sample: Any):
    with Watch() as watch:
        nvml.watts, nvml.celsius, nvml.sm = 512.0, 70, 1700
        sample(watch)
        nvml.reasons = POWER | SET_BY_HAND
        sample(watch)
        nvml.reasons = 0
    during = watch.summary()["during"]
    assert during["power_w"] == [300.5, 512.0]
    assert during["temperature_c"] == [41, 70]
    assert during["sm_mhz"] == [1700, 1755]
    assert during["throttle"] == {"SwPowerCap": 1, "ApplicationsClocksSetting": 1}


@pytest.mark.parametrize("reasons", [HOT, POWER, HOT | IDLE, 1 << 20])
def test_a_sample_taken_while_throttled_is_dropped(
    nvml: Nvml, sample: Any, reasons: int
):
    with Watch() as watch:
        assert not sample(watch)
        nvml.reasons = reasons
        assert sample(watch)
        nvml.reasons = 0
        assert not sample(watch)
    assert (watch.summary()["samples"], watch.summary()["dropped"]) == (3, 1)


@pytest.mark.parametrize("reasons", [0, IDLE, SET_BY_HAND, IDLE | SET_BY_HAND])
def test_idleness_and_clocks_set_by_hand_are_no_throttling(
    nvml: Nvml, sample: Any, reasons: int
):
    nvml.reasons = reasons
    with Watch() as watch:
        assert not sample(watch)
    assert watch.summary()["valid"]


def test_a_look_beside_a_short_sample_counts(nvml: Nvml, sample: Any):
    with Watch() as watch:
        nvml.reasons = HOT
        assert sample(watch)
        hot = module.time.monotonic()
        nvml.reasons = 0
        sample(watch)
        assert watch.throttled(hot + 1, hot + 2)
        assert watch.throttled(hot - 2, hot - 1)
        assert not watch.throttled(hot + 61, hot + 62)
        assert watch.throttled(hot - 500, hot + 500)


def test_old_drivers_name_the_reasons_otherwise(nvml: Nvml, sample: Any):
    nvml.lacks = {"nvmlDeviceGetCurrentClocksEventReasons"}
    nvml.reasons = HOT
    with Watch() as watch:
        assert sample(watch)
    assert watch.summary()["before"]["throttle"] == ["SwThermalSlowdown"]


def test_a_reason_that_has_only_an_old_name_has_that():
    bit = pynvml.nvmlClocksThrottleReasonReliability
    assert _named(pynvml, bit | IDLE) == ("GpuIdle", "Reliability")
    assert _named(pynvml, 1 << 20) == ("bit 0x100000",)
    assert _named(pynvml, 0) == ()


@pytest.mark.parametrize(("mhz", "dropped"), [(1317, False), (1316, True)])
def test_a_clock_far_below_the_steady_one_drops(
    nvml: Nvml, sample: Any, mhz: int, dropped: bool
):
    with Watch() as watch:
        sample(watch)
        nvml.sm = mhz  # 0.75 of 1755 is 1316.25
        assert sample(watch) is dropped


def test_one_spike_of_the_clock_is_not_its_steady_maximum(nvml: Nvml, sample: Any):
    with Watch() as watch:
        sample(watch)
        nvml.sm = 3000
        sample(watch)
        nvml.sm = 1755
        assert not sample(watch)
    assert watch.summary()["steady_sm_mhz"] == 1755


def test_a_slow_start_is_judged_by_what_came_later(nvml: Nvml, sample: Any):
    nvml.sm = 800
    with Watch() as watch:
        assert not sample(watch)  # nothing faster was seen
        nvml.sm = 1755
        assert not sample(watch)
        assert not sample(watch)
    assert watch.summary()["dropped"] == 1


@pytest.mark.parametrize(("dropped", "valid"), [(2, True), (3, False)])
def test_a_fifth_may_be_dropped_and_no_more(
    nvml: Nvml, sample: Any, dropped: int, valid: bool
):
    with Watch() as watch:
        for number in range(10):
            nvml.reasons = HOT if number < dropped else 0
            sample(watch)
    found = watch.summary()
    assert (found["valid"], found["dropped"]) == (valid, dropped)
    if not valid:
        assert found["reason"] == (
            "the GPU throttled in 3 of 10 samples (SwThermalSlowdown)"
        )


def test_a_throttled_run_that_nobody_asked_about_is_not_valid(nvml: Nvml):
    nvml.reasons = HOT
    with Watch() as watch:
        pass
    assert not watch.summary()["valid"]
    assert "2 of 2 looks" in watch.summary()["reason"]


def test_a_child_is_no_other_process(nvml: Nvml):
    with (
        subprocess.Popen(["sleep", "60"], start_new_session=True) as child,
        Watch() as watch,
    ):
        nvml.pids = [os.getpid(), child.pid]
        watch._look(processes=True)
        child.kill()
        child.wait()
        watch._look(processes=True)  # NVML may still name it
    assert watch.summary()["valid"], watch.summary()["reason"]


@pytest.mark.parametrize("before", [True, False])
def test_another_process_makes_a_run_invalid(
    nvml: Nvml, sample: Any, stranger: int, before: bool
):
    if before:
        nvml.pids = [stranger]
    with Watch() as watch:
        sample(watch)
        nvml.pids = [os.getpid(), stranger]
    found = watch.summary()
    assert not found["valid"]
    assert found["foreign_processes"] == [stranger]
    assert found["reason"] == f"another process uses the GPU (pid {stranger})"


UNSEEN = 4_000_000_000  # beyond what Linux gives out: of another namespace


def test_in_a_container_what_came_with_us_is_taken_for_ours(
    nvml: Nvml, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "_users_of_cuda", lambda: [os.getpid()])
    nvml.pids = []
    with Watch() as watch:
        nvml.pids = [UNSEEN]
    assert watch.summary()["valid"]


def test_in_a_container_one_more_than_ours_is_another(
    nvml: Nvml, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "_users_of_cuda", lambda: [os.getpid()])
    nvml.pids = []
    with Watch() as watch:
        nvml.pids = [UNSEEN, UNSEEN + 1]
    assert not watch.summary()["valid"]


def test_in_a_container_who_was_there_before_is_another(
    nvml: Nvml, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "_users_of_cuda", lambda: [os.getpid()])
    nvml.pids = [UNSEEN]
    with Watch() as watch:
        nvml.pids = [UNSEEN, UNSEEN + 1]
    assert watch.summary()["foreign_processes"] == [UNSEEN]


def test_who_uses_cuda_is_told_by_the_file_it_holds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
):
    held = tmp_path / "nvidia-uvm"
    held.touch()
    monkeypatch.setattr(module, "CUDA_FILE", held)
    assert module._users_of_cuda() == []
    with held.open():
        assert module._users_of_cuda() == [os.getpid()]


@pytest.mark.parametrize(
    ("attribute", "value", "reason"),
    [
        ("limit", 500.0, "power_limit_w of the GPU changed during the run, 700.0 to"),
        ("mig", 1, "mig of the GPU changed during the run, False to True"),
        ("ecc_errors", 2, "uncorrected ECC errors during the run"),
    ],
)
def test_a_card_that_changed_meanwhile_was_not_one_machine(
    nvml: Nvml, attribute: str, value: Any, reason: str
):
    with Watch() as watch:
        setattr(nvml, attribute, value)
    found = watch.summary()
    assert not found["valid"]
    assert found["reason"].startswith(reason)


def test_a_figure_that_cannot_be_read_any_more_did_not_change(nvml: Nvml):
    with Watch() as watch:
        nvml.lacks = {"nvmlDeviceGetEnforcedPowerLimit", "nvmlDeviceGetTotalEccErrors"}
    assert watch.summary()["valid"], watch.summary()["reason"]


def test_what_nvml_does_not_support_is_none(nvml: Nvml, sample: Any):
    nvml.lacks = {
        name
        for name in dir(pynvml)
        if name.startswith(("nvmlDeviceGet", "nvmlSystem"))
        and not name.startswith("nvmlDeviceGetHandle")
        and name != "nvmlDeviceGetName"
    }
    with Watch() as watch:
        assert not sample(watch)
    found = watch.summary()
    state = dict(found["before"])
    assert state.pop("gpu") == "NVIDIA H200"
    assert set(state.values()) == {None}
    assert found["during"].pop("throttle") == {}
    assert set(found["during"].values()) == {None}
    assert found["valid"]
    assert found["reason"] == (
        "NVML does not tell here: SM clock, throttle reasons, compute processes"
    )


def test_an_nvml_that_fails_halfway_ends_no_run_but_its_worth(nvml: Nvml, sample: Any):
    with Watch() as watch:
        sample(watch)
        nvml.gone = True
        assert not sample(watch)
    found = watch.summary()
    assert not found["valid"]
    assert found["reason"] == "NVML stopped answering after 2 looks"
    assert found["before"]["sm_mhz"] == 1755
    assert found["after"]["sm_mhz"] is None


@pytest.mark.parametrize(
    ("failing", "reason"),
    [
        ("nvmlInit", "no NVML: Not Supported"),
        ("nvmlDeviceGetHandleByIndex", "no GPU that NVML can read: Not Supported"),
    ],
)
def test_without_a_gpu_it_says_so(nvml: Nvml, failing: str, reason: str):
    nvml.lacks = {failing}
    with Watch() as watch:
        assert not watch.throttled(0, 1)
    assert watch.summary() == {"valid": True, "gpu": None, "reason": reason}


def test_without_the_package_it_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with Watch() as watch:
        pass
    assert watch.summary()["reason"] == "no NVML: nvidia-ml-py is not installed"


@pytest.mark.parametrize(
    ("visible", "opened"),
    [("2,3", 2), ("GPU-77", "GPU-77"), ("MIG-5,GPU-77", "MIG-5")],
)
def test_the_card_is_the_first_visible_one(
    nvml: Nvml, monkeypatch: pytest.MonkeyPatch, visible: str, opened: Any
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with Watch():
        pass
    assert nvml.opened == [opened]


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_a_hidden_card_is_none(
    nvml: Nvml, monkeypatch: pytest.MonkeyPatch, hidden: str
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    with Watch() as watch:
        pass
    assert watch.summary()["gpu"] is None
    assert nvml.shut == 1


def test_it_looks_by_itself_ten_times_a_second_at_least(nvml: Nvml):
    with Watch() as watch:
        time.sleep(0.5)
        nvml.reasons = HOT
        time.sleep(0.2)
        nvml.reasons = 0
    found = watch.summary()
    assert found["looks"] >= 7
    assert found["during"]["throttle"]["SwThermalSlowdown"] >= 1


def test_nothing_is_ever_set_on_the_card(nvml: Nvml, sample: Any):
    with Watch() as watch:
        sample(watch)
    watch.summary()
    assert nvml.calls
    assert all(
        name.startswith(("nvmlDeviceGet", "nvmlSystemGet", "nvmlInit", "nvmlShutdown"))
        for name in nvml.calls
    )


@pytest.mark.gpu
def test_a_real_card_tells_what_a_result_needs():
    with Watch() as watch:
        time.sleep(0.5)
    found = watch.summary()
    assert found["gpu"]
    assert found["looks"] >= 5
    for name in ("sm_mhz", "sm_max_mhz", "driver", "temperature_c", "throttle"):
        assert found["before"][name] is not None, name
