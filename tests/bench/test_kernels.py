"""``vllm-ext bench kernels`` without a GPU: right answers, and no timings."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _pytest.mark.expression import Expression

from vllm_ext.bench import kernels, results
from vllm_ext.microbench import reference, shapes
from vllm_ext.microbench.gpu_host.stages import KERNEL_CASES
from vllm_ext.microbench.shapes import Case, Sampling

ROOT = Path(__file__).resolve().parents[2]
UV = Path(sys.executable).with_name("uv")
COMMAND = [sys.executable, "-m", "vllm_ext", "bench", "kernels"]


def bench(*options: str, cwd: Path, **environ: str) -> tuple[int, str, str]:
    """Status, and what was said."""
    done = subprocess.run(
        [*COMMAND, *options],
        cwd=cwd,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environ},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


def parse(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    kernels.add_arguments(parser)
    return parser.parse_args(options)


# -- the cases -------------------------------------------------------------------------


def all_cases(**options: Any) -> list[Case]:
    return list(shapes.cases(tuple(shapes.MODES), ("bf16", "fp32"), **options))


def test_cases_reach_from_one_request_to_256_and_over_four_vocabularies():
    cases = all_cases(small=False)
    usual = [case for case in cases if (case.dtype, case.kind) == ("bf16", "llm")]
    assert len(usual) == len(shapes.MODES) * 5 * 4
    assert {case.batch for case in usual} == {1, 8, 32, 128, 256}
    assert {case.vocabulary for case in usual} == {32000, 128256, 151936, 262144}
    for mode in shapes.MODES:
        others = {(case.dtype, case.kind) for case in cases if case.mode == mode} - {
            ("bf16", "llm")
        }
        assert others == {("fp32", "llm"), ("bf16", "random")}


def test_full_is_every_combination():
    assert len(all_cases(small=False, full=True)) == len(shapes.MODES) * 2 * 2 * 20


def test_cases_and_their_names_are_unique():
    cases = all_cases(small=False, full=True)
    assert len(set(cases)) == len({case.id for case in cases}) == len(cases)


def test_logits_like_a_models_have_few_likely_tokens():
    case = Case("temperature", 8, 151936, "fp32", "llm")
    shares = shapes.logits(case, 0, "cpu").softmax(-1).sort(descending=True).values
    assert 0.35 < shares[:, 0].mean() < 0.6
    needed = (shares.cumsum(-1) < 0.95).sum(-1).float().median()
    assert 30 < needed < 120


def test_random_logits_have_thousands():
    case = Case("temperature", 4, 32000, "bf16", "random")
    shares = shapes.logits(case, 0, "cpu").float().softmax(-1).sort().values
    assert int((shares.flip(-1).cumsum(-1) < 0.95).sum(-1).min()) > 10_000


def test_argument_sets_differ_in_place_and_not_in_kind():
    case = Case("temperature", 2, 2500, "bf16", "llm")
    first, second = (shapes.logits(case, number, "cpu") for number in (0, 1))
    assert not torch.equal(first, second)
    assert torch.equal(first.sort().values, second.sort().values)
    assert torch.equal(first, shapes.logits(case, 0, "cpu"))


@pytest.mark.parametrize("columns", [32, 33, 2500])
def test_bits_are_columns(columns: int):
    mask = torch.rand(3, columns) < 0.3
    words = shapes.bits(mask).numpy()
    for row, column in np.ndindex(*mask.shape):
        bit = int(words[row, column // 32]) >> (column % 32) & 1
        assert bool(bit) == bool(mask[row, column])


# -- what is right ---------------------------------------------------------------------


def kept_by_hand(values: np.ndarray, sampling: Sampling) -> set[int]:
    """The tokens that one row keeps, from the definitions, one after the other."""
    order = sorted(range(len(values)), key=lambda token: (-values[token], token))
    if sampling.min_p:
        best = values[order[0]]
        order = [t for t in order if values[t] >= best + np.log(sampling.min_p)]
    if 0 < sampling.top_k < len(order):
        last = values[order[sampling.top_k - 1]]
        order = [t for t in order if values[t] >= last]
    shares = np.exp(values[order] - values[order[0]])
    shares /= shares.sum()
    before = np.cumsum(shares) - shares
    return {t for t, mass in zip(order, before, strict=True) if mass < sampling.top_p}


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7),
        Sampling(temperature=0.7, min_p=0.05),
        Sampling(temperature=1.3, top_k=7),
        Sampling(temperature=0.6, top_p=0.9),
        Sampling(temperature=0.6, top_k=20, top_p=0.95),
        Sampling(temperature=0.6, top_k=20, top_p=0.8, min_p=0.1),
    ],
)
def test_kept_tokens_are_those_of_the_definitions(sampling: Sampling):
    logits = 3 * torch.randn(6, 300, generator=torch.Generator().manual_seed(5))
    shares, allowed = reference.distribution(logits, sampling)
    assert shares.sum(-1) == pytest.approx(np.ones(6))
    for row in range(6):
        kept = kept_by_hand(
            logits[row].double().numpy() / sampling.temperature, sampling
        )
        assert set(shares[row].nonzero()[:, 0].tolist()) == kept
        assert set(allowed[row].nonzero()[:, 0].tolist()) >= kept
        assert int(allowed[row].sum()) <= len(kept) + 1


def known_logprobs():
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0], [0.0, -1.0, 5.0, 4.0]])
    tokens = torch.tensor([2, 0])
    ids = torch.tensor([[2, 1, 3], [0, 2, 3]])
    values = logits.log_softmax(dim=-1).gather(1, ids)
    return logits, tokens, values, ids, torch.tensor([3, 3])


def test_ids_and_ranks_that_are_right_are_right():
    reference.check_ids_and_ranks(*known_logprobs())


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda ids, ranks: ids[0].copy_(torch.tensor([1, 1, 3])), "not the drawn"),
        (lambda ids, ranks: ids[1].copy_(torch.tensor([0, 2, 1])), "its logprob"),
        (lambda ids, ranks: ids[0].copy_(torch.tensor([2, 1, 1])), "named twice"),
        (lambda ids, ranks: ranks.sub_(1), "rank"),
    ],
)
def test_a_wrong_id_or_rank_is_seen(spoil: Any, why: str):
    logits, tokens, values, ids, ranks = known_logprobs()
    spoil(ids, ranks)
    with pytest.raises(AssertionError, match=why):
        reference.check_ids_and_ranks(logits, tokens, values, ids, ranks)


def test_penalties_are_those_of_the_definitions():
    sampling = Sampling(repetition=1.5, presence=0.5, frequency=0.25)
    logits = torch.tensor([[2.0, -2.0, 2.0, -2.0, 1.0]])
    prompt = torch.tensor([[True, True, False, False, False]])
    counts = torch.tensor([[0, 0, 1, 2, 0]])
    found = reference.penalized(logits, prompt, counts, sampling)
    expected = [2 / 1.5, -3.0, 2 / 1.5 - 0.75, -3.0 - 1.0, 1.0]
    assert found[0].tolist() == pytest.approx(expected)


NO_VLLM = "raise ImportError"  # of a file vllm.py, found before the real one

WRONG = """
import torch
from vllm_ext.microbench import bench_sample, shapes
from vllm_ext.microbench.measure import Provider

