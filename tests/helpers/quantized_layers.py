"""Layers with a quantized weight, of every kind that runs on a CPU, and small models of them."""

import copy

import pytest
import torch
from torch import nn

import ipca
from tests.helpers.models import Plain

BITSANDBYTES = ("nf4", "fp4", "int8")
TORCHAO = ("torchao-int8", "torchao-int4")
KINDS = (*BITSANDBYTES, *TORCHAO)


def quantized_layer(kind, weight, bias=None, **options):
    """``weight (out, in)`` quantized; ``options`` are those of bitsandbytes' 4-bit parameter."""
    out, inner = weight.shape
    if kind in TORCHAO:
        return in_torchao(kind, weight, bias)
    bnb = pytest.importorskip("bitsandbytes")
    if kind == "int8":
        layer = bnb.nn.Linear8bitLt(inner, out, bias=bias is not None, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(inner, out, bias=bias is not None, quant_type=kind)
        layer.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, quant_type=kind, module=layer, **options)
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return layer.to("cpu")  # where bitsandbytes quantizes


def in_torchao(kind, weight, bias):
    quantization = pytest.importorskip("torchao.quantization")
    by_row = quantization.PerAxis(0)
    configs = {
        "torchao-int8": quantization.Int8WeightOnlyConfig,
        "torchao-int4": lambda: quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=by_row),
    }
    return quantized_by(configs[kind](), weight, bias)


def quantized_by(config, weight, bias=None):
    """An ``nn.Linear`` quantized by a configuration of torchao."""
    quantization = pytest.importorskip("torchao.quantization")
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone(), requires_grad=False)
    quantization.quantize_(layer, config)
    return layer


def quantize(model, kind):
    """Every ``nn.Linear`` of ``model`` but its head, in place."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "head":
            parent, _, child = name.rpartition(".")
            layer = quantized_layer(kind, module.weight.detach(), module.bias.detach())
            setattr(model.get_submodule(parent), child, layer)
    return model


def quantized_model(kind="nf4"):
    """A model of two quantized layers and a plain head, its plain twin, and an input."""
    plain = Plain()
    return quantize(copy.deepcopy(plain), kind), plain, torch.randn(7, 20, requires_grad=True)


def adapt(model, **options):
    return ipca.apply_pc(model, **{"rank": 3, "form": "intact", "targets": ["a", "b"], "progress": False, **options})


def train(model):
    with torch.no_grad():
        for parameter in ipca.adapter_parameters(model):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model
