"""Real vLLM engines for tests: a script in its own process, and a tiny engine in it.

vLLM and Triton's kernels read the environment when they are imported, and an engine
leaves much behind, so each gets a process; a fork, see `forking`. A test gives
`run_script` a script, which hands its findings back with `report`:

    SCRIPT = '''
    from vllm import SamplingParams
    from vllm_ext_cpulane.engine import PROMPT, report, tiny_engine

    llm = tiny_engine()
    [answer] = llm.generate([PROMPT], SamplingParams(max_tokens=4, temperature=0))
    report(list(answer.outputs[0].token_ids))
    '''
    tokens = run_script(SCRIPT, lane_environment("interpret"))

Boot an engine once for several tests: call `run_script` in a module-scoped fixture.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from textwrap import dedent
from typing import TYPE_CHECKING, Any

from vllm_ext_cpulane.forking import Fork
from vllm_ext_cpulane.tinymodel import write_model

if TYPE_CHECKING:
    from vllm import LLM

REPORT_FILE = "VEXT_CPULANE_REPORT"
PROMPT = {"prompt_token_ids": [1, 50, 90, 60]}  # text, so that answers are text too


class ScriptFailedError(Exception):
    """A script ended badly or reported nothing; holds what it wrote."""


def run_script(
    script: str | Path,
    environment: Mapping[str, str],
    *arguments: str,
    timeout: float = 300,
) -> Any:
    """Run a Python script in a new process and return what it reported.

    What it leaves in the temporary folder is gone when this returns.

    Args:
        script: Source text, or the path of a file. A file whose engine starts
            processes of its own needs an ``if __name__ == "__main__"``.
        environment: Added to this process's; see ``lane_environment``.
        arguments: ``sys.argv[1:]`` of the script.
        timeout: Seconds before it is killed, with every process it started.

    Raises:
        ScriptFailedError: It exited with an error, or never called ``report``.
        subprocess.TimeoutExpired: It took longer than ``timeout``.
    """
    source = [str(script)] if isinstance(script, Path) else ["-c", dedent(script)]
    with tempfile.TemporaryDirectory(prefix="vext-") as folder:
        answer = Path(folder) / "report.json"
        added = {REPORT_FILE: str(answer), "TMPDIR": folder}
        process = _start(
            [*source, *arguments], os.environ | dict(environment) | added, environment
        )
        try:
            output, _ = process.communicate(timeout=timeout)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)  # an engine has children
            process.wait()
            raise
        if process.returncode or not answer.exists():
            raise ScriptFailedError(
                f"exit status {process.returncode}, "
                f"{'a' if answer.exists() else 'no'} report\n{output}"
            )
        return json.loads(answer.read_text())


def _start(
    arguments: list[str], whole: Mapping[str, str], environment: Mapping[str, str]
) -> "Fork | subprocess.Popen[str]":
    """A Python process; one of the lane begins with what vLLM imports.

    Not where CUDA is: a fork of a process that has begun to use it cannot.
    """
    if environment.get("VEXT_CPULANE") and "VLLM_USE_V2_MODEL_RUNNER" in environment:
        return Fork(arguments, whole, environment)
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=whole,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def report(findings: Any) -> None:
    """In a script: hand ``findings``, anything JSON can hold, to `run_script`."""
    Path(os.environ[REPORT_FILE]).write_text(json.dumps(findings))


def tiny_engine(**options: Any) -> "LLM":
    """In a script: an ``LLM`` on a tiny model with a tokenizer and random weights.

    Args:
        options: For ``LLM``, over the defaults below.
    """
    from vllm import LLM

    # Counts in GiB, takes seconds to fill and goes before the option below.
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    folder = tempfile.mkdtemp(prefix="vllm-ext-tiny-model-")
    defaults: dict[str, Any] = {
        "model": str(write_model(folder, tokenizer=True, weights=True)),
        "max_model_len": 256,
        "max_num_seqs": 8,
        "max_logprobs": -1,
        "enforce_eager": True,
        "kv_cache_memory_bytes": 16 * 2**20,
    }
    return LLM(**(defaults | options))
