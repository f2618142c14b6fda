"""The resource report: what a kernel lost is named, and nothing else is.

Kernels are compiled in child processes, once for all tests that look at them.
"""

import copy
import json
import re
from pathlib import Path

import pytest

from vllm_ext.hostbench import CannotRunError
from vllm_ext.jsonfile import CannotWriteError
from vllm_ext.prove import kernels, sass
from vllm_ext_cpulane.engine import run_script
from vllm_ext_cpulane.environment import lane_environment

HERE = Path(__file__).parent
MODULE = "kernels_planted"
FOREIGN = {"TRITON_DEFAULT_FP_FUSION": "0", "PTXAS_OPTIONS": "--maxrregcount=16"}

NO_WARM = "import vllm_ext\n"
RAISES = "def warm(*arguments):\n    raise ValueError('no such shape\\nat all')\n"


def quiet(line):
    pass


def report_of(modules=(MODULE,), stock=False, environ=(), path=HERE):
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", str(path))
        for name, value in dict(environ).items():
            patched.setenv(name, value)
        return kernels.report(quiet, modules, stock)


@pytest.fixture(scope="module")
def before():
    return report_of()


@pytest.fixture(scope="module")
def after():
    return report_of(environ={"PLANTED": "1"})


@pytest.fixture(scope="module")
def stock():
    return kernels.report(quiet)


def judged(found, expected):
    """Verdicts by subject; several of one subject joined."""
    result = {}
    for verdict in kernels.judge(found, expected):
        assert verdict.instrument == "kernels"
        assert verdict.fault == (verdict.outcome == "not proven")
        assert "\n" not in verdict.detail
        known = result.get(verdict.subject, (verdict.outcome, ""))
        assert known[0] == verdict.outcome
        result[verdict.subject] = (verdict.outcome, known[1] + verdict.detail)
    return result


@pytest.fixture(scope="module")
def verdicts(before, after):
    return judged(after, kernels.updated({}, before))


def entry(found, name, variant=""):
    [it] = [
        each
        for each in found["kernels"]
        if each["kernel"] == f"{MODULE}:{name}" and variant in each["variant"]
    ]
    return it


# -- what is found --------------------------------------------------------------------


def test_what_has_not_changed_is_proven(before):
    result = judged(before, kernels.updated({}, before))
    assert {outcome for outcome, _ in result.values()} == {"proven on CPU"}
    _, detail = result["_narrow_kernel"]
    assert re.fullmatch(
        r"sm_80/90/100: [\d/]+ registers, no spills, 0 B shared, "
        r"16-byte loads 4 of 4, stores 4 of 4, 64 of 64 warps",
        detail,
    )


@pytest.mark.parametrize("name", ["_steady_kernel", "_fused_kernel"])
def test_beside_a_kernel_that_changed_the_others_are_left_in_peace(verdicts, name):
    outcomes = {
        outcome for subject, (outcome, _) in verdicts.items() if name in subject
    }
    assert outcomes == {"proven on CPU"}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("_spilling_kernel", r"^spills \d+/\d+/\d+ bytes per thread on sm_80/90/100; "),
        ("_spilling_kernel", r"sm_80: registers \d+ -> 255, "),
        ("_spilling_kernel", r"sm_90: .*bytes of spill stores 0 -> [1-9]"),
        ("_spilling_kernel", r"sm_100: .*bytes of spill loads 0 -> [1-9]"),
        ("_spilling_kernel", r"bytes of stack 0 -> [1-9]"),
        ("_narrow_kernel", r"sm_80: (.*, )?16-byte loads 4 -> 0"),
        ("_shared_kernel", r"sm_90: .*bytes of shared memory 16 -> 4096"),
        ("_ordered_kernel", r"^sm_80: FADD 0 -> 8, FFMA 8 -> 0, FMUL 0 -> 8; sm_90"),
        ("_uncompilable_kernel", r"^does not compile for sm_80: type fp8e4nv not supp"),
        ("_misaligned_kernel", r"^launched with x_ptr \*fp32:16 -> \*fp32; "),
        ("_misaligned_kernel", r"no longer launched: x_ptr \*fp32:16; out_ptr "),
        ("_new_kernel", r"^no expected values; `vllm-ext prove kernels --update`"),
        ("_old_kernel", r"^no longer launched: x_ptr \*fp32:16; pairs .*SCALE 2"),
    ],
)
def test_what_got_worse_is_named(verdicts, name, change):
    outcome, detail = verdicts[name]
    assert outcome == "not proven"
    assert re.search(change, detail), detail


