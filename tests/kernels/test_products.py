import pytest
import torch

from ipca.kernels.configs import CONFIGS
from ipca.kernels.products import MOST_COMPONENTS, fuses, products
from ipca.kernels.tuning import force
from tests.helpers.kernel_inputs import LAYOUTS, PLACES, SHAPES, assert_within_twice, draw, poisoned, strided, wide

SCALING = 0.7
FROZEN = pytest.mark.parametrize("frozen", [False, True], ids=["residual", "intact"])


def plain(dy, h, B, B0):
    B, B0 = B.to(dy.dtype), B0.to(dy.dtype)
    return SCALING * (dy @ B), SCALING * (dy @ B0), SCALING * (dy.mT @ h), dy.sum(0)


def check(t, frozen, layout="contiguous", needs_bias=True):
    given = (t.dy, t.h, t.B, t.B0)
    dy, B, B0 = (strided(t, layout) for t in (t.dy, t.B, t.B0))
    with poisoned():
        found = products(dy, t.h, B, B0 if frozen else None, scaling=SCALING, needs_bias=needs_bias)
    for got, other, exact in zip(found, plain(*given), plain(*wide(*given)), strict=True):
        if got is not None:
            assert_within_twice(got, other.to(got.dtype), exact)
    assert [got is None for got in found] == [False, not frozen, False, not needs_bias]
    assert found[2].dtype == t.B.dtype


@FROZEN
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[3] <= MOST_COMPONENTS], ids=str)
@pytest.mark.parametrize(("dtype", "factors"), PLACES, ids=str)
def test_every_product_is_as_exact_as_pytorch(shape, dtype, factors, frozen):
    check(draw(*shape, dtype, factors), frozen)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_operands(layout):
    check(draw(37, 70, 1, 5), True, layout)


def test_without_bias():
    check(draw(37, 70, 1, 5), True, needs_bias=False)


@FROZEN
@pytest.mark.parametrize("config", CONFIGS["products", "16-bit"], ids=str)
def test_every_configuration_computes_the_same(config, frozen):
    with force("products", config):
        check(draw(150, 300, 1, 9, torch.float16, torch.float32), frozen)


def test_the_same_bits_again():
    t = draw(150, 300, 1, 9)
    one, two = (products(t.dy, t.h, t.B, t.B0, scaling=SCALING) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one[:3], two[:3], strict=True))


def test_equal_factors_give_equal_bits():
    t = draw(37, 70, 1, 5)
    g, g0, _, _ = products(t.dy, t.h, t.B, t.B.clone(), scaling=SCALING)
    assert torch.equal(g, g0)


def test_one_read_is_taken_where_its_partials_cost_less_than_a_second():
    dy = torch.randn(2, 4096, dtype=torch.float16)
    B = {R: torch.randn(4096, R) for R in (4, 16, 64, 65)}
    with force("products", CONFIGS["products", "16-bit"][0]):  # 256 columns of 2 bytes
        assert [fuses(dy, B[R], None) for R in (16, 64, 65)] == [True, True, False]
        assert not fuses(dy, B[64], B[64])
    with force("products", CONFIGS["products", "float32"][0]):
        assert [fuses(dy.float(), B[R], None) for R in (16, 64)] == [True, False]
