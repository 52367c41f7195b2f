import dataclasses
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
    "form": "residual",
    "dropout": 0.1,
    "targets": ("query", r"encoder\.layer\.[0-3]\..*dense"),
    "exclude": ("classifier",),
    "modules_to_save": ("head", "pooler"),
    "rank_pattern": {"query": 4, "value": 2},
    "window_pattern": {"key": "start=7"},
    "alpha_pattern": {"value": 3.0},
    "adapter_dtype": "bfloat16",
    "tol": 1e-7,
    "train": "B",
    "magnitude": 2.0,
}


def test_the_defaults():
    config = AdapterSettings()
    assert (config.rank, config.window, config.alpha, config.form) == (16, "middle", None, "intact")
    assert (config.dropout, config.targets, config.adapter_dtype, config.tol) == (0.0, "all-linear", None, "default")
    assert config.exclude == config.modules_to_save == ()
    assert config.rank_pattern == config.window_pattern == config.alpha_pattern == {}


def test_every_field_is_kept():
    config = AdapterSettings(**FULL)
    assert set(FULL) == {field.name for field in dataclasses.fields(AdapterSettings)}
    assert {name: getattr(config, name) for name in FULL} == FULL


@pytest.mark.parametrize(("name", "value"), FULL.items(), ids=FULL)
def test_each_field_counts(name, value):
    assert AdapterSettings(**{name: value}) != AdapterSettings()


@pytest.mark.parametrize("targets", ["all-linear", "query", ["query"], ("query", "value"), []])
def test_targets_of_one_text_or_several(targets):
    assert AdapterSettings(targets=targets).targets == (targets if isinstance(targets, str) else tuple(targets))


@pytest.mark.parametrize("name", ["exclude", "modules_to_save"])
def test_a_single_text_is_one_pattern(name):
    assert getattr(AdapterSettings(**{name: "head"}), name) == ("head",)
    assert getattr(AdapterSettings(**{name: ["head", "pooler"]}), name) == ("head", "pooler")


@pytest.mark.parametrize(
    ("window", "text"),
    [
        (" Middle ", "middle"),
        ("ERANK", "erank"),
        ("start=005", "start=5"),
        (0.25, "0.25"),
        (Window.minor(16), "minor"),
        (Window(256, 16), "start=256"),
        (Window.at(1 / 3, 16), str(1 / 3)),
    ],
)
def test_the_window_is_kept_in_its_text_form(window, text):
    assert AdapterSettings(window=window).window == text


@pytest.mark.parametrize("window", [Window.middle(4), Window(7, 4), Window.at(0.3, 4), Window.energy(0.9, 4)], ids=str)
def test_a_window_brings_its_rank(window):
    config = AdapterSettings(window=window, alpha=2.0, targets=["query"])
    assert config == AdapterSettings(rank=4, window=window.text, alpha=2.0, targets=("query",))
    assert Window(config.window, config.rank) == window
    assert AdapterSettings(window=window, rank=4, alpha=2.0, targets=["query"]) == config


@pytest.mark.parametrize("window", ["minor", 0.25, "start=7", "erank"])
def test_a_rule_stands_beside_a_rank(window):
    text = str(window)
    assert AdapterSettings(window=window, rank=3) == AdapterSettings(rank=3, window=Window(text, 3).text)
    assert AdapterSettings(window=window) == AdapterSettings(window=Window(text, 16).text)


def test_two_ranks_are_refused():
    with pytest.raises(ValueError, match=r"rank=4\) has rank 4, but rank=5 was given too; give one of them"):
        AdapterSettings(window=Window.middle(4), rank=5)


def test_a_window_in_a_pattern_has_a_rank_that_layers_train():
    assert AdapterSettings(rank=4, window_pattern={"a": Window(5, 4)}).window_pattern == {"a": "start=5"}
    config = AdapterSettings(rank=4, rank_pattern={"a": 8}, window_pattern={"a": Window(5, 8)})
    assert config.window_pattern == {"a": "start=5"}
    words = r"window_pattern\['a'\] is .*rank=8\), but layers train 4 .* set rank_pattern\['a'\] or rank, .*'start=5'"
    for ranks in ({}, {"b": 8}):
        with pytest.raises(ValueError, match=words):
            AdapterSettings(rank=4, rank_pattern=ranks, window_pattern={"a": Window(5, 8)})


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "bfloat16"), ("float64", "float64"), (None, None)])
def test_the_dtype_of_the_factors_by_its_name_or_itself(dtype, name):
    config = AdapterSettings(adapter_dtype=dtype)
    assert config.adapter_dtype == name
    assert config.factor_dtype(torch.float16) == (torch.float32 if name is None else getattr(torch, name))


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
    ({"window": 1.5}, ValueError, "The fraction in window '1.5' must lie in [0, 1]"),
    ({"window": -1}, ValueError, "A window cannot start at -1"),
    ({"window": 1}, ValueError, "window 1 is ambiguous, an index or a fraction: write 'start=1' for the index, '1.0'"),
    ({"window": None}, TypeError, "got None"),
    ({"window": True}, TypeError, "got True"),
    ({"window_pattern": {"query": "center"}}, ValueError, "Unknown window 'center'"),
    ({"window_pattern": {"query": None}}, TypeError, "got None"),
    *[({"alpha": bad}, ValueError, f"alpha must be positive, got {bad}") for bad in (0, -1.0, math.nan, math.inf)],
    *[({"alpha_pattern": {"q": bad}}, ValueError, f"alpha must be positive, got {bad}") for bad in (0, -2, math.nan)],
    ({"form": "lora"}, ValueError, "form must be one of intact, residual; got 'lora'"),
    ({"form": None}, ValueError, "form must be one of intact, residual; got None"),
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
    ({"adapter_dtype": torch.int8}, ValueError, "such as 'float32'; got 'int8'"),
    ({"tol": "best"}, ValueError, "tol must be a number or one of fast, default, exact; got 'best'"),
]


@pytest.mark.parametrize(("options", "error", "message"), INVALID, ids=[str(options) for options, *_ in INVALID])
def test_an_invalid_field(options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        AdapterSettings(**options)
