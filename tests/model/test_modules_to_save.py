import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from transformers import LlamaConfig, LlamaForCausalLM

import ipca
from tests.helpers.models import snapshot


def network():
    head = nn.Sequential(nn.BatchNorm1d(12, affine=False), nn.Linear(12, 3))
    return nn.ModuleDict({"body": nn.Linear(8, 12), "head": head})


def forward(model, x):
    return model["head"](model["body"](x))


def train(model):
    optimizer = torch.optim.SGD(ipca.adapter_parameters(model), lr=0.3)
    for _ in range(5):
        loss = forward(model, torch.randn(16, 8)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("freeze", [False, True])
def test_a_saved_module_travels_whole_frozen_or_not(tmp_path, freeze):
    base = network()
    model = train(ipca.apply_pc(copy.deepcopy(base), rank=2, modules_to_save=["head"], progress=False))
    model.requires_grad_(not freeze)
    model["body"].requires_grad_(False)
    ipca.save_adapter(model, tmp_path)
    again = ipca.load_adapter(copy.deepcopy(base), tmp_path, trainable=False).eval()
    x = torch.randn(5, 8)
    assert torch.equal(forward(again, x), forward(model, x))
    assert not torch.allclose(forward(again, x), forward(base.eval(), x), atol=1e-3)
    ipca.save_adapter(again, tmp_path)
    assert torch.equal(forward(ipca.load_adapter(copy.deepcopy(base), tmp_path).eval(), x), forward(model, x))


def test_a_second_call_keeps_what_the_first_one_trains():
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "head": nn.Linear(8, 3)})
    ipca.apply_pc(model, rank=2, targets=["a"], modules_to_save=["head"], progress=False)
    ipca.apply_pc(model, rank=2, targets=["b"], progress=False)
    training = {name for name, p in model.named_parameters() if p.requires_grad}
    assert training == {"a.lora_A", "a.lora_B", "b.lora_A", "b.lora_B", "head.weight", "head.bias"}
    assert {id(p) for p in ipca.adapter_parameters(model)} == {id(p) for p in model.parameters() if p.requires_grad}


def test_a_module_that_holds_adapted_layers_cannot_train_whole():
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "block": nn.ModuleDict({"b": nn.Linear(8, 8)})})
    ipca.apply_pc(model, rank=2, targets=["b"], progress=False)
    before = snapshot(model)
    with pytest.raises(ValueError, match="'block' holds layers that are adapted; unload them first"):
        ipca.apply_pc(model, rank=2, targets=["a"], modules_to_save=["block"], progress=False)
    assert snapshot(model) == before


