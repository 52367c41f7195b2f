"""Before training a PeftModel with a window computes the base's function to the bit; its two ways to compute agree."""

import copy

import pytest
import torch
from peft import get_peft_model

from ipca.peft import PCConfig
from tests.helpers.peft_cases import off, output, train, wrap
from tests.helpers.peft_models import CASES, Heavy, Small, ids, llama
from tests.helpers.quantized_layers import KINDS, quantize


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
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
            for part in ("weight", "start_of_weight"):
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
