"""The four variables and their twin in ``--additional-config``."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_ext.settings import CONFIG_KEYS, VARIABLES, from_config, parse

SERIES = {"one": True, "two": True, "three": False}


def read(**environ: str):
    return parse(environ, SERIES)


def test_nothing_set_is_the_defaults():
    chosen = read()
    assert chosen.enabled
    assert chosen.patches == ("one", "two")
    assert not chosen.strict
    assert chosen.state_dir is None
    assert chosen.problems == ()


@pytest.mark.parametrize(
    ("text", "patches"),
    [
        ("two", ("two",)),
        ("three,one", ("one", "three")),  # in the order of the series
        ("+three", ("one", "two", "three")),
        ("-one", ("two",)),
        (" +three , -one,", ("two", "three")),
        ("one,-one", ()),
        ("one,+three", ("one", "three")),
        ("-one,-two", ()),
        ("", ("one", "two")),
    ],
)
def test_choosing_patches(text, patches):
    chosen = read(VEXT_PATCHES=text)
    assert chosen.patches == patches
    assert chosen.problems == ()


@pytest.mark.parametrize(
    ("text", "patches"),
    [
        ("four", ()),
        ("one,four,five", ("one",)),
        ("-four", ("one", "two")),
        ("+", ("one", "two")),
        ("+-one", ("one", "two")),
    ],
)
def test_an_unknown_name_gets_one_line_and_the_rest_holds(text, patches):
    chosen = read(VEXT_PATCHES=text)
    assert chosen.patches == patches
    (line,) = chosen.problems
    assert "known are one, two, three" in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("text", "enabled"), [("0", False), ("off", False), ("1", True), ("True", True)]
)
def test_the_switch(text, enabled):
    assert read(VEXT=text).enabled is enabled


def test_a_value_that_is_neither_gets_one_line_and_the_default():
    chosen = read(VEXT="maybe", VEXT_STRICT="2", VEXT_STATE_DIR="/some/where")
    assert chosen.enabled
    assert not chosen.strict
    assert chosen.state_dir == Path("/some/where")
    assert len(chosen.problems) == 2
    assert "VEXT=maybe" in chosen.problems[0]


def test_a_form_of_step_graph_that_is_none_is_said():
    assert read(VEXT_STEP_GRAPH="Mono").problems == ()
    assert read(VEXT_STEP_GRAPH="bracketed").problems == ()
    (line,) = read(VEXT_STEP_GRAPH="one").problems
    assert "taken as bracketed" in line


def test_additional_config_stands_for_the_variables():
    ours = {"enabled": False, "patches": ["one", "-two"], "strict": 1, "state_dir": "x"}
    assert from_config({"vllm_ext": ours, "other": 1}) == (
        {
            "VEXT": "0",
            "VEXT_PATCHES": "one,-two",
            "VEXT_STRICT": "1",
            "VEXT_STATE_DIR": "x",
        },
        [],
    )
    assert set(CONFIG_KEYS.values()) == set(VARIABLES)


@pytest.mark.parametrize("config", [None, {}, {"other": 1}, "text", object()])
def test_somebody_elses_additional_config_is_none_of_ours(config):
    assert from_config(config) == ({}, [])


@pytest.mark.parametrize(
    "config",
    [
        {"vllm_ext": ["one"]},
        {"vllm_ext": {"patch": "one"}},
        {"vllm_ext": {"patches": {"one": True}}},
        {"vllm_ext": {"strict": None}},
        {"vllm_ext": {"patches": []}},
    ],
)
def test_what_is_not_understood_gets_one_line(config):
    variables, problems = from_config(config)
    assert variables == {}
    (line,) = problems
    assert line.startswith("additional_config.vllm_ext")
