"""``vllm-ext prove``: a line for each, the rest reported when one cannot be used."""

import json
import sys
from types import ModuleType

import pytest

from vllm_ext import doctor
from vllm_ext.children import ChildError
from vllm_ext.cli import main
from vllm_ext.hostbench import CannotRunError
from vllm_ext.prove import command
from vllm_ext.prove.verdict import Verdict

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


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (CannotRunError("needs the CPU lane: run make setup"), "run make setup"),
        (ChildError("stock engine ended with status 1; ...\n  | a\n"), "status 1"),
        (ModuleNotFoundError("no", name="torch"), "needs torch"),
        (KeyError("scheduler"), "KeyError: 'scheduler'"),
    ],
)
def test_one_that_cannot_be_used_is_named_and_the_rest_reported(
    instruments, capsys, error, said
):
    instruments(graphs=error, races=[GOOD])
    status, out, _ = prove(capsys, "all")
    assert status == 1
    broken, good, total = out.splitlines()
    assert broken.startswith("graphs")
    assert said in broken
    assert "proven on CPU" in good
    assert total.startswith("0 proven on GPU, 1 proven on CPU, 1 not proven")


def test_a_vllm_that_nobody_knows_is_named(instruments, capsys, monkeypatch):
    instruments(races=[GOOD])

    class Unknown:
        version = "0.40.1"

    monkeypatch.setattr(doctor, "open_source", lambda path: Unknown)
    status, out, _ = prove(capsys, "races")
    assert status == 1
    assert "prove knows vLLM 0.32.x and 0.33.x, here is 0.40.1" in out


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
