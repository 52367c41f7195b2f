"""ConvPC against a float64 convolution with the effective weight: forward, gradients, odd shapes, settings, errors."""

import pytest
import torch
from torch import nn

from ipca import Window
from ipca.nn.conv import ConvPC
from tests.helpers.layer_kinds import relative

FORMS = ("residual", "intact")
CONVS = {
    "1d": (lambda **o: nn.Conv1d(5, 7, 3, stride=2, padding=1, **o), (2, 5, 13)),
    "1d point": (lambda **o: nn.Conv1d(5, 7, 1, **o), (2, 5, 6)),
    "2d": (lambda **o: nn.Conv2d(3, 7, (3, 2), stride=(2, 1), padding=(1, 0), **o), (2, 3, 9, 11)),
    "2d same": (lambda **o: nn.Conv2d(3, 7, 3, padding="same", **o), (2, 3, 5, 4)),
    "2d one image": (lambda **o: nn.Conv2d(3, 7, 3, **o), (3, 5, 4)),
    "3d": (lambda **o: nn.Conv3d(3, 7, (2, 3, 2), **o), (1, 3, 4, 5, 4)),
}


def trained(name: str, form: str, **options) -> tuple[nn.Module, ConvPC, torch.Tensor]:
    build, shape = CONVS[name]
    conv = build()
    layer = ConvPC.from_layer(conv, Window("middle", 3), form=form, **options)
    with torch.no_grad():
        layer.lora_A.add_(0.1 * torch.randn_like(layer.lora_A))
        layer.lora_B.add_(0.1 * torch.randn_like(layer.lora_B))
    return conv, layer, torch.randn(shape)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CONVS)
def test_output_and_gradients_are_those_of_the_effective_weight(name, form):
    _, layer, x = trained(name, form, alpha=4.5)
    x.requires_grad_()
    y = layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    A, B, wide_x = (t.detach().double().requires_grad_() for t in (layer.lora_A, layer.lora_B, x))
    low = B @ A - (layer.lora_B0.double() @ layer.lora_A0.double() if form == "intact" else 0.0)
    kept = layer.base_weight.detach().double()
    wide = CONVS[name][0](bias=False).double()
    y64 = torch.func.functional_call(wide, {"weight": kept + layer.scaling * low.view(kept.shape)}, (wide_x,))
    bias = layer.bias.detach().double().view(-1, *(1 for _ in layer.kernel_size))
    y64 = y64 + bias
    y64.backward(dy.double())
    assert relative(y, y64) <= 1e-6
    for found, wanted in ((layer.lora_A.grad, A.grad), (layer.lora_B.grad, B.grad), (x.grad, wide_x.grad)):
        assert relative(found, wanted) <= 1e-6
    assert layer.base_weight.grad is None


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_intact_form_is_exact_before_training_with_dropout_and_autocast(name, dtype):
    build, shape = CONVS[name]
    conv, x = build().to(dtype), torch.randn(shape, dtype=dtype)
    layer = ConvPC.from_layer(conv, Window("middle", 3), form="intact", dropout=0.5)
    assert torch.equal(layer(x), conv(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), conv(x))
    assert layer.lora_A.dtype == torch.float32


def test_window_is_that_of_the_flattened_weight():
    conv = nn.Conv2d(3, 7, (3, 2))
    layer = ConvPC.from_layer(conv, Window(2, 3), form="residual")
    U, S, Vh = torch.linalg.svd(conv.weight.detach().double().flatten(1), full_matrices=False)
    wanted = U[:, 2:5] * S[2:5] @ Vh[2:5]
    assert relative(layer.lora_B0 @ layer.lora_A0, wanted) <= 1e-6
    assert relative(layer.base_weight, (conv.weight.double().flatten(1) - wanted).view(7, 3, 3, 2)) <= 1e-6
    assert layer.weight.shape == layer.base_weight.shape == conv.weight.shape
    assert relative(layer.weight, conv.weight) <= 1e-6


def test_intact_form_shares_the_memory_of_the_weight():
    conv = nn.Conv2d(3, 7, 3)
    layer = ConvPC.from_layer(conv, Window("middle", 3), form="intact")
    assert layer.base_weight.data_ptr() == conv.weight.data_ptr()
    assert layer.bias.data_ptr() == conv.bias.data_ptr()


@pytest.mark.parametrize("form", FORMS)
def test_channels_last_weights(form):
    conv = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 5, 5).to(memory_format=torch.channels_last)
    layer = ConvPC.from_layer(conv, Window("middle", 3), form=form)
    assert relative(layer(x), conv(x)) <= 1e-6
    layer.to(torch.float64).to(torch.float32).to(memory_format=torch.channels_last)
    assert relative(layer(x), conv(x)) <= 1e-6
    assert relative(layer.to_plain()(x), conv(x)) <= 1e-6


@pytest.mark.parametrize("name", CONVS)
def test_plain_again_with_every_setting(name):
    conv, layer, x = trained(name, "intact")
    back = layer.to_plain()
    assert type(back) is type(conv)
    assert repr(back) == repr(conv)
    assert relative(back(x), layer(x)) <= 1e-6
    assert torch.equal(layer.to_plain(base=True).weight, conv.weight)
    assert layer.to_plain().weight.data_ptr() != layer.base_weight.data_ptr()


@pytest.mark.parametrize("form", FORMS)
def test_plain_state_dict_sets_the_window_anew(form):
    _, layer, x = trained("2d", form)
    other = CONVS["2d"][0]()
    layer.load_state_dict(other.state_dict())
    assert relative(layer(x), other(x)) <= 1e-6
    with pytest.raises(RuntimeError, match=r"the weight has shape \(7, 3, 3, 3\), this layer \(7, 3, 3, 2\)"):
        layer.load_state_dict(nn.Conv2d(3, 7, 3).state_dict())


def test_repr_shows_the_geometry():
    _, layer, _ = trained("2d", "intact")
    assert "in_features=18, out_features=7" in repr(layer)
    assert "kernel_size=(3, 2), stride=(2, 1), padding=(1, 0)" in repr(layer)


@pytest.mark.parametrize(
    ("conv", "error", "words"),
    [
        (nn.Linear(4, 4), TypeError, r"expected an nn\.Conv1d, nn\.Conv2d or nn\.Conv3d, got Linear"),
        (nn.Conv2d(4, 6, 3, groups=2), ValueError, "cannot adapt this Conv2d: it has groups=2"),
        (nn.Conv2d(4, 6, 3, dilation=(1, 2)), ValueError, r"it has dilation=\(1, 2\), which PEFT's low-rank convol"),
        (nn.Conv1d(4, 6, 3, padding=1, padding_mode="reflect"), ValueError, "it has padding_mode=reflect"),
        (nn.Conv2d(1, 2, 3), ValueError, r"rank 3 is above the 2 singular values of a \(2, 9\) weight; lower `rank`"),
    ],
    ids=str,
)
def test_what_is_refused(conv, error, words):
    with pytest.raises(error, match=words):
        ConvPC.from_layer(conv, Window("middle", 3))