MODES, DTYPES = ("temperature", "top-k+top-p", "logprobs", "greedy"), ("bf16",)

def right(case):
    return bench_sample._program(case.sampling)

def answers(change):
    def make(case, device):
        program = right(case)
        def call(logits, positions):
            found = program(logits, None)
            tokens, logprobs = found if isinstance(found, tuple) else (found, None)
            tokens, logprobs = change(case, logits, tokens, logprobs)
            return tokens if logprobs is None else (tokens, logprobs)
        return Provider(call)
    return make

def in_place(case, logits, tokens, logprobs):
    logits.mul_(1.01)
    return tokens, logprobs

PROVIDERS = {
    "right": answers(lambda case, logits, tokens, lp: (tokens, lp)),
    "always-best": answers(lambda case, logits, tokens, lp: (logits.argmax(-1), lp)),
    "another": answers(lambda case, logits, tokens, lp: (tokens * 0 + 2500, lp)),
    "worst": answers(lambda case, logits, tokens, lp: (logits.argmin(-1), lp)),
    "a-row-less": answers(lambda case, logits, tokens, lp: (tokens[1:], lp)),
    "logprobs-off": answers(lambda case, logits, tokens, lp:
        (tokens, None if lp is None else lp + 0.001)),
    "in-place": answers(in_place),
}
TWINS = {"not-the-twin": lambda case, device: Provider(
    lambda logits, positions: logits.argmax(-1),
    twin=lambda logits, positions: logits.argmax(-1) + 1)}
PROVIDERS |= TWINS

def bench_wrong(measure, case, provider):
    measure(provider, PROVIDERS, case, make_args=lambda number: (
            shapes.logits(case, number, "cpu"), shapes.positions(case, number, "cpu")),
        check=lambda prepared: bench_sample.check(case, prepared, "cpu"),
        set_bytes=1, moved_bytes=1)