class Twice(nn.Module):
    """One parameter under two names."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x))


def test_a_parameter_with_two_names_in_one_module_travels_too(tmp_path):
    base = nn.ModuleDict({"body": nn.Linear(8, 12), "head": Twice()})
    model = train(ipca.apply_pc(copy.deepcopy(base), rank=2, modules_to_save=["head"], progress=False))
    ipca.save_adapter(model, tmp_path)
    again, x = ipca.load_adapter(base, tmp_path).eval(), torch.randn(5, 8)
    assert torch.equal(forward(again, x), forward(model, x))
    assert again["head"].second.weight is again["head"].first.weight


class Remembers(nn.Linear):
    def get_extra_state(self):
        return {"steps": 1}

    def set_extra_state(self, state):
        pass


def test_a_module_with_other_state_than_tensors_is_refused_before_it_trains():
    model = nn.ModuleDict({"body": nn.Linear(8, 12), "head": Remembers(12, 3)})
    before = snapshot(model)
    with pytest.raises(ValueError, match="'head' has extra state that is no tensor"):
        ipca.apply_pc(model, rank=2, modules_to_save=["head"], progress=False)
    assert snapshot(model) == before


def tied_llama():
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=30,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (tied_llama, {"modules_to_save": ["embed_tokens"]}, "'model.embed_tokens' shares parameters"),
        (network, {"exclude": ["nosuchlayer"]}, "exclude 'nosuchlayer' matches no module"),
        (network, {"modules_to_save": ["nosuchlayer"]}, "modules_to_save 'nosuchlayer' matches no module"),
    ],
)
def test_what_cannot_be_meant_is_refused(model, options, message):
    model = model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        ipca.apply_pc(model, rank=2, progress=False, **options)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_whole_integer_modules_are_refused():
    model = network()
    model["table"] = nn.ParameterList([nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)])
    with pytest.raises(ValueError, match="'table' has parameters that are no floats"):
        ipca.apply_pc(model, rank=2, targets=["body"], modules_to_save=["table"], progress=False)
    assert type(model["body"]) is nn.Linear


def test_layers_of_a_peft_adapter_are_refused():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(network(), LoraConfig(r=2, target_modules=["body"]))
    with pytest.raises(ValueError, match=r"belongs to a PEFT adapter; merge and unload"):
        ipca.apply_pc(model, rank=2, progress=False)


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, AveragedModel])
def test_a_wrapper_is_not_saved(wrap, tmp_path):
    model = ipca.apply_pc(network(), rank=2, progress=False)
    with pytest.raises(ValueError, match="belongs to a wrapper"):
        ipca.save_adapter(wrap(model), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_name_that_ends_another_one_is_refused():
    model = nn.ModuleDict({"q_proj": nn.Linear(10, 10), "proj": nn.Linear(10, 4)})
    with pytest.raises(ValueError, match="'proj' would make PEFT save 'q_proj' too"):
        ipca.apply_pc(model, rank=2, targets=["q_proj"], modules_to_save=["proj"], progress=False)
    ipca.apply_pc(model, rank=2, targets=["q_proj"], progress=False)
    model["proj"].requires_grad_(True)
    with pytest.raises(ValueError, match="'proj' would make PEFT save 'q_proj' too"):
        ipca.export(model, "unused")


def test_no_targets_and_hooks_of_every_kind_are_refused():
    with pytest.raises(ValueError, match="targets is empty"):
        ipca.apply_pc(network(), rank=2, targets=[], progress=False)
    model = network()
    model["body"].register_full_backward_pre_hook(print)
    with pytest.raises(ValueError, match="body: it has hooks"):
        ipca.apply_pc(model, rank=2, progress=False)


def test_a_small_new_head_is_named_with_the_cure():
    with pytest.raises(ValueError, match=r"head\.1: .* train it fully"):
        ipca.apply_pc(network(), rank=4, targets=["body", "head.1"], progress=False)
    with pytest.warns(UserWarning, match=r"leaves out head\.1: rank 4 is above the 3 singular values"):
        ipca.apply_pc(network(), rank=4, progress=False)


def test_a_layer_in_two_places_is_not_saved(tmp_path):
    layer = ipca.nn.LinearPC(8, 8, 2)
    with pytest.raises(ValueError, match="several places"):
        ipca.save_adapter(nn.Sequential(layer, nn.ReLU(), layer), tmp_path)


def test_inference_mode_is_refused(tmp_path):
    ipca.save_adapter(ipca.apply_pc(network(), rank=2, progress=False), tmp_path)
    with torch.inference_mode():
        with pytest.raises(RuntimeError, match="could never train"):
            ipca.apply_pc(network(), rank=2, progress=False)
        with pytest.raises(RuntimeError, match="could never train"):
            ipca.load_adapter(network(), tmp_path)


def test_a_layer_of_an_encoder_alone():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    x, mask = torch.randn(2, 5, 16), torch.tensor([[0, 0, 0, 0, 1], [0, 0, 1, 1, 1]]).bool()
    with torch.no_grad():
        y = encoder(x, src_key_padding_mask=mask)
        with pytest.warns(UserWarning, match=r"leaves out self_attn\.out_proj"):
            ipca.apply_pc(encoder.layers[1], rank=3, progress=False)
        assert torch.allclose(encoder(x, src_key_padding_mask=mask)[~mask], y[~mask], rtol=1e-4, atol=1e-5)
