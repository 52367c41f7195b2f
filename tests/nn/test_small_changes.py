"""A change that is small beside the factors keeps its digits in 16-bit products, whatever the kind of layer."""

import pytest
import torch
from torch import nn

import ipca
from ipca.nn import ConvPC, EmbeddingPC, LinearPC, QuantizedLinearPC
from ipca.window import Window
from tests.helpers.quantized_layers import KINDS, quantized_layer

RANK, MOVED = 5, 1e-3
WINDOW = Window(3, RANK)


def relative(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


def moved(layer, dtype):
    """The layer after a step of Adam or two: its factors have moved by a thousandth."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for factor in (layer.lora_A, layer.lora_B):
            factor.add_(MOVED * torch.randn(factor.shape, generator=generator))
    assert layer.lora_A.dtype == torch.float32
    zero = torch.zeros((), dtype=dtype)
    with torch.no_grad():  # the output is the change alone
        if isinstance(layer, QuantizedLinearPC):
            layer.base_product = lambda x: zero
        else:
            layer.base_weight.zero_()
    return layer.eval()


def change(layer):
    """``scaling · (B A − B0 A0)`` in float64."""
    A, B, A0, B0 = (factor.detach().double() for factor in (layer.lora_A, layer.lora_B, layer.lora_A0, layer.lora_B0))
    return layer.scaling * (B @ A - B0 @ A0)


def exact(layer, x):
    """What the change adds to the output, in float64."""
    moved_by = change(layer)
    if isinstance(layer, EmbeddingPC):
        return moved_by.mT[x]
    if isinstance(layer, ConvPC):
        return nn.functional.conv2d(x.double(), moved_by.view(layer.base_weight.shape), padding=layer.padding)
    return x.double() @ moved_by.mT


def made(kind, dtype):
    """A layer and its input, whose values 16 bits hold."""
    torch.manual_seed(0)
    x = torch.randn(2, 40, 64).bfloat16().to(dtype)
    if kind == "linear":
        return LinearPC.from_linear(nn.Linear(64, 29, bias=False).to(dtype), WINDOW), x
    if kind == "embedding":
        return EmbeddingPC.from_layer(nn.Embedding(40, 29).to(dtype), WINDOW), torch.arange(60).view(3, 20) % 40
    if kind == "conv":
        conv = nn.Conv2d(4, 29, 3, padding=1, bias=False).to(dtype)
        return ConvPC.from_layer(conv, WINDOW), torch.randn(2, 4, 9, 9).bfloat16().to(dtype)
    return QuantizedLinearPC.from_linear(quantized_layer(kind, torch.randn(64, 64, dtype=dtype), None), WINDOW), x


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", ["linear", "embedding", "conv", *KINDS])
def test_a_small_change_keeps_its_digits_in_bfloat16(kind, autocast):
    dtype = torch.float32 if autocast else torch.bfloat16
    layer, x = made(kind, dtype)
    moved(layer, dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = layer(x)
    want = exact(layer, x)
    plain = relative(want.to(torch.bfloat16), want)
    assert relative(got, want) < 4 * plain, "a difference of two products is off by a third"


def test_the_weight_of_a_stack_keeps_a_small_change():
    torch.manual_seed(0)
    model = ipca.apply_pc(moe(), rank=RANK, targets=["gate_up_proj", "down_proj"], progress=False)
    stacks = [module for module in model.modules() if type(module).__name__ == "StackPC"]
    assert stacks
    for stack in stacks:
        moved(stack, torch.bfloat16)
        with torch.no_grad():
            got, want = stack.as_matrix(stack.computed_weight()), change(stack)
        assert relative(got, want) < 4 * relative(want.to(torch.bfloat16), want)


def moe():
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = MixtralConfig(**sizes, num_key_value_heads=2, vocab_size=64, num_local_experts=3, num_experts_per_tok=2)
    return MixtralForCausalLM(config).to(torch.bfloat16)
