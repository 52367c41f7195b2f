"""torch.func sees through the op where it can, and is told why where it cannot."""

import contextlib

import pytest
import torch
import torch.autograd.forward_ad as fw
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, jvp, vmap

import ipca
from ipca.nn import LinearPC
from ipca.ops import pc_linear

FORMS = pytest.mark.parametrize("form", ["residual", "intact"])


@pytest.fixture(autouse=True)
def _auto():
    before = ipca.set_backend("auto")
    yield
    ipca.set_backend(before)


def layer(form, **options):
    made = LinearPC(12, 7, rank=3, form=form, **options)
    with torch.no_grad():
        made.lora_A.add_(torch.randn_like(made.lora_A))
    return made


@FORMS
def test_gradients_of_each_sample(form):
    made, x = layer(form), torch.randn(5, 12)
    factors = {"lora_A": made.lora_A.detach(), "lora_B": made.lora_B.detach()}

    def loss(factors, x):
        return functional_call(made, factors, (x,)).square().sum()

    found = vmap(grad(loss), in_dims=(None, 0))(factors, x)
    for i, row in enumerate(x):
        made.zero_grad()
        made(row).square().sum().backward()
        torch.testing.assert_close(found["lora_A"][i], made.lora_A.grad, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found["lora_B"][i], made.lora_B.grad, rtol=1e-4, atol=1e-4)


@FORMS
def test_a_directional_derivative(form):
    made, x, v = layer(form), torch.randn(5, 12), torch.randn(5, 12)
    with torch.no_grad():
        y, dy = jvp(made, (x,), (v,))
        torch.testing.assert_close(dy, made(v) - made(torch.zeros_like(v)), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(y, made(x), rtol=1e-5, atol=1e-5)


@FORMS
@pytest.mark.parametrize("trains", [False, True])
def test_a_derivative_in_forward_mode(form, trains):
    made, x, v = layer(form), torch.randn(5, 12), torch.randn(5, 12)
    made.train_factors(trains)
    expected = jvp(made, (x,), (v,))[1].detach()
    with fw.dual_level():
        y, dy = fw.unpack_dual(made(fw.make_dual(x, v)))
        torch.testing.assert_close(dy, expected)
        torch.testing.assert_close(y, made(x))
    assert fw._current_level == -1
    assert made(x).requires_grad is trains


@FORMS
def test_a_derivative_in_forward_mode_along_a_factor(form):
    made, x, v = layer(form), torch.randn(5, 12), torch.randn(3, 12)
    A = made.lora_A.detach()
    expected = jvp(lambda A: functional_call(made, {"lora_A": A}, (x,)), (A,), (v,))[1]
    with fw.dual_level():
        y = functional_call(made, {"lora_A": fw.make_dual(A, v)}, (x,))
        torch.testing.assert_close(fw.unpack_dual(y).tangent, expected)
        y = F.linear(x, functional_call(Read(made), {"layer.lora_A": fw.make_dual(A, v)}, ()))
        torch.testing.assert_close(fw.unpack_dual(y).tangent, expected)


class Read(nn.Module):
    """The weight of a layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self):
        return self.layer.weight + 0


@FORMS
def test_a_derivative_of_a_weight_that_is_read_in_forward_mode(form):
    made, x, v = layer(form), torch.randn(5, 12), torch.randn(5, 12)
    for mode in (contextlib.nullcontext(), made.disabled()):
        with mode, fw.dual_level():
            tangent = fw.unpack_dual(F.linear(fw.make_dual(x, v), made.weight)).tangent
            torch.testing.assert_close(tangent, v @ made.computed_weight().mT)


@FORMS
def test_dropout_in_forward_mode(form):
    made, x, v = layer(form, dropout=0.5), torch.randn(5, 12), torch.randn(5, 12)
    with fw.dual_level():
        torch.manual_seed(3)
        y, dy = fw.unpack_dual(made(fw.make_dual(x, v)))
    with torch.no_grad():  # the same entries are dropped, and the layer is affine
        results = []
        for given in (x, v, torch.zeros_like(v)):
            torch.manual_seed(3)
            results.append(made(given))
    torch.testing.assert_close(y, results[0])
    torch.testing.assert_close(dy, results[1] - results[2])


@FORMS
def test_the_second_derivative_by_forward_over_reverse(form):
    made, x, v = layer(form), torch.randn(5, 12), torch.randn(5, 12)
    expected = jvp(grad(lambda x: made(x).pow(3).sum()), (x,), (v,))[1]
    with fw.dual_level():
        dual = fw.make_dual(x.requires_grad_(), v)
        (found,) = torch.autograd.grad(made(dual).pow(3).sum(), dual)
        torch.testing.assert_close(fw.unpack_dual(found).tangent, expected, rtol=1e-4, atol=1e-4)


KINDS = {
    "conv2d": (lambda: nn.Conv2d(3, 6, 3), (2, 3, 5, 5)),
    "linear under autocast": (lambda: nn.Linear(12, 7), (5, 12)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_layers_in_forward_mode(kind):
    build, shape = KINDS[kind]
    model = ipca.apply_pc(nn.Sequential(build()), rank=3, targets=["0"], progress=False)
    x, v = torch.randn(shape), torch.randn(shape)
    with fw.dual_level(), torch.autocast("cpu", torch.bfloat16, enabled="autocast" in kind):
        found = fw.unpack_dual(model(fw.make_dual(x, v))).tangent
        torch.testing.assert_close(found, (model(v) - model(torch.zeros_like(v))).to(found.dtype), rtol=0.1, atol=0.05)


def test_a_backend_set_by_name_has_no_rule():
    made, x = layer("intact"), torch.randn(5, 12)
    for name in ("triton", "addmm", "merged"):
        ipca.set_backend(name)
        with pytest.raises(RuntimeError, match=rf"backend '{name}' has no rule for torch\.func transforms"):
            vmap(made)(x)
        with fw.dual_level(), pytest.raises(RuntimeError, match=r"no rule for .* derivatives in forward mode"):
            made(fw.make_dual(x, x))
    ipca.set_backend("reference")
    assert vmap(made)(torch.randn(5, 12)).shape == (5, 7)


def test_dropout_has_no_rule():
    with pytest.raises(RuntimeError, match=r"no dropout under torch\.func transforms; call eval\(\)"):
        vmap(layer("residual", dropout=0.5))(torch.randn(5, 12))


def test_what_is_explained_inside_a_transform():
    made, found = layer("residual"), []

    def spy(x):
        found.append(ipca.nn.explain(made, x).backend)
        return pc_linear(x, made.base_weight, made.lora_A, made.lora_B)

    vmap(spy)(torch.randn(5, 12))
    assert found == ["reference"]


@FORMS
@pytest.mark.parametrize("tracked", [True, False])
def test_a_layer_is_traced_by_torch_jit(form, tracked, tmp_path):
    layer, x = LinearPC.from_linear(torch.nn.Linear(20, 12), rank=3, form=form).eval(), torch.randn(5, 20)
    with torch.no_grad():
        layer.lora_B.add_(0.1)
    with torch.set_grad_enabled(tracked):
        torch.jit.save(torch.jit.trace(layer, x), tmp_path / "layer.pt")
    traced, other = torch.jit.load(tmp_path / "layer.pt"), torch.randn(3, 20)
    torch.testing.assert_close(traced(other), layer(other))
