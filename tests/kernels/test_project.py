import pytest
import torch
import torch.nn.functional as F

from ipca.kernels.project import project
from ipca.ops.dropout import apply_dropout, new_seed
from tests.helpers.kernel_inputs import LAYOUTS, PLACES, SHAPES, assert_within_twice, draw, poisoned, strided, wide

pytestmark = pytest.mark.usefixtures("kernel_masks")


@pytest.mark.parametrize("shape", [*SHAPES, (40, 8, 96, 300)], ids=str)
@pytest.mark.parametrize(("dtype", "factors"), PLACES, ids=str)
@pytest.mark.parametrize("frozen", [False, True])
def test_both_products_are_as_exact_as_pytorch(shape, dtype, factors, frozen):
    t = draw(*shape, dtype, factors)
    with poisoned():
        h, h0 = project(t.x, t.A, t.A0 if frozen else None)
    x, A, A0 = wide(t.x, t.A, t.A0)
    assert_within_twice(h, F.linear(t.x, t.A.to(dtype)), x @ A.mT)
    if frozen:
        assert_within_twice(h0, F.linear(t.x, t.A0.to(dtype)), x @ A0.mT)
    else:
        assert h0 is None


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("factor_layout", ["contiguous", "transposed"])
def test_strided_operands(layout, factor_layout):
    t = draw(37, 8, 50, 5)
    with poisoned():
        h, h0 = project(strided(t.x, layout), strided(t.A, factor_layout), strided(t.A0, factor_layout))
    assert_within_twice(h, t.x @ t.A.mT, t.x.double() @ t.A.double().mT)
    assert_within_twice(h0, t.x @ t.A0.mT, t.x.double() @ t.A0.double().mT)


def test_equal_factors_give_equal_bits():
    t = draw(37, 8, 133, 17)
    h, h0 = project(t.x, t.A, t.A.clone())
    assert torch.equal(h, h0)


@pytest.mark.parametrize("p", [0.1, 0.9, 1.0])
def test_dropout_is_that_of_pytorch(p):
    t = draw(37, 8, 133, 5)
    seed = new_seed(t.x.device)
    h, h0 = project(t.x, t.A, t.A0, seed, p)
    z = apply_dropout(t.x, seed, p)
    assert_within_twice(h, z @ t.A.mT, z.double() @ t.A.double().mT)
    assert_within_twice(h0, z @ t.A0.mT, z.double() @ t.A0.double().mT)
