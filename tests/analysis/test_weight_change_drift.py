"""Rescaling and rotation of singular components against cases worked out by hand; angles against SciPy."""

import math

import pytest
import scipy.linalg
import torch
from torch import nn

import ipca
from ipca import analysis
from tests.helpers.models import Plain


def drift_of(before, after, dtype=torch.float32):
    before, after = (torch.as_tensor(weight, dtype=dtype) for weight in (before, after))
    layer = nn.Linear(*reversed(after.shape), bias=False, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(after)
    return analysis.drift(nn.Sequential(layer), {"0": before})["0"]


def adapted(**options):
    return ipca.apply_pc(Plain(), rank=3, targets=["a", "b"], progress=False, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_by_two(dtype):
    found = drift_of([[3.0, 0.0], [0.0, 1.0]], [[2.0, 0.5], [0.0, 1.5]], dtype)
    assert found.S.tolist() == pytest.approx([3, 1])
    assert found.rescaling.tolist() == pytest.approx([1, 0.5])
    assert found.rotation.tolist() == pytest.approx([math.sqrt(0.125)] * 2)
    assert found.outside.tolist() == [0, 0]
    assert found.norm == pytest.approx(math.sqrt(1.5))
    assert found.shares == {
        "rescaling": pytest.approx(1.25 / 1.5),
        "rotation": pytest.approx(0.25 / 1.5),
        "outside": 0,
    }
    assert found.window is None


def test_the_components_are_those_of_the_pretrained_weight():
    turned = torch.tensor([[0.8, -0.6], [0.6, 0.8]])  # W = turned diag(3, 1); the change is 0.5 u₁ v₂ᵀ
    found = drift_of(turned @ torch.diag(torch.tensor([3.0, 1.0])), turned @ torch.tensor([[3.0, 0.5], [0.0, 1.0]]))
    assert found.rescaling.tolist() == pytest.approx([0, 0], abs=1e-6)
    assert found.rotation.tolist() == pytest.approx([math.sqrt(0.125)] * 2, rel=1e-6)


@pytest.mark.parametrize("tall", [True, False])
def test_what_leaves_the_span_of_a_rectangular_weight_is_outside(tall):
    before = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    change = torch.tensor([[0.0, 0.0], [0.2, 0.0], [0.4, 0.3]])
    before, after = (W if tall else W.mT for W in (before, before + change))
    found = drift_of(before, after)
    assert found.shape == tuple(before.shape)
    assert found.outside.tolist() == pytest.approx([0.4, 0.3])
    assert found.rotation.tolist() == pytest.approx([math.sqrt(0.02)] * 2)
    assert found.rescaling.tolist() == pytest.approx([0, 0], abs=1e-7)
    assert found.shares["outside"] == pytest.approx(0.25 / 0.29)


@pytest.mark.parametrize("shape", [(11, 7), (7, 11), (9, 9)])
def test_the_three_parts_sum_to_the_change(shape):
    before, after = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    found = drift_of(before, after, torch.float64)
    change = after - before
    total = sum(part.square().sum() for part in (found.rescaling, found.rotation, found.outside))
    assert total.item() == pytest.approx(change.square().sum().item(), rel=1e-12)
    assert sum(found.shares.values()) == pytest.approx(1, rel=1e-12)
    U, S, Vh = torch.linalg.svd(before, full_matrices=False)
    M = U.mT @ after @ Vh.mT
    i = 3
    row, column = M[i].square().sum() - M[i, i] ** 2, M[:, i].square().sum() - M[i, i] ** 2
    assert found.rotation[i].item() == pytest.approx(((row + column) / 2).sqrt().item(), rel=1e-10)
    assert found.rescaling[i].item() == pytest.approx((M[i, i] - S[i]).abs().item(), rel=1e-10)
    assert found.outside.any() == (shape[0] != shape[1])


def test_no_change_is_no_drift_with_shares_of_zero():
    found = analysis.drift(adapted())
    for layer in found.values():
        assert layer.norm == 0
        assert layer.shares == {"rescaling": 0, "rotation": 0, "outside": 0}
        assert layer.window == ipca.Window(4, 3)


def test_rescaling_a_window_rescales_its_components_alone():
    model = adapted(window="start=2")
    with torch.no_grad():
        model.a.lora_B.mul_(1.5)
    found = analysis.drift(model)["a"]
    expected = torch.zeros(12, dtype=torch.float64)
    expected[2:5] = 0.5 * found.S[2:5]
    torch.testing.assert_close(found.rescaling, expected, rtol=1e-5, atol=1e-6)
    assert found.shares["rescaling"] == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("form", ["residual", "intact"])
def test_angles_are_those_of_scipy(form):
    model = adapted(form=form)
    with torch.no_grad():
        for parameter in ipca.adapter_parameters(model):
            parameter.add_(0.2 * torch.randn_like(parameter))
    for name, found in analysis.principal_angles(model).items():
        layer = model.get_submodule(name)
        A, B, A0, B0 = (getattr(layer, f"lora_{x}").detach().double().numpy() for x in ("A", "B", "A0", "B0"))
        assert found.output.tolist() == pytest.approx(scipy.linalg.subspace_angles(B, B0).tolist(), rel=1e-9)
        assert found.input.tolist() == pytest.approx(scipy.linalg.subspace_angles(A.T, A0.T).tolist(), rel=1e-9)
        assert found.output[0] > 0.01


@pytest.mark.parametrize("angle", [1e-9, 0.3, 1.2, math.pi / 2])
def test_a_turn_by_a_known_angle(angle):
    model = nn.Sequential(nn.Linear(5, 7, dtype=torch.float64))
    ipca.apply_pc(model, rank=1, targets=["0"], progress=False)
    layer = model[0]
    b = layer.lora_B0[:, 0]
    other = torch.linalg.svd(layer.lora_B0)[0][:, 3] * b.norm()
    with torch.no_grad():
        layer.lora_B[:, 0] = -2 * (math.cos(angle) * b + math.sin(angle) * other)
    found = analysis.principal_angles(model)["0"]
    assert found.output.tolist() == pytest.approx([angle], rel=1e-6)
    assert found.input.tolist() == pytest.approx([0], abs=1e-14)


def test_a_factor_that_starts_at_zero_has_no_direction_to_turn_from():
    model = adapted(form="intact")
    with torch.no_grad():
        model.a.lora_B0.zero_()
        model.b.lora_B.zero_()
        model.b.lora_A[1] = model.b.lora_A[0]
    found = analysis.principal_angles(model)
    assert [len(found[name].output) for name in ("a", "b")] == [0, 0]
    assert [len(found[name].input) for name in ("a", "b")] == [3, 2]
    assert found["b"].input.tolist() == pytest.approx([0, 0], abs=1e-6)


def test_angles_of_layers_without_a_start_are_refused():
    with pytest.raises(ValueError, match="a: a Linear does not keep its initial factors; an adapted layer of"):
        analysis.principal_angles(Plain(), Plain())


def test_experts_are_measured_one_by_one():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.randn(3, 6, 8))

        def forward(self, x):
            return x @ self.up.mT

    model = ipca.apply_pc(nn.Sequential(Experts()), rank=2, targets=["0.up"], form="intact", progress=False)
    with torch.no_grad():
        model[0].up.lora_B[1] *= 2
    found = analysis.drift(model)
    assert list(found) == ["0.up[0]", "0.up[1]", "0.up[2]"]
    assert [layer.norm > 0 for layer in found.values()] == [False, True, False]
    assert list(analysis.principal_angles(model)) == list(found)
