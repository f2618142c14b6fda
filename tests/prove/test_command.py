"""``vllm-ext prove``: a line for each, the rest reported when one cannot be used."""

import json
import sys
from types import ModuleType

import pytest

from vllm_ext import doctor
from vllm_ext.children import ChildError
from vllm_ext.cli import main
from vllm_ext.hostbench import CannotRunError
from vllm_ext.jsonfile import CannotWriteError
from vllm_ext.patching.fingerprint import SourceError
from vllm_ext.prove import command
from vllm_ext.prove.verdict import Verdict, reason

GOOD = Verdict("races", "some_patch", "proven on CPU", "12 launches in 3 orders")
UNKNOWN = Verdict("races", "other_patch", "not proven", "these steps do not call it")
BAD = Verdict("races", "_k_kernel", "not proven", "store past x at k.py:3", fault=True)
ON_GPU = Verdict("syncs", "some_patch", "proven on GPU", "0 waits", "results/a.json")


def failing(error):
    def verdicts(say):
        raise error

    return verdicts


@pytest.fixture
def instruments(monkeypatch):
    """Instruments that answer at once; by name."""

    def install(**answers):
        monkeypatch.setattr(command, "INSTRUMENTS", dict.fromkeys(answers, "a text"))
        for name, answer in answers.items():
            module = ModuleType(name)
            if isinstance(answer, Exception):
                module.verdicts = failing(answer)
            else:
                module.verdicts = lambda say, answer=answer, **_: answer
            monkeypatch.setitem(sys.modules, f"vllm_ext.prove.{name}", module)

    return install


def prove(capsys, *arguments):
    status = main(["prove", *arguments])
    out, err = capsys.readouterr()
    return status, out, err


def test_all_has_a_line_for_each(instruments, capsys):
    instruments(syncs=[ON_GPU], races=[GOOD, UNKNOWN])
    status, out, _ = prove(capsys, "all")
    assert status == 0  # what is not known is no fault
    first, second, third, total = out.splitlines()
    assert first.split() == (
        ["syncs", "some_patch", "proven", "on", "GPU", "0", "waits;", "results/a.json"]
    )
    assert second.split()[:5] == ["races", "some_patch", "proven", "on", "CPU"]
    assert "these steps do not call it" in third
    assert total == "1 proven on GPU, 1 proven on CPU, 1 not proven"


def test_a_fault_needs_attention(instruments, capsys):
    instruments(races=[GOOD, BAD])
    status, out, _ = prove(capsys, "races")
    assert status == 1
    assert "_k_kernel   FAULT" in out
    assert out.splitlines()[-1].endswith("1 not proven; 1 faults")


def test_json_is_the_same_as_data(instruments, capsys):
    instruments(syncs=[ON_GPU], races=[BAD])
    status, out, _ = prove(capsys, "all", "--json")
    assert status == 1
    assert [each["subject"] for each in json.loads(out)] == ["some_patch", "_k_kernel"]
    assert json.loads(out)[0]["evidence"] == "results/a.json"


ENDED = ChildError(
    "stock engine ended with status 1; its last lines:\n"
    "  | Traceback (most recent call last):\n  | RuntimeError: no such op\n  | "
)
ERRORS = {
    "needs the CPU lane": CannotRunError("needs the CPU lane"),
    "stock engine ended with status 1; its last lines: RuntimeError: no such op": ENDED,
    "stock engine: no | such mode": ChildError("stock engine: no | such mode"),
    "needs torch, which comes with vLLM; in a checkout, run make setup": (
        ModuleNotFoundError("no", name="torch")
    ),
    "x.md cannot be written: it is a folder": (
        CannotWriteError("x.md cannot be written: it is a folder")
    ),
    "KeyError: 'scheduler'": KeyError("scheduler"),
    "ValueError: first": ValueError("first\nsecond"),
    "AssertionError": AssertionError(),
    "CannotRunError": CannotRunError(""),
    "ChildError": ChildError(""),
}


@pytest.mark.parametrize("said", ERRORS)
def test_an_error_is_one_line(said):
    assert reason(ERRORS[said]) == said


@pytest.mark.parametrize("said", ERRORS)
def test_one_that_cannot_be_used_is_named_and_the_rest_reported(
    instruments, capsys, said
):
    instruments(graphs=ERRORS[said], races=[GOOD])
    status, out, _ = prove(capsys, "all")
    assert status == 1
    broken, good, total = out.splitlines()
    assert broken.startswith("graphs")
    assert broken.endswith(f" {said}")
    assert "proven on CPU" in good
    assert total.startswith("0 proven on GPU, 1 proven on CPU, 1 not proven")


@pytest.fixture(
    params=[("graphs", "--write"), ("graphs", "--html"), ("kernels", "--figures")],
    ids=" ".join,
)
def errand(request, tmp_path):
    """Arguments for what an instrument does beside judging."""
    instrument, option = request.param
    file = [] if option == "--figures" else [str(tmp_path / "file")]
    return [instrument, option, *file]


@pytest.mark.parametrize("said", ERRORS)
def test_an_errand_that_fails_is_one_line(errand, instruments, capsys, said):
    instruments(**{errand[0]: []})
    module = sys.modules[f"vllm_ext.prove.{errand[0]}"]

    def fails(*arguments):
        raise ERRORS[said]

    module.write = module.html = module.report = fails
    assert prove(capsys, *errand) == (1, "", f"vllm-ext: {said}\n")


class Unknown:
    version = "0.40.1"


def test_a_vllm_that_nobody_knows_is_named(instruments, capsys, monkeypatch):
    instruments(races=[GOOD])
    monkeypatch.setattr(doctor, "open_source", lambda path: Unknown)
    status, out, _ = prove(capsys, "races")
    assert status == 1
    assert "prove knows vLLM 0.32.x and 0.33.x, here is 0.40.1" in out


def test_an_errand_is_not_run_with_a_vllm_that_nobody_knows(
    errand, capsys, monkeypatch
):
    monkeypatch.setattr(doctor, "open_source", lambda path: Unknown)
    status, out, err = prove(capsys, *errand)
    assert (status, out) == (1, "")
    assert err.startswith("vllm-ext: prove knows vLLM 0.32.x and 0.33.x, here is 0.40")


def test_without_vllm_it_says_what_to_do(errand, instruments, capsys, monkeypatch):
    def missing():
        raise SourceError("not installed")

    instruments(**{"races": [GOOD], errand[0]: []})
    monkeypatch.setattr(doctor, "package_folder", missing)
    told = "vLLM is not installed here; in a checkout, run make setup"
    status, out, _ = prove(capsys, "races")
    assert status == 1
    assert out.splitlines()[0].endswith(f" {told}")
    assert prove(capsys, *errand) == (1, "", f"vllm-ext: {told}\n")


@pytest.mark.parametrize("name", command.INSTRUMENTS)
def test_every_instrument_is_there_and_told(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["prove", name, "--help"])
    assert ended.value.code == 0
    assert command.INSTRUMENTS[name] in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("option", ["--write", "--html"])
def test_a_file_that_cannot_be_written_is_said_before_the_work(
    option, capsys, tmp_path
):
    status, out, err = prove(capsys, "graphs", option, str(tmp_path / "no" / "file"))
    assert status == 1
    assert out == ""
    assert len(err.splitlines()) == 1
    assert "cannot be written" in err
