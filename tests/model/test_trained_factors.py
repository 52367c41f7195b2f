"""train= and magnitude=: what trains, what stays, the size of the start, and files that resume."""

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn

import ipca
import ipca.peft
from ipca.model import AdapterSettings
from ipca.model.apply import adapted_layers
from ipca.nn import LinearPC
from tests.helpers.models import Plain


def trained_names(model):
    return {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}


def fit(model, steps=3):
    x = torch.randn(16, 20)
    optimizer = torch.optim.AdamW(ipca.adapter_parameters(model), lr=1e-2)
    for _ in range(steps):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("form", ["intact", "residual"])
@pytest.mark.parametrize(("train", "names"), [("both", {"lora_A", "lora_B"}), ("A", {"lora_A"}), ("B", {"lora_B"})])
def test_only_what_is_named_trains_and_the_other_factor_stays(train, names, form, tmp_path):
    base = Plain()
    model = ipca.apply_pc(copy.deepcopy(base), rank=3, train=train, form=form, progress=False)
    assert trained_names(model) == names
    fit(model)
    for layer in adapted_layers(model).values():
        assert torch.equal(layer.lora_A, layer.lora_A0) == ("lora_A" not in names)
        assert torch.equal(layer.lora_B, layer.lora_B0) == ("lora_B" not in names)
    ipca.save_adapter(model, tmp_path)
    again = ipca.load_adapter(copy.deepcopy(base), tmp_path)
    assert trained_names(again) == names
    assert trained_names(ipca.load_adapter(model, tmp_path)) == names
    x = torch.randn(5, 20)
    assert torch.equal(again(x), model(x))
    assert trained_names(ipca.load_adapter(copy.deepcopy(base), tmp_path, trainable=False)) == set()


def test_half_of_the_parameters_train():
    full, half = (
        ipca.summary(ipca.apply_pc(Plain(), rank=3, train=train, exclude="head", progress=False)).trainable
        for train in ("both", "A")
    )
    assert (full, half) == (3 * 64, 3 * 32)


def test_the_gradient_is_that_of_the_whole_layer():
    torch.manual_seed(0)
    plain, x = nn.Linear(20, 12), torch.randn(7, 20)
    both, one = (LinearPC.from_linear(plain, "middle", rank=3, train=train) for train in ("both", "A"))
    for layer in (both, one):
        layer(x).square().sum().backward()
    assert torch.equal(both.lora_A.grad, one.lora_A.grad)
    assert one.lora_B.grad is None


@pytest.mark.parametrize("window", ["principal", "middle", "minor"])
@pytest.mark.parametrize("magnitude", [1.0, 0.5, 2])
def test_all_components_start_at_one_size(window, magnitude):
    model = Plain()
    before = model(x := torch.randn(5, 20))
    ipca.apply_pc(model, rank=3, alpha=6, window=window, magnitude=magnitude, exclude="head", progress=False)
    for layer in adapted_layers(model).values():
        W = layer.pretrained_weight().double()
        size = magnitude * W.norm() / 12**0.5
        torch.testing.assert_close(2 * layer.lora_A0.double().square().sum(1), size.expand(3), rtol=1e-5, atol=0)
        torch.testing.assert_close(2 * layer.lora_B0.double().square().sum(0), size.expand(3), rtol=1e-5, atol=0)
        found = ipca.window_svd(W, ipca.Window(window, 3))
        torch.testing.assert_close(2 * layer.lora_B0.double() @ layer.lora_A0.double(), size * found.U @ found.Vh)
    assert torch.equal(model(x), before)


def test_the_residual_form_takes_that_size_out_of_the_weight():
    model = Plain()
    before = model(x := torch.randn(5, 20))
    ipca.apply_pc(model, rank=3, magnitude=1.5, form="residual", progress=False)
    torch.testing.assert_close(model(x), before)
    assert model.a.certificate.holds


def test_one_rate_is_the_matched_rate_of_every_window():
    for window in ("principal", "middle", "minor"):
        model = ipca.apply_pc(Plain(), rank=3, window=window, magnitude=1.0, progress=False)
        rates = [group["lr"] for group in ipca.param_groups(model, 1e-3, match="sqrt-sigma")]
        assert rates == pytest.approx([1e-3] * len(rates), rel=1e-5)


def test_null_components_start_as_those_of_lora():
    model = nn.Sequential(nn.Linear(20, 12))
    with torch.no_grad():
        model[0].weight[6:] = 0
    with pytest.warns(UserWarning, match="components that are 0"):
        ipca.apply_pc(model, rank=3, window="minor", magnitude=1.0, progress=False)
    assert not model[0].lora_B0.any()