def test_one_target_that_fails_hides_no_other(after):
    figures = entry(after, "_uncompilable_kernel")["figures"]
    assert set(figures["80"]) == {"error"}
    assert figures["90"]["registers"] > 0 < figures["100"]["registers"]
    assert "does not compile: type fp8e4nv" in kernels.table(after)


def test_a_spill_of_ours_cannot_be_accepted(after):
    outcome, detail = judged(after, kernels.updated({}, after))["_spilling_kernel"]
    assert outcome == "not proven"
    assert detail.startswith("spills ")
    of_stock = copy.deepcopy(after)
    of_stock["origins"] = ["vllm 1"]
    for each in of_stock["kernels"]:
        each["origin"] = "vllm 1"
    expected = kernels.updated({}, of_stock)
    assert judged(of_stock, expected)["stock _spilling_kernel"][0] == "proven on CPU"


def test_a_better_kernel_is_a_change_too_but_wider_accesses_are_not(before, after):
    outcome, detail = judged(before, kernels.updated({}, after))["_shared_kernel"]
    assert outcome == "not proven"
    assert "bytes of shared memory 4096 -> 16" in detail
    wider = copy.deepcopy(before)
    for figures in entry(wider, "_steady_kernel")["figures"].values():
        figures["loads"]["128"] += 1
    result = judged(wider, kernels.updated({}, before))
    assert result["_steady_kernel"][0] == "proven on CPU"


def test_another_order_of_the_same_float_operations_is_a_change(before):
    other = copy.deepcopy(before)
    entry(other, "_ordered_kernel")["figures"]["90"]["float_order"] = "0"
    outcome, detail = judged(other, kernels.updated({}, before))["_ordered_kernel"]
    assert (outcome, detail) == (
        "not proven",
        "sm_90: another order of float operations",
    )


def test_a_kernel_that_fits_on_no_sm_is_not_proven(before):
    too_large = copy.deepcopy(before)
    figures = entry(too_large, "_steady_kernel")["figures"]["80"]
    figures |= sass.occupancy(80, 32, 4, shared=200 * 1024)
    outcome, detail = judged(too_large, kernels.updated({}, before))["_steady_kernel"]
    assert outcome == "not proven"
    assert detail == "does not fit on sm_80: too much of shared memory"


def test_fusion_is_part_of_a_variant_and_changes_its_operations(before):
    fused, apart = (
        entry(before, "_fused_kernel", f"enable_fp_fusion {on}")["figures"]
        for on in (True, False)
    )
    for arch in map(str, kernels.ARCHES):
        assert fused[arch]["floats"] == {"FFMA": 8}
        assert apart[arch]["floats"] == {"FADD": 8, "FMUL": 8}
        assert fused[arch]["float_order"] != apart[arch]["float_order"]


def test_a_variant_tells_types_alignment_constants_and_options(before):
    assert entry(before, "_old_kernel")["variant"] == (
        "x_ptr *fp32:16; pairs ('i32', 'i32')[1]:16; SCALE 2; enable_fp_fusion True"
    )
    assert entry(before, "_narrow_kernel")["variant"] == (
        "x_ptr *fp32:16; out_ptr *fp32:16; enable_fp_fusion True; num_warps 2"
    )


def test_figures_do_not_depend_on_cache_or_environment(before, tmp_path):
    assert report_of(environ=FOREIGN | {"TRITON_CACHE_DIR": str(tmp_path)}) == before
    assert any(tmp_path.iterdir())


