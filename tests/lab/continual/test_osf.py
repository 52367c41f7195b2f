"""OSF by PEFT: what its projected gradients keep with plain SGD, what Adam does to that, and the layers around it."""

import pytest
import torch
from torch import nn

from ipca.lab.continual.osf import fold_osf, inject_osf
from tests.helpers.models import Plain, snapshot


def fit(model, optimizer):
    for _ in range(20):
        loss = (model(torch.randn(8, 20)) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def change(optimizer_of):
    """The change of the layer ``a`` by training half of its 12 components, and its protected ones ``U, Vh``."""
    torch.manual_seed(5)
    model = Plain()
    weight = model.a.weight.detach().clone()
    U, _, Vh = torch.linalg.svd(weight, full_matrices=False)
    inject_osf(model, ["a", "b"], 0.5)
    fit(model, optimizer_of([p for p in model.parameters() if p.requires_grad]))
    fold_osf(model)
    return model.a.weight.detach() - weight, U[:, :6], Vh[:6]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_leaves_the_protected_components_alone(momentum):
    found, U, Vh = change(lambda p: torch.optim.SGD(p, lr=0.05, momentum=momentum))
    assert found.norm() > 0.01
    assert (U.mT @ found).norm() <= 1e-5 * found.norm()
    assert (found @ Vh.mT).norm() <= 1e-5 * found.norm()


def test_adam_does_not():
    found, U, _ = change(lambda p: torch.optim.Adam(p, lr=0.01))
    assert (U.mT @ found).norm() > 0.01 * found.norm()


def test_the_function_stays_when_layers_go_in_and_when_they_are_folded():
    model, x = Plain().eval(), torch.randn(7, 20)
    before, modules = model(x), [type(module) for module in model.modules()]
    inject_osf(model, ["a", "b"], 0.25)
    assert (model(x) - before).abs().max() <= 1e-5 * before.abs().max()
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trains == {f"{n}.osf_svd_params.default.{part}_low" for n in "ab" for part in "USV"}
    fit(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05))
    after = model(x)
    fold_osf(model)
    assert (model(x) - after).abs().max() <= 1e-5 * after.abs().max()
    assert (after - before).abs().max() > 0.01
    assert [type(module) for module in model.modules()] == modules
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert not hasattr(model, "peft_config")


@pytest.mark.parametrize(("protected", "expected"), [(0.5, 6), (0.3, 3), (0.01, 1)])
def test_the_share_is_that_of_each_layer(protected, expected):
    model = nn.ModuleDict({"a": nn.Linear(12, 20), "xa": nn.Linear(20, 30)})
    inject_osf(model, ["a"], protected)
    assert model["a"].effective_rank == {"default": expected}
    assert type(model["xa"]) is nn.Linear


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(ValueError, match="above 0 and below 1"):
        inject_osf(Plain(), ["a"], share)


def test_a_layer_with_nothing_left_is_refused():
    model = nn.Sequential(nn.Linear(1, 5))
    with pytest.raises(ValueError, match="0 has 1 singular components, and protecting 1 leaves none to train"):
        inject_osf(model, ["0"], 0.5)


def test_another_kind_of_layer_is_refused():
    model = nn.Sequential(nn.Embedding(5, 4))
    with pytest.raises(TypeError, match=r"0 is a Embedding; PEFT's OSF adapts nn\.Linear only"):
        inject_osf(model, ["0"], 0.5)


def test_a_failure_half_way_puts_everything_back():
    model = Plain()
    with torch.no_grad():
        model.b.weight[2, 2] = torch.nan
    before = snapshot(model)
    with pytest.raises(RuntimeError):
        inject_osf(model, ["a", "b"], 0.5)
    assert snapshot(model) == before
    assert not hasattr(model, "peft_config")
