"""Layers around base layers: which get one, and errors that begin with the layer's path."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn.utils import parametrize

from ipca.peft import PCConfig
from tests.helpers.layer_kinds import mixtral
from tests.helpers.peft_cases import wrap
from tests.helpers.peft_models import Small, llama


class Odd(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.fine = layer, nn.Linear(8, 8)


class Scaled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def parametrized():
    layer = nn.Linear(8, 8)
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
    "parametrized": (parametrized, "its weight is computed from other parameters"),
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