"""


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], str]:
    """Of each mode and planted sampler, why it is wrong, or nothing."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "bench_wrong.py").write_text(WRONG)
    (folder / "vllm.py").write_text(NO_VLLM)
    (folder / "pytest.ini").write_text(kernels.SETTINGS)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-c",
        "pytest.ini",
        ".",
        "-k",
        "b8-v2500-bf16-random",
    ]
    command += ["-p", "vllm_ext.microbench.conftest", "--vext-report", "report.json"]
    done = subprocess.run(
        [*command, "--benchmark-disable"],
        cwd=folder,
        env={
            **os.environ,
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": str(folder),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    found = json.loads((folder / "report.json").read_text())["vllm_ext"]
    verdicts = {
        (each["case"].split()[1], each["provider"]): "" for each in found["parity"]
    }
    return verdicts | {
        (each["case"].split()[1], each["provider"]): each["why"]
        for each in found["wrong"]
    }


@pytest.mark.parametrize("mode", ["temperature", "top-k+top-p", "logprobs", "greedy"])
def test_a_right_sampler_is_right(judged: dict[tuple[str, str], str], mode: str):
    assert judged[mode, "right"] == ""


@pytest.mark.parametrize(
    ("mode", "provider", "why"),
    [
        ("temperature", "always-best", "gave the likeliest token"),
        ("logprobs", "always-best", "a logprob is off"),
        ("greedy", "another", "token 2500 does not exist"),
        ("greedy", "worst", "which is not kept"),
        ("top-k+top-p", "worst", "which is not kept"),
        ("greedy", "a-row-less", "(7,) tokens for 8 rows"),
        ("logprobs", "logprobs-off", "a logprob is off"),
        ("greedy", "in-place", "it changes the logits"),
        ("greedy", "not-the-twin", "row 0 is not stock's"),
    ],
)
def test_a_wrong_sampler_is_seen(
    judged: dict[tuple[str, str], str], mode: str, provider: str, why: str
):
    assert why in judged[mode, provider]


# -- the command -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("kernels")
    few = "greedy or (temperature and (stock or ours))"
    select = f"sample and b8-v2500-bf16-random and ({few})"
    status, said, _ = bench("-k", select, "--json", "out.json", cwd=folder)
    return status, said, results.read(folder / "out.json")


def test_without_a_gpu_answers_are_checked_and_nothing_is_timed(
    run: tuple[int, str, dict[str, Any]],
):
    status, said, result = run
    assert status == 0, said
    checks = len(result["vllm_ext"]["parity"])
    assert checks == 7
    assert said.splitlines()[-1] == f"0 timings, {checks} parity checks; no GPU"
    assert result["benchmarks"] == []
    assert result["vllm_ext"]["label"] == "interpreted kernels"
    assert result["vllm_ext"]["kind"] == "kernels"
    assert "-k" in result["vllm_ext"]["command"]


def test_what_a_call_would_launch_is_counted(run: tuple[int, str, dict[str, Any]]):
    """Stock's numbers are those of reading it: a kernel, argmax and gather, ..."""
    counted = {
        (each["case"].split()[1], each["provider"]): each["submissions"]
        for each in run[2]["vllm_ext"]["parity"]
    }
    assert counted["greedy", "stock"] == 3
    assert counted["temperature", "stock"] == 5
    assert counted["greedy", "ours"] == counted["temperature", "ours"] == 1
    assert "sample greedy                 3" in run[1]


def test_who_was_not_run_is_said_with_the_reason(
    run: tuple[int, str, dict[str, Any]],
):
    _, said, result = run
    assert "not run: sonic-sampler, 1 case: sonic-sampler is not installed" in said
    assert "not run: stock-triton, 2 cases: stock's default path is the same" in said
    assert len(result["vllm_ext"]["not_run"]) == 3


def test_what_no_time_is_left_for_is_not_begun_and_said(tmp_path: Path):
    options = ("-k", "sample and b8-v2500-bf16-random and greedy", "--seconds", "0")
    status, said, _ = bench(*options, "--json", "out.json", cwd=tmp_path)
    assert status == 0, said
    ours = results.read(tmp_path / "out.json")["vllm_ext"]
    assert ours["parity"] == []
    assert {each["why"] for each in ours["not_run"]} == {"no time was left for it"}
    assert {each["provider"] for each in ours["not_run"]} >= {"stock", "ours"}
    assert "not run: ours, 1 case: no time was left for it" in said


@pytest.mark.parametrize("mode", shapes.MODES)
def test_what_a_gpu_host_is_asked_for_is_a_small_part_of_each(mode: str):
    asked = Expression.compile(KERNEL_CASES)
    cases = [*shapes.cases((mode,), ("bf16", "fp32"), small=False)]

    def is_chosen(case: Case) -> bool:
        return asked.evaluate(lambda word, **_: word in case.id)

    chosen = [case for case in cases if is_chosen(case)]
    assert {case.batch for case in chosen} == {1, 32}
    assert {case.dtype for case in chosen} == {case.dtype for case in cases}
    assert len(chosen) < len(cases) / 4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("-k", "b3-v7"), "vllm-ext: no benchmark is selected by -k 'b3-v7'"),
        (("-k", "a b ("), "vllm-ext: pytest ended with 4: ERROR: Wrong expression"),
        (("--save",), "vllm-ext: --save keeps timings, and without a GPU there are"),
        (("--json", "no/where.json"), "vllm-ext: no/where.json cannot be written"),
    ],
)
def test_bad_input_gets_one_line(
    options: tuple[str, ...],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert kernels.run(parse(*options)) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(said)
    assert len(err.splitlines()) == 1


def test_without_pytest_benchmark_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    find = kernels.importlib.util.find_spec
    monkeypatch.setattr(
        kernels.importlib.util,
        "find_spec",
        lambda name: None if name == "pytest_benchmark" else find(name),
    )
    assert kernels.run(parse()) == 1
    assert capsys.readouterr().err == (
        "vllm-ext: pytest_benchmark is missing: pip install 'vllm-ext[bench]'\n"
    )


@pytest.mark.parametrize("seconds", [0.3, 60])
def test_an_interruption_waits_for_what_pytest_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
):
    """As long as its patience lasts; the interruption comes at the first line."""

    class Interrupted:
        def write(self, line: str) -> None:
            raise KeyboardInterrupt

    script = (
        "import sys, time; print('[1] a case', file=sys.stderr, flush=True);"
        f"time.sleep({seconds}); open('written', 'w').close(); sys.exit(2)"
    )
    monkeypatch.setattr(kernels, "PATIENCE", 10 if seconds < 1 else 0.3)
    monkeypatch.setattr(sys, "stderr", Interrupted())
    command = [sys.executable, "-c", script]
    with (tmp_path / "log").open("w") as log:
        if seconds > 1:
            with pytest.raises(KeyboardInterrupt):
                kernels._passed_on(command, tmp_path, os.environ, log)
        else:
            found = kernels._passed_on(command, tmp_path, os.environ, log)
            assert found == (kernels.INTERRUPTED, [])
    assert (tmp_path / "written").exists() == (seconds < 1)


