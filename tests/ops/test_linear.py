"""Low-precision results are held to twice the error of the same formula in plain PyTorch, both against float64."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from ipca.ops import pc_linear, set_backend

LOW = [torch.float32, torch.bfloat16, torch.float16]
FORMS = pytest.mark.parametrize("intact", [False, True], ids=["residual", "intact"])
SCALING = 0.7
TRAINED = ("x", "weight", "A", "B", "bias")


def inputs(*, M=(13,), N=17, K=29, R=5, dtype=torch.float64, factors=None, intact=False, bias=True, train=TRAINED):
    """Every tensor of the op; ``factors`` is the dtype of A and B where it differs."""
    t = SimpleNamespace(
        x=torch.randn(*M, K, dtype=dtype),
        weight=torch.randn(N, K, dtype=dtype) / K**0.5,
        A=torch.randn(R, K, dtype=factors or dtype) / K**0.5,
        B=torch.randn(N, R, dtype=factors or dtype),
        bias=torch.randn(N, dtype=dtype) if bias else None,
        A0=None,
        B0=None,
    )
    if intact:  # as far from A and B as training takes them
        t.A0, t.B0 = t.A + 0.3 * torch.randn_like(t.A) / K**0.5, t.B + 0.3 * torch.randn_like(t.B)
    for name in train:
        if getattr(t, name) is not None:
            getattr(t, name).requires_grad_()
    return t


def call(t, **options):
    return pc_linear(t.x, t.weight, t.A, t.B, t.bias, scaling=SCALING, A0=t.A0, B0=t.B0, **options)


def plain(t):
    """The formula as anybody would write it, with PyTorch's own autograd."""
    low = F.linear(F.linear(t.x, t.A.to(t.x.dtype)), t.B.to(t.x.dtype))
    if t.A0 is not None:
        low = low - F.linear(F.linear(t.x, t.A0.to(t.x.dtype)), t.B0.to(t.x.dtype))
    return F.linear(t.x, t.weight, t.bias) + SCALING * low


def cast(t, dtype):
    """Leaves in another dtype with the same values."""
    new = {k: v if v is None else v.detach().to(dtype).requires_grad_(v.requires_grad) for k, v in vars(t).items()}
    return SimpleNamespace(**new)


def grads(y, dy, t):
    wanted = [getattr(t, name) for name in TRAINED if getattr(t, name) is not None and getattr(t, name).requires_grad]
    return torch.autograd.grad(y, wanted, dy.to(y.dtype))


def assert_within_twice(got, other, exact):
    assert (got.double() - exact).norm() <= 2 * (other.double() - exact).norm()


@FORMS
@pytest.mark.parametrize("M", [(3,), (), (2, 2), (0,)], ids=str)
@pytest.mark.parametrize("trained", [TRAINED, ("x",), ("weight",), ("A",), ("B",), ("bias",), ("A", "B")], ids=str)
def test_first_and_second_derivatives(intact, M, trained):
    t = inputs(M=M, N=3, K=5, R=2, intact=intact, train=trained)
    leaves = [getattr(t, name) for name in trained]

    def f(*values):
        return call(SimpleNamespace(**{**vars(t), **dict(zip(trained, values, strict=True))}))

    assert gradcheck(f, leaves)
    assert gradgradcheck(f, leaves)


@FORMS
@pytest.mark.parametrize("what", ["factors from x", "x is the weight"])
def test_second_derivatives_of_inputs_that_depend_on_each_other(intact, what):
    t = inputs(M=(4,), N=4, K=5, R=2, intact=intact)

    def derivatives(function):
        x = t.x.detach().requires_grad_()
        own = {"A": x[:2] * 2} if what == "factors from x" else {"weight": x}
        y = function(SimpleNamespace(**{**vars(t), "x": x, **own}))
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return first, torch.autograd.grad(first.square().sum(), x)[0]

    torch.testing.assert_close(derivatives(call), derivatives(plain), rtol=1e-10, atol=1e-10)


