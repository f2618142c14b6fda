"""The plugin in every way vLLM is run, and out of the way wherever it must be.

Each case is a real engine on the CPU lane. What is compared is always the same small
batch, greedy and seeded, against stock vLLM of the same machine and version.
"""

from __future__ import annotations

import json
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from serving import served

from vllm_ext.doctor import open_source
from vllm_ext.patches import SERIES
from vllm_ext.patching.report import read_states
from vllm_ext_cpulane.engine import run_script
from vllm_ext_cpulane.environment import lane_environment
from vllm_ext_cpulane.tinymodel import write_model

pytestmark = pytest.mark.vllm

DEFAULTS = [patch.name for patch in SERIES if patch.default]
V2 = [
    patch.name
    for patch in SERIES
    if patch.default and all(".worker.gpu." in module for module in patch.modules)
]

BATCH = """
    from vllm import SamplingParams
    from vllm_ext_cpulane.engine import report, tiny_engine

    def batch(**options):
        llm = tiny_engine(**options)
        prompts = [{"prompt_token_ids": [1, 50 + i, 90, 110]} for i in range(4)]
        params = [
            SamplingParams(max_tokens=6, ignore_eos=True, **each)
            for each in (
                dict(temperature=0),
                dict(temperature=0.8, seed=7),
                dict(temperature=0.9, seed=8, top_k=20, top_p=0.9),
                dict(temperature=0, repetition_penalty=1.3, logprobs=2),
            )
        ]
        answers = llm.generate(prompts, params, use_tqdm=False)
        return [list(answer.outputs[0].token_ids) for answer in answers]
"""

SIMPLE = BATCH + "    report(batch())\n"


def run(script: str, tmp_path: Path, **environ: str) -> tuple[Any, list[dict]]:
    """What ``script`` reported, and the state files of its processes."""
    folder = tmp_path / "states"
    answer = run_script(
        script,
        {
            **lane_environment("interpret"),
            "VEXT": "1",
            "VEXT_STATE_DIR": str(folder),
            **environ,
        },
    )
    return answer, read_states(folder) if folder.exists() else []


def states(files: list[dict]) -> dict[str, str]:
    """State of each patch in the process where it got furthest."""
    order = ["off", "waiting", "upstream", "skipped", "failed", "applied", "in use"]
    found: dict[str, str] = {}
    for file in files:
        for patch in file["patches"]:
            have = found.get(patch["name"], "off")
            found[patch["name"]] = max(have, patch["state"], key=order.index)
    return found


def assert_active(files: list[dict]) -> None:
    assert states(files)["clean_sampler_writes"] == "in use"
    assert {name: states(files)[name] for name in V2} == {
        name: states(files)[name]
        for name in V2
        if states(files)[name] in ("in use", "applied")
    }


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    tokens, files = run(SIMPLE, tmp_path_factory.mktemp("stock"), VEXT="0")
    assert files == []  # inert: nothing was even reported
    return tokens


# -- active ----------------------------------------------------------------------------


def test_in_process(stock, tmp_path):
    tokens, files = run(SIMPLE, tmp_path)
    assert tokens == stock
    (file,) = files
    assert_active(files)
    calls = {patch["name"]: patch["calls"] for patch in file["patches"]}
    assert calls["clean_sampler_writes"] > 6


def test_multiprocess_engine(stock, tmp_path):
    """The default: frontend, engine core and worker; only the worker applies V2's."""
    script = tmp_path / "script.py"
    body = "\n".join(line[4:] for line in BATCH.splitlines())
    script.write_text(body + "\nif __name__ == '__main__':\n    report(batch())\n")
    folder = tmp_path / "states"
    tokens = run_script(
        script,
        {
            **lane_environment("interpret", in_process=False),
            "VEXT": "1",
            "VEXT_STATE_DIR": str(folder),
        },
    )
    assert tokens == stock
    files = read_states(folder)
    assert_active(files)
    using = {
        file["process"]
        for file in files
        for patch in file["patches"]
        if patch["state"] == "in use"
    }
    assert "MainProcess" not in using
    assert using


