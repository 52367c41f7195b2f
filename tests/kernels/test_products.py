import pytest
import torch

from ipca.kernels.configs import CONFIGS
from ipca.kernels.products import MOST_COMPONENTS, fuses, products
from ipca.kernels.tuning import force
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

SCALING = 0.7
PAIRS = pytest.mark.parametrize("pairs", [1, 2], ids=["residual", "intact"])


def plain(dy, h, E):
    return SCALING * (dy @ E.to(dy.dtype)), SCALING * (dy.mT @ h), dy.sum(0)


def check(t, pairs, layout="contiguous", needs_bias=True):
    E = torch.cat([t.B, t.B0], dim=1) if pairs == 2 else t.B
    with poisoned():
        found = products(
            strided(t.dy, layout), t.h, strided(E, layout), t.B.dtype, scaling=SCALING, needs_bias=needs_bias
        )
    for got, other, exact in zip(found, plain(t.dy, t.h, E), plain(*wide(t.dy, t.h, E)), strict=True):
        if got is not None:
            assert_within_twice(got, other.to(got.dtype), exact)
    assert [got is None for got in found] == [False, False, not needs_bias]
    assert found[1].dtype == t.B.dtype


@PAIRS
@pytest.mark.parametrize("shape", [s for s in SHAPES if 2 * s[3] <= MOST_COMPONENTS], ids=str)
@pytest.mark.parametrize(("dtype", "factors"), PLACES, ids=str)
def test_every_product_is_as_exact_as_pytorch(shape, dtype, factors, pairs):
    check(draw(*shape, dtype, factors), pairs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_operands(layout):
    check(draw(37, 70, 1, 5), 2, layout)


def test_without_bias():
    check(draw(37, 70, 1, 5), 2, needs_bias=False)


@PAIRS
@every_configuration("products")
def test_every_configuration_computes_the_same(kernel, kind, config, pairs):
    with configured(kernel, kind, config, R=9 * pairs) as dtype:
        check(draw(150, 300, 1, 9, dtype, torch.float32), pairs)


def test_the_same_bits_again():
    t = draw(150, 300, 1, 9)
    one, two = (products(t.dy, t.h, t.B, t.B.dtype, scaling=SCALING) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one[:2], two[:2], strict=True))


def test_one_read_is_taken_where_its_partials_cost_less_than_a_second():
    dy = torch.randn(2, 4096, dtype=torch.float16)
    E = {S: torch.randn(4096, S) for S in (4, 16, 32, 64, 65)}
    with force("products", CONFIGS["products", "16-bit"][0]):  # 256 columns of 2 bytes
        assert [fuses(dy, E[S], R) for S, R in ((32, 16), (64, 32), (64, 64), (65, 32))] == [True, True, False, False]
    with force("products", CONFIGS["products", "float32"][0]):
        assert [fuses(dy.float(), E[S], 4) for S in (4, 16, 64)] == [True, True, False]
