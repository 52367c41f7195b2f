import pytest
import torch
import torch.nn.functional as F

from ipca.kernels.configs import CONFIGS, Config
from ipca.kernels.launch import descriptor_fits
from ipca.kernels.linear import input_grad, linear
from ipca.kernels.tuning import force
from ipca.ops.dropout import apply_dropout, new_seed
from tests.helpers.kernel_inputs import (
    DEVICE,
    LAYOUTS,
    PLACES,
    SHAPES,
    assert_within_twice,
    configured,
    draw,
    every_configuration,
    on_gpu,
    poisoned,
    strided,
    wide,
)

pytestmark = pytest.mark.usefixtures("kernel_masks")

SCALING = 0.7
ALIGNED = (130, 72, 136, 20)
TMA = pytest.mark.parametrize("tma", [False, True], ids=["pointers", "descriptors"])


def forward(t, **options):
    return linear(t.x, t.weight, t.h, t.B, t.bias, scaling=SCALING, **options)


def plain_forward(x, weight, h, B, bias):
    return F.linear(x, weight, bias) + SCALING * F.linear(h, B.to(x.dtype))


def exact_forward(t):
    return plain_forward(*wide(t.x, t.weight, t.h, t.B, t.bias))


def check_forward(t, **options):
    with poisoned():
        y = forward(t, **options)
    assert_within_twice(y, plain_forward(t.x, t.weight, t.h, t.B, t.bias), exact_forward(t))


def plain_grad(dy, weight, g, A):
    return dy @ weight + g @ A.to(dy.dtype)


def check_grad(t, **options):
    given = (t.dy, t.weight, t.g, t.A)
    with poisoned():
        dx = input_grad(*given, **options)
    assert_within_twice(dx, plain_grad(*given), plain_grad(*wide(*given)))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "factors"), PLACES, ids=str)
def test_forward_and_input_gradient_are_as_exact_as_pytorch(shape, dtype, factors):
    t = draw(*shape, dtype, factors)
    check_forward(t, tma=False)
    check_grad(t, tma=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=on_gpu)], ids=str)
def test_descriptors_read_the_same(dtype):
    t = draw(*ALIGNED, dtype)
    assert descriptor_fits(t.x)
    assert descriptor_fits(t.weight)
    check_forward(t, tma=True)
    check_grad(t, tma=True)


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
        lambda: torch.frombuffer(bytearray(264), dtype=torch.float16, offset=8)[:128].view(8, 16),
    ],
)
def test_what_descriptors_cannot_read(tensor):
    assert not descriptor_fits(tensor())


def test_without_bias():
    t = draw(37, 70, 133, 5)
    t.bias = None
    check_forward(t)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_operands(layout):
    t = draw(37, 70, 50, 5)
    y, dx = exact_forward(t), plain_grad(*wide(t.dy, t.weight, t.g, t.A))
    plain = plain_forward(t.x, t.weight, t.h, t.B, t.bias)
    plain_dx = plain_grad(t.dy, t.weight, t.g, t.A)
    for name in ("x", "dy", "weight", "A", "B"):
        setattr(t, name, strided(getattr(t, name), layout))
    assert_within_twice(forward(t), plain, y)
    assert_within_twice(input_grad(t.dy, t.weight, t.g, t.A), plain_dx, dx)


@TMA
def test_factors_at_their_start_leave_exactly_the_product_with_the_weight(tma):
    """``D = [0; A0]``, ``E = [B0, 0]``: ``h Eᵀ`` and ``g D`` are exactly 0, whatever the other halves are."""
    t = draw(*ALIGNED)
    nothing, E = torch.zeros_like(t.h), torch.cat([t.B, torch.zeros_like(t.B)], dim=1)
    base = linear(t.x, t.weight, nothing, t.B, t.bias, scaling=1.0, tma=tma)
    h = torch.cat([nothing, t.h], dim=1)
    assert torch.equal(linear(t.x, t.weight, h, E, t.bias, scaling=SCALING, tma=tma), base)
    bare = input_grad(t.dy, t.weight, nothing, t.A, tma=tma)
    D, g = torch.cat([torch.zeros_like(t.A), t.A]), torch.cat([t.g, nothing], dim=1)
    assert torch.equal(input_grad(t.dy, t.weight, g, D, tma=tma), bare)


@pytest.mark.parametrize("p", [0.2, 1.0])
def test_the_gradient_of_what_dropout_dropped_is_that_of_the_base(p):
    t = draw(37, 70, 133, 5)
    seed = new_seed(t.x.device)
    dx = input_grad(t.dy, t.weight, t.g, t.A, seed, p)
    dy, weight, g, A = wide(t.dy, t.weight, t.g, t.A)
    exact = dy @ weight + apply_dropout(g @ A, seed, p)
    torch.testing.assert_close(dx.double(), exact, rtol=0, atol=1e-5 * exact.abs().max().item())


@pytest.mark.slow
@every_configuration("linear", "input_grad")
@TMA
def test_every_configuration_computes_the_same(kernel, kind, config, tma):
    if tma and kind == "float32":
        pytest.skip("never with descriptors")
    with configured(kernel, kind, config, R=9, tma=tma) as dtype:
        t = draw(300, 288, 72, 9, dtype)
        (check_forward if kernel == "linear" else check_grad)(t, tma=tma)


@on_gpu
@TMA
def test_tf32_keeps_10_bits(tma):
    with configured("linear", "tf32", CONFIGS["linear", "tf32"][1], R=4, tma=tma):
        x = torch.full((64, 64), 1 + 2**-13, device=DEVICE)
        nothing = torch.zeros(64, 4, device=DEVICE)
        y = linear(x, torch.eye(64, device=DEVICE), nothing, nothing, scaling=1.0, tma=tma)
    assert torch.equal(y, torch.ones_like(x))


def test_tiles_in_groups_cover_everything_once():
    """Fewer row tiles than a group, a last group that is short, more tiles than programs."""
    for M in (20, 16 * 9 + 3):
        t = draw(M, 70, 16, 3)
        with force("linear", Config(16, 16, 16, 4, 2, GROUP_M=4)):
            check_forward(t)