ASYNC = """
    import asyncio
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm_ext_cpulane.engine import PROMPT, report
    import sys

    async def main():
        engine = AsyncLLM.from_engine_args(AsyncEngineArgs(
            model=sys.argv[1], load_format="dummy", max_model_len=256, max_num_seqs=8,
            enforce_eager=True, kv_cache_memory_bytes=16 * 2**20,
        ))

        async def one(number):
            params = SamplingParams(max_tokens=5, ignore_eos=True, temperature=0.8,
                                    seed=number)
            async for answer in engine.generate(PROMPT, params, str(number)):
                last = answer
            return list(last.outputs[0].token_ids)

        answers = await asyncio.gather(*(one(number) for number in range(3)))
        engine.shutdown()
        return answers

    if __name__ == "__main__":
        report(asyncio.run(main()))
"""


def test_async_engine(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("\n".join(line[4:] for line in ASYNC.splitlines()))
    model = write_model(tmp_path / "model", tokenizer=True)
    environ = lane_environment("interpret", in_process=False)
    folder = tmp_path / "states"
    on = {"VEXT": "1", "VEXT_STATE_DIR": str(folder)}
    with ThreadPoolExecutor() as both:
        stock, patched = both.map(
            lambda settings: run_script(script, {**environ, **settings}, str(model)),
            ({"VEXT": "0"}, on),
        )
    assert patched == stock
    assert_active(read_states(folder))


def test_vllm_serve_answers_an_openai_client(tmp_path):
    from openai import OpenAI

    model = write_model(tmp_path / "model", tokenizer=True)

    def ask(environ: dict[str, str]) -> list[Any]:
        lane = lane_environment("interpret", in_process=False)
        options = ("--load-format", "dummy", "--max-num-seqs", "8")
        printed = tmp_path / f"serve-{environ['VEXT']}.log"
        with served(model, printed, *options, environment=lane | environ) as url:
            client = OpenAI(base_url=f"{url}/v1", api_key="none")
            guided = client.completions.create(
                model="tiny",
                prompt="hello",
                max_tokens=8,
                temperature=0,
                extra_body={"structured_outputs": {"regex": "[a-z]{6,9}"}},
            )
            plain = client.completions.create(
                model="tiny",
                prompt="hello",
                max_tokens=8,
                temperature=0,
                extra_body={"return_token_ids": True, "ignore_eos": True},
            )
            chat = client.chat.completions.create(
                model="tiny",
                messages=[{"role": "user", "content": "hi"}],
                max_tokens=4,
                temperature=0.7,
                seed=3,
                top_p=0.9,
            )
            scraped[environ["VEXT"]] = scrape(client, url)
            texts = (guided.choices[0].text, chat.choices[0].message.content)
            return [plain.choices[0].token_ids, *texts]

    def scrape(client: OpenAI, url: str) -> list[str]:
        """Our lines of ``/metrics``, once there is a count: the next steps write it."""
        for _ in range(20):
            time.sleep(0.6)
            client.completions.create(model="tiny", prompt="hello", max_tokens=3)
            with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
                text = answer.read().decode()
            lines = [line for line in text.splitlines() if line.startswith("vext_")]
            if not lines or any("left_to_stock" in line for line in lines):
                break
        return lines

    scraped: dict[str, list[str]] = {}
    folder = tmp_path / "states"
    on = {"VEXT": "1", "VEXT_STATE_DIR": str(folder)}
    with ThreadPoolExecutor() as both:
        stock, patched = both.map(ask, ({"VEXT": "0"}, on))
    assert patched == stock
    assert len(patched[0]) == 8
    assert_active(read_states(folder))
    assert scraped["0"] == []
    using = {line for line in scraped["1"] if 'state="in use"' in line}
    assert any('patch="clean_sampler_writes"' in line for line in using)
    assert not any('process="MainProcess"' in line for line in using)
    labels = 'patch="scheduler_fast_path",reason="structured output"'
    (left,) = [line for line in scraped["1"] if labels in line]
    assert 1 <= float(left.split()[-1]) <= 8


# -- inert -----------------------------------------------------------------------------


def test_vllm_plugins_without_us(stock, tmp_path):
    tokens, files = run(SIMPLE, tmp_path, VLLM_PLUGINS="vllm_ext_cpulane")
    assert tokens == stock
    assert files == []


def test_no_plugin_at_all(tmp_path):
    """``VLLM_PLUGINS=""`` shuts out the CPU lane too, so this is Model Runner V1."""
    environ = {"VLLM_PLUGINS": "", "VLLM_USE_V2_MODEL_RUNNER": "0", "VEXT_CPULANE": ""}
    tokens, files = run(SIMPLE, tmp_path, **environ)
    assert files == []
    assert tokens == run(SIMPLE, tmp_path, **environ, VEXT="0")[0]


def test_a_mutated_target_is_skipped_and_the_rest_applies(stock, tmp_path):
    """A vLLM that differs in one function, in a folder of its own."""
    site = open_source(None).path
    tree = tmp_path / "tree"
    changed = Path("vllm/v1/worker/gpu/sample/sampler.py")
    text = (site / changed).read_text()
    old = "    def apply_staged_writes(self) -> None:\n"
    assert text.count(old) == 1
    for depth in range(len(changed.parts) - 1):  # real folders down to the file
        folder = Path(*changed.parts[: depth + 1])
        (tree / folder).mkdir(parents=True)
        for entry in (site / folder).iterdir():
            if entry.name not in (changed.parts[depth + 1], "__pycache__"):
                (tree / folder / entry.name).symlink_to(entry)
    (tree / changed).write_text(text.replace(old, f"{old}        assert True\n"))

    tokens, files = run(SIMPLE, tmp_path, PYTHONPATH=str(tree))
    assert tokens == stock
    found = states(files)
    assert found.pop("clean_sampler_writes") == "skipped"
    assert "applied" in found.values() or "in use" in found.values()
    (reason,) = {
        patch["reason"]
        for file in files
        for patch in file["patches"]
        if patch["state"] == "skipped" and patch["name"] == "clean_sampler_writes"
    }
    assert "Sampler.apply_staged_writes changed" in reason


FOREIGN = (
    BATCH
    + """
    import functools
    import vllm.v1.worker.gpu.sample.sampler as sampler
    stock = sampler.Sampler.apply_staged_writes
    calls = []

    @functools.wraps(stock)
    def theirs(self):
        calls.append(1)
        return stock(self)

    theirs.__code__ = theirs.__code__.replace(co_filename="/plugins/theirs.py")
    sampler.Sampler.apply_staged_writes = theirs
    from vllm_ext import plugin
    plugin.register()
    tokens = batch()
    assert sampler.Sampler.apply_staged_writes is theirs
    assert calls
    report(tokens)
"""
)


def test_another_plugin_was_first(stock, tmp_path):
    tokens, files = run(FOREIGN, tmp_path)
    assert tokens == stock
    assert states(files)["clean_sampler_writes"] == "skipped"
    assert "/plugins/theirs.py" in json.dumps(files)


RAISES_ON_IMPORT = (
    """
    import sys

    class NoReplacements:
        def find_spec(self, name, path=None, target=None):
            if name.startswith("vllm_ext.patches.") and name.endswith(".replacement"):
                raise ImportError("planted")

    sys.meta_path.insert(0, NoReplacements())
"""
    + SIMPLE
)

RAISES_ON_APPLY = (
    """
    from vllm_ext.patching import engine

    def planted(*args):
        raise RuntimeError("planted")

    for how in engine._FORMS:
        engine._FORMS[how] = planted
"""
    + SIMPLE
)


@pytest.mark.parametrize("script", [RAISES_ON_IMPORT, RAISES_ON_APPLY])
def test_every_patch_raises_and_stock_serves_on(script, stock, tmp_path):
    tokens, files = run(script, tmp_path)
    assert tokens == stock
    found = states(files)
    assert {found[name] for name in V2} == {"failed"}
    assert json.dumps(files).count("planted") >= len(V2)
