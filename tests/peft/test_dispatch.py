"""Layers around base layers: which get one, and errors that begin with the layer's path."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn.utils import parametrize
from transformers import Llama4TextConfig
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.llama4.modeling_llama4 import Llama4Router
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding
from transformers.pytorch_utils import Conv1D

from ipca.peft import PCConfig
from tests.helpers.layer_kinds import mixtral
from tests.helpers.peft_cases import disturb, off, wrap
from tests.helpers.peft_models import Small, llama


class Odd(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.fine = layer, nn.Linear(8, 8)


class Twice(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class TwiceConv1D(Conv1D):
    def forward(self, x):
        return 2 * super().forward(x)


class Causal(nn.Conv1d):
    def forward(self, x):
        return super().forward(nn.functional.pad(x, (2, 0)))


class Standardized(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight - weight.mean(), bias)


class Named(nn.Linear):
    label = "mine"


class NamedConv(nn.Conv2d):
    label = "mine"


class Scaled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def parametrized(layer):
    parametrize.register_parametrization(layer, "weight", Scaled())
    return layer


def parallel():
    layer = nn.Linear(8, 8)
    layer._hf_tp_plan = "colwise"
    return layer


LAYERS = {
    "grouped": (lambda: nn.Conv2d(4, 8, 3, groups=2), "PEFT's format knows no convolution with groups=2"),
    "dilated": (lambda: nn.Conv1d(4, 8, 3, dilation=2), r"knows no convolution with dilation=\(2,\)"),
    "circular": (lambda: nn.Conv1d(4, 8, 3, padding_mode="circular"), "convolution with padding_mode='circular'"),
    "max_norm": (lambda: nn.Embedding(9, 8, max_norm=1.0), r"max_norm=1\.0 changes the embedding's weight"),
    "attention": (lambda: nn.MultiheadAttention(8, 2), "nn.MultiheadAttention reads its weights without calling"),
    "its projection": (lambda: nn.MultiheadAttention(8, 2).out_proj, "reads its weights without calling"),
    "parallel": (parallel, "it is tensor parallel, and no rank has the weight to decompose"),
    "parametrized": (lambda: parametrized(nn.Linear(8, 8)), "its weight is computed from other parameters"),
    "parametrized convolution": (lambda: parametrized(nn.Conv1d(4, 8, 3)), "its weight is computed from other param"),
    "normed": (lambda: nn.utils.weight_norm(nn.Conv1d(4, 8, 3)), "its weight is computed from other parameters"),
    "twice": (lambda: Twice(8, 8), "a Twice may compute something else than its base class Linear"),
    "twice, transposed": (lambda: TwiceConv1D(8, 8), "a TwiceConv1D may compute .* than its base class Conv1D"),
    "causal": (lambda: Causal(4, 8, 3), "a Causal may compute something else than its base class Conv1d"),
    "standardized": (lambda: Standardized(4, 8, 3), "a Standardized may compute .* than its base class Conv2d"),
    "positions": (lambda: OPTLearnedPositionalEmbedding(9, 8), "may compute .* than its base class Embedding"),
    "router": (lambda: Llama4Router(Llama4TextConfig(hidden_size=8, num_local_experts=8)), "a Llama4Router may"),
    "bilinear": (lambda: nn.Bilinear(8, 8, 8), "a Bilinear has no weight matrix that PEFT's format knows"),
    "norm": (lambda: nn.LayerNorm(8), "a LayerNorm has no weight matrix that PEFT's format knows"),
    "too small": (lambda: nn.Linear(8, 3), r"needs 4 singular values, but there are only 3"),
    "not finite": (lambda: broken(nn.Linear(8, 8)), "NaN"),
}


def broken(layer):
    with torch.no_grad():
        layer.weight[0, 0] = torch.nan
    return layer


@pytest.mark.parametrize("name", LAYERS)
def test_layers_that_no_window_fits_are_refused_by_path(name):
    build, words = LAYERS[name]
    with pytest.raises(ValueError, match=rf"^layer: .*{words}"):
        get_peft_model(Odd(build()), PCConfig(r=4, target_modules=["layer"]))


SAME = {
    "named": (lambda: Named(8, 8), lambda: torch.randn(3, 8)),
    "named convolution": (lambda: NamedConv(4, 8, 3), lambda: torch.randn(2, 4, 5, 5)),
    "falcon": (lambda: FalconLinear(8, 8), lambda: torch.randn(3, 8)),
    "bart": (lambda: BartScaledWordEmbedding(9, 8, 1, embed_scale=3.5), lambda: torch.arange(9)),
}


@pytest.mark.parametrize("name", SAME)
def test_subclasses_that_compute_the_same_have_a_window(name):
    build, x = SAME[name][0], SAME[name][1]()
    model = get_peft_model(Odd(build()), PCConfig(r=4, target_modules=["layer"]))
    layer = model.base_model.model.layer
    y = layer(x)
    assert torch.equal(layer.get_base_layer()(x), y)
    disturb(model)
    y = layer(x)
    assert off(y, layer.get_base_layer()(x)) > 1e-2
    assert off(model.merge_and_unload().layer(x), y) < 1e-5


def test_all_linear_leaves_out_subclasses_that_may_compute_something_else():
    base, x = nn.Sequential(nn.Linear(8, 8), Twice(8, 8), Named(8, 8)), torch.randn(3, 8)
    with pytest.warns(UserWarning, match="'all-linear' leaves out 1: a Twice may compute something else") as said:
        model = get_peft_model(base, PCConfig(r=4, target_modules="all-linear"))
    assert len([each for each in said if "match" in str(each.message)]) == 0
    assert [type(layer).__name__ for layer in model.base_model.model] == ["WindowLinear", "Twice", "WindowLinear"]
    disturb(model)
    y = model(x)
    assert off(model.merge_and_unload()(x), y) < 1e-5


def test_a_weight_of_integers():
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(torch.ones(8, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"^layer: its weight is a Tensor of torch\.int8"):
        get_peft_model(Odd(layer), PCConfig(r=4, target_modules=["layer"]))


def test_a_window_behind_the_last_component():
    with pytest.raises(ValueError, match=r"^a: .*ends at 13, but there are only 12 singular values"):
        wrap(Small(), window="start=10")


def test_experts_whose_windows_start_apart():
    model = mixtral()
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[0] *= torch.linspace(1, 0, 24).square()
    config = PCConfig(r=2, window="erank", target_modules=[], target_parameters=["mlp.experts.down_proj"])
    with pytest.raises(ValueError, match=r"^model\.layers\.[01]\.mlp\.experts\.down_proj: the windows of this stack"):
        get_peft_model(model, config)


def test_dropout_on_experts_is_refused_by_peft():
    config = PCConfig(r=2, lora_dropout=0.1, target_modules=[], target_parameters=["mlp.experts.down_proj"])
    with pytest.raises(ValueError, match="dropout"):
        get_peft_model(mixtral(), config)


def test_no_layer_matches():
    with pytest.raises(ValueError, match=r"Target modules .* not found in the base model"):
        wrap(llama(), target_modules=["query"])
