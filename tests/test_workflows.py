"""The workflow files are YAML, and name commands, files and options that exist."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from vllm_ext import cli

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
SHELL = {"echo", "set", "cd"}
GATED = {"kernels", "engine"}


def steps(path: Path) -> Iterator[dict[str, Any]]:
    for job in yaml.safe_load(path.read_text())["jobs"].values():
        yield from job["steps"]


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command of a script of one command a line."""
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


def check(words: list[str]) -> None:
    """Raise AssertionError if a command is not there or takes no such options."""
    command, *rest = words
    if command == "make":
        assert set(rest[:1]) <= TARGETS, f"make {rest[0]}: no such target"
    elif command == "vllm-ext":
        try:
            cli._parser(rest[:1]).parse_args(rest)
        except SystemExit:
            raise AssertionError(f"{shlex.join(words)}: no such command") from None
    elif command == "bash":
        assert (ROOT / rest[0]).is_file(), f"no file {rest[0]}"
        for inner in commands((ROOT / rest[0]).read_text()):
            check(inner)
    elif Path(command).name == "python":
        assert rest[:2] in (["-m", "venv"], ["-m", "pip"]), shlex.join(words)
    else:
        assert command in SHELL, f"{shlex.join(words)}: what is that?"


def test_there_are_two():
    assert [path.name for path in WORKFLOWS] == ["ci.yml", "gpu.yml"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_commands_exist(path: Path):
    scripts = [step["run"] for step in steps(path) if "run" in step]
    assert scripts
    for script in scripts:
        for words in commands(script):
            check(words)


@pytest.mark.parametrize(
    "line",
    [
        "make no-such-target",
        "vllm-ext bench kernels --no-such-option",
        "vllm-ext bench nothing",
        "bash no/such/file",
        "cargo bench",
    ],
)
def test_a_command_that_does_not_exist_would_be_seen(
    line: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(AssertionError):
        check(shlex.split(line))


def test_the_gpu_runner_runs_nothing_that_nobody_asked_for():
    text = (ROOT / ".github" / "workflows" / "gpu.yml").read_text()
    workflow = yaml.safe_load(text)
    triggers = workflow[True]  # YAML 1.1 takes "on" for a boolean
    assert set(triggers) == {"workflow_dispatch", "pull_request"}
    assert triggers["pull_request"] == {"types": ["labeled"]}
    measure = workflow["jobs"]["measure"]
    assert "self-hosted" in measure["runs-on"]
    assert "github.event.label.name == 'gpu'" in measure["if"]
    assert workflow["permissions"] == {"contents": "read"}


def test_what_is_gated_kept_and_followed_was_written():
    path = ROOT / ".github" / "workflows" / "gpu.yml"
    scripts = [" ".join(step.get("run", "").split()) for step in steps(path)]
    for kind in GATED:
        file = f"{kind}.json"
        assert any(
            f"bench {kind}" in line and f"--json {file}" in line for line in scripts
        )
        assert f"vllm-ext bench gate {file} --baseline microbench/baselines/{file}" in (
            scripts
        )
    [follow] = [
        step for step in steps(path) if "benchmark-action" in step.get("uses", "")
    ]
    assert follow["with"]["tool"] == "pytest"
    assert follow["with"]["fail-on-alert"] is False
    jobs = yaml.safe_load(path.read_text())["jobs"]
    assert set(jobs["follow"]["strategy"]["matrix"]["kind"]) == GATED
