"""W + λ ΔW for every method: the ends to the bit, every λ the same line, and everything put back."""

import copy

import peft
import pytest
import torch
from torch import nn

from ipca.lab import baselines
from ipca.model import AdapterSettings
from tests.helpers.models import Plain, snapshot

SETTINGS = AdapterSettings(rank=3, targets=("a", "b"), alpha=6)
METHODS = ("0.25", "lora", "full", "frozen-A", *baselines.BASELINES)
NEED_BASE = ("full", "kasa", "osf", "oft", "corda-ipm", "corda-kpm")
X = torch.randn(9, 20, generator=torch.Generator().manual_seed(3))


def move(model):
    """Change what trains at random."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))


def tuned(method, settings=SETTINGS):
    """The base, its weights, and a model that was adapted by ``method`` and moved."""
    torch.manual_seed(5)
    base = Plain().eval()
    model = baselines.apply(copy.deepcopy(base), method, settings, calibration=[torch.randn(30, 20)])
    move(model)
    return base, {name: base.get_submodule(name).weight for name in ("a", "b")}, model


@pytest.mark.parametrize("method", METHODS)
def test_the_ends_are_the_base_and_the_tuned_model_to_the_bit(method):
    base, weights, model = tuned(method)
    before, after = snapshot(model), model(X)
    assert not torch.allclose(after, base(X), atol=1e-3)
    with baselines.scaled(model, 0.0, weights) as given:
        assert given is model
        assert torch.equal(model(X), base(X))
    with baselines.scaled(model, 1.0, weights):
        assert torch.equal(model(X), after)
    assert snapshot(model) == before
    assert torch.equal(model(X), after)


@pytest.mark.parametrize("scale", [0.3, 1.25])
@pytest.mark.parametrize("method", METHODS)
def test_every_scale_is_on_the_line_through_the_weights(method, scale):
    base, weights, model = tuned(method)
    x = torch.randn(9, 20)

    def layer(name):
        module = model.get_submodule(name)
        return module(x if name == "a" else x[:, :12]).detach()

    for name in ("a", "b"):
        given = x if name == "a" else x[:, :12]
        start, end = base.get_submodule(name)(given), layer(name)
        with baselines.scaled(model, scale, weights):
            assert torch.allclose(layer(name), start + scale * (end - start), atol=2e-6)


@pytest.mark.parametrize("method", NEED_BASE)
def test_a_base_that_is_needed_is_asked_for(method):
    _, _, model = tuned(method)
    with pytest.raises(ValueError, match=r"[Pp]ass (base|the pretrained model)"):
        baselines.scaled(model, 0.5).__enter__()


def test_others_need_no_base():
    for method in set(METHODS) - set(NEED_BASE):
        base, _, model = tuned(method)
        with baselines.scaled(model, 0.0):
            assert torch.equal(model(X), base(X))


def test_a_residual_window_is_scaled_by_its_change():
    base, weights, model = tuned("0.25", AdapterSettings(rank=3, targets=("a", "b"), form="residual"))
    start, end = weights["a"], model.a.effective_weight()
    with baselines.scaled(model, 0.4, weights):
        assert torch.allclose(model.a.weight, start + 0.4 * (end - start), atol=1e-6)
    with baselines.scaled(model, 0.0, weights):
        assert torch.equal(model(X), base(X))


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_a_peft_model_is_scaled_as_well(options):
    base = Plain().eval()
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=3, target_modules=["a", "b"], **options)).eval()
    move(model)
    after = model(X)
    with baselines.scaled(model, 0.0, base):
        assert torch.equal(model(X), base(X))
    with baselines.scaled(model, 0.5, base):
        assert not torch.allclose(model(X), after, atol=1e-4)
    assert torch.equal(model(X), after)


def test_what_cannot_be_scaled_is_said():
    _, _, model = tuned("lora")
    model.a.merge()
    with pytest.raises(ValueError, match="a merged adapter cannot be scaled; unmerge it first"):
        baselines.scaled(model, 0.5).__enter__()
    base = nn.Sequential(nn.Embedding(9, 8))
    with pytest.raises(ValueError, match=r"0: of this method only linear layers can be scaled, not 'embedding'"):
        baselines.scaled(copy.deepcopy(base), 0.5, {"0": base[0].weight.T}).__enter__()
