"""vLLM with the upstream forms in it, without the plugin, is vLLM with the plugin.

What stands in upstream's own files is what ran: the lines that each form added are
counted, and a bug planted among them is found. Both on the vLLM that is installed.
"""

import json
import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from upstream_forms import patched_tree

from vllm_ext_cpulane.engine import run_script
from vllm_ext_cpulane.environment import lane_environment

pytestmark = pytest.mark.vllm
HERE = Path(__file__).parent
NAMES = [patch.name for patch in patched_tree.with_forms()]

# Not in an engine of Model Runner V2; their own tests run them.
OF_RUNNER_V1 = {
    "min_tokens_restore",
    "v1_last_token",
    "v1_copy_back",
    "v1_pinned_mask",
}

GPU = "vllm/v1/worker/gpu"
# One bug among the lines of each form: file, text, and what is there instead.
PLANTED = {
    "fused_sampler": (
        f"{GPU}/sample/fused/step.py",
        "sampled_token_ids=sampled.view(-1, 1)",
        "sampled_token_ids=sampled.view(-1, 1) + 1",
    ),
    "clean_sampler_writes": (
        f"{GPU}/sample/sampler.py",
        "        self.has_staged_writes = True\n        needs_processing =",
        "        needs_processing =",
    ),
    "repeated_batch": (
        f"{GPU}/input_batch.py",
        "        input_buffers.kept = None\n",
        "",
    ),
    "late_metadata": (
        f"{GPU}/model_states/default.py",
        "or self.vllm_config.speculative_config is not None",
        "or self.vllm_config.kv_transfer_config is not None",
    ),
    "identity_gathers": (
        f"{GPU}/input_batch.py",
        "        batch.num_tokens == batch.num_reqs\n        and ",
        "        ",
    ),
    "decode_counts": (
        f"{GPU}/input_batch.py",
        "        not batch.has_prefill\n        and ",
        "        ",
    ),
    "min_tokens_restore": (
        "vllm/v1/sample/logits_processor/builtin.py",
        "row_needs_restore[restore_rows] & torch.isfinite(stop_logits)",
        "row_needs_restore[restore_rows]",
    ),
    "v1_last_token": (
        "vllm/v1/sample/last_tokens.py",
        "self._counts.index_copy_(0, moves[0], old.index_select(0, moves[1]))",
        "self._counts.index_copy_(0, moves[1], old.index_select(0, moves[1]))",
    ),
    "v1_copy_back": (
        "vllm/v1/outputs.py",
        "        if copies is not self:\n            wait_for_copies()\n",
        "",
    ),
    "v1_pinned_mask": (
        "vllm/v1/worker/gpu_input_batch.py",
        "pin_memory=PIN_MEMORY,\n                    )\n                self.allowed",
        "pin_memory=False,\n                    )\n                self.allowed",
    ),
    "step_graph": (
        f"{GPU}/step_graph/eligibility.py",
        "if (computed < states.prefill_len.np[seats]).any():",
        "if (computed > states.prefill_len.np[seats]).all():",
    ),
    "scheduler_fast_path": (
        "vllm/v1/core/sched/steady.py",
        "at >= row.last and (",
        "at > row.last and (",
    ),
}


def without_the_plugin(folder: Path) -> dict[str, str]:
    """Variables for a process that imports the vLLM in ``folder``, or the installed."""
    return {
        **lane_environment("interpret"),
        "PYTHONPATH": f"{folder}{os.pathsep}{HERE}",
        "VLLM_PLUGINS": "vllm_ext_cpulane",  # the lane, and nobody else
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_STEP_GRAPH": "bracketed",  # upstream's form of it has to be asked for
    }


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> patched_tree.Tree:
    folder = tmp_path_factory.mktemp("patched")
    return patched_tree.make_tree(folder, patched_tree.with_forms())


