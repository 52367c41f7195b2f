"""Merging and back: the base is there again to the bit, whatever is done in between, or PEFT subtracts."""

import contextlib
import copy
import pickle

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from ipca.peft import PCConfig
from ipca.peft.layers import WindowLora
from tests.helpers.peft_cases import disturb, off, output, wrap
from tests.helpers.peft_models import CASES, Heavy, Small, ids
from tests.helpers.quantized_layers import quantize


def bases(model):
    """The base weights of all adapted layers, by path."""
    layers = (layer for layer in model.modules() if isinstance(layer, WindowLora))
    return {layer.path: layer.base_parameter().detach().clone() for layer in layers}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[path], other[path]) for path in one)


def kept(model):
    return [layer.path for layer in model.modules() if isinstance(layer, WindowLora) and layer._kept is not None]


def small(dtype=torch.bfloat16, **options):
    base = Small().to(dtype)
    model = wrap(base, target_modules=["words", "a", "b"], **options)
    disturb(model)
    return base, model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_the_base_is_as_it_was_after_merging_and_back(name, safe, dtype):
    case = CASES[name]
    base, x = case.build().to(dtype).eval(), case.x()
    x = x.to(dtype) if x.is_floating_point() else x
    model = wrap(base, PCConfig(r=2, **case.options)).eval()
    before = bases(model)
    for _ in range(3):
        disturb(model)
        y = output(model, x)
        model.merge_adapter(safe_merge=safe)
        assert not same(bases(model), before)
        model.unmerge_adapter()
        assert same(bases(model), before)
        assert torch.equal(output(model, x), y)
        assert not kept(model)


@pytest.mark.parametrize("name", CASES)
def test_a_disabled_adapter_leaves_the_base_where_it_was_merged(name):
    case = CASES[name]
    base, x = case.build().bfloat16().eval(), case.x()
    x = x.bfloat16() if x.is_floating_point() else x
    model = wrap(base, PCConfig(r=2, **case.options)).eval()
    y = output(model, x)
    disturb(model)
    model.merge_adapter()
    assert not torch.equal(output(model, x), y)
    with model.disable_adapter():
        assert torch.equal(output(model, x), y)


def test_an_adapter_that_is_added_afterward_fits_the_original_base(tmp_path):
    base, model = small()
    model.merge_adapter()
    model.unmerge_adapter()
    model.add_adapter("second", PCConfig(r=2, target_modules=["a", "b"]))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "second", is_trainable=True)
    x = ids()
    assert torch.equal(again(x), base(x))


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_kept_where_the_layers_are_unloaded(name, monkeypatch):
    case, weights = CASES[name], []
    base, x = case.build().eval(), case.x()
    model = wrap(base, PCConfig(r=2, **case.options)).eval()
    disturb(model)
    y = output(model, x)
    monkeypatch.setattr(WindowLora, "_keep", lambda self, weight: weights.append(weight))
    assert off(output(model.merge_and_unload(), x), y) < 1e-5
    assert weights
    assert all(weight is None for weight in weights)


def test_adapters_that_are_merged_one_after_another():
    _, model = small(torch.float32)
    model.add_adapter("second", PCConfig(r=2, window="minor", target_modules=["a", "b"]))
    model.add_adapter("stock", LoraConfig(r=2, target_modules=["a", "b"], lora_bias=True, init_lora_weights=False))
    layer = model.base_model.model.a
    before, bias = bases(model), layer.get_base_layer().bias.detach().clone()
    model.base_model.set_adapter(["default", "second", "stock"])
    disturb(model)
    for name in ("default", "stock", "second"):
        layer.merge(adapter_names=[name])
    assert layer.merged_adapters == ["default", "stock", "second"]
    assert not torch.equal(layer.get_base_layer().bias, bias)
    layer.unmerge()
    assert same(bases(model), before)
    assert off(layer.get_base_layer().bias, bias) < 1e-5
    assert layer.merged_adapters == []


COPIES = {"copy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}


@pytest.mark.parametrize("twin", COPIES.values(), ids=COPIES)
def test_copies_of_a_merged_model_are_unmerged_to_the_bit(twin):
    _, model = small()
    before = bases(model)
    model.merge_adapter()
    other = twin(twin(model))
    assert same(bases(other), bases(model))
    other.unmerge_adapter()
    assert same(bases(other), before)
    assert not same(bases(model), before)
    model.unmerge_adapter()
    assert same(bases(model), before)


@pytest.mark.parametrize("twin", [lambda model: model, *COPIES.values()], ids=["itself", *COPIES])
def test_a_cast_of_a_merged_model_is_unmerged_to_the_cast_base(twin):
    base, model = small(torch.float32)
    model.merge_adapter()
    model = twin(model.bfloat16())
    model.unmerge_adapter()
    cast = base.bfloat16()
    assert same(bases(model), {name: getattr(cast, name).weight for name in ("words", "a", "b")})


def add(layer):
    layer.get_base_layer().weight.add_(1)


def replace(layer):
    base = layer.get_base_layer()
    base.weight = nn.Parameter(base.weight.detach() + 1, requires_grad=False)


def load(layer):
    base = layer.get_base_layer()
    base.load_state_dict({**base.state_dict(), "weight": base.weight + 1})


@pytest.mark.parametrize("twin", [lambda model: model, *COPIES.values()], ids=["itself", *COPIES])
@pytest.mark.parametrize("change", [add, replace, load])
@torch.no_grad()
def test_a_merged_weight_that_somebody_has_changed_keeps_the_change(change, twin):
    _, model = small(torch.float32)
    before = bases(model)
    model.merge_adapter()
    change(model.base_model.model.a)
    model = twin(model)
    model.unmerge_adapter()
    after = bases(model)
    assert off(after["a"], before["a"] + 1) < 1e-5
    assert torch.equal(after["b"], before["b"])


def test_a_merge_that_fails_midway_is_undone():
    _, model = small()
    before, layer = bases(model), model.base_model.model.a
    model.add_adapter("second", PCConfig(r=2, target_modules=["a", "b"]))
    model.base_model.set_adapter(["default", "second"])
    with torch.no_grad():
        layer.lora_B["second"].weight.fill_(torch.nan)
    with contextlib.suppress(ValueError):  # PEFT's, after it has merged the first one
        layer.merge(safe_merge=True)
    assert layer.merged_adapters == ["default"]
    layer.unmerge()
    assert same(bases(model), before)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantized_base_is_left_to_peft(kind):
    model = get_peft_model(quantize(Heavy(), kind).train(), PCConfig(r=3, target_modules=["a", "b"]))
    disturb(model)
    model.merge_adapter()
    layers = [model.base_model.model.a, model.base_model.model.b]
    assert [layer.merged_adapters for layer in layers] == [["default"]] * 2
    assert not kept(model)
    model.unmerge_adapter()
    assert not any(layer.merged for layer in layers)


def test_where_the_device_has_no_room_the_base_is_kept_on_the_cpu(monkeypatch):
    def full(self):
        raise torch.OutOfMemoryError

    _, model = small()
    before, x = bases(model), ids()
    y = output(model, x)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "clone", full)
        model.merge_adapter()
    assert len(kept(model)) == 3
    model.unmerge_adapter()
    assert same(bases(model), before)
    assert torch.equal(output(model, x), y)
