"""What trains beside the factors: told by ``requires_grad``, by name, and by the steps that were taken."""

import copy

import pytest
import torch
from torch import nn

import ipca


class Gated(nn.Module):
    """Adapted layers beside a parameter of their parent, and a norm inside it."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.ones(8))
        self.fc, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(self.fc(x * self.gate))


def adapted(base=None, **options):
    return ipca.apply_pc(base or nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), rank=2, progress=False, **options)


def step(model, optimizer=None, **options):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(trained, lr=0.1, **options)
    optimizer.zero_grad()
    (model(torch.randn(16, 8)) - torch.randn(16, 8)).square().sum().backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}], ids=str)
def test_a_norm_that_trained_and_was_frozen_is_in_the_file(options, tmp_path):
    base = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    model = adapted(copy.deepcopy(base))
    model[1].requires_grad_(True)
    step(model, **options)
    model.requires_grad_(False)
    ipca.save_adapter(model, tmp_path)
    x = torch.randn(4, 8)
    assert not torch.equal(model[1].weight, base[1].weight)
    assert torch.equal(ipca.load_adapter(base, tmp_path)(x), model(x))


def test_what_trains_later_with_the_same_optimizer_is_in_the_file(tmp_path):
    base = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    model = adapted(copy.deepcopy(base))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # also of what is frozen at first
    step(model, optimizer)
    assert list(ipca.summary(model).modules_to_save) == []
    model[1].requires_grad_(True)
    step(model, optimizer)
    model[1].requires_grad_(False)
    assert ipca.summary(model).modules_to_save == (("1", 16),)
    ipca.save_adapter(model, tmp_path)
    assert torch.equal(ipca.load_adapter(base, tmp_path)[1].weight, model[1].weight)


@pytest.mark.parametrize("name", ["base_weight", "bias"])
def test_a_base_that_trained_and_was_frozen_is_refused(name, tmp_path):
    model = adapted()
    getattr(model[0], name).requires_grad_(True)
    step(model)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="0: its weight or bias trains or has trained, which an adapter file"):
        ipca.save_adapter(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_gradients_from_before_the_adapter_are_no_secret(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(4, 8)).square().sum().backward()
    adapted(model, targets=["0"])
    optimizer.step()  # of gradients that the norm still has
    ipca.save_adapter(model, tmp_path)
    base = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    assert torch.equal(ipca.load_adapter(base, tmp_path, check_base=False)[1].weight, model[1].weight)


def test_a_parameter_beside_adapted_layers_trains_once_and_is_refused_frozen_or_not(tmp_path):
    model = adapted(Gated())
    model.gate.requires_grad_(True)
    model.norm.requires_grad_(True)
    found = list(ipca.adapter_parameters(model))
    assert {id(p) for p in found} == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(found) == 5
    assert ipca.summary(model).modules_to_save == (("Gated", 8), ("norm", 16))
    step(model)
    for frozen in (False, True):
        model.requires_grad_(not frozen)
        model.fc.base_weight.requires_grad_(False)
        model.fc.bias.requires_grad_(False)
        with pytest.raises(ValueError, match="Gated trains parameters of its own beside the adapted fc"):
            ipca.save_adapter(model, tmp_path / "out")


def test_only_modules_with_parameters_that_a_step_has_changed_are_marked(tmp_path):
    model, other = adapted(Gated()), Gated()
    step(other)
    step(model)
    assert ipca.summary(model).modules_to_save == ()
    ipca.save_adapter(model, tmp_path)


@pytest.mark.parametrize("named", [["1"], []])
def test_unload_takes_the_marks_away(named):
    model = adapted(modules_to_save=named)
    model[1].requires_grad_(True)
    optimizer = step(model)
    ipca.unload(model)
    adapted(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"0.lora_A", "0.lora_B"}
    assert ipca.summary(model).modules_to_save == ()
    step(model)
    assert ipca.summary(model).modules_to_save == ()
    optimizer.zero_grad()
    model[1].requires_grad_(True)
    step(model, optimizer)
    model[1].requires_grad_(False)
    assert ipca.summary(model).modules_to_save == (("1", 16),)


def test_without_merging_what_trained_goes_into_the_next_adapter(tmp_path):
    base = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    model = adapted(copy.deepcopy(base), modules_to_save=["1"])
    step(model)
    adapted(ipca.unload(model, merge=False))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"0.lora_A", "0.lora_B"}
    ipca.save_adapter(model, tmp_path)
    x = torch.randn(4, 8)
    assert torch.equal(ipca.load_adapter(base, tmp_path)(x), model(x))


@pytest.mark.parametrize("merge", [True, False])
def test_a_head_that_is_adapted_after_it_trained_whole_keeps_its_weight_frozen(merge, tmp_path):
    model = nn.ModuleDict({"body": nn.Linear(8, 8), "head": nn.Sequential(nn.Linear(8, 8), nn.ReLU())})
    ipca.unload(adapted(model, modules_to_save=["head"]), merge=merge)
    adapted(model)
    assert not model["head"][0].base_weight.requires_grad
    assert len(list(ipca.adapter_parameters(model))) == 4
    ipca.save_adapter(model, tmp_path)


def test_an_adapter_without_a_module_that_has_trained_is_not_loaded_over_it(tmp_path):
    model = adapted()
    ipca.save_adapter(model, tmp_path)
    model[1].requires_grad_(True)
    step(model)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"^1 trains whole in this model, and the adapter in .* does not hold it"):
        ipca.load_adapter(model, tmp_path)


def test_marks_survive_copies():
    model = adapted()
    model[1].requires_grad_(True)
    step(model)
    model.requires_grad_(False)
    assert ipca.summary(copy.deepcopy(model)).modules_to_save == (("1", 16),)


def test_a_module_that_trains_whole_is_resumed_in_place(tmp_path):
    base = nn.ModuleDict({"body": nn.Linear(8, 8), "head": nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))})
    model = adapted(base, targets=["body"], modules_to_save=["head"])
    ipca.save_adapter(model, tmp_path)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model["head"](model["body"](torch.randn(4, 8))).square().sum().backward()
    optimizer.step()
    ipca.load_adapter(model, tmp_path)
    assert torch.equal(model["head"][0].weight, torch.ones(8))
