"""``register()`` as vLLM calls it: cheap, silent, repeatable, and never in the way."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from vllm_ext.patching.report import read_states
from vllm_ext_cpulane.environment import lane_environment

ROOT = Path(__file__).resolve().parents[1]


def python(code: str, *arguments: str, **environ: str) -> subprocess.CompletedProcess:
    """Run ``code`` in a fresh interpreter."""
    return subprocess.run(
        [sys.executable, "-P", *arguments, "-c", textwrap.dedent(code)],
        env={**os.environ, "VEXT": "1", **environ},
        capture_output=True,
        text=True,
        timeout=120,
    )


def answer(code: str, *arguments: str, **environ: str):
    done = python(code, *arguments, **environ)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_under_5_ms_with_no_import_of_vllm_or_torch():
    """In a process that has loaded what vLLM has loaded when it calls plugins.

    Processor time, the best of five: the machine may be busy with other things.
    """
    code = """
        import json, sys, time
        import vllm.engine.arg_utils
        before = set(sys.modules)
        best = 1e9
        for _ in range(5):
            for name in [n for n in sys.modules if n.partition(".")[0] == "vllm_ext"]:
                del sys.modules[name]
            from vllm_ext.plugin import register
            started = time.thread_time()
            register()
            best = min(best, time.thread_time() - started)
        import torch
        new = {n for n in set(sys.modules) - before if not n.startswith("vllm_ext")}
        print(json.dumps([best, sorted(new), torch.cuda.is_initialized()]))
    """
    seconds, new, cuda = answer(code)
    assert seconds < 0.005
    assert new == []
    assert cuda is False


def test_imports_nothing_of_vllm_or_torch_even_alone():
    code = """
        import json, sys
        from vllm_ext.plugin import register
        register()
        print(json.dumps([n for n in sys.modules if n in ("vllm", "torch", "triton")]))
    """
    assert answer(code) == []


def test_is_registered_under_one_name():
    code = """
        import importlib.metadata, json
        found = importlib.metadata.entry_points(group="vllm.general_plugins")
        print(json.dumps([e.name for e in found if e.value.startswith("vllm_ext")]))
    """
    assert answer(code) == ["vllm_ext"]


def test_registering_again_changes_nothing():
    code = """
        import json, sys
        from vllm_ext import plugin
        plugin.register()
        first, finders = plugin.engine, list(sys.meta_path)
        plugin.register()
        print(json.dumps([plugin.engine is first, sys.meta_path == finders]))
    """
    assert answer(code) == [True, True]


def test_without_vllm_it_says_so_in_one_line(tmp_path):
    """A Python that has our package on its path and nothing else."""
    code = """
        import logging
        logging.basicConfig(format="%(levelname)s %(message)s")
        from vllm_ext.plugin import register
        register()
        print("went on")
    """
    done = python(code, "-S", PYTHONPATH=str(ROOT))
    assert done.stdout == "went on\n", done.stderr
    assert done.stderr == (
        "WARNING vllm-ext: vllm is not installed beside vllm-ext; running stock code\n"
    )


def test_a_broken_installation_does_not_raise(tmp_path):
    shutil.copytree(ROOT / "vllm_ext", tmp_path / "vllm_ext")
    for folder in ("kernels", "patches", "microbench"):
        shutil.copytree(ROOT / folder, tmp_path / "vllm_ext" / folder)
    (tmp_path / "vllm_ext" / "patches" / "fingerprints.json").write_text("{")
    code = "from vllm_ext.plugin import register; register(); print('went on')"
    done = python(code, PYTHONPATH=str(tmp_path))
    assert done.stdout == "went on\n", done.stderr
    assert "reinstall vllm-ext" in done.stderr


def test_off_means_no_hook_at_all():
    code = """
        import json, sys
        before = list(sys.meta_path)
        from vllm_ext import plugin
        plugin.register()
        print(json.dumps([plugin.engine is None, sys.meta_path == before]))
    """
    assert answer(code, VEXT="0") == [True, True]


def test_a_setting_that_is_not_understood_is_one_warning():
    code = """
        import logging
        logging.basicConfig(format="%(levelname)s %(message)s")
        from vllm_ext.plugin import register
        register()
    """
    done = python(code, VEXT_PATCHES="no_such_patch")
    (line,) = done.stderr.splitlines()
    assert line.startswith("WARNING vllm-ext: VEXT_PATCHES names unknown patches")


def test_vllm_serve_help_works():
    done = subprocess.run(
        [Path(sys.executable).with_name("vllm"), "serve", "--help"],
        env={**os.environ, "VEXT": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "usage: vllm serve" in done.stdout


STATE = """
    import json, multiprocessing, os, sys

    def child(queue):
        from vllm_ext import plugin
        plugin.register()
        import vllm.v1.watermarking.gpu_sampler
        queue.put({
            name: outcome.state for name, outcome in plugin.engine.outcomes.items()
        })

    if __name__ == "__main__":
        from vllm_ext import plugin
        plugin.register()
        context = multiprocessing.get_context(sys.argv[1])
        queue = context.Queue()
        process = context.Process(target=child, args=(queue,))
        process.start()
        there = queue.get(timeout=100)
        process.join()
        here = {n: o.state for n, o in plugin.engine.outcomes.items()}
        print(json.dumps([here, there]))
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_survives_fork_and_spawn(method, tmp_path):
    """The child applies what the parent, which imports no target, waits with."""
    assert method in multiprocessing.get_all_start_methods()
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(STATE))
    done = subprocess.run(
        [sys.executable, script, method],
        env={**os.environ, "VEXT": "1", "VEXT_PATCHES": "clean_sampler_writes"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    here, there = json.loads(done.stdout.splitlines()[-1])
    assert here["clean_sampler_writes"] == "waiting"
    assert there["clean_sampler_writes"] == "applied"
    del there["clean_sampler_writes"]
    assert set(there.values()) <= {"off"}


CONFIG = """
    import json, os, sys, tempfile
    configs, preset = json.loads(sys.argv[1])
    os.environ.pop("VEXT_PATCHES", None)
    os.environ.update(preset)
    from vllm_ext import plugin
    plugin.register()
    import vllm.v1.watermarking.gpu_sampler
    from vllm.engine.arg_utils import EngineArgs
    from vllm_ext_cpulane.tinymodel import write_model
    model = str(write_model(tempfile.mkdtemp()))
    states = []
    for config in configs:
        args = EngineArgs(
            model=model, skip_tokenizer_init=True, additional_config=config
        )
        assert args.create_engine_config().additional_config == config
        outcome = plugin.engine.outcomes["clean_sampler_writes"]
        states.append([outcome.state, outcome.reason, os.environ.get("VEXT_PATCHES")])
    print(json.dumps(states))
"""

OFF = {"vllm_ext": {"patches": "-clean_sampler_writes"}}


def configure(*configs: dict, **environ: str):
    """State of one patch, and of its variable, after each engine configuration."""
    code = CONFIG.replace("sys.argv[1]", repr(json.dumps([configs, environ])))
    return answer(code, **lane_environment("interpret"))


def test_additional_config_sets_what_the_environment_does_not():
    assert configure({}, OFF, {}) == [
        ["applied", "", None],
        ["off", "not asked for", "-clean_sampler_writes"],
        ["applied", "", None],  # a later engine of the process asks for nothing
    ]


def test_the_environment_wins_over_additional_config():
    assert configure(OFF, VEXT_PATCHES="clean_sampler_writes") == [
        ["applied", "", "clean_sampler_writes"]
    ]


def test_counting_can_begin_and_end_with_an_engine(tmp_path):
    """What was applied before is placed again, so that its calls are counted."""
    folder = {"vllm_ext": {"state_dir": str(tmp_path)}}
    assert [state for state, _, _ in configure({}, folder, {})] == ["applied"] * 3
    (path,) = tmp_path.glob("*.json")
    states = {
        each["name"]: each["state"] for each in read_states(tmp_path)[0]["patches"]
    }
    assert states["clean_sampler_writes"] == "applied"
    assert path.stem.isdigit()
