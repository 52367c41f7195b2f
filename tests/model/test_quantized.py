"""Models with quantized layers: adapted, trained, saved, merged."""

import copy

import pytest
import torch
from torch import nn

import ipca
from ipca.model import AdapterSettings
from ipca.nn import QuantizedLinearPC
from ipca.nn.quantization import dequantize, quantization_kind
from ipca.offline.source import ModelSource
from tests.helpers.models import Plain, snapshot
from tests.helpers.offline_runs import Run
from tests.helpers.quantized_layers import KINDS, adapt, quantize, quantized_model, train

KIND = "nf4"


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_model_computes_the_same_and_only_factors_train(kind):
    model, _, x = quantized_model(kind)
    before = model(x)
    adapt(model)
    assert torch.equal(model(x), before)
    assert isinstance(model.a, QuantizedLinearPC)
    assert (type(model.head), model.a.kind, model.a.form) == (nn.Linear, kind, "intact")
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"{layer}.lora_{side}" for layer in "ab" for side in "AB"}
    model(x).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in ipca.adapter_parameters(model))


def test_all_linear_takes_quantized_and_plain_layers():
    model, _, x = quantized_model()
    before = model(x)
    ipca.apply_pc(model, rank=3, form="intact", progress=False)
    kinds = {name: type(layer).__name__ for name, layer in model.named_children()}
    assert kinds == {"a": "QuantizedLinearPC", "b": "QuantizedLinearPC", "head": "LinearPC"}
    assert torch.equal(model(x), before)


def test_the_summary_counts_what_4_bits_hide_and_says_where_windows_come_from():
    model, plain, _ = quantized_model()
    adapt(model)
    found = ipca.summary(model)
    assert found.sources == ((2, "dequantized"),)
    assert "quantized layers: 2 windows of dequantized weights" in str(found)
    assert found.total == sum(p.numel() for p in plain.parameters()) + found.trainable
    assert "quantized" not in str(ipca.summary(adapt(plain)))


def test_the_residual_form_is_refused_and_the_model_left_alone():
    model, _, _ = quantized_model()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"cannot adapt a, b: its weight is quantized, .* use the intact form"):
        adapt(model, form="residual")
    assert snapshot(model) == before


def test_a_layer_that_cannot_be_worked_with_is_refused_by_name():
    model, _, _ = quantized_model()
    model.b.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="cannot adapt b: bitsandbytes packed its weight for evaluation"):
        adapt(model)
    assert quantization_kind(model.a) == KIND


def test_hooks_of_a_quantized_layer_stay():
    model, _, x = quantized_model()
    calls = []
    model.a.register_forward_hook(lambda *_: calls.append(1))
    adapt(model)
    model(x)
    assert calls == [1]


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_saved_and_loaded_onto_the_same_base(kind, tmp_path):
    model, plain, x = quantized_model(kind)
    train(adapt(model, unquantized_weights={"a": plain.a.weight, "b": plain.b.weight}))
    after = model(x)
    ipca.save_adapter(model, tmp_path)
    fresh = ipca.load_adapter(quantize(copy.deepcopy(plain), kind), tmp_path)
    assert torch.equal(fresh(x), after)
    assert ipca.summary(fresh).sources == ((2, "unquantized"),)
    train(model)
    ipca.load_adapter(model, tmp_path)
    assert torch.equal(model(x), after)


def test_another_base_is_refused_by_default(tmp_path):
    model, plain, _ = quantized_model()
    ipca.save_adapter(train(adapt(model)), tmp_path)
    other = quantize(Plain(), KIND)
    with pytest.raises(ValueError, match=r"a: this is not the base weight .* \(its values differ\)"):
        ipca.load_adapter(other, tmp_path)
    with pytest.raises(ValueError, match=r"a: this is not the base weight .* \(it is float32 here and was nf4\)"):
        ipca.load_adapter(plain, tmp_path)
    loaded = ipca.load_adapter(plain, tmp_path, check_base=False)
    change = model.a.effective_weight() - dequantize(model.a.base)
    assert (loaded.a.effective_weight() - plain.a.pretrained_weight() - change).abs().max() < 1e-5