def test_a_module_that_cannot_be_launched_is_named_and_hides_no_other(tmp_path):
    (tmp_path / "kernels_bare.py").write_text(NO_WARM)
    (tmp_path / "kernels_raising.py").write_text(RAISES)
    source = (HERE / f"{MODULE}.py").read_text()
    (tmp_path / f"{MODULE}.py").write_text(source)
    modules = ["kernels_bare", "kernels_raising", "kernels_absent", MODULE]
    found = report_of(modules, path=tmp_path)
    assert found["problems"] == {
        "kernels_bare": "has no warm(max_rows, vocab_size, device) that launches its "
        "variants",
        "kernels_raising": "no such shape",
        "kernels_absent": "No module named 'kernels_absent'",
    }
    result = judged(found, kernels.updated({}, found))
    assert result["kernels_raising"] == ("not proven", "no such shape")
    assert result["_steady_kernel"][0] == "proven on CPU"


# -- what is on record ----------------------------------------------------------------


@pytest.fixture
def record(tmp_path, monkeypatch):
    path = tmp_path / "resources.json"
    path.write_text("{}")
    monkeypatch.setattr(kernels, "EXPECTED", path)
    return path


def test_an_unknown_triton_is_one_line_that_says_what_to_do(before):
    known = kernels.updated({}, before)
    expected = {"0.0.1": known[before["triton"]]}
    [verdict] = kernels.judge(before, expected)
    assert (verdict.subject, verdict.outcome) == ("vllm_ext", "not proven")
    assert not verdict.fault  # nothing is wrong; nothing is known
    assert verdict.detail == (
        f"no expected values with Triton {before['triton']}; "
        "`vllm-ext prove kernels --update` records them"
    )


def recorded(**changes):
    """A record of one kernel; with ``name=None`` without that figure."""
    figures = dict.fromkeys((*kernels.EXACT, *kernels.AT_LEAST), 0)
    figures |= {"floats": {"FADD": 1}, "float_order": "0", **changes}
    figures = {name: value for name, value in figures.items() if value is not None}
    return json.dumps({"3.7.1": {"vllm_ext": {"a:b": {"x": {"80": figures}}}}})


def test_a_record_as_it_should_be_is_read(record):
    record.write_text(recorded())
    assert kernels.read() == json.loads(recorded())


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", '{"3.7.1": {"vllm_ext": {"a:b": {"x": {"80": {}}}}}}', None),
        *(recorded(registers="x"), recorded(registers=True), recorded(stack=None)),
        *(recorded(wide_loads="3"), recorded(floats=[]), recorded(floats={"FADD": ""})),
        *(recorded(float_order=0), recorded(float_order=None)),
    ],
)
def test_a_record_that_cannot_be_read_is_one_line(record, text, monkeypatch):
    def never(*arguments):
        raise AssertionError("it should not have compiled anything")

    monkeypatch.setattr(kernels, "report", never)
    if text is None:
        record.unlink()
    else:
        record.write_text(text)
    for update in (False, True):
        [verdict] = kernels.verdicts(quiet, update)
        assert verdict.subject == "resources.json"
        assert verdict.outcome == "not proven"
        assert verdict.fault
        assert "restore it, or" in verdict.detail
    assert not record.exists() if text is None else record.read_text() == text


def test_update_says_what_it_accepts_and_keeps_what_it_did_not_look_at(
    record, before, after, monkeypatch
):
    others = {"0.0.1": kernels.updated({}, after)[after["triton"]]}
    record.write_text(json.dumps(others))
    said = []
    monkeypatch.setattr(kernels, "report", lambda say: before)
    outcomes = {verdict.outcome for verdict in kernels.verdicts(said.append, True)}
    assert outcomes == {"proven on CPU"}
    assert json.loads(record.read_text())["0.0.1"] == others["0.0.1"]

    said.clear()
    monkeypatch.setattr(kernels, "report", lambda say: after)
    kernels.verdicts(said.append)
    assert json.loads(record.read_text()) == kernels.updated(others, before)
    kernels.verdicts(said.append, True)
    assert json.loads(record.read_text()) == kernels.updated(others, after)
    assert any(line.startswith("_narrow_kernel: sm_80: ") for line in said)
    assert not any("_steady_kernel" in line for line in said)