@FORMS
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("M", [(13,), (), (2, 7), (1, 1)], ids=str)
@pytest.mark.parametrize("sizes", [(17, 29, 5), (1, 1, 1), (64, 130, 33), (3, 2, 9)], ids=str)
def test_forward_and_gradients_in_float64_equal_the_formula(intact, bias, M, sizes):
    N, K, R = sizes
    t = inputs(M=M, N=N, K=K, R=R, intact=intact, bias=bias)
    y, want = call(t), plain(t)
    dy = torch.randn_like(y)
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grads(y, dy, t), grads(want, dy, t), rtol=1e-12, atol=1e-11)


@FORMS
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("M", [(13,), (), (4, 33)], ids=str)
def test_forward_and_gradients_are_as_exact_as_plain_pytorch(intact, dtype, M):
    t = inputs(M=M, N=67, K=130, R=9, dtype=dtype, intact=intact)
    wide = cast(t, torch.float64)
    y, other, exact = call(t), plain(t), plain(wide)
    dy = torch.randn(y.shape, dtype=dtype)
    assert y.dtype == dtype
    assert_within_twice(y, other, exact)
    for name, *three in zip(TRAINED, grads(y, dy, t), grads(other, dy, t), grads(exact, dy, wide), strict=True):
        assert three[0].dtype == getattr(t, name).dtype
        assert_within_twice(*three)


@FORMS
@pytest.mark.parametrize("dtype", LOW[1:], ids=str)
def test_wide_factors_on_a_narrow_weight(intact, dtype):
    t = inputs(M=(21,), N=67, K=130, R=9, dtype=dtype, factors=torch.float32, intact=intact)
    wide = cast(t, torch.float64)
    y, other, exact = call(t), plain(t), plain(wide)
    dy = torch.randn(y.shape, dtype=dtype)
    assert y.dtype == dtype
    assert_within_twice(y, other, exact)
    found = grads(y, dy, t)
    assert [g.dtype for g in found] == [dtype, dtype, torch.float32, torch.float32, dtype]
    for three in zip(found, grads(other, dy, t), grads(exact, dy, wide), strict=True):
        assert_within_twice(*three)


@pytest.mark.parametrize("backend", ["auto", "addmm", "merged", "reference"])
@pytest.mark.parametrize("dtype", LOW[1:], ids=str)
def test_narrow_factors_beside_wide_initial_ones_start_as_the_base(dtype, backend):
    """As FSDP's mixed precision passes them: parameters cast, buffers not."""
    t = inputs(N=67, K=130, R=9, dtype=dtype, factors=torch.float32, intact=True)
    t.A0, t.B0 = t.A.detach(), t.B.detach()
    t.A, t.B = t.A0.to(dtype), t.B0.to(dtype)
    before = set_backend(backend)
    try:
        assert torch.equal(call(t), F.linear(t.x, t.weight, t.bias))
    finally:
        set_backend(before)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_factors_far_from_their_initial_ones_add_a_rounding(dtype):
    """The intact form multiplies by A − A0 and B − B0; where these are as large as A and B, they round once more."""
    t = inputs(N=67, K=130, R=9, dtype=dtype, intact=True)
    t.A0, t.B0 = torch.randn_like(t.A) / 130**0.5, torch.randn_like(t.B)
    y, other, exact = call(t), plain(t), plain(cast(t, torch.float64))
    assert (y.double() - exact).norm() <= 3 * (other.double() - exact).norm()


VIEWS = {
    "transposed": lambda: torch.randn(29, 6, dtype=torch.float64).mT,
    "every other row": lambda: torch.randn(12, 29, dtype=torch.float64)[::2],
    "every other column": lambda: torch.randn(6, 58, dtype=torch.float64)[:, 1::2],
    "channels first": lambda: torch.randn(2, 29, 3, dtype=torch.float64).transpose(1, 2),
    "batch second": lambda: torch.randn(3, 2, 29, dtype=torch.float64).transpose(0, 1),
    "expanded": lambda: torch.randn(2, 1, 29, dtype=torch.float64).expand(2, 3, 29),
}


