"""OPLoRA keeps the leading singular triples, under autocast too, and becomes a plain LoRA that can be saved."""

import copy

import torch
from torch.nn.utils.parametrize import remove_parametrizations

import ipca
from ipca.lab import baselines
from ipca.model import AdapterSettings
from ipca.model.apply import adapted_layers
from tests.helpers.models import Plain

SETTINGS = AdapterSettings(rank=3, targets=("a", "b"))
X = torch.randn(7, 20, generator=torch.Generator().manual_seed(2))


def trained():
    torch.manual_seed(5)
    base = Plain().eval()
    model = baselines.apply(copy.deepcopy(base), "oplora", SETTINGS)
    groups = ipca.param_groups(model, 1e-2)
    assert [(group["name"], len(group["params"])) for group in groups] == [("lora_A", 2), ("lora_B", 2)]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(X).square().sum()
        loss.backward()
        optimizer.step()
    return base, model


def test_the_leading_components_stay_and_the_next_do_not():
    base, model = trained()
    for name in ("a", "b"):
        W = base.get_submodule(name).weight.double()
        U, _, Vh = torch.linalg.svd(W, full_matrices=False)
        moved = model.get_submodule(name).effective_weight().double()
        assert (moved - W).norm() > 0.01 * W.norm()
        assert (U[:, :3].mT @ (moved - W)).norm() <= 1e-5 * (moved - W).norm()
        assert ((moved - W) @ Vh[:3].mT).norm() <= 1e-5 * (moved - W).norm()
        assert (U[:, 3:6].mT @ (moved - W)).norm() > 0.1 * (moved - W).norm()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            A = model.get_submodule(name).lora_A.double()
        assert (A @ Vh[:3].mT).norm() <= 1e-5 * A.norm(), "the projection is computed in float32"


def test_without_its_parametrizations_it_is_saved_as_lora(tmp_path):
    base, model = trained()
    expected = model(X)
    assert torch.equal(copy.deepcopy(model)(X), expected)
    for layer in adapted_layers(model).values():
        for factor in ("lora_A", "lora_B"):
            remove_parametrizations(layer, factor)
    assert torch.equal(model(X), expected)
    ipca.save_adapter(model, tmp_path / "adapter")
    assert torch.equal(ipca.load_adapter(base, tmp_path / "adapter")(X), expected)
