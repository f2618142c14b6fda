"""The kernel sanitizer: planted bugs are named, clean kernels and vLLM's are not."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import pytest

from vllm_ext.children import ChildError
from vllm_ext.patches import SERIES
from vllm_ext.prove import races
from vllm_ext_cpulane.engine import run_script
from vllm_ext_cpulane.environment import lane_environment

SCRIPT = Path(__file__).with_name("races_kernels.py")

# Kinds of faults, kernel and program of the first one, and what it has to say.
PLANTED = {
    "load_past_the_end": (
        *({"out of bounds"}, "_copy_kernel", (2, 0, 0)),
        "load of 4 bytes at byte 40 of x_ptr (float32[10]), outside of its storage "
        "(2 of 4 lanes)",
    ),
    "store_past_the_end": (
        *({"out of bounds"}, "_fill_kernel", (2, 0, 0)),
        "store of 4 bytes at byte 40 of y_ptr (float32[10]), elsewhere in its storage",
    ),
    "before_a_view": (
        *({"out of bounds"}, "_previous_kernel", (0, 0, 0)),
        "byte -8 of x_ptr (int64[4]), elsewhere in its storage",
    ),
    "before_a_tensor": (
        *({"out of bounds"}, "_previous_kernel", (0, 0, 0)),
        "byte -8 of x_ptr (int64[4]), outside of its storage",
    ),
    "neighbour_row": (
        *({"out of bounds"}, "_row_kernel", (1, 0, 0)),
        "byte 32 of y_ptr (int32[1, 8]), elsewhere in its storage (8 of 8 lanes)",
    ),
    "between_rows": (
        *({"out of bounds"}, "_row_kernel", (0, 0, 0)),
        "byte 24 of y_ptr (int32[4, 6], strides [8, 1])",
    ),
    "past_the_last_row": (
        *({"out of bounds"}, "_row_kernel", (3, 0, 0)),
        "byte 96 of y_ptr (int32[3, 6], strides [8, 1]), elsewhere in its storage "
        "(6 of 6 lanes)",
    ),
    "into_another_argument": (
        *({"out of bounds"}, "_sum_kernel", (0, 0, 0)),
        "byte 64 of x_ptr (int64[8]), elsewhere in its storage (1 of 9 lanes)",
    ),
    "in_a_helper": (
        *({"out of bounds"}, "_helped_kernel", (2, 0, 0)),
        "byte 24 of x_ptr (int64[3])",
    ),
    "atomics_past_the_end": (
        *({"out of bounds"}, "_atomics_kernel", (2, 0, 0)),
        "atomic of 4 bytes at byte 8 of x_ptr (int32[2])",
    ),
    "cas_past_the_end": (
        *({"out of bounds"}, "_cas_block_kernel", (0, 0, 0)),
        "atomic of 4 bytes at byte 12 of x_ptr (int32[3])",
    ),
    "the_last_of_a_grid": (
        *({"out of bounds"}, "_grid_kernel", (1, 2, 3)),
        "byte 92 of y_ptr (int32[23])",
    ),
    "past_the_second_of_two": (
        *({"out of bounds"}, "_either_kernel", (0, 0, 0)),
        "byte 56 of y_ptr (int64[6]), outside of its storage",
    ),
    "past_a_reinterpretation": (
        *({"out of bounds"}, "_signs_kernel", (0, 0, 0)),
        "load of 1 byte at byte 4 of x_ptr (uint8[4]), outside of its storage",
    ),
    "misaligned": (
        *({"misaligned"}, "_wide_kernel", (0, 0, 0)),
        "load of 4 bytes at byte 1 of x_ptr (int8[8])",
    ),
    "unnamed_target": (
        *({"out of bounds"}, "_table_kernel", (0, 0, 0)),
        "in no tensor of the launch and in none that is reachable",
    ),
    "past_a_target": (
        *({"out of bounds"}, "_table_kernel", (0, 0, 0)),
        "byte 32 of reachable[0] (int32[8])",
    ),
    "lost_update": (
        *({"race"}, "_lost_kernel", (1, 0, 0)),
        "load of 8 bytes at byte 0 of y_ptr (int64[1]), which program (0, 0, 0) stored",
    ),
    "two_values": (
        *({"race", "order"}, "_claim_kernel", (1, 0, 0)),
        "store of 4 bytes at byte 4 of y_ptr (int32[2]), which program (0, 0, 0) "
        "stored",
    ),
    "the_same_value_and_then_another": (
        *({"race", "order"}, "_then_another_kernel", (1, 0, 0)),
        "store of 4 bytes at byte 0 of y_ptr (int32[1]), which program (0, 0, 0) "
        "stored",
    ),
    "load_of_what_another_stores": (
        *({"race", "order"}, "_neighbour_kernel", (1, 0, 0)),
        "store of 4 bytes at byte 4 of x_ptr (int32[3]), which program (0, 0, 0) "
        "loaded",
    ),
    "store_of_what_another_loads": (
        *({"race", "order"}, "_overwrite_kernel", (1, 0, 0)),
        "store of 8 bytes at byte 8 of x_ptr (int64[5]), which program (0, 0, 0) "
        "loaded",
    ),
    "through_two_arguments": (
        *({"race"}, "_aliases_kernel", (1, 0, 0)),
        "load of 4 bytes at byte 4 of x_ptr (int32[3]), which program (0, 0, 0) stored",
    ),
    "through_two_storages": (
        *({"race"}, "_aliases_kernel", (1, 0, 0)),
        "load of 4 bytes at byte 4 of x_ptr (int32[3]), which program (0, 0, 0) stored",
    ),
    "atomic_and_plain_load": (
        *({"race", "order"}, "_plain_read_kernel", (1, 0, 0)),
        "atomic of 4 bytes at byte 0 of count_ptr (int32[1]), which program (0, 0, 0) "
        "loaded",
    ),
    "zeroed_by_one": (
        *({"race", "order"}, "_zeroing_kernel", (1, 0, 0)),
        "atomic of 4 bytes at byte 0 of count_ptr (int32[1]), which program (0, 0, 0) "
        "stored",
    ),
    "atomic_of_one_program": (
        *({"race"}, "_scope_kernel", (1, 0, 0)),
        "byte 0 of count_ptr (int32[1]), which program (0, 0, 0) stored",
    ),
    "a_byte_of_a_word": (
        *({"race"}, "_bytes_kernel", (1, 0, 0)),
        "load of 1 byte at byte 1 of x_ptr (int8[4]), which program (0, 0, 0) stored",
    ),
    "a_word_over_bytes": (
        *({"race", "order"}, "_word_kernel", (2, 0, 0)),
        "store of 4 bytes at byte 0 of x_ptr (int8[4]), which program (0, 0, 0) stored",
    ),
    "half_a_word": (
        *({"race"}, "_halves_kernel", (1, 0, 0)),
        "load of 4 bytes at byte 8 of x_ptr (int32[4]), which program (0, 0, 0) stored",
    ),
    "lanes_of_one_store": (
        *({"race"}, "_lanes_kernel", (0, 0, 0)),
        "lanes of one store have different values for byte 0 of y_ptr (int32[4])",
    ),
    "stored_after_arrival": (
        *({"race"}, "_first_done_kernel", (3, 0, 0)),
        "load of 4 bytes at byte 0 of part_ptr (int32[4]), which program (0, 0, 0) "
        "stored",
    ),
    "exchange": (
        *({"order"}, "_exchange_kernel", (2, 0, 0)),
        "wrote byte 0 of y_ptr (int32[1]); programs that run reversed make "
        "1 byte different",
    ),
    "as_in_reverse": (
        *({"order"}, "_middle_kernel"),
        *((2, 0, 0), "wrote byte 0 of y_ptr (int32[1]); programs that run shuffled"),
    ),
    "written_in_another_order": (
        *({"order"}, "_early_kernel", (2, 0, 0)),
        "wrote byte 0 of y_ptr (int32[1]); programs that run reversed",
    ),
    "sum_of_floats": (
        *({"order"}, "_float_sum_kernel", (3, 0, 0)),
        "of y_ptr (float32[1]); programs that run reversed make",
    ),
    "ticket": (
        *({"order"}, "_ticket_kernel", (3, 0, 0)),
        "wrote byte 0 of y_ptr (int32[4]); programs that run reversed make "
        "4 bytes different",
    ),
    "waits": (
        *({"order"}, "_wait_kernel", (1, 0, 0)),
        "fails when programs run reversed: a program waits for one that comes later",
    ),
    "two_bugs": (
        *({"out of bounds", "race", "order"}, "_two_bugs_kernel", (0, 0, 0)),
        "byte 12 of y_ptr (int32[3])",
    ),
}
for semantic in ("relaxed_only", "acquires_only", "releases_only"):
    PLANTED[semantic] = (
        *({"race"}, "_last_done_kernel", (4, 0, 0)),
        "load of 8 bytes at byte 0 of part_ptr (int64[5]), which program (0, 0, 0) "
        "stored",
    )
CLEAN = (
    *("rows_with_gaps", "named_targets", "an_address_as_a_number", "masked_tail"),
    *("in_place", "atomic_sum_of_integers", "last_done_finishes", "same_value"),
    *("under_a_lock", "arguments_that_are_not_used", "a_column", "block_pointers"),
    *("descriptors", "tuples", "a_grid_of_three", "the_first_or_the_second"),
    "a_reinterpretation",
)


def marked_lines() -> dict[str, set[int]]:
    """Line numbers by the case that a comment at their end names."""
    lines = defaultdict(set)
    for number, line in enumerate(SCRIPT.read_text().splitlines(), 1):
        if match := re.search(r"  # ([a-z_ ]+)$", line):
            for case in match[1].split():
                lines[case].add(number)
    return lines


@pytest.fixture(scope="module", params=["stock interpreter", "lane"])
def found(request: pytest.FixtureRequest) -> dict:
    environment = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "VEXT_CPULANE": ""}
    if request.param == "lane":
        environment = lane_environment("interpret")
    found = run_script(SCRIPT, environment)
    assert found["lane"] == (request.param == "lane")
    assert set(found["cases"]) == {*PLANTED, *CLEAN}
    return found


@pytest.mark.parametrize("case", PLANTED)
def test_a_planted_bug_is_named(found, case):
    kinds, kernel, program, text = PLANTED[case]
    faults = found["cases"][case]["faults"]
    assert {fault["kind"] for fault in faults} == kinds
    first = faults[0]
    assert first["kernel"] == kernel
    assert tuple(first["program"]) == program
    assert text in first["what"]
    assert first["what"].startswith(f"program {program}: ")
    assert {Path(fault["file"]) for fault in faults} == {SCRIPT}
    assert {fault["line"] for fault in faults} == marked_lines()[case]
    place = f"prove/{SCRIPT.name}:{first['line']}"
    expected = f"{first['kind']} in {kernel} at {place}: {first['what']}"
    assert found["cases"][case]["texts"][0].startswith(expected)


@pytest.mark.parametrize("case", CLEAN)
def test_a_clean_kernel_is_clean(found, case):
    assert found["cases"][case]["texts"] == []


@pytest.mark.parametrize("case", [*PLANTED, *CLEAN])
def test_watching_changes_no_bit(found, case):
    """Of results, where nothing was left out because it was out of bounds."""
    kinds = PLANTED[case][0] if case in PLANTED else set()
    result = found["cases"][case]
    if kinds & {"out of bounds", "misaligned"}:
        assert "unwatched" not in result
    elif case == "an_address_as_a_number":
        stored, address = result["results"]
        assert stored == [address]
    else:
        assert result["watched"] == result["unwatched"]


def test_an_access_out_of_bounds_is_not_done(found):
    cases = found["cases"]
    assert cases["store_past_the_end"]["results"] == [[1.0] * 10 + [0.0] * 6]
    assert cases["neighbour_row"]["results"] == [[[0] * 8] * 4]
    assert cases["atomics_past_the_end"]["results"] == [[1, 1], [1, 1, 1]]
    assert cases["cas_past_the_end"]["results"] == [[5, 1, 5]]
    assert cases["into_another_argument"]["results"][0][8] == sum(range(8))


def test_a_race_names_both_lines(found):
    load, store = sorted(marked_lines()["lost_update"])
    [first, second] = found["cases"]["lost_update"]["faults"]
    assert (first["line"], second["line"]) == (load, store)
    assert f"{SCRIPT.name}:{store}" in first["what"]


def test_only_bytes_that_overlap_race(found):
    texts = found["cases"]["half_a_word"]["texts"]
    assert not any("(2, 0, 0)" in text for text in texts)


def test_a_fault_is_told_once_and_counted(found):
    assert [f["launches"] for f in found["cases"]["two_bugs"]["faults"]] == [3, 3, 3]
    assert found["cases"]["two_bugs"]["texts"][0].endswith("(in 3 launches)")


def test_the_interpreter_is_as_before(found):
    assert found["restored"]
    raising = found["raising"]
    assert all(value for key, value in raising.items() if key.startswith("restored"))


def test_raises_at_the_first_fault(found):
    raising = found["raising"]
    assert raising["raised"].startswith("out of bounds in _fill_kernel")
    assert raising["stored"] == [1.0] * 8 + [0.0] * 8  # not even its allowed lanes
    assert raising["raised again"] == raising["raised"] + " (in 2 launches)"
    assert raising["raised in another order"].startswith("order in _exchange_kernel")
    assert raising["kept"] == [3, 0]  # of the natural order
    assert raising["two"] == "another Sanitizer is in use; leave it first"


def test_an_error_of_a_kernel_is_said(found):
    failing = found["failing"]
    assert "a mistake of the kernel" in failing["message"]
    fault, problem = failing["checked"]
    assert fault.startswith("order in _exchange_kernel")
    assert problem.startswith("_failing_kernel: failed: ")
    assert "a mistake of the kernel" in problem


def test_other_orders_for_so_many_launches_of_a_size(found):
    """Six launches, three of each of two sizes: all, reordered, sizes."""
    assert found["reordering"] == {"0": [6, 0, 2], "2": [6, 4, 2], "9": [6, 6, 2]}


def test_memory_that_it_cannot_watch(found):
    """The launch runs, the reason is kept, and the next launch is watched."""
    elsewhere = found["elsewhere"]
    assert elsewhere["result"] == [3]
    assert elsewhere["problems"] == {
        "_exchange_kernel": "not watched: y_ptr is not in this process's memory",
        "_claim_kernel": "",
    }
    assert elsewhere["faults"] == ["_claim_kernel"]


def test_on_the_pretend_device(found):
    for seen in found["on a device"]:
        [fault] = seen["faults"]
        assert "store of 4 bytes at byte 24 of y_ptr (float32[6])" in fault
        assert seen["result"] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
        assert seen["launches"] == 1


def test_wide_blocks_cost_a_few_times_the_three_runs(found):
    """Measured 5 to 6 times one unwatched run, with three runs of it in it."""
    wide = found["wide"]
    assert wide["faults"] == []
    assert wide["watched"] < 15 * wide["unwatched"]


def test_needs_the_interpreter():
    script = """
        from vllm_ext.prove.sanitizer import Sanitizer
        from vllm_ext_cpulane.engine import report

        try:
            Sanitizer().__enter__()
        except RuntimeError as error:
            report(str(error))
    """
    said = run_script(script, {"TRITON_INTERPRET": "0"})
    assert said == (
        "kernels are compiled in this process; start it with TRITON_INTERPRET=1"
    )


# -- vLLM --------------------------------------------------------------------------

FOR_V1 = ("min_tokens_restore", "v1_last_token", "v1_pinned_mask")
NOT_LAUNCHED = {"_post_update_num_computed_tokens_kernel", "_expand_idx_mapping_kernel"}


def test_stock_kernels_and_patches():
    """Two engines decode; no kernel has a fault, and what did not run is said."""
    said = []
    judged = {verdict.subject: verdict for verdict in races.verdicts(said.append)}
    kernels = {name for name in judged if name.startswith("stock ")}
    unproven = {
        name: verdict.detail
        for name, verdict in judged.items()
        if verdict.outcome != "proven on CPU"
    }
    assert unproven == {
        **{f"stock {name}": "not launched in this decode" for name in NOT_LAUNCHED},
        **dict.fromkeys(FOR_V1, "not called in a decode of Model Runner V2"),
        "step_graph": "left all to stock: a request is new or resumed",
    }
    assert len(kernels) >= 29
    assert set(judged) - kernels == {patch.name for patch in SERIES}
    assert not any("of one program" in verdict.detail for verdict in judged.values())
    assert re.fullmatch(
        r"\d+ launches, \d+ sizes, in 3 orders",
        judged["stock _gumbel_sample_kernel"].detail,
    )
    [stock] = [text for text in said if text.startswith("the stock engine: ")]
    assert re.fullmatch(r".*: \d+ launches of 27 kernels, 0 faults", stock)


def test_a_bug_in_a_launch_of_the_engine():
    """One program too many for the temperatures reads a row that is not there."""
    script = """
        from triton.runtime.interpreter import GridExecutor

        from vllm_ext.prove import races
        from vllm_ext_cpulane.engine import report

        stock = GridExecutor.__init__

        def init(self, fn, arg_names, grid, *rest):
            if fn.__name__ == "_temperature_kernel":
                grid = (grid[0] + 1, *grid[1:])
            stock(self, fn, arg_names, grid, *rest)

        GridExecutor.__init__ = init
        report(races.decode(steps=2))
    """
    lane = {**lane_environment("interpret"), "VEXT": "0"}
    found = run_script(script, lane)
    [verdict] = [
        verdict
        for verdict in races.kernel_verdicts(found)
        if verdict.subject == "stock _temperature_kernel"
    ]
    assert verdict.outcome == "not proven"
    assert "out of bounds in _temperature_kernel at sample/gumbel.py:" in verdict.detail
    assert "load of 8 bytes at byte 16 of expanded_idx_mapping_ptr (int64[2])" in (
        verdict.detail
    )
    assert verdict.fault
    assert {fault["kernel"] for fault in found["faults"]} == {"_temperature_kernel"}


PROVEN = "proven on CPU", False
UNKNOWN = "not proven", False
FAULT = "not proven", True


def found_in(
    faults: tuple[str, ...] = (), stopped: str = "", calls: int = 3, **kernel: object
) -> dict:
    """What a decode finds that launches one kernel, ``_k``."""
    watched = {"launches": 4, "reordered": 4, "sizes": 1, "problem": "", **kernel}
    return {
        "kernels": {"_k": watched},
        "faults": [
            {"kernel": "_k", "key": ["race", "_k", name, 1], "text": f"race in {name}"}
            for name in faults
        ],
        "patches": [
            {
                **{"name": patch.name, "state": "in use", "reason": ""},
                **{"calls": calls, "aside": {}},
            }
            for patch in SERIES
        ],
        "stopped": stopped,
    }


@pytest.mark.parametrize(
    ("found", "outcome", "detail"),
    [
        (found_in(), PROVEN, "4 launches, 1 size, in 3 orders"),
        (
            found_in(reordered=3, sizes=2),
            PROVEN,
            "4 launches, 2 sizes, 3 of them in 3 orders",
        ),
        (
            found_in(launches=1, reordered=0),
            PROVEN,
            "1 launch, 1 size, of one program each",
        ),
        (found_in(("a", "b", "c")), FAULT, "race in a; and 2 more"),
        (found_in(launches=0), UNKNOWN, "not launched in this decode"),
        (found_in(problem="not\nwatched"), UNKNOWN, "not watched"),
    ],
)
def test_verdict_of_a_kernel(found, outcome, detail):
    [verdict] = races.kernel_verdicts(found)
    assert (verdict.instrument, verdict.subject) == ("races", "stock _k")
    assert (verdict.outcome, verdict.fault, verdict.detail) == (*outcome, detail)


def test_a_decode_that_stops_is_not_proven():
    kernel, step = races.kernel_verdicts(found_in(stopped="ValueError: no"))
    assert kernel.outcome == "proven on CPU"
    assert step.subject == "stock decode step"
    assert (step.outcome, step.fault, step.detail) == (
        *FAULT,
        "stopped: ValueError: no",
    )
    patches = races.patch_verdicts(found_in(), found_in(stopped="no"), {})
    assert {(each.detail, each.fault) for each in patches} == {("stopped: no", True)}


def test_a_fault_is_laid_at_the_patch_that_has_it_alone():
    """Stock's own faults are no patch's."""
    stock, patched = found_in(("stock's",)), found_in(("stock's", "new"))
    alone = {patch.name: found_in(("stock's",)) for patch in SERIES}
    alone[SERIES[1].name] = patched
    judged = races.patch_verdicts(stock, patched, alone)
    details = {each.subject: each.detail for each in judged if "not" in each.outcome}
    assert details == {SERIES[1].name: "race in new"}
    assert judged[0].outcome == "proven on CPU"
    assert judged[0].detail == "3 calls; 4 launches of 1 kernel with all patches on"
    assert [each.subject for each in judged if each.fault] == [SERIES[1].name]


def test_a_fault_of_patches_together_is_laid_at_all():
    stock, patched = found_in(), found_in(("new",))
    judged = races.patch_verdicts(stock, patched, {SERIES[0].name: stock})
    assert {(each.outcome, each.fault, each.detail) for each in judged} == {
        (*FAULT, "with all patches on, though with none alone: race in new")
    }


def test_a_patch_that_did_not_run_is_not_proven():
    idle = found_in(calls=0)
    judged = races.patch_verdicts(idle, idle, {})
    assert {(each.outcome, each.fault) for each in judged} == {UNKNOWN}
    skipped = found_in()
    skipped["patches"][0] |= {"state": "skipped", "reason": "f changed"}
    skipped["patches"][1]["aside"] = {"drafts": 2, "prefill": 1}
    skipped["patches"][2]["aside"] = {"drafts": 2}
    skipped["patches"].pop()
    first, second, third, *_, last = races.patch_verdicts(found_in(), skipped, {})
    assert (second.outcome, second.fault) == UNKNOWN
    assert second.detail == "left all to stock: drafts"
    assert third.outcome == "proven on CPU"
    assert (first.outcome, first.fault) == UNKNOWN
    assert first.detail == "skipped: f changed"
    assert (last.outcome, last.fault) == UNKNOWN


def test_an_engine_that_fails_is_a_finding():
    class Failing:
        name = "the stock engine"

        def ready(self, timeout):
            return bool(said)

        def hear(self, timeout):
            raise ChildError("it ended with status 1; its last lines:\n | a\n | No: b")

    said = []
    found = races._hear(Failing(), said.append)
    assert found["stopped"] == "it ended with status 1; its last lines: No: b"
    assert said == [
        "the stock engine boots or decodes (20 s)",
        "the stock engine: 0 launches of 0 kernels, 0 faults",
    ]


def test_a_fault_is_searched_for_patch_by_patch(monkeypatch):
    """The engines are played: those with the third patch on have a fault."""
    culprit = SERIES[2].name

    def hear(patches, say):
        return found_in(("new",) if culprit in patches else ())

    monkeypatch.setattr(races, "_start", lambda stack, lane, patches: patches)
    monkeypatch.setattr(races, "_hear", hear)
    said = []
    judged = races.verdicts(said.append)
    assert [each.subject for each in judged if each.fault] == [culprit]
    assert said[1:] == [f"faults with patches on: {each.name} alone" for each in SERIES]
