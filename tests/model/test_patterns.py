"""Which paths a pattern matches, whatever characters the names of modules hold."""

import pytest
from torch import nn

import ipca
from ipca.model.apply import adapted_layers
from ipca.model.targets import _matches_any, matches


@pytest.mark.parametrize(
    ("pattern", "name", "wanted"),
    [
        ("a.b", "a.b", True),
        ("b", "a.b", True),
        ("b", "a.bb", False),
        ("b", "a.cb", False),
        ("a", "a.b", False),
        (r"a\..", "a.b", True),
        ("a.b", "axb", True),  # as a regular expression
        ("", "a", False),
    ],
)
def test_a_pattern_is_a_path_its_end_or_a_whole_regular_expression(pattern, name, wanted):
    assert matches(pattern, name) is wanted


def test_excluding_a_module_excludes_what_it_contains():
    assert _matches_any(["a"], "a.b.c")
    assert _matches_any([r"a\.\w"], "a.b.c")
    assert not _matches_any(["c.d", "b.c.d"], "a.b.c")


def test_a_name_that_is_no_regular_expression_is_a_name_still():
    model = nn.Module()
    for name in ("a", "b*[", "c("):
        model.add_module(name, nn.Linear(6, 6))
    ipca.apply_pc(model, rank=2, targets=["b*[", "c("], rank_pattern={"c(": 3}, progress=False)
    assert {name: layer.rank for name, layer in adapted_layers(model).items()} == {"b*[": 2, "c(": 3}