def test_it_needs_no_checkout_and_no_vllm(tmp_path: Path):
    """Installed in a folder of its own; a checkout's commit would be in the result."""
    source, site = tmp_path / "source", tmp_path / "site"
    for name in ("vllm_ext", "kernels", "patches", "microbench"):
        ignored = shutil.ignore_patterns("__pycache__", "results", "gpu_host")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    subprocess.run(
        [UV, "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--offline"]
        + ["--target", site, source],
        check=True,
    )
    (site / "vllm.py").write_text(NO_VLLM)
    select = "penalties and b8-v2500-fp32-llm and (where or boolean or stock)"
    status, said, err = bench(
        *("-k", select, "--json", "out.json"), cwd=tmp_path, PYTHONPATH=str(site)
    )
    assert status == 0, said + err
    assert "0 timings, 2 parity checks; no GPU" in said
    assert "not run: stock, 2 cases: vLLM is not installed" in said
    assert results.read(tmp_path / "out.json")["commit_info"]["id"] == "unknown"


@pytest.mark.gpu
def test_on_a_gpu_it_times(tmp_path: Path):
    done = subprocess.run(
        [*COMMAND, "-k", "sample and greedy-b1-v32000-bf16-llm", "--json", "out.json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    result = results.read(tmp_path / "out.json")
    assert not result["vllm_ext"]["wrong"], done.stdout
    timed = {each["params"]["provider"]: each for each in result["benchmarks"]}
    assert {"ours", "torch.compile"} <= set(timed)
    ours = timed["ours"]
    assert ours["extra_info"]["launches"] == 1
    assert 1e-7 < ours["stats"]["median"] < 1e-3
    assert 0 < ours["extra_info"]["cold_share_of_copy"] < 1.2
    assert result["vllm_ext"]["watch"]["gpu"]


@pytest.mark.gpu
def test_the_device_clock_leaves_the_host_out():
    from vllm_ext.microbench.cuda import Cuda

    device = Cuda()
    tensor = torch.zeros(1 << 20, device="cuda")

    def ten() -> None:
        for _ in range(10):
            tensor.add_(1)

    ten()
    graph = device.capture(ten)
    assert graph.launches == 10
    eager = min(device.seconds(ten, 1e-3) for _ in range(20))
    replayed = min(device.seconds(graph.replay, 1e-3) for _ in range(20))
    assert replayed <= 1.5 * eager
    assert device.launches(ten) in (10, None)
    assert device.copy_bytes_per_second() > 1e10
