"""PEFT's layers with a window: the base's function before training, to the bit; two ways to compute; merging."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from ipca.model.heads import find_heads
from ipca.peft import PCConfig
from tests.helpers.peft_cases import off, output, train, wrap
from tests.helpers.peft_models import CASES, Heavy, Small, ids, llama
from tests.helpers.quantized_layers import KINDS, TORCHAO, quantize

NAMES = [pytest.param(name, marks=pytest.mark.zoo) if name in ("gpt2", "vit") else name for name in CASES]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_the_start_is_the_base_to_the_bit(name, dtype):
    case = CASES[name]
    base, x = case.build().to(dtype).eval(), case.x()
    x = x.to(dtype) if x.is_floating_point() else x
    model = wrap(base, PCConfig(r=2, **case.options))
    assert torch.equal(output(model, x), output(base, x))
    train(model, x)
    assert not torch.equal(output(model, x), output(base, x))
    with model.disable_adapter():
        assert torch.equal(output(model, x), output(base, x))


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_base_is_kept_to_the_bit(kind):
    base, x = quantize(Heavy(), kind).train(), torch.randn(5, 64)
    model = get_peft_model(base, PCConfig(r=3, target_modules=["a", "b"]))
    with model.disable_adapter():
        y = model(x)
    assert torch.equal(model(x), y)
    train(model, x)
    assert not torch.equal(model(x), y)
    with model.disable_adapter():
        assert torch.equal(model(x), y)


def watched(model):
    """The same model, which PEFT's own forward computes: a hook hangs on every base layer."""
    model = copy.deepcopy(model)
    for layer in (model.base_model.model.a, model.base_model.model.b):
        layer.get_base_layer().register_forward_hook(lambda *_: None)
    return model


def gradients(model, x):
    model.zero_grad()
    y = output(model, x)
    y.float().square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, y


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-13), (torch.bfloat16, 0.02)])
def test_the_fused_op_and_pefts_forward_agree(dtype, bound):
    model, x = wrap(Small().to(dtype)), ids()
    train(model, x)
    (fused, y), (plain, z) = gradients(model, x), gradients(watched(model), x)
    assert off(y, z) < bound
    assert fused.keys() == plain.keys()
    assert max(off(fused[name], plain[name]) for name in fused) < 2 * bound


def test_they_agree_under_autocast():
    model, x = wrap(Small()), ids()
    train(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        (fused, y), (plain, z) = gradients(model, x), gradients(watched(model), x)
    assert off(y, z) < 0.02
    assert max(off(fused[name], plain[name]) for name in fused) < 0.05


def test_they_agree_where_the_base_trains_too():
    model, x = wrap(Small(), bias="all"), ids()
    model.base_model.model.a.get_base_layer().weight.requires_grad_(True)
    (fused, _), (plain, _) = gradients(model, x), gradients(watched(model), x)
    assert "base_model.model.a.base_layer.weight" in fused
    assert "base_model.model.b.base_layer.bias" in fused
    assert fused.keys() == plain.keys()
    assert max(off(fused[name], plain[name]) for name in fused) < 1e-5


def test_the_base_is_kept_under_dropout_too():
    base, x = Small(), ids()
    model = wrap(base, lora_dropout=0.5).train()
    assert torch.equal(model(x), base(x))
    assert torch.equal(watched(model)(x), base(x))
    train(model, x)
    assert not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


@pytest.mark.parametrize("way", ["forward hook", "replaced forward", "hook on a factor"])
def test_nothing_attached_is_left_out(way):
    model, x, calls = wrap(Small()), ids(), []
    layer = model.base_model.model.a
    base, factor = layer.get_base_layer(), layer.lora_A["default"]
    if way == "replaced forward":
        plain = base.forward
        base.forward = lambda z: calls.append(1) or plain(z)
    else:
        (base if way == "forward hook" else factor).register_forward_hook(lambda *_: calls.append(1))
    model(x)
    assert calls == [1]


def test_hooks_on_every_module_run():
    model, x, calls = wrap(Small()), ids(), []
    hook = register_module_forward_hook(lambda module, *_: calls.append(module))
    try:
        model(x)
    finally:
        hook.remove()
    assert {model.base_model.model.a.get_base_layer(), *model.base_model.model.a.lora_A.children()} <= set(calls)


def test_a_forward_replaced_on_the_class_runs(monkeypatch):
    model, x = wrap(Small()), ids()
    before = model(x)
    own = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 2 * own(self, x))
    assert off(model(x), before) > 1e-2


def test_dropout_follows_its_own_module():
    """Its mode, as Monte-Carlo dropout sets it in a model that is evaluated, and what it is replaced with."""
    model, x = wrap(Small(), lora_dropout=0.5).eval(), ids()
    train(model, x)
    model.eval()
    layer, y = model.base_model.model.a, model(x)
    layer.lora_dropout.train()
    assert not torch.equal(model(x), model(x))
    model.train()
    model.base_model.model.b.lora_dropout.eval()
    layer.lora_dropout.eval()
    assert torch.equal(model(x), y)
    layer.lora_dropout["default"] = nn.Threshold(0.0, 0.0)
    assert off(model(x), watched(model)(x)) < 1e-6
    assert off(model(x), y) > 1e-4


def test_random_factors_on_request():
    base, x = Small(), ids()
    model = wrap(base, init_lora_weights=False)
    assert not torch.equal(model(x), base(x))
    assert torch.equal(wrap(base)(x), base(x))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 0.01), (torch.bfloat16, 0.05), (torch.float64, 1e-6)])
def test_casting_the_model_casts_what_it_started_from(dtype, bound):
    model, x = wrap(Small()), ids()
    train(model, x)
    y, cast = model(x), copy.deepcopy(model).to(dtype)
    assert off(cast(x), y) < bound
    with torch.no_grad():
        for owner in cast.modules():
            for part in ("weight", "initial_weight"):
                assert getattr(owner, part, torch.empty(0, dtype=dtype)).dtype == dtype


def test_gradient_checkpointing_gives_the_same_gradients():
    model, x = wrap(llama(), target_modules=["q_proj", "down_proj"]).train(), ids()
    train(model, x)
    plain, _ = gradients(model, x)
    model.base_model.model.gradient_checkpointing_enable()
    model.base_model.model.enable_input_require_grads()
    checkpointed, _ = gradients(model, x)
    assert plain.keys() == checkpointed.keys()
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


def test_torch_compile_computes_the_same_in_one_graph():
    model, x = wrap(Small()), ids()
    train(model, x)
    layer, z = model.base_model.model.a, torch.randn(5, 20)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert off(compiled(z), layer(z)) < 1e-6
    assert off(torch.compile(model, backend="aot_eager")(x), model(x)) < 1e-6


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
    plain = model.unload()
    for head in find_heads(base):  # PEFT leaves what was trained whole
        plain.get_submodule(head).load_state_dict(base.get_submodule(head).state_dict())
    assert off(output(plain, x), output(base, x)) < 1e-5


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