def test_the_record_as_a_table(record):
    """Of the newest Triton, a number for each target or one for all."""

    def of(registers, spilled=0):
        return {
            **{"registers": registers, "spill_stores": spilled, "spill_loads": 0},
            **{"stack": 0, "shared": 16, "wide_loads": 2, "wide_stores": 0},
            **{"floats": {}, "float_order": ""},
        }

    old = {"80": of(1), "90": of(1)}
    new = {"80": of(64), "90": of(61, spilled=8)}
    kernel = {"a.b:_ours": {"x *bf16; N 1": new, "x *fp32; N 1": old}}
    record.write_text(
        json.dumps(
            {
                "3.9.2": {"vllm_ext": {"a:_gone": {"": old}}},
                "3.10.0": {"vllm_ext": kernel},
            }
        )
    )
    assert kernels.recorded().splitlines() == [
        *("### Ours, Triton 3.10.0", "", *kernels.HEADS),
        "| `_ours (x *bf16)` | 64/61 | 0/8 | 16 | 2 |",
        "| `_ours (x *fp32)` | 1 | 0 | 16 | 2 |",
    ]


def test_a_record_that_cannot_be_written_is_said_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "EXPECTED", tmp_path / "nowhere" / "resources.json")
    monkeypatch.setattr(kernels, "report", lambda say: pytest.fail("compiled"))
    with pytest.raises(CannotWriteError):
        kernels.verdicts(quiet, update=True)


def test_without_the_lane_it_says_so(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CannotRunError, match="run make setup"):
        kernels.report(quiet)


# -- stock's kernels ------------------------------------------------------------------


@pytest.mark.vllm
def test_every_kernel_is_as_on_record(stock):
    """The gate: what fails here was changed, or has to be looked at and recorded."""
    judged = kernels.judge(stock, kernels.read())
    assert [v for v in judged if v.outcome != "proven on CPU"] == []


@pytest.mark.vllm
def test_the_kernels_of_a_decode_step_are_all_looked_at(stock):
    modes = {}
    for each in stock["kernels"]:
        if each["origin"] == kernels.OURS:
            continue
        modes.setdefault(each["kernel"].rpartition(":")[2], set()).update(each["modes"])
    everywhere = {"greedy", "temperature", "filtered", "penalties", "logprobs"}
    everywhere |= set(kernels.MORE_MODES)
    drawn = {"temperature", "filtered", "penalties", "min-p"}
    # The turnover samples as greedy does, and prefills in every step.
    prefills = {name for name, where in modes.items() if where == {"turnover"}}
    assert prefills == {"_prepare_prefill_inputs_kernel"}
    modes = {
        name: where - {"turnover"}
        for name, where in modes.items()
        if name not in prefills
    }
    assert {name: where for name, where in modes.items() if where != everywhere} == {
        "_temperature_kernel": drawn,
        "_topk_topp_kernel": {"filtered", "penalties"},
        "_topp_sb_stats_kernel": {"filtered", "penalties"},
        "_topp_sb_step_kernel": {"filtered", "penalties"},
        "_topp_sb_mask_kernel": {"filtered", "penalties"},
        "_penalties_kernel": {"penalties"},
        "_min_p_kernel": {"min-p"},
        "_bias_kernel": {"bias"},
        "_bad_words_kernel": {"bad words"},
        "_ranks_kernel": {"logprobs"},
        "_topk_log_softmax_kernel": {"logprobs"},
    }
    assert {name for name, where in modes.items() if where == everywhere} == {
        "_prepare_pos_seq_lens_kernel",
        "_combine_sampled_and_draft_tokens_kernel",
        "_gather_block_tables_kernel",
        "_compute_slot_mappings_kernel",
        "_gumbel_sample_kernel",
        "_get_num_sampled_and_rejected_kernel",
        "_post_update_kernel",
        "_apply_write_kernel",
    }


@pytest.mark.vllm
def test_kernels_are_launched_as_on_a_gpu_at_serving_sizes(stock):
    variants = {each["kernel"]: each["variant"] for each in stock["kernels"]}
    module = "vllm.v1.sample.ops.topk_topp_triton"
    filtered = variants[f"{module}:_topk_topp_kernel"]
    assert f"VOCAB_SIZE {kernels.VOCABULARY};" in filtered
    assert "BLOCK_SIZE 8192;" in filtered  # 256 on a CPU
    assert filtered.endswith("num_warps 8")
    # 16 parts of each of 8 rows occupy 128 of 132 multiprocessors.
    assert "S 16;" in variants[f"{module}:_topp_sb_stats_kernel"]
    table = kernels.table(stock)
    assert table.index("vllm_ext ") < table.index("vllm 0.32.0")
    for kernel in variants:
        assert kernel.rpartition(":")[2] in table


