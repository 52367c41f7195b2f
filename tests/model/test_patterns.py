"""What is said of a pattern that matches nothing."""

import pytest
from torch import nn

import ipca
from ipca.analysis import spectrum
from ipca.model.patterns import hint
from tests.helpers.models import Plain, snapshot

NAMES = [
    "",
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.0.mlp.up_proj",
    "lm_head",
]


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("q_prj", " Did you mean 'q_proj' or "),
        ("self_atn.q_proj", " Did you mean 'self_attn.q_proj'?"),
        (r"model\.layers\.0\.mlp\.up_prj", " Did you mean 'model.layers.0.mlp.up_proj' or "),
        (r".*\.q_prj", " Did you mean 'q_proj' or "),
        ("lmhead", " Did you mean 'lm_head'?"),
        ("q_proj,up_proj", " It is one pattern; give 'q_proj' and 'up_proj' as separate ones."),
        ("q_proj up_proj", " It is one pattern; give 'q_proj' and 'up_proj' as separate ones."),
        ("zzzz", ""),
        ("", ""),
    ],
)
def test_hints(pattern, says):
    assert hint(pattern, NAMES).startswith(says)
    assert says or hint(pattern, NAMES) == ""


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(9, 8), nn.Linear(9, 8)


WRONG = {
    "targets": ({"targets": ["q_prj"]}, r"target 'q_prj'; linear layers .*\. Did you mean 'q_proj'"),
    "one of two": ({"targets": ["v_proj", "q_prj"]}, r"Did you mean 'q_proj'"),
    "commas": ({"targets": "q_proj,v_proj"}, r"It is one pattern; give 'q_proj' and 'v_proj' as separate ones"),
    "exclude": ({"exclude": ["v_porj"]}, r"exclude 'v_porj' matches no module\. Did you mean 'v_proj'"),
    "modules_to_save": ({"modules_to_save": ["v_prj"]}, r"matches no module\. Did you mean 'v_proj'"),
    "window_pattern": ({"window_pattern": {"q_prj": "minor"}}, r"window_pattern 'q_prj' .* Did you mean 'q_proj'"),
    "rank_pattern": ({"rank_pattern": {"q_prj": 2}}, r"rank_pattern 'q_prj' .* Did you mean 'q_proj'"),
    "alpha_pattern": ({"alpha_pattern": {"q_prj": 2.0}}, r"alpha_pattern 'q_prj' .* Did you mean 'q_proj'"),
}


@pytest.mark.parametrize(("options", "says"), WRONG.values(), ids=WRONG)
def test_every_option_that_names_modules_says_what_is_near_and_changes_nothing(options, says):
    model = Named()
    before = snapshot(model)
    with pytest.raises(ValueError, match=says):
        ipca.apply_pc(model, rank=3, progress=False, **options)
    assert snapshot(model) == before


def test_spectra_say_it_too():
    with pytest.raises(ValueError, match=r"Did you mean 'head'\?"):
        spectrum(Plain(), rank=2, targets=["heads"], progress=False)
