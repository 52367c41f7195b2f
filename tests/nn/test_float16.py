"""Windows in float16 at small ``alpha / rank``, whose factors are large: finite wherever the plain layer is."""

import copy

import pytest
import torch
from torch import nn

import ipca
from ipca.ops import pair

WIDTH, RANK = 256, 64


def layers():
    """A linear layer and a convolution with one large component, and inputs that lie in its direction."""
    torch.manual_seed(0)
    u, v = torch.randn(WIDTH), torch.zeros(WIDTH)
    v[7] = 1
    weight = 0.02 * torch.randn(WIDTH, WIDTH) + 20 * torch.outer(u / u.norm(), v)
    linear, conv = nn.Linear(WIDTH, WIDTH), nn.Conv2d(WIDTH, WIDTH, 1)
    with torch.no_grad():
        linear.weight.copy_(weight)
        conv.weight.copy_(weight[:, :, None, None])
    x = torch.randn(3, WIDTH)
    x[0, 7] = 6000
    return {"linear": (linear, x), "conv": (conv, x[:, :, None, None])}


def adapted(model, library, form, alpha):
    model = nn.Sequential(copy.deepcopy(model))
    options = {"window": "principal"}
    if library == "ipca":
        return ipca.apply_pc(model, rank=RANK, alpha=alpha, form=form, targets=["0"], progress=False, **options)
    peft = pytest.importorskip("peft")
    from ipca.peft import PCConfig

    return peft.get_peft_model(model, PCConfig(r=RANK, lora_alpha=alpha, target_modules=["0"], **options))


@pytest.mark.parametrize("alpha", [0.5, 1, 8, 16])
@pytest.mark.parametrize(("library", "form"), [("ipca", "intact"), ("ipca", "residual"), ("peft", "intact")])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_it_is_finite_and_right_before_and_after_a_step(kind, library, form, alpha):
    plain, x = layers()[kind]
    with torch.no_grad():
        right = plain(x)
    assert 1000 < right.abs().max() < 60000
    model = adapted(plain.half(), library, form, alpha)
    y = model(x.half())
    assert (y - right).abs().max() < 5e-3 * right.abs().max()
    if form == "intact":
        assert torch.equal(y, plain(x.half()))
    factors = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for factor in factors:
            factor += 1e-3 * torch.randn_like(factor)
    with torch.no_grad():
        exact = copy.deepcopy(model).float()(x)
        assert (model(x.half()) - exact).abs().max() < 5e-3 * exact.abs().max()


@pytest.mark.parametrize("form", ["intact", "residual"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_gradients_are_those_of_float32(kind, form):
    plain, x = layers()[kind]
    x, dy = x.clamp(-3, 3), torch.randn(plain(x).shape)
    half = adapted(plain.half(), "ipca", form, 1)
    single = copy.deepcopy(half).float()
    grads = []
    for model, dtype in ((half, torch.float16), (single, torch.float32)):
        given = x.to(dtype).requires_grad_()
        model(given).backward(dy.to(dtype))
        grads.append([given.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    for got, want in zip(*grads, strict=True):
        assert (got - want).norm() < 5e-3 * want.norm()


def test_under_autocast():
    plain, x = layers()["linear"]
    model = adapted(plain, "ipca", "intact", 1)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.float16):
        assert torch.equal(model(x), plain(x))


def test_only_small_scalings_in_float16_are_balanced():
    factors = [torch.randn(2, 3), torch.randn(4, 2), None, None]
    for scaling, dtype in (
        (1.0, torch.float16),
        (0.5, torch.float16),
        (1 / 64, torch.bfloat16),
        (1 / 64, torch.float32),
    ):
        found = pair.balanced_pair(*factors, scaling, torch.ones(1, dtype=dtype))
        assert found[0] is factors[0]
        assert found[4] == scaling
    A, B, A0, B0, scaling = pair.balanced_pair(*factors, 1 / 64, torch.ones(1).half())
    assert A0 is B0 is None
    assert scaling == 1
    assert torch.equal(A, factors[0] / 8)
    assert torch.equal(B, factors[1] / 8)