def test_null_components_beside_a_frozen_b_are_said_not_to_train():
    model = nn.Sequential(nn.Linear(20, 12))
    with torch.no_grad():
        model[0].weight[6:] = 0
    options = {"rank": 3, "window": "minor", "train": "A", "progress": False}
    for adapt in (
        lambda base: ipca.apply_pc(base, **options),
        lambda base: get_peft_model(
            base, ipca.peft.PCConfig(r=3, window="minor", train="A", target_modules=["0"], progress=False)
        ),
    ):
        with pytest.warns(UserWarning, match="3 of 3 of 0.* B = 0, and never train, as train='A' freezes B"):
            adapt(copy.deepcopy(model))


def test_a_plain_state_dict_is_decomposed_as_the_layer_says():
    layer, other = LinearPC(20, 12, 3, "minor", magnitude=1.0, train="B"), nn.Linear(20, 12)
    layer.load_state_dict(other.state_dict())
    want = LinearPC.from_linear(other, "minor", rank=3, magnitude=1.0)
    assert torch.equal(layer.lora_A0, want.lora_A0)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["lora_B"]
    model = ipca.apply_pc(nn.Sequential(nn.Linear(20, 12)), rank=3, window="minor", magnitude=1.0, progress=False)
    model.load_state_dict({f"0.{name}": value for name, value in other.state_dict().items()})
    assert torch.equal(model[0].lora_A0, want.lora_A0)


def test_a_checkpoint_that_trains_another_factor_is_not_resumed_in_place(tmp_path):
    base = Plain()
    ipca.save_adapter(ipca.apply_pc(copy.deepcopy(base), rank=3, train="A", progress=False), tmp_path)
    model = ipca.apply_pc(copy.deepcopy(base), rank=3, train="B", progress=False)
    with pytest.raises(ValueError, match="a has train B, the adapter A; load onto the plain base"):
        ipca.load_adapter(model, tmp_path)


def test_a_summary_says_what_trains():
    model = ipca.apply_pc(Plain(), rank=3, train="A", progress=False)
    assert "only A trains" in str(ipca.summary(model))
    assert "train=A" in repr(model.a)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"train": "C"}, ValueError, "train must be one of both, A, B, the factors that train; got 'C'"),
        ({"train": None}, ValueError, "train must be one of both, A, B"),
        ({"magnitude": 0}, ValueError, "magnitude must be 'sigma', .* or a positive number, .*got 0"),
        ({"magnitude": -1.0}, ValueError, "magnitude must be 'sigma'"),
        ({"magnitude": float("nan")}, ValueError, "magnitude must be 'sigma'"),
        ({"magnitude": "large"}, ValueError, "magnitude must be 'sigma', .*got 'large'"),
        ({"magnitude": True}, TypeError, "magnitude must be 'sigma' or a number, got True"),
    ],
)
def test_what_is_out_of_range_is_refused_everywhere(options, error, words):
    for call in (
        lambda: AdapterSettings(**options),
        lambda: ipca.apply_pc(Plain(), progress=False, **options),
        lambda: LinearPC(20, 12, 3, **options),
        lambda: ipca.peft.PCConfig(r=3, **options),
    ):
        with pytest.raises(error, match=words):
            call()


@pytest.mark.parametrize("train", ["A", "B", "both"])
def test_a_server_gets_one_term_of_half_the_rank(train, tmp_path):
    from safetensors.torch import load_file

    base = Plain()
    model = fit(ipca.apply_pc(copy.deepcopy(base), rank=3, train=train, progress=False))
    ipca.export(model, tmp_path, format="serve")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    A, B = (tensors[f"base_model.model.a.lora_{part}.weight"] for part in "AB")
    assert A.shape == ((6 if train == "both" else 3), 20)
    torch.testing.assert_close(B @ A, model.a.effective_weight() - base.a.weight.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"magnitude": 100, "form": "residual"}, "times as large as the weight.*; lower magnitude, or use the intact"),
        ({"magnitude": 1e300}, "the factors overflow .*; lower magnitude"),
        ({"magnitude": 1e-300}, "the factors are all 0 .*; lower alpha, or raise magnitude"),
    ],
)
def test_a_magnitude_that_cannot_be_held_is_named(options, words):
    with pytest.raises((RuntimeError, ValueError), match=f"^a: .*{words}"):
        ipca.apply_pc(Plain(), rank=3, targets="a", progress=False, **options)
