import dataclasses
import json
import math
import re

import pytest
import torch

from ipca import Window
from ipca.model import AdapterSettings

FULL = {
    "rank": 8,
    "window": "energy=0.9",
    "alpha": 12.5,
    "form": "intact",
    "dropout": 0.1,
    "targets": ("query", r"encoder\.layer\.[0-3]\..*dense"),
    "exclude": ("classifier",),
    "modules_to_save": ("head", "pooler"),
    "rank_pattern": {"query": 4, "value": 2},
    "window_pattern": {"key": "start=7"},
    "alpha_pattern": {"value": 3.0},
    "adapter_dtype": "bfloat16",
    "tol": 1e-7,
}


def test_the_defaults():
    config = AdapterSettings()
    assert (config.rank, config.window, config.alpha, config.form) == (16, "middle", None, "residual")
    assert (config.dropout, config.targets, config.adapter_dtype, config.tol) == (0.0, "all-linear", None, "default")
    assert config.exclude == config.modules_to_save == ()
    assert config.rank_pattern == config.window_pattern == config.alpha_pattern == {}
    assert AdapterSettings.create() == config == AdapterSettings.from_json("{}")


def test_every_field_survives_json():
    config = AdapterSettings(**FULL)
    assert set(FULL) == {field.name for field in dataclasses.fields(AdapterSettings)}
    assert {name: getattr(config, name) for name in FULL} == FULL
    assert AdapterSettings.from_json(config.to_json()) == config
    assert json.loads(config.to_json())["targets"] == list(FULL["targets"])


@pytest.mark.parametrize(("name", "value"), FULL.items(), ids=FULL)
def test_each_field_alone_survives_json(name, value):
    config = AdapterSettings(**{name: value})
    assert config != AdapterSettings()
    assert AdapterSettings.from_json(config.to_json()) == config


@pytest.mark.parametrize("targets", ["all-linear", "query", ["query"], ("query", "value"), []])
def test_targets_of_one_text_or_several(targets):
    config = AdapterSettings(targets=targets)
    assert config.targets == (targets if isinstance(targets, str) else tuple(targets))
    assert AdapterSettings.from_json(config.to_json()) == config


@pytest.mark.parametrize("name", ["exclude", "modules_to_save"])
def test_a_single_text_is_one_pattern(name):
    assert getattr(AdapterSettings(**{name: "head"}), name) == ("head",)
    assert getattr(AdapterSettings(**{name: ["head", "pooler"]}), name) == ("head", "pooler")


@pytest.mark.parametrize(
    ("window", "text"),
    [
        (" Middle ", "middle"),
        ("ERANK", "erank"),
        (5, "start=5"),
        ("start=005", "start=5"),
        (0.25, "0.25"),
        (Window.minor(16), "minor"),
        (Window(256, 16), "start=256"),
        (Window.at(1 / 3, 16), str(1 / 3)),
    ],
)
def test_the_window_is_kept_in_its_text_form(window, text):
    assert AdapterSettings(window=window).window == text
    assert AdapterSettings.from_json(AdapterSettings(window=window).to_json()).window == text


@pytest.mark.parametrize("window", [Window.middle(4), Window(7, 4), Window.at(0.3, 4), Window.energy(0.9, 4)], ids=str)
def test_create_takes_the_rank_of_a_window(window):
    config = AdapterSettings.create(window=window, alpha=2.0, targets=["query"])
    assert config == AdapterSettings(rank=4, window=window.text, alpha=2.0, targets=("query",))
    assert Window(config.window, config.rank) == window
    assert AdapterSettings.create(window=window, rank=4, alpha=2.0, targets=["query"]) == config


@pytest.mark.parametrize("window", ["minor", 0.25, 7, "start=7", "erank"])
def test_create_takes_a_rule_beside_a_rank(window):
    assert AdapterSettings.create(window=window, rank=3) == AdapterSettings(rank=3, window=Window(window, 3).text)
    assert AdapterSettings.create(window=window) == AdapterSettings(window=Window(window, 16).text)


def test_create_refuses_two_ranks():
    with pytest.raises(ValueError, match=r"rank=4\) has rank 4, but rank=5 was given too; give one of them"):
        AdapterSettings.create(window=Window.middle(4), rank=5)


def test_create_names_unknown_options_and_the_known_ones():
    with pytest.raises(
        TypeError, match="unknown option lora_alpha, r; AdapterSettings has adapter_dtype, alpha,"
    ) as error:
        AdapterSettings.create(r=8, lora_alpha=16)
    assert all(name in str(error.value) for name in FULL)


def test_create_validates_what_it_builds():
    with pytest.raises(ValueError, match="form must be one of residual, intact; got 'lora'"):
        AdapterSettings.create(window=Window.middle(4), form="lora")


def test_a_config_is_frozen_and_shares_nothing_with_its_caller():
    ranks, targets = {"query": 4}, ["query"]
    config = AdapterSettings(rank_pattern=ranks, targets=targets)
    ranks["query"] = 0
    targets.append("value")
    assert config == AdapterSettings(rank_pattern={"query": 4}, targets=("query",))
    with pytest.raises(dataclasses.FrozenInstanceError, match="rank"):
        config.rank = 3
    assert config.rank == 16


