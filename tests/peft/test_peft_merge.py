"""Merging a window into the base weight and out of it, and scaling it, for every kind of layer."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

from ipca.peft import PCConfig
from tests.helpers.peft_cases import off, output, train, wrap
from tests.helpers.peft_models import CASES, Heavy, ids, llama
from tests.helpers.quantized_layers import KINDS, TORCHAO, quantize


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_merging_and_back(name, safe):
    case = CASES[name]
    base, x = case.build().eval(), case.x()
    model = wrap(base, PCConfig(r=2, **case.options)).eval()
    train(model, x)
    y = output(model, x)
    assert off(output(copy.deepcopy(model).merge_and_unload(safe_merge=safe), x), y) < 1e-5
    model.merge_adapter(safe_merge=safe)
    assert off(output(model, x), y) < 1e-5
    model.unmerge_adapter()
    assert off(output(model, x), y) < 1e-5
    assert off(output(model.unload(), x), output(base, x)) < 1e-5


def test_merging_in_bfloat16_is_as_near_as_stock(tmp_path):
    base, x = llama().to(torch.bfloat16).eval(), ids()
    model = wrap(base, target_modules="all-linear").eval()
    train(model, x, 3)
    model.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    layers = {m.path: m for m in model.modules() if hasattr(m, "path")}
    exact = {path: m.base_matrix().double() + m.change("default").double() for path, m in layers.items()}
    merged, theirs = model.merge_and_unload(), stock.merge_and_unload()
    errors = [
        (torch.dist(merged.get_submodule(path).weight.double(), weight), torch.dist(other.weight.double(), weight))
        for path, weight in exact.items()
        for other in [theirs.get_submodule(path)]
    ]
    assert len(errors) == 14
    assert all(ours <= other * 1.001 for ours, other in errors)


@pytest.mark.parametrize("name", ["llama", "embedding", "conv2d"])
def test_scaling_scales_the_change(name):
    case = CASES[name]
    base, x = case.build().eval(), case.x()
    model = wrap(base, PCConfig(r=2, **case.options)).eval()
    train(model, x)
    layer = next(m for m in model.modules() if isinstance(m, LoraLayer))
    y, delta = output(model, x), layer.get_delta_weight("default")
    layer.set_scale("default", 3)
    assert off(layer.get_delta_weight("default"), 3 * delta) < 1e-6
    assert not torch.equal(output(model, x), y)
    layer.set_scale("default", 0)
    layer.set_scale("default", 1)
    assert torch.equal(output(model, x), y)
    layer.scale_layer(2)
    assert layer.scaling["default"] == (1 if name == "embedding" else 2)  # PEFT scales no embedding
    layer.unscale_layer(2)
    assert torch.equal(output(model, x), y)


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_base_merges_as_in_stock_peft(kind, tmp_path):
    torch.manual_seed(0)
    base, x = quantize(Heavy(), kind).train(), torch.randn(5, 64)
    twin = copy.deepcopy(base)
    twin.is_loaded_in_8bit, twin.is_loaded_in_4bit = kind == "int8", kind in ("nf4", "fp4")  # as transformers says it
    model = get_peft_model(base, PCConfig(r=3, target_modules=["a", "b"]))
    train(model, x, 5)
    model.save_pretrained(tmp_path)
    stock, y = PeftModel.from_pretrained(twin, tmp_path).train(), model(x)
    assert off(stock(x), y) < 1e-5
    if kind in TORCHAO:
        with pytest.raises(ValueError, match="get_apply_tensor_subclass"):
            model.merge_adapter()
        return
    with model.disable_adapter():
        moved = off(model(x), y)
    model.merge_adapter()
    stock.merge_adapter()
    assert off(model(x), y) < 1.1 * off(stock(x), y) < moved
    model.unmerge_adapter()
    assert off(model(x), y) < moved