@pytest.fixture(scope="module")
def found(tree: patched_tree.Tree) -> list[dict]:
    """Of an engine with the plugin, and of one on the patched tree."""
    lines: dict[str, list[int]] = {}
    for of_form in tree.added.values():
        for file, numbers in of_form.items():
            lines.setdefault(str(tree.folder / file), []).extend(numbers)
    asked = tree.folder / "asked.json"
    asked.write_text(json.dumps(lines))
    nothing = tree.folder / "nothing.json"
    nothing.write_text("{}")
    plugin = {
        **lane_environment("interpret"),
        "VEXT": "1",
        "VEXT_STRICT": "1",
        "VEXT_PATCHES": ",".join(NAMES),
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    script = HERE / "in_engine" / "answers.py"
    with ThreadPoolExecutor() as both:
        return [
            *both.map(
                lambda how: run_script(script, how[0], str(how[1])),
                ((plugin, nothing), (without_the_plugin(tree.folder), asked)),
            )
        ]


class TestInAnEngine:
    def test_same_answers(self, found: list[dict]):
        plugin, patched = found
        assert patched["answers"] == plugin["answers"]
        assert any(answer["logprobs"] for answer in plugin["answers"].values())
        assert sum(len(answer["tokens"]) for answer in plugin["answers"].values()) > 50
        assert patched["replays"] == plugin["replays"] > 10

    def test_each_is_what_it_says(self, found: list[dict], tree: patched_tree.Tree):
        plugin, patched = found
        assert plugin["version"] == patched["version"] == patched_tree.VERSION
        assert set(plugin["used"]) >= set(NAMES) - OF_RUNNER_V1
        assert Path(plugin["vllm"]).parent == patched_tree.installed()
        assert Path(patched["vllm"]).parent == tree.folder / "vllm"
        assert (patched["ours"], patched["used"]) == ([], [])

    @pytest.mark.parametrize("name", sorted(set(NAMES) - OF_RUNNER_V1))
    def test_the_lines_of_a_form_are_what_ran(
        self, found: list[dict], tree: patched_tree.Tree, name: str
    ):
        """Half of them or so: others are for other backends, for what fails, or run
        before the first step."""
        added, ran = 0, 0
        for file, lines in tree.added[name].items():
            added += len(lines)
            ran += len(set(lines) & set(found[1]["ran"][str(tree.folder / file)]))
        assert ran >= 0.45 * added, f"{ran} of {added}"


@pytest.fixture(scope="module")
def outcomes(
    tree: patched_tree.Tree, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, list[bool]]]:
    """By vLLM and form, whether each of its tests passed."""
    stock = patched_tree.make_tree(tmp_path_factory.mktemp("stock"))
    planted = patched_tree.make_tree(
        tmp_path_factory.mktemp("planted"), patched_tree.with_forms()
    )
    patched_tree.plant(planted, PLANTED)
    folders = {
        "patched": tree.folder,
        "stock": stock.folder,
        "planted": planted.folder,
    }
    with ThreadPoolExecutor() as all_of_them:
        made = all_of_them.map(lambda each: run_tests(each, tree), folders.values())
        return dict(zip(folders, made, strict=True))


class TestOfTheForms:
    """The tests that the forms bring into vLLM's suite."""

    @pytest.mark.parametrize("name", NAMES)
    def test_they_pass_on_the_patched_tree(self, outcomes, name: str):
        assert outcomes["patched"][name]
        assert all(outcomes["patched"][name])

    @pytest.mark.parametrize("name", NAMES)
    def test_they_fail_on_stock(self, outcomes, name: str):
        assert not all(outcomes["stock"][name])

    @pytest.mark.parametrize("name", NAMES)
    def test_they_find_a_bug_among_the_lines_of_the_form(self, outcomes, name: str):
        assert name in PLANTED, "plant a bug into the form"
        assert not all(outcomes["planted"][name])


PYTEST = """
    import os
    import sys

    import pytest
    from vllm_ext_cpulane.engine import report

    os.chdir(sys.argv[1])
    report(pytest.main(sys.argv[2:]))
"""


def run_tests(folder: Path, tree: patched_tree.Tree) -> dict[str, list[bool]]:
    """By form, whether each of its tests passes on the vLLM in ``folder``."""
    written = folder / "outcomes.xml"
    files = {path: name for name, paths in tree.tests.items() for path in paths}
    run_script(
        PYTEST,
        without_the_plugin(folder) | {"VEXT": "0"},
        str(folder),
        *("-q", "-p", "no:cacheprovider"),
        *("-c", os.devnull, f"--rootdir={tree.folder}", "-p", "on_the_cpu"),
        *("-o", "junit_family=xunit1", f"--junit-xml={written}"),
        "--continue-on-collection-errors",
        *map(str, files),
    )
    outcomes: dict[str, list[bool]] = {name: [] for name in tree.tests}
    for case in ElementTree.parse(written).iter("testcase"):
        [name] = {
            name
            for path, name in files.items()
            if path.stem in f"{case.get('classname')}.{case.get('name')}".split(".")
        }
        outcomes[name].append(not len(case))
    return outcomes


def test_what_is_installed_stays_as_it_is(tree: patched_tree.Tree):
    stock = patched_tree.installed()
    for of_form in tree.added.values():
        for path in map(Path, of_form):
            inside = path.relative_to("vllm")
            patched = tree.folder / path
            assert not patched.is_symlink()
            if (stock / inside).exists():
                assert (stock / inside).read_bytes() != patched.read_bytes()


def test_a_file_that_no_form_touches_is_the_installed_one(tree: patched_tree.Tree):
    inside = Path("vllm", "v1", "worker", "gpu", "block_table.py")
    installed = patched_tree.installed().parent / inside
    assert (tree.folder / inside).resolve() == installed.resolve()


def environment_names(variables: Mapping[str, str]) -> set[str]:
    return {name for name in variables if name.startswith("VEXT")}


def test_the_patched_tree_is_run_without_our_settings(tmp_path: Path):
    assert environment_names(without_the_plugin(tmp_path)) == {"VEXT_CPULANE"}