@FORMS
@pytest.mark.parametrize("view", VIEWS)
def test_strided_inputs_and_gradients(intact, view):
    t = inputs(intact=intact)
    t.x = VIEWS[view]().requires_grad_()
    y, want = call(t), plain(t)
    dy = torch.randn(*y.shape[::-1], dtype=torch.float64).permute(*range(y.ndim)[::-1])
    assert not dy.is_contiguous()
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grads(y, dy, t), grads(want, dy, t), rtol=1e-12, atol=1e-11)
    ones = torch.ones((), dtype=torch.float64).expand_as(y)
    torch.testing.assert_close(grads(call(t), ones, t), grads(plain(t), ones, t), rtol=1e-12, atol=1e-11)


@FORMS
def test_an_empty_batch_has_zero_gradients(intact):
    t = inputs(M=(2, 0), intact=intact)
    y = call(t)
    assert y.shape == (2, 0, 17)
    for name, grad in zip(TRAINED, grads(y, torch.empty_like(y), t), strict=True):
        assert grad.shape == getattr(t, name).shape
        assert not grad.any()


@FORMS
@pytest.mark.parametrize(
    "frozen", [("x",), ("weight",), ("A",), ("B",), ("weight", "bias"), ("x", "weight", "bias", "A")]
)
def test_what_is_frozen_gets_no_gradient_and_the_rest_its_own(intact, frozen):
    trained = [name for name in TRAINED if name not in frozen]
    t = inputs(intact=intact, train=trained)
    dy = torch.randn(13, 17, dtype=torch.float64)
    call(t).backward(dy)
    assert all(getattr(t, name).grad is None for name in frozen)
    for name, want in zip(trained, grads(plain(t), dy, t), strict=True):
        torch.testing.assert_close(getattr(t, name).grad, want, rtol=1e-12, atol=1e-11)


def test_the_initial_factors_are_constants():
    t = inputs(intact=True, train=("x", "A", "A0", "B0"))
    for options in ({}, {"dropout": 0.3}):
        call(t, **options).sum().backward()
        assert t.A0.grad is None
        assert t.B0.grad is None


def test_nothing_is_recorded_where_nothing_trains():
    assert not call(inputs(train=())).requires_grad
    with torch.no_grad():
        assert not call(inputs()).requires_grad


def test_the_inputs_are_left_alone():
    t = inputs(intact=True)
    kept = cast(t, torch.float64)
    call(t).sum().backward()
    assert all(torch.equal(getattr(t, name), getattr(kept, name)) for name in (*TRAINED, "A0", "B0"))


@pytest.mark.parametrize(
    ("dtype", "factors"),
    [
        (torch.float64, None),
        (torch.float32, None),
        (torch.bfloat16, None),
        (torch.float16, None),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("M", [(13,), (), (2, 7), (0,), (513,)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_equal_factors_leave_exactly_the_linear_layer(dtype, factors, M, bias):
    for N, K, R in ((17, 29, 5), (1, 1, 1), (130, 257, 16)):
        t = inputs(M=M, N=N, K=K, R=R, dtype=dtype, factors=factors, bias=bias, intact=True)
        t.A0, t.B0 = t.A.detach().clone(), t.B.detach().clone()
        assert torch.equal(call(t), F.linear(t.x, t.weight, t.bias))
        assert torch.equal(call(t, dropout=0.4), F.linear(t.x, t.weight, t.bias))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_equal_factors_cancel_on_strided_inputs_and_factors(dtype):
    """The layout of patch embeddings, a trained and a frozen pair, and factors of equal values but other strides."""
    x = torch.randn(2, 257, 5, dtype=dtype).transpose(1, 2)
    weight, A, B = (torch.randn(shape, dtype=dtype) for shape in ((130, 257), (16, 257), (130, 16)))
    y = pc_linear(x, weight, A.clone().requires_grad_(), B.clone().requires_grad_(), A0=A, B0=B)
    assert torch.equal(y, F.linear(x, weight))
    assert torch.equal(pc_linear(x, weight, A, B, A0=A.t().contiguous().t(), B0=B), F.linear(x, weight))
