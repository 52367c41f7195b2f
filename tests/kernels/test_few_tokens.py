import pytest
import torch
import torch.nn.functional as F

from ipca.kernels.few_tokens import few_tokens, takes
from ipca.ops.dropout import apply_dropout, new_seed
from tests.helpers.kernel_inputs import (
    LAYOUTS,
    PLACES,
    SHAPES,
    assert_within_twice,
    configured,
    draw,
    every_configuration,
    poisoned,
    strided,
    wide,
)

pytestmark = pytest.mark.usefixtures("kernel_masks")

SCALING = 0.7


def plain(x, weight, D, E, bias, seed=None, p=0.0):
    D, E = D.to(x.dtype), E.to(x.dtype)
    z = x if seed is None else apply_dropout(x, seed, p)
    h = F.linear(z, D)
    return F.linear(x, weight, bias) + SCALING * F.linear(h, E), h


def check(t, seed=None, p=0.0, layout="contiguous"):
    given = (t.x, t.weight, t.A, t.B, t.bias)
    x, weight, D, E, bias = (t if t is None else strided(t, layout) for t in given)
    with poisoned():
        results = few_tokens(x, weight, D, E, bias, seed, p, scaling=SCALING)
    for got, other, exact in zip(results, plain(*given, seed, p), plain(*wide(*given), seed, p), strict=True):
        assert_within_twice(got, other, exact)


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[3] <= 16], ids=str)
@pytest.mark.parametrize(("dtype", "factors"), PLACES, ids=str)
def test_output_and_low_rank_input_are_as_exact_as_pytorch(shape, dtype, factors):
    check(draw(*shape, dtype, factors))


def test_without_bias_and_with_dropout():
    t = draw(5, 70, 133, 5)
    t.bias = None
    check(t)
    check(t, new_seed(t.x.device), 0.3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_operands(layout):
    check(draw(9, 40, 50, 5), layout=layout)


def test_factors_at_their_start_leave_exactly_the_product_with_the_weight():
    t = draw(9, 40, 50, 5)
    base, _ = few_tokens(t.x, t.weight, torch.zeros_like(t.A), t.B, t.bias, scaling=1.0)
    D, E = torch.cat([torch.zeros_like(t.A), t.A]), torch.cat([t.B, torch.zeros_like(t.B)], dim=1)
    y, _ = few_tokens(t.x, t.weight, D, E, t.bias, scaling=SCALING)
    assert torch.equal(y, base)


@every_configuration("few_tokens")
def test_every_configuration_computes_the_same(kernel, kind, config):
    with configured(kernel, kind, config, R=9) as dtype:
        check(draw(70, 80, 300, 9, dtype, torch.float32))


def test_which_inputs_it_takes():
    x = torch.randn(257, 8)
    assert takes(x[:256], 16)
    assert not takes(x, 16)
    assert not takes(x[:5].half(), 129)
    assert not takes(x[:5], 17)  # without matrix units
