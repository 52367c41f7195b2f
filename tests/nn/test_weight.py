"""``LinearPC.weight`` is the effective weight at every moment, for code that reads it instead of calling the layer."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ipca
from ipca.nn import LinearPC

FORMS = ["residual", "intact"]


def trained(form, dtype=torch.float64):
    linear = nn.Linear(24, 40, dtype=dtype)
    layer = LinearPC.from_linear(linear, "middle", rank=6, alpha=3, form=form)
    with torch.no_grad():
        layer.lora_A.add_(0.1 * torch.randn_like(layer.lora_A))
        layer.lora_B.add_(0.1 * torch.randn_like(layer.lora_B))
    return linear, layer


@pytest.mark.parametrize("form", FORMS)
def test_the_weight_is_what_forward_multiplies_by(form):
    linear, layer = trained(form)
    x = torch.randn(9, 24, dtype=torch.float64)
    torch.testing.assert_close(F.linear(x, layer.weight, layer.bias), layer(x))
    torch.testing.assert_close(layer.weight, layer.effective_weight())
    with layer.disabled():
        torch.testing.assert_close(layer.weight, linear.weight.detach())
    layer.eval().merge()
    torch.testing.assert_close(F.linear(x, layer.weight, layer.bias), layer(x))
    with layer.disabled():
        torch.testing.assert_close(layer.weight, linear.weight.detach())


@pytest.mark.parametrize("form", FORMS)
def test_a_reader_of_the_weight_trains_the_factors(form):
    _, layer = trained(form)
    x, dy = torch.randn(9, 24, dtype=torch.float64), torch.randn(9, 40, dtype=torch.float64)
    called = torch.autograd.grad(layer(x), [layer.lora_A, layer.lora_B], dy)
    read = torch.autograd.grad(F.linear(x, layer.weight, layer.bias), [layer.lora_A, layer.lora_B], dy)
    for ours, theirs in zip(called, read, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_intact_weight_is_exactly_the_base_before_training():
    linear = nn.Linear(24, 40)
    assert torch.equal(LinearPC.from_linear(linear, rank=6, form="intact").weight, linear.weight)


@pytest.mark.parametrize("form", FORMS)
def test_a_layer_put_by_hand_into_an_encoder_keeps_its_fast_path_right(form):
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(3, 5, 16)
    with torch.no_grad():
        y = encoder(x)
        encoder.linear1 = LinearPC.from_linear(encoder.linear1, rank=4, form=form).eval()
        torch.testing.assert_close(encoder(x), y, atol=1e-5, rtol=1e-5)
        encoder.linear1.lora_B.mul_(3)
        changed = encoder(x)
        encoder.linear1 = encoder.linear1.to_linear()
        assert not torch.allclose(changed, y, atol=1e-2)
        torch.testing.assert_close(encoder(x), changed, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_a_model_that_concatenates_a_weight_stays_equal_and_trains_it(form):
    from transformers import MobileBertConfig, MobileBertForMaskedLM

    config = MobileBertConfig(
        vocab_size=60,
        hidden_size=32,
        embedding_size=16,
        intra_bottleneck_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    base = MobileBertForMaskedLM(config).eval()
    ids = torch.randint(0, 60, (2, 7))
    model = ipca.apply_pc(copy.deepcopy(base), rank=4, form=form, progress=False)
    before = base(ids).logits
    y = model(ids).logits
    assert (y - before).abs().max() <= 1e-5 * before.abs().max()
    y.square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in ipca.adapter_parameters(model))


def test_a_plain_load_of_an_adapted_state_dict_misses_the_weight():
    plain = nn.Sequential(nn.Linear(8, 8))
    adapted = ipca.apply_pc(copy.deepcopy(plain), rank=2, progress=False)
    assert "0.weight" in plain.load_state_dict(adapted.state_dict(), strict=False).missing_keys


def test_a_kept_weight_without_its_factors_is_refused():
    _, layer = trained("residual")
    before = copy.deepcopy(layer.state_dict())
    partial = {key: value for key, value in before.items() if "lora" not in key}
    with pytest.raises(
        RuntimeError, match=r"base_weight, which means nothing without lora_A, lora_B, lora_A0, lora_B0"
    ):
        layer.load_state_dict(partial, strict=False)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_a_plain_conv1d_state_dict_sets_the_window_of_its_transpose():
    from transformers.pytorch_utils import Conv1D

    first, second = Conv1D(16, 16), Conv1D(16, 16)
    nn.init.normal_(second.weight)
    layer = LinearPC.from_linear(first, rank=4)
    layer.load_state_dict(second.state_dict())
    x = torch.randn(5, 16)
    torch.testing.assert_close(layer(x), second(x), atol=1e-5, rtol=1e-5)


def test_factors_that_overflow_their_dtype_are_refused():
    linear = nn.Linear(8, 8)
    with torch.no_grad():
        linear.weight.mul_(1e12)
    with pytest.raises(RuntimeError, match="factors overflow"):
        LinearPC.from_linear(linear, rank=2, form="intact", adapter_dtype=torch.float16)


def test_conv1d_with_one_input():
    from transformers.pytorch_utils import Conv1D

    LinearPC.from_linear(Conv1D(1025, 1), rank=1)


@pytest.mark.parametrize("shape", [(8, 8), (8, 12)])
def test_plain_conv1d_state_dict_loads_into_its_layer(shape):
    from transformers.pytorch_utils import Conv1D

    conv = Conv1D(*shape)
    layer = LinearPC.from_linear(conv, rank=2)
    layer.load_state_dict(conv.state_dict())
    x = torch.randn(3, shape[1])
    assert torch.allclose(layer(x), conv(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("alpha", "words"), [(1e-12, "factors overflow"), (1e20, "factors are all 0")])
def test_factors_that_leave_the_range_of_float16(form, alpha, words):
    with pytest.raises((ValueError, RuntimeError), match=words):
        LinearPC.from_linear(nn.Linear(20, 20).half(), rank=4, alpha=alpha, form=form)
