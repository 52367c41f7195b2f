"""Whole models of every kind: the same function before training, only the factors train, the base comes back."""

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import ipca
from ipca.nn import LinearPC

pytestmark = pytest.mark.filterwarnings("ignore:'all-linear' leaves out .*out_proj")  # of nn.TransformerEncoder

FORMS = ("residual", "intact")
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class Own(nn.Module):
    """What a user may write: a list, a dict, no bias, an odd size, a layer called twice."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(13, 32, bias=False)
        self.blocks = nn.ModuleList([nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32)) for _ in range(2)])
        self.heads = nn.ModuleDict({"left": nn.Linear(32, 7), "right": nn.Linear(32, 5)})
        self.scale = nn.Parameter(torch.ones(32))

    def forward(self, x):
        x = self.first(x) * self.scale
        for block in (*self.blocks, self.blocks[0]):
            x = x + block(x).relu()
        return torch.cat([self.heads["left"](x), self.heads["right"](x)], -1)


def bert():
    return transformers.BertModel(transformers.BertConfig(**SMALL, **NO_DROPOUT, vocab_size=40))


def vit():
    return transformers.ViTModel(transformers.ViTConfig(**SMALL, **NO_DROPOUT, image_size=16, patch_size=8))


def llama(tied: bool):
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=40, tie_word_embeddings=tied)
    return transformers.LlamaForCausalLM(config)


def gpt2():
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 40, "n_positions": 16}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **ends, **no_dropout))


def encoder():
    layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "bert": (bert, 13),  # six in each of two layers, and the pooler
    "vit": (vit, 13),
    "llama": (lambda: llama(False), 14),
    "llama tied": (lambda: llama(True), 14),
    "gpt2": (gpt2, 8),
    "own": (Own, 5),
    "encoder": (encoder, 4),
}


def inputs_for(name: str) -> torch.Tensor:
    if name in ("own", "encoder"):
        return torch.randn(6, 5, 13 if name == "own" else 32)
    return torch.randn(6, 3, 16, 16) if name == "vit" else torch.randint(0, 40, (6, 9))


def output_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = model(x)
    parts = [y] if isinstance(y, torch.Tensor) else [part for part in y.to_tuple() if isinstance(part, torch.Tensor)]
    return torch.cat([part.flatten(1) for part in parts], 1)


def train(model: nn.Module, x: torch.Tensor, steps: int = 15) -> list[float]:
    torch.manual_seed(1)
    target = torch.randn_like(output_of(model, x))
    optimizer = torch.optim.AdamW(ipca.adapter_parameters(model), lr=3e-3)
    losses = []
    for _ in range(steps):
        loss = F.mse_loss(output_of(model, x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_model_is_unchanged_then_trains_then_gives_its_base_back(name, form):
    build, count = MODELS[name]
    model, x = build(), inputs_for(name)
    plain, kinds = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    with torch.no_grad():
        y = output_of(model, x)

    assert ipca.apply_pc(model, rank=4, alpha=6, form=form, progress=False) is model
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LinearPC)}
    assert len(layers) == count
    off = ((output_of(model, x) - y).norm() / y.norm()).item()
    assert off <= (0.0 if form == "intact" else 1e-5)

    factors = {f"{layer}.lora_{factor}" for layer in layers for factor in "AB"}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == factors
    assert {id(p) for p in ipca.adapter_parameters(model)} == {id(model.get_parameter(n)) for n in factors}
    frozen = {k: v.clone() for k, v in model.state_dict().items() if k not in factors}
    losses = train(model, x)
    assert losses[-1] < 0.97 * losses[0]
    assert {n for n, p in model.named_parameters() if p.grad is not None} == factors
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in frozen.items())
    assert all(not torch.equal(state[f"{n}.lora_{f}"], state[f"{n}.lora_{f}0"]) for n in layers for f in "AB")

    with torch.no_grad(), ipca.disabled(model):
        off = ((output_of(model, x) - y).norm() / y.norm()).item()
    assert off <= (0.0 if form == "intact" else 1e-5)
    ipca.unload(model, merge=False)
    state = model.state_dict()
    assert [type(m) for m in model.modules()] == kinds
    assert list(state) == list(plain)
    for key, value in plain.items():
        assert (state[key] - value).norm() <= (0.0 if form == "intact" else 1e-6) * value.norm()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_merged_and_unloaded_models_keep_the_trained_function(name, form):
    model, x = MODELS[name][0](), inputs_for(name)
    ipca.apply_pc(model, rank=4, form=form, progress=False)
    train(model, x, steps=3)
    model.eval()
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        y = output_of(model, x)
        merged = output_of(ipca.merge_adapter(model), x)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        back = output_of(ipca.unmerge_adapter(model), x)
        unloaded = output_of(ipca.unload(model), x)
    assert torch.equal(back, y)
    assert (merged - y).norm() <= 1e-5 * y.norm()
    assert torch.equal(unloaded, merged)
    assert not any(isinstance(m, LinearPC) for m in model.modules())


def test_modules_to_save_train_whole_beside_the_factors():
    config = transformers.BertConfig(**SMALL, **NO_DROPOUT, vocab_size=40, num_labels=3)
    model = transformers.BertForSequenceClassification(config)
    ipca.apply_pc(model, rank=4, modules_to_save=["classifier", "pooler"], progress=False)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    whole = {"classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    assert {name for name in names if "lora" not in name} == whole
    assert {id(p) for p in ipca.adapter_parameters(model)} == {id(model.get_parameter(name)) for name in names}
    before = {name: p.clone() for name, p in model.named_parameters()}
    losses = train(model, inputs_for("bert"))
    assert losses[-1] < 0.9 * losses[0]
    assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == names


@pytest.mark.parametrize("form", FORMS)
def test_training_one_layer_follows_the_gradient_of_the_product(form):
    linear = nn.Linear(13, 11).double()
    model = ipca.apply_pc(nn.Sequential(linear), rank=3, alpha=5, form=form, progress=False)
    layer, x = model[0], torch.randn(7, 13, dtype=torch.float64)
    model(x).square().sum().backward()
    weight = linear.weight.detach().clone().requires_grad_()
    F.linear(x, weight, linear.bias).square().sum().backward()
    scaling = 5 / 3
    assert torch.allclose(layer.lora_B.grad, scaling * weight.grad @ layer.lora_A.mT, rtol=1e-9)
    assert torch.allclose(layer.lora_A.grad, scaling * layer.lora_B.mT @ weight.grad, rtol=1e-9)


def test_functions_on_a_plain_model_say_what_to_do():
    model = Own()
    before = copy.deepcopy(model.state_dict())
    for function in (ipca.merge_adapter, ipca.unmerge_adapter, ipca.unload):
        with pytest.raises(ValueError, match="this Own has no LinearPC layer; call apply_pc or load_adapter first"):
            function(model)
    with pytest.raises(ValueError, match="no LinearPC layer"):
        list(ipca.adapter_parameters(model))
    with pytest.raises(ValueError, match="no LinearPC layer"), ipca.disabled(model):
        pass
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("merge", [True, False])
def test_hooks_that_an_unloaded_layer_loses_are_named(merge):
    def run(*attach):
        model = ipca.apply_pc(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), rank=2, progress=False)
        for each in attach:
            each(model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ipca.unload(model, merge=merge)
        return [str(each.message).partition(",")[0] for each in caught]

    assert run() == run(lambda model: model.register_forward_hook(print)) == []
    said = ["1: the hooks on this adapted layer"]
    assert run(lambda model: model[1].register_forward_hook(print)) == said
    assert run(lambda model: model[1].register_full_backward_pre_hook(print)) == said
    assert run(lambda model: setattr(model[1], "forward", lambda x: x)) == said
