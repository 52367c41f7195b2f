import pytest
import torch

from ipca.kernels.configs import CONFIGS
from ipca.kernels.few_tokens import few_tokens, takes
from ipca.kernels.tuning import force
from ipca.ops import reference
from ipca.ops.dropout import new_seed
from tests.helpers.kernel_inputs import LAYOUTS, PLACES, SHAPES, assert_within_twice, draw, poisoned, strided, wide

pytestmark = pytest.mark.usefixtures("kernel_masks")

SCALING = 0.7
FROZEN = pytest.mark.parametrize("frozen", [False, True], ids=["residual", "intact"])


def plain(x, weight, A, B, bias, A0, B0, frozen, seed=None, p=0.0):
    A, B, A0, B0 = (factor.to(x.dtype) for factor in (A, B, A0, B0))
    return reference.pc_linear(x, weight, A, B, bias, *((A0, B0) if frozen else (None, None)), SCALING, seed, p)


def check(t, frozen, seed=None, p=0.0, **layout):
    given = (t.x, t.weight, t.A, t.B, t.bias, t.A0, t.B0)
    x, weight, A, B, bias, A0, B0 = (t if t is None else strided(t, layout.get("layout")) for t in given)
    with poisoned():
        y, h = few_tokens(x, weight, A, B, bias, *((A0, B0) if frozen else (None, None)), seed, p, scaling=SCALING)
    results = zip((y, h), plain(*given, frozen, seed, p), plain(*wide(*given), frozen, seed, p), strict=True)
    for got, other, exact in results:
        assert_within_twice(got, other, exact)


@FROZEN
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[3] <= 32], ids=str)
@pytest.mark.parametrize(("dtype", "factors"), PLACES, ids=str)
def test_output_and_low_rank_input_are_as_exact_as_pytorch(shape, dtype, factors, frozen):
    check(draw(*shape, dtype, factors), frozen)


@FROZEN
def test_without_bias_and_with_dropout(frozen):
    t = draw(5, 70, 133, 5)
    t.bias = None
    check(t, frozen)
    check(t, frozen, new_seed(t.x.device), 0.3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_operands(layout):
    check(draw(9, 40, 50, 5), True, layout=layout)


def test_equal_factors_leave_exactly_the_product_with_the_weight():
    t = draw(9, 40, 50, 5)
    zero = torch.zeros_like(t.A)
    base, _ = few_tokens(t.x, t.weight, zero, t.B, t.bias, scaling=1.0)
    y, _ = few_tokens(t.x, t.weight, t.A, t.B, t.bias, t.A.clone(), t.B.clone(), scaling=SCALING)
    assert torch.equal(y, base)


@pytest.mark.parametrize("config", CONFIGS["few_tokens", "16-bit"], ids=str)
def test_every_configuration_computes_the_same(config):
    with force("few_tokens", config):
        check(draw(70, 80, 300, 9, torch.float16, torch.float32), True)


def test_which_inputs_it_takes():
    x = torch.randn(257, 8)
    assert takes(x[:256], 16)
    assert not takes(x, 16)
    assert not takes(x[:5].half(), 129)
    assert not takes(x[:5], 33)  # without matrix units
