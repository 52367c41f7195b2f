import pytest
import torch
import torch.nn.functional as F

from ipca.kernels.configs import CONFIGS, Config
from ipca.kernels.launch import descriptor_fits
from ipca.kernels.linear import input_grad, linear
from ipca.kernels.tuning import force
from ipca.ops.dropout import apply_dropout, new_seed
from tests.helpers.kernel_inputs import (
    LAYOUTS,
    PLACES,
    SHAPES,
    assert_within_twice,
    draw,
    on_gpu,
    poisoned,
    strided,
    wide,
)

pytestmark = pytest.mark.usefixtures("kernel_masks")

SCALING = 0.7
FROZEN = pytest.mark.parametrize("frozen", [False, True], ids=["residual", "intact"])
ALIGNED = (130, 72, 136, 20)
TMA = pytest.mark.parametrize("tma", [False, True], ids=["pointers", "descriptors"])


def forward(t, frozen, **options):
    return linear(
        t.x, t.weight, t.h, t.B, *((t.h0, t.B0) if frozen else (None, None)), t.bias, scaling=SCALING, **options
    )


def plain_forward(x, weight, h, B, h0, B0, bias, frozen):
    low = F.linear(h, B.to(x.dtype))
    return F.linear(x, weight, bias) + SCALING * (low - F.linear(h0, B0.to(x.dtype)) if frozen else low)


def exact_forward(t, frozen):
    return plain_forward(*wide(t.x, t.weight, t.h, t.B, t.h0, t.B0, t.bias), frozen)


def check_forward(t, frozen, **options):
    with poisoned():
        y = forward(t, frozen, **options)
    plain = plain_forward(t.x, t.weight, t.h, t.B, t.h0, t.B0, t.bias, frozen)
    assert_within_twice(y, plain, exact_forward(t, frozen))


def plain_grad(dy, weight, g, A, g0, A0, frozen):
    low = g @ A.to(dy.dtype)
    return dy @ weight + (low - g0 @ A0.to(dy.dtype) if frozen else low)


def check_grad(t, frozen, **options):
    with poisoned():
        dx = input_grad(t.dy, t.weight, t.h, t.A, *((t.h0, t.A0) if frozen else (None, None)), **options)
    given = (t.dy, t.weight, t.h, t.A, t.h0, t.A0)
    assert_within_twice(dx, plain_grad(*given, frozen), plain_grad(*wide(*given), frozen))


@FROZEN
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "factors"), PLACES, ids=str)
def test_forward_and_input_gradient_are_as_exact_as_pytorch(shape, dtype, factors, frozen):
    t = draw(*shape, dtype, factors)
    check_forward(t, frozen, tma=False)
    check_grad(t, frozen, tma=False)


@FROZEN
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=on_gpu)], ids=str)
def test_descriptors_read_the_same(dtype, frozen):
    t = draw(*ALIGNED, dtype)
    assert descriptor_fits(t.x)
    assert descriptor_fits(t.weight)
    assert torch.equal(forward(t, frozen, tma=True), forward(t, frozen, tma=False))
    check_grad(t, frozen, tma=True)


@pytest.mark.parametrize(
    "tensor",
    [
        lambda: torch.empty(8, 12, dtype=torch.float16),
        lambda: torch.empty(16, 16).t(),
        lambda: torch.empty(8, 32)[:, ::2],
        lambda: torch.empty(8, 33)[:, 1:],
        lambda: torch.empty(16).expand(8, 16),
        lambda: torch.empty(64).as_strided((8, 16), (4, 1)),
        lambda: torch.empty(8, 16, 4)[:, :, 1],
    ],
)
def test_what_descriptors_cannot_read(tensor):
    assert not descriptor_fits(tensor())


@FROZEN
def test_without_bias(frozen):
    t = draw(37, 70, 133, 5)
    t.bias = None
    check_forward(t, frozen)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_operands(layout):
    t = draw(37, 70, 50, 5)
    y, dx = exact_forward(t, True), plain_grad(*wide(t.dy, t.weight, t.h, t.A, t.h0, t.A0), True)
    plain = plain_forward(t.x, t.weight, t.h, t.B, t.h0, t.B0, t.bias, True)
    plain_dx = plain_grad(t.dy, t.weight, t.h, t.A, t.h0, t.A0, True)
    for name in ("x", "dy", "weight", "A", "B", "A0", "B0"):
        setattr(t, name, strided(getattr(t, name), layout))
    assert_within_twice(forward(t, True), plain, y)
    assert_within_twice(input_grad(t.dy, t.weight, t.h, t.A, t.h0, t.A0), plain_dx, dx)


@TMA
def test_equal_factors_leave_exactly_the_product_with_the_weight(tma):
    t = draw(*ALIGNED)
    t.h0, t.B0 = t.h.clone(), t.B.clone()
    nothing = torch.zeros_like(t.h)
    base = linear(t.x, t.weight, nothing, t.B, bias=t.bias, scaling=1.0, tma=tma)
    assert torch.equal(forward(t, True, tma=tma), base)
    g = torch.randn_like(t.h)
    bare = input_grad(t.dy, t.weight, nothing, t.A, tma=tma)
    assert torch.equal(input_grad(t.dy, t.weight, g, t.A, g.clone(), t.A.clone(), tma=tma), bare)


@FROZEN
@pytest.mark.parametrize("p", [0.2, 1.0])
def test_the_gradient_of_what_dropout_dropped_is_that_of_the_base(frozen, p):
    t = draw(37, 70, 133, 5)
    seed = new_seed(t.x.device)
    dx = input_grad(t.dy, t.weight, t.h, t.A, *((t.h0, t.A0) if frozen else (None, None)), seed, p)
    dy, weight, g, A, g0, A0 = wide(t.dy, t.weight, t.h, t.A, t.h0, t.A0)
    low = g @ A - g0 @ A0 if frozen else g @ A
    exact = dy @ weight + apply_dropout(low, seed, p)
    torch.testing.assert_close(dx.double(), exact, rtol=0, atol=1e-5 * exact.abs().max().item())


@TMA
def test_adding_to_what_is_there(tma):
    t = draw(*ALIGNED)
    out = torch.randn_like(t.x)
    want = out.double() + plain_grad(*wide(t.dy, t.weight, t.h, t.A, t.h0, t.A0), True)
    returned = input_grad(t.dy, t.weight, t.h, t.A, t.h0, t.A0, out=out, tma=tma)
    assert returned is out
    torch.testing.assert_close(out.double(), want, rtol=0, atol=1e-5 * want.abs().max().item())


@pytest.mark.slow
@FROZEN
@pytest.mark.parametrize("config", sorted({c for k, v in CONFIGS.items() if k[0] == "linear" for c in v}), ids=str)
def test_every_configuration_computes_the_same(config, frozen):
    t = draw(300, 290, 72, 9)
    with force("linear", config):
        check_forward(t, frozen, tma=False)
        check_grad(t, frozen, tma=False)


def test_tiles_in_groups_cover_everything_once():
    """Fewer row tiles than a group, a last group that is short, more tiles than programs."""
    for M in (20, 16 * 9 + 3):
        t = draw(M, 70, 16, 3)
        with force("linear", Config(16, 16, 16, 4, 2, GROUP_M=4)):
            check_forward(t, True)
