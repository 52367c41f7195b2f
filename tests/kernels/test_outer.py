import pytest
import torch

from ipca.kernels.outer import outer
from ipca.kernels.reduce import add_up, split_rows
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
    poisoned,
    strided,
)

pytestmark = pytest.mark.usefixtures("kernel_masks")


def check(t, dtype, layout="contiguous", transposed=False, seed=None, p=0.0):
    with poisoned():
        found = outer(t.h, strided(t.x, layout), dtype, seed, p, scaling=0.7, transposed=transposed)
    z = t.x if seed is None else apply_dropout(t.x, seed, p)
    plain, exact = (0.7 * (g.mT @ x) for g, x in ((t.h, z), (t.h.double(), z.double())))
    plain, exact = (plain.mT, exact.mT) if transposed else (plain, exact)
    assert found.is_contiguous()
    assert_within_twice(found, plain.to(dtype), exact)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, (40, 8, 70, 300)], ids=str)
@pytest.mark.parametrize(("dtype", "factors"), PLACES, ids=str)
def test_as_exact_as_pytorch(shape, dtype, factors, transposed):
    check(draw(*shape, dtype, factors), factors, transposed=transposed)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_input(layout):
    check(draw(37, 8, 50, 5), torch.float32, layout)


@pytest.mark.parametrize("p", [0.1, 0.9, 1.0])
def test_dropout_is_that_of_pytorch(p):
    t = draw(37, 8, 133, 5)
    check(t, torch.float32, seed=new_seed(t.x.device), p=p)


@every_configuration("outer")
def test_every_configuration_computes_the_same(kernel, kind, config):
    with configured(kernel, kind, config, R=9) as dtype:
        check(draw(300, 8, 300, 9, dtype), torch.float32)


def test_the_same_bits_again():
    t = draw(300, 8, 133, 5)
    assert torch.equal(outer(t.h, t.x, torch.float32), outer(t.h, t.x, torch.float32))


def test_partials_are_added_in_order():
    partial = torch.randn(7, 33, 50, device=DEVICE)
    total = torch.zeros(33, 50, device=DEVICE)
    for part in partial:
        total += part
    assert torch.equal(add_up(partial, 0.5, torch.float32), 0.5 * total)


@pytest.mark.parametrize("M", [1, 31, 4096, 100_000])
def test_splits_cover_every_row_in_whole_blocks(M):
    splits, rows_each = split_rows(M, 3, 32, torch.device("cpu"))
    assert splits * rows_each >= M
    assert rows_each % 32 == 0