# -- reading machine code -------------------------------------------------------------

PTXAS = """
    import re, subprocess, sys, tempfile
    import torch, triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from vllm_ext_cpulane import discard
    from vllm_ext_cpulane.engine import report

    discard.install()
    import kernels_planted
    from vllm_ext.prove import sass

    x = torch.zeros(64 * 1024)
    found = []
    for kernel in (kernels_planted._spilling_kernel, kernels_planted._steady_kernel):
        launched = kernel.warmup(x, x, grid=(1,))
        for arch in sass.LIMITS:
            compiled = triton.compile(launched.src, target=GPUTarget("cuda", arch, 32))
            cubin, metadata = compiled.asm["cubin"], compiled.metadata
            kept = sass.Compiled(cubin, metadata.num_warps, metadata.shared)
            [figures] = sass.figures([kept], arch)
            nvidia = knobs.nvidia
            tool = nvidia.ptxas_blackwell if arch >= 100 else nvidia.ptxas
            name = f"--gpu-name=sm_{arch}{'a' if arch >= 90 else ''}"
            with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
                file.write(compiled.asm["ptx"])
                file.flush()
                done = subprocess.run(
                    [tool.path, "-lineinfo", "-v", "--regAllocOptLevel=2", name,
                     file.name, "-o", "/dev/null"],
                    capture_output=True, text=True, check=True)
            found.append([arch, figures, done.stderr])
    report(found)
"""


def test_spills_and_registers_are_those_that_ptxas_reports():
    environment = lane_environment("discard") | {
        **{"PLANTED": "1", "PYTHONPATH": str(HERE), "VEXT": "0"},
    }
    found = run_script(PTXAS, environment)
    assert len(found) == 2 * len(kernels.ARCHES)
    spilling = 0
    for arch, figures, log in found:
        stack, stores, loads = map(
            int,
            re.search(
                r"(\d+) bytes stack frame, (\d+) bytes spill stores, "
                r"(\d+) bytes spill loads",
                log,
            ).groups(),
        )
        registers = int(re.search(r"Used (\d+) registers", log)[1])
        assert (arch, figures["registers"]) == (arch, registers)
        assert (arch, figures["spill_stores"]) == (arch, stores)
        assert (arch, figures["spill_loads"]) == (arch, loads)
        assert (arch, figures["stack"]) == (arch, stack)
        spilling += stores > 0
    assert spilling == len(kernels.ARCHES)


@pytest.mark.parametrize(
    ("arch", "registers", "warps", "shared", "blocks", "by"),
    [
        (80, 16, 1, 0, 32, "blocks"),
        (80, 32, 4, 0, 16, "warps"),
        (90, 255, 8, 0, 1, "registers"),  # 2 warps of 8192 in each quarter of 16384
        (90, 128, 2, 0, 8, "registers"),  # 4 warps of 4096 in each quarter
        (90, 40, 4, 0, 12, "registers"),  # 12 warps of 1280 in each quarter
        (90, 33, 4, 0, 12, "registers"),  # and of 33 rounded up to 40
        (90, 200, 2, 0, 4, "registers"),  # 2 warps in a quarter leave 3584 unused
        (90, 255, 16, 0, 0, "registers"),  # 8 warps are all that 65536 allow
        (80, 32, 4, 100 * 1024, 1, "shared memory"),  # 101 KiB of 164
        (100, 32, 4, 100 * 1024, 2, "shared memory"),  # of 228
        (80, 32, 4, 163 * 1024, 1, "shared memory"),
        (80, 32, 4, 163 * 1024 + 1, 0, "shared memory"),
        (100, 32, 4, 227 * 1024, 1, "shared memory"),
        (90, 32, 1, 41 * 1024 - 1024, 5, "shared memory"),  # 5 times 41 of 228 KiB
    ],
)
def test_occupancy_by_hand(arch, registers, warps, shared, blocks, by):
    found = sass.occupancy(arch, registers, warps, shared)
    assert found == {
        "blocks_per_sm": blocks,
        "warps_per_sm": blocks * warps,
        "limited_by": by,
    }
