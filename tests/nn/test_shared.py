"""SharedInput equals its layers called one by one, in every state that a layer can be in."""

import copy

import pytest
import torch
from torch import nn

import ipca
from ipca.nn import LinearPC, SharedInput

FORMS = pytest.mark.parametrize("form", ["residual", "intact"])


def block(form="intact", dropout=0.0, widths=(24, 8, 8)):
    layers = [
        LinearPC.from_linear(nn.Linear(20, n, bias=i != 1), rank=3 + i, form=form, dropout=dropout)
        for i, n in enumerate(widths)
    ]
    with torch.no_grad():
        for layer in layers:
            layer.lora_A.add_(torch.randn_like(layer.lora_A))
            layer.lora_B.add_(torch.randn_like(layer.lora_B))
    return SharedInput(**dict(zip("qkv", layers, strict=True)))


def assert_same(found, wanted):
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def one_by_one(module, x):
    return tuple(layer(x) for layer in module.children())


@FORMS
def test_outputs_and_gradients(form):
    module, x = block(form), torch.randn(2, 5, 20, requires_grad=True)
    leaves = [x, *ipca.adapter_parameters(module)]
    found, wanted = module(x), one_by_one(module, x)
    assert [y.shape for y in found] == [(2, 5, 24), (2, 5, 8), (2, 5, 8)]
    assert_same(found, wanted)
    total = [sum(y.square().sum() for y in ys) for ys in (found, wanted)]
    assert_same(*(torch.autograd.grad(loss, leaves) for loss in total))


@FORMS
def test_before_training_the_intact_form_is_the_base_exactly(form):
    linears = {name: nn.Linear(20, 8) for name in "qkv"}
    module = SharedInput(**{n: LinearPC.from_linear(layer, rank=3, form=form) for n, layer in linears.items()})
    x = torch.randn(7, 20)
    for y, layer in zip(module(x), linears.values(), strict=True):
        assert torch.equal(y, layer(x)) if form == "intact" else torch.allclose(y, layer(x), atol=1e-5)


def test_one_mask_for_all():
    module, x = block(dropout=0.5), torch.randn(6, 20)
    torch.manual_seed(1)
    found = module(x)
    wanted = []
    for layer in module.children():
        torch.manual_seed(1)
        wanted.append(layer(x))
    assert_same(found, wanted)
    module.eval()
    assert_same(module(x), one_by_one(module, x))


@FORMS
def test_merged_disabled_and_hooked_layers(form):
    module, x = block(form).eval(), torch.randn(6, 20)
    want = module(x)
    module.q.merge()
    assert_same(module(x), want)
    with ipca.disabled(module):
        assert_same(module(x), one_by_one(module, x))
    module.q.unmerge()
    seen = []
    module.k.register_forward_hook(lambda *_: seen.append(1))
    assert_same(module(x), want)
    assert seen == [1]


@FORMS
def test_unloaded_layers(form):
    module, x = block(form).eval(), torch.randn(6, 20)
    want = module(x)
    partly = copy.deepcopy(module)
    partly.k = partly.k.to_linear()
    assert_same(partly(x), want)
    ipca.unload(module)
    assert [type(layer) for layer in module.children()] == [nn.Linear] * 3
    assert_same(module(x), want)


def test_a_layer_may_not_stay_under_its_old_name_and_the_adapter_has_the_new_one(tmp_path):
    base = nn.ModuleDict({name: nn.Linear(20, 8) for name in "qk"})
    model = ipca.apply_pc(copy.deepcopy(base), rank=3, progress=False)
    model["qk"] = SharedInput(q=model["q"], k=model["k"])
    with pytest.raises(ValueError, match="q stands in several places of the model"):
        ipca.save_adapter(model, tmp_path)
    del model["q"], model["k"]
    ipca.save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match=r"the adapter holds qk\.q, which this ModuleDict does not have"):
        ipca.load_adapter(copy.deepcopy(base), tmp_path)
    again, x = ipca.unload(copy.deepcopy(model), merge=False), torch.randn(3, 20)
    ipca.load_adapter(again, tmp_path, check_base=False)  # the residual form gives the base back up to rounding
    assert_same(again["qk"](x), model["qk"](x))


def test_the_layers_stay_what_they_are():
    module = block()
    assert "q.lora_A" in module.state_dict()
    again = copy.deepcopy(module)
    again.load_state_dict(module.state_dict())
    x = torch.randn(3, 20)
    assert_same(again(x), module(x))
    assert_same(tuple(layer(x) for layer in ipca.unload(copy.deepcopy(module)).children()), module(x))


@FORMS
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_compiled_without_breaks_or_recompilation(form, dropout):
    from torch._dynamo.testing import CompileCounterWithBackend

    module = block(form, dropout)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True, dynamic=True)
    frames = []
    for M in (5, 9, 64):
        x = torch.randn(M, 20, requires_grad=True)
        torch.manual_seed(1)
        found = compiled(x)
        torch.manual_seed(1)
        wanted = module(x)
        assert_same(found, wanted)
        assert_same(*(torch.autograd.grad(sum(y.sum() for y in ys), [x, module.q.lora_A]) for ys in (found, wanted)))
        frames.append(counter.frame_count)
    assert len(set(frames)) == 1


def test_what_cannot_share():
    module = block()
    with pytest.raises(TypeError, match=r"k is a Linear; apply_pc first, then share"):
        SharedInput(q=module.q, k=nn.Linear(20, 8))
    other = LinearPC.from_linear(nn.Linear(20, 8), rank=3, form="residual")
    with pytest.raises(
        ValueError, match=r"same form, in_features, dropout and adapter dtype, got \{'q': \('intact', 20"
    ):
        SharedInput(q=module.q, k=other)
    with pytest.raises(ValueError, match="two layers or more"):
        SharedInput(q=module.q)
