"""torch.func sees through the op where it can, and is told why where it cannot."""

import pytest
import torch
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


def test_a_backend_set_by_name_has_no_rule():
    made = layer("intact")
    for name in ("triton", "addmm", "merged"):
        ipca.set_backend(name)
        with pytest.raises(RuntimeError, match=rf"backend '{name}' has no rule for torch\.func transforms"):
            vmap(made)(torch.randn(5, 12))
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
