"""init_: a window for stock LoRA layers, on a base that becomes the residual one."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from ipca import window_svd
from ipca.peft import init_
from ipca.window import Window
from tests.helpers.models import snapshot
from tests.helpers.peft_cases import off, output, train, wrap
from tests.helpers.peft_models import Heavy, Small, gpt2, ids, llama
from tests.helpers.quantized_layers import quantize


def stock(base, **options):
    return wrap(base, LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": ["a", "b"], **options}))


@pytest.mark.parametrize("window", ["principal", "middle", "minor", 0.25, "start=2"])
def test_the_factors_are_those_of_the_window(window):
    base = Small()
    model = stock(base)
    starts = init_(model, window)
    layer = model.base_model.model.a
    found = window_svd(base.a.weight.detach(), Window(window, 3))
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert starts.keys() == {"a", "b"}
    assert starts["a"].window == found.report.window
    assert off(2 * product, (found.U * found.S) @ found.Vh) < 1e-5
    assert off(layer.weight + 2 * product, base.a.weight) < 1e-6


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05), (torch.float64, 1e-12)])
@pytest.mark.parametrize("build", [llama, gpt2])
def test_the_function_is_kept_up_to_rounding(build, dtype, bound):
    base, x = build().to(dtype).eval(), ids()
    targets = ["q_proj", "down_proj"] if build is llama else ["c_attn", "c_fc"]
    model = stock(base, target_modules=targets, fan_in_fan_out=build is gpt2)
    starts = init_(model)
    assert all(start.certificate.holds for start in starts.values())
    assert off(output(model, x), output(base, x)) < bound
    with model.disable_adapter():
        assert off(output(model, x), output(base, x)) > 10 * bound if dtype != torch.bfloat16 else True


def test_pefts_conversion_gives_an_adapter_of_the_original_base(tmp_path):
    base, x = Small(), ids()
    model = stock(base)
    init_(model)
    model.save_pretrained(tmp_path / "start")
    train(model, x, 5)
    y = model(x)
    start = str(tmp_path / "start")
    model.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=start)
    assert off(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")(x), y) < 1e-5
    model.save_pretrained(tmp_path / "residual")
    wrong = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "residual")
    assert off(wrong(x), y) > 0.01  # as the docstring says
    assert off(PeftModel.from_pretrained(model.unload(), tmp_path / "residual")(x), y) < 1e-6


def merged():
    model = stock(Small())
    model.merge_adapter()
    return model


def second():
    model = stock(Small())
    model.add_adapter("other", LoraConfig(r=2, target_modules=["b"]))
    return model


def tied():
    model = Small()
    model.b = nn.Linear(12, 20)
    model.c = nn.Linear(12, 20)
    model.c.weight = model.b.weight
    return stock(model, target_modules=["b", "c"])


def tied_outside():
    model = Small()
    model.c = nn.Linear(12, 20)
    model.c.weight = model.b.weight
    return stock(model)


def broken():
    model = Small()
    with torch.no_grad():
        model.b.weight[0, 0] = torch.nan
    return stock(model)


REFUSED = {
    "no lora": (Small, "this Small has no LoRA layer; wrap it with peft.get_peft_model first"),
    "merged": (merged, "^a: it is merged; call unmerge_adapter"),
    "two adapters": (
        second,
        "^b: it holds the adapters default, other, and the base can be changed for 'default' alone",
    ),
    "dora": (lambda: stock(Small(), use_dora=True), "^a: its adapter is a variant of LoRA"),
    "lora_bias": (lambda: stock(Small(), lora_bias=True), "^a: its adapter is a variant of LoRA"),
    "embedding": (
        lambda: stock(Small(), target_modules=["words"]),
        "^words: it is a .*Embedding, not PEFT's stock linear layer",
    ),
    "window": (lambda: wrap(Small()), "^a: it is a .*WindowLinear, not PEFT's stock linear layer"),
    "tied": (tied, "^c: its weight is tied to that of b, which would lose two windows"),
    "tied outside": (tied_outside, "the weight of an adapted layer is tied to another module's: .*c.weight"),
    "not finite": (broken, "^b: .*NaN"),
    "too large": (lambda: stock(Small(), r=13), "^a: .*needs 13 singular values, but there are only 12"),
    "quantized": (
        lambda: get_peft_model(quantize(Heavy(), "nf4"), LoraConfig(target_modules=["a"])),
        "^a: its weight is quant",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_has_not_changed(name):
    build, words = REFUSED[name]
    model = build()
    before = snapshot(model)
    with pytest.raises(ValueError, match=words):
        init_(model)
    assert snapshot(model) == before


def test_another_adapters_name():
    model = stock(Small())
    with pytest.raises(ValueError, match=r"^a: it holds the adapters default, and .* for 'other' alone"):
        init_(model, adapter_name="other")