def test_replace_validates_again():
    config = AdapterSettings(**FULL)
    assert dataclasses.replace(config, rank=2).rank == 2
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        dataclasses.replace(config, rank=0)
    assert config == AdapterSettings(**FULL)


INVALID = [
    ({"rank": 0}, ValueError, "rank must be at least 1, got 0"),
    ({"rank": -3}, ValueError, "rank must be at least 1, got -3"),
    ({"rank": "8"}, TypeError, "rank must be an int, got '8'"),
    ({"rank": 8.0}, TypeError, "rank must be an int, got 8.0"),
    ({"rank": True}, TypeError, "rank must be an int, got True"),
    ({"rank_pattern": {"query": 0}}, ValueError, "rank must be at least 1, got 0"),
    ({"rank_pattern": {"query": 2.5}}, TypeError, "rank must be an int, got 2.5"),
    ({"window": "center"}, ValueError, "Unknown window 'center'"),
    ({"window": 1.5}, ValueError, "The fraction in window 1.5 must lie in [0, 1]"),
    ({"window": -1}, ValueError, "A window cannot start at -1"),
    ({"window": None}, TypeError, "got None"),
    ({"window": True}, TypeError, "got True"),
    ({"window_pattern": {"query": "center"}}, ValueError, "Unknown window 'center'"),
    ({"window_pattern": {"query": None}}, TypeError, "got None"),
    *[({"alpha": bad}, ValueError, f"alpha must be positive, got {bad}") for bad in (0, -1.0, math.nan, math.inf)],
    *[({"alpha_pattern": {"q": bad}}, ValueError, f"alpha must be positive, got {bad}") for bad in (0, -2, math.nan)],
    ({"form": "lora"}, ValueError, "form must be one of residual, intact; got 'lora'"),
    ({"form": None}, ValueError, "form must be one of residual, intact; got None"),
    *[
        ({"dropout": bad}, ValueError, f"dropout must lie in [0, 1), got {bad}")
        for bad in (1.0, -0.1, 2, math.nan, math.inf)
    ],
    ({"targets": None}, TypeError, "targets must be strings, got None"),
    ({"dropout": "0.1"}, TypeError, "dropout must be a number, got '0.1'"),
    ({"alpha": True}, TypeError, "alpha must be a number, got True"),
    ({"alpha_pattern": {"a": "x"}}, TypeError, "alpha must be a number, got 'x'"),
    ({"rank_pattern": None}, TypeError, "rank_pattern must be a dictionary of patterns, got None"),
    ({"rank_pattern": {1: 2}}, TypeError, "rank_pattern must be a dictionary of patterns, got {1: 2}"),
    ({"tol": 5}, ValueError, "tol must be a number in [1e-12, 1), which float64 can reach; got 5"),
    ({"targets": ["query", 3]}, TypeError, "targets must be strings, got ['query', 3]"),
    ({"exclude": [None]}, TypeError, "exclude must be strings, got [None]"),
    ({"modules_to_save": [b"head"]}, TypeError, "modules_to_save must be strings, got [b'head']"),
    ({"adapter_dtype": "int8"}, ValueError, "adapter_dtype must name a float dtype such as 'float32'; got 'int8'"),
    ({"adapter_dtype": torch.float32}, ValueError, "such as 'float32'; got torch.float32"),
    ({"tol": "best"}, ValueError, "tol must be a number or one of fast, default, exact; got 'best'"),
]


@pytest.mark.parametrize(("options", "error", "message"), INVALID, ids=[str(options) for options, *_ in INVALID])
def test_an_invalid_field(options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        AdapterSettings(**options)
    with pytest.raises(error, match=re.escape(message)):
        AdapterSettings.create(**options)


@pytest.mark.parametrize("options", [{"form": "lora"}, {"rank": "8"}, {"alpha": math.nan}, {"tol": "best"}], ids=str)
def test_json_is_validated_as_the_constructor_is(options):
    with pytest.raises((TypeError, ValueError), match=f"^{next(iter(options))} must be"):
        AdapterSettings.from_json(json.dumps(options))


@pytest.mark.parametrize("text", ["", "{", "{'rank': 3}", "rank"])
def test_text_that_is_no_json(text):
    with pytest.raises(ValueError, match="not a AdapterSettings in JSON: "):
        AdapterSettings.from_json(text)


@pytest.mark.parametrize(("text", "kind"), [("[]", "list"), ("3", "int"), ("null", "NoneType"), ('"middle"', "str")])
def test_json_that_is_no_object(text, kind):
    with pytest.raises(ValueError, match=f"a AdapterSettings in JSON is an object, got {kind}"):
        AdapterSettings.from_json(text)


def test_unknown_keys_in_json_are_named():
    text = json.dumps({**json.loads(AdapterSettings().to_json()), "r": 8, "lora_alpha": 16})
    with pytest.raises(ValueError, match="unknown keys in AdapterSettings: lora_alpha, r"):
        AdapterSettings.from_json(text)