def test_an_adapter_of_the_original_model_goes_onto_the_quantized_one(tmp_path):
    _, plain, x = quantized_model()
    base = quantize(copy.deepcopy(plain), KIND)
    before = base(x)
    ipca.save_adapter(adapt(plain), tmp_path)
    ipca.load_adapter(base, tmp_path, check_base=False)
    assert torch.equal(base(x), before)


@pytest.mark.parametrize("kind", KINDS)
def test_disabled_merged_and_unloaded(kind):
    model, _, x = quantized_model(kind)
    before, base = model(x), model.a
    train(adapt(model))
    after = model(x)
    with ipca.disabled(model):
        assert torch.equal(model(x), before)
    x = x.detach()
    ipca.merge_adapter(model)
    model.eval()
    merged = model(x)
    ipca.unmerge_adapter(model)
    model.train()
    whole = ipca.unload(copy.deepcopy(model)).eval()
    assert type(whole.a) is nn.Linear
    assert torch.equal(whole(x), merged)
    assert (merged - after).norm() < 1e-5 * after.norm()
    ipca.unload(model, merge=False)
    assert model.a is base
    assert torch.equal(model(x.requires_grad_()), before)


def test_export_writes_a_stock_adapter_and_no_residual_base(tmp_path):
    model, _, _ = quantized_model()
    train(adapt(model))
    ipca.export(model, tmp_path / "peft")
    assert (tmp_path / "peft" / "adapter_model.safetensors").is_file()
    with pytest.raises(ValueError, match=r"a is quantized \(nf4\), and W_res would have to be quantized again"):
        ipca.export(model, tmp_path / "residual", format="residual")
    assert not (tmp_path / "residual").exists()


def test_a_trainable_bias_of_the_base_is_not_saved_silently(tmp_path):
    model, _, _ = quantized_model()
    adapt(model)
    model.a.base.bias.requires_grad_(True)
    with pytest.raises(ValueError, match="a: its weight or bias trains or has trained, which an adapter file"):
        ipca.save_adapter(model, tmp_path)


def test_windows_are_kept_in_a_cache(tmp_path, decomposed):
    first, _, _ = quantized_model()
    second = copy.deepcopy(first)
    adapt(first, cache=tmp_path)
    assert len(decomposed) == 2
    adapt(second, cache=tmp_path)
    assert len(decomposed) == 2
    assert torch.equal(first.a.lora_A, second.a.lora_A)
    assert ipca.summary(second).sources == ((2, "dequantized"),)


def test_layers_decomposed_one_by_one_make_the_same_adapter(tmp_path):
    model, plain, x = quantized_model()
    config = AdapterSettings(rank=3, form="intact", targets=("a", "b"))
    job = Run(tmp_path, plain, config)(source=ModelSource(copy.deepcopy(model)))
    before = model(x)
    ipca.load_adapter(model, job.out)
    assert torch.equal(model(x), before)
    assert ipca.summary(model).sources == ((2, "dequantized"),)


def test_what_runs_a_model_for_measurements_packs_no_weight():
    model, _, x = quantized_model(KIND)
    layers = {name: layer for name, layer in model.named_modules() if quantization_kind(layer) == KIND}
    for layer in layers.values():
        layer.support_avx512bf16_for_cpu = True  # as bitsandbytes finds on such a CPU, where it packs
    before = {name: layer.weight.clone() for name, layer in layers.items()}
    model.eval()
    ipca.analysis.sensitivity(model, [x], targets="all-linear", progress=False)
    with pytest.raises(ValueError, match="start"):
        ipca.apply_pc(model, rank=3, window="inputs:start=1000", calibration=[x], progress=False)
    assert all(torch.equal(layer.weight, before[name]) for name, layer in layers.items())
    assert not any(layer.training for layer in model.modules())
    ipca.apply_pc(model, rank=3, window="inputs:minor", calibration=[x], progress=False)
    model.train()(x).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in ipca.adapter_parameters(model))
