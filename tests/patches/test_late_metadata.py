"""Metadata that is built late is what stock builds, and is not built for a replay."""

import copy
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest

from vllm_ext_cpulane.engine import run_script
from vllm_ext_cpulane.environment import lane_environment

SCRIPT = Path(__file__).parent / "in_engine" / "late_metadata.py"


@pytest.fixture(scope="module")
def found():
    return run_script(SCRIPT, lane_environment("interpret") | {"VEXT": "0"})


@pytest.mark.vllm
class TestInTheEngine:
    def test_same_metadata_and_answers_as_stock(self, found):
        assert found["differ"] == []
        assert found["same answers"]
        assert found["late"] > 10

    def test_nothing_is_built_where_nobody_reads(self, found):
        assert found["built late"] == 0

    def test_other_steps_build_at_once(self, found):
        assert found["at once"] > 0
        assert found["late outside FULL"] == 0

    def test_a_builder_it_does_not_know_builds_at_once(self, found):
        assert found["unknown builder"] == [0, ["CPUAttentionBackend computes ahead"]]

    def test_known_builders_do_nothing_to_tensors(self, found):
        assert found["operations"] == []
        assert set(found["collected"]) == {
            "TritonAttentionMetadataBuilder",
            "FlashAttentionMetadataBuilder",
        }


@pytest.fixture(scope="module")
def replacement():
    from vllm_ext.patches.late_metadata import replacement

    return replacement


@pytest.fixture
def late(replacement):
    return replacement.LateMetadata(lambda: {"a": 1, "b": 2})


LOOKS = {
    "len": len,
    "bool": bool,
    "in": lambda d: "a" in d,
    "item": lambda d: d["a"],
    "get": lambda d: d.get("b"),
    "iterate": list,
    "reversed": lambda d: list(reversed(d)),
    "keys": lambda d: list(d.keys()),
    "values": lambda d: list(d.values()),
    "items": lambda d: list(d.items()),
    "equal": lambda d: d == {"a": 1, "b": 2},
    "unequal": lambda d: d != {"a": 1, "b": 2},
    "repr": repr,
    "copy": lambda d: d.copy(),
    "copy.copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda d: pickle.loads(pickle.dumps(d)),
    "dict": dict,
    "unpack": lambda d: {**d},
    "arguments": lambda d: (lambda **k: k)(**d),
    "or": lambda d: d | {"c": 3},
    "or from the right": lambda d: {"c": 3} | d,
    "update another": lambda d: (other := {}, other.update(d))[0],
    "pop": lambda d: (d.pop("a"), dict(d)),
    "popitem": lambda d: (d.popitem(), dict(d)),
    "set": lambda d: (d.__setitem__("c", 3), dict(d)),
    "delete": lambda d: (d.__delitem__("a"), dict(d)),
    "setdefault": lambda d: (d.setdefault("a", 5), dict(d)),
    "update": lambda d: (d.update(c=3), dict(d)),
    "clear": lambda d: (d.clear(), dict(d)),
}


@pytest.mark.parametrize("look", LOOKS)
def test_every_look_sees_the_whole_dict(late, look):
    assert isinstance(late, dict)
    assert LOOKS[look](late) == LOOKS[look]({"a": 1, "b": 2})


def test_it_is_built_once(replacement):
    built = []
    late = replacement.LateMetadata(lambda: built.append(1) or {"a": 1})
    assert built == []
    assert (late["a"], len(late), built) == (1, 1, [1])


def group(module="triton_attn", name="TritonAttentionMetadataBuilder", **attributes):
    kind = type(name, (), {"__module__": f"vllm.v1.attention.backends.{module}"})
    builder = kind()
    vars(builder).update({"rswa_window": None} | attributes)
    return SimpleNamespace(
        kernel_block_size=None,
        get_metadata_builder=lambda ubatch: builder,
        backend=kind,
    )


def flash(**attributes):
    stock = {"aot_schedule": False, "dcp_world_size": 1}
    return group("flash_attn", "FlashAttentionMetadataBuilder", **(stock | attributes))


def packed():
    made = group()
    made.kernel_block_size = 16
    return made


def prepare(replacement, groups, *, state=None, batch=None, mode=None, **call):
    """Whether stock ran at once for such a step."""
    from vllm.config.compilation import CUDAGraphMode
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    kind = (state or {}).pop("kind", DefaultModelState)
    model_state = object.__new__(kind)
    config = {"kv_transfer_config": None, "speculative_config": None}
    model_state.vllm_config = SimpleNamespace(**(config | (state or {})))
    model_state.model_config = SimpleNamespace(
        is_mm_prefix_lm=bool((state or {}).get("is_mm_prefix_lm"))
    )
    fields = {"dcp_local_seq_lens": None, "fast_prefill": None, "prompt_lens": None}
    ran = []
    patched = replacement.build_when_read(lambda *_, **__: ran.append(1) or {"a": 1})
    result = patched(
        model_state,
        SimpleNamespace(**(fields | (batch or {}))),
        CUDAGraphMode.FULL if mode is None else CUDAGraphMode[mode],
        *("tables", "slots", [groups], "kv cache config"),
        **({"for_capture": False} | call),
    )
    at_once = bool(ran)
    assert result == {"a": 1}
    return at_once


@pytest.mark.parametrize("groups", [[group()], [flash()], [group(), flash()]])
def test_a_replay_of_known_builders_is_late(replacement, groups):
    assert not prepare(replacement, groups)


def test_every_other_step_is_stock(replacement):
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    derived = type("Derived", (DefaultModelState,), {})
    for case in (
        {"mode": "PIECEWISE"},
        {"mode": "NONE"},
        {"for_capture": True},
        {"ubatch_idx": 0},
        {"model_specific_attn_metadata": object()},
        {"state": {"kind": derived}},
        {"state": {"kv_transfer_config": object()}},
        {"state": {"speculative_config": object()}},
        {"state": {"is_mm_prefix_lm": True}},
        {"batch": {"dcp_local_seq_lens": object()}},
        {"batch": {"fast_prefill": object()}},
        {"batch": {"prompt_lens": object()}},
    ):
        assert prepare(replacement, [group()], **case), case
    for other in (
        group(rswa_window=8),
        flash(aot_schedule=True),
        flash(dcp_world_size=2),
        flash(rswa_window=8),
        group("flashinfer", "FlashInferMetadataBuilder"),
        packed(),
    ):
        assert prepare(replacement, [group(), other])


def test_the_known_builders_are_there(replacement):
    for name in replacement.ONLY_COLLECTS:
        module, _, kind = name.rpartition(".")
        builder = getattr(__import__(module, fromlist=[kind]), kind)
        assert f"{builder.__module__}.{builder.__qualname__}" == name
