"""Where the windows of quantized layers come from: original weights by layer, or what they were quantized to."""

import re

import pytest
import torch
from safetensors.torch import save_file

import ipca
from tests.helpers.models import Plain, snapshot
from tests.helpers.quantized_layers import adapt, quantized_model


def as_mapping(plain, _):
    return {name: getattr(plain, name).weight for name in ("a", "b", "head")}


def as_function(plain, _):
    return lambda name: plain.get_submodule(name).weight


def as_folder(plain, tmp_path):
    save_file(plain.state_dict(), tmp_path / "model.safetensors")
    return ipca.load_unquantized_weights(tmp_path)


def with_a_prefix(plain, tmp_path):
    save_file({f"model.{k}": v.contiguous() for k, v in plain.state_dict().items()}, tmp_path / "model.safetensors")
    return ipca.load_unquantized_weights(tmp_path)


@pytest.mark.parametrize("given", [as_mapping, as_function, as_folder, with_a_prefix])
def test_windows_of_the_unquantized_weights(given, tmp_path):
    model, plain, x = quantized_model()
    before = model(x)
    adapt(model, unquantized_weights=given(plain, tmp_path))
    assert torch.equal(model(x), before)
    assert ipca.summary(model).sources == ((2, "unquantized"),)
    for name in ("a", "b"):
        layer, W = getattr(model, name), getattr(plain, name).weight.detach()
        want = ipca.window_svd(W, layer.window)
        assert (layer.lora_B0 @ layer.lora_A0 - (want.U * want.S) @ want.Vh).abs().max() < 1e-5


def wrong_layer(plain):
    return {"a": plain.a.weight.flip(0), "b": plain.b.weight}


@pytest.mark.parametrize(
    ("unquantized_weights", "error", "words"),
    [
        (lambda plain: "folder", TypeError, "for a checkpoint folder pass ipca.load_unquantized_weights(folder)"),
        (lambda plain: {"a": plain.a.weight}, ValueError, "lacks the weight of b (1 of 2 layers are missing)"),
        (lambda plain: lambda name: None, TypeError, "unquantized_weights gave NoneType, not a tensor"),
        (
            lambda plain: lambda name: plain.a.weight,
            ValueError,
            "b: the unquantized weight has shape (12, 20), the layer",
        ),
        (wrong_layer, ValueError, "a: the unquantized weight is no nearer to the quantized one than 0 is"),
    ],
)
def test_originals_that_do_not_fit_leave_the_model_alone(unquantized_weights, error, words):
    model, plain, _ = quantized_model()
    before = snapshot(model)
    with pytest.raises(error, match=re.escape(words)):
        adapt(model, unquantized_weights=unquantized_weights(plain))
    assert snapshot(model) == before


def test_originals_for_a_plain_model_are_refused():
    plain = Plain()
    with pytest.raises(ValueError, match="none of the layers to adapt is; leave it out"):
        adapt(plain, unquantized_weights={"a": plain.a.weight, "b": plain.b.weight})
