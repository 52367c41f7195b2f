"""A change that is small beside the factors keeps its digits in 16-bit products of PEFT's layers, and in merging."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from ipca.peft import PCConfig
from ipca.peft.layers import WindowLora
from tests.helpers.quantized_layers import BITSANDBYTES, quantize

MOVED = 1e-3


def relative(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


class Model(nn.Module):
    """A layer of each kind, called one after the other."""

    def __init__(self):
        super().__init__()
        self.embedding, self.conv, self.linear = nn.Embedding(40, 32), nn.Conv1d(32, 64, 3), nn.Linear(64, 64)

    def forward(self, ids):
        return self.linear(self.conv(self.embedding(ids).mT).mT)


def adapted(quantized=None, **options):
    torch.manual_seed(0)
    model = Model()
    if quantized:
        model = quantize(model, quantized)
    model = get_peft_model(model, PCConfig(r=4, target_modules=["embedding", "conv", "linear"], **options)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, factor in model.named_parameters():
            if "lora_" in name:
                factor.add_(MOVED * torch.randn(factor.shape, generator=generator))
    return model, {module.kind: module for module in model.modules() if isinstance(module, WindowLora)}


def inputs(kind):
    torch.manual_seed(2)
    if kind == "embedding":
        return torch.arange(60).view(3, 20) % 40
    return torch.randn(3, 32, 20).bfloat16().float() if kind == "conv" else torch.randn(3, 20, 64).bfloat16().float()


def exact(layer, x):
    """What the adapter adds, in float64."""
    pair = [tensor.detach().double().flatten(1) for tensor in layer.pairs("default")]
    change = layer.scaling["default"] * (pair[1] @ pair[0] - pair[3] @ pair[2])
    if layer.kind == "embedding":
        return change.mT[x]
    if layer.kind == "conv":
        return nn.functional.conv1d(x.double(), change.view(layer.base_parameter().shape))
    return x.double() @ change.mT


@pytest.mark.parametrize("kind", ["linear", "conv", "embedding"])
def test_a_batch_without_rows(kind):
    layer, x = adapted()[1][kind], inputs(kind)
    assert layer.low_rank("default", x[:0]).shape == (0, *layer.low_rank("default", x).shape[1:])


class Doubled(nn.Linear):
    """A module that somebody has put in the place of a factor."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_a_module_in_the_place_of_a_factor_is_called():
    layer, x = adapted()[1]["linear"], inputs("linear")
    plain, pair = layer.low_rank("default", x), layer.pairs("default")
    frozen = x @ pair[2].mT @ pair[3].mT
    layer.lora_B["default"].__class__ = Doubled
    assert torch.allclose(layer.low_rank("default", x), 2 * (plain + frozen) - frozen, atol=1e-5)


def watch(layer):
    for owner, _ in layer.owners("default"):
        owner.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv", "embedding"])
def test_a_small_change_keeps_its_digits_under_autocast(kind, watched):
    layer = adapted()[1][kind]
    if watched:
        watch(layer)
    x = inputs(kind)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got = layer.low_rank("default", x)
    want = exact(layer, x)
    assert relative(got, want) < 4 * relative(want.to(torch.bfloat16), want)


@pytest.mark.parametrize("quantized", BITSANDBYTES)
def test_a_small_change_beside_a_quantized_weight(quantized):
    layer = next(layer for kind, layer in adapted(quantized)[1].items() if kind == quantized)
    x = inputs("linear")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got = layer.low_rank("default", x)
    want = exact(layer, x)
    assert relative(got, want) < 4 * relative(want.to(torch.bfloat16), want)


def test_of_two_active_adapters_both_keep_their_digits():
    model, layers = adapted()
    model.add_adapter("second", PCConfig(r=4, window="minor", target_modules=["linear"]))
    model.base_model.set_adapter(["default", "second"])
    layer, x = layers["linear"], inputs("linear")
    with torch.no_grad():
        layer.get_base_layer().weight.zero_()
        layer.get_base_layer().bias.zero_()
        with torch.autocast("cpu", torch.bfloat16):
            got = layer(x)
    want = exact(layer, x)
    assert relative(got, want) < 4 * relative(want.to(torch.bfloat16), want)


def test_merging_under_autocast_is_merging():
    x = inputs("embedding")
    merged = []
    for enabled in (False, True):
        model = adapted()[0]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            model = model.merge_and_unload()
        merged.append(model)
    assert torch.equal(merged[0](x), merged[1](x))
    model, layers = adapted()
    before = layers["linear"].base_parameter().clone()
    with torch.autocast("cpu", torch.bfloat16):
        model.merge_adapter()
    model.unmerge_adapter()
    assert (layers["linear"].base_parameter() - before).abs().max() < 1e-6
