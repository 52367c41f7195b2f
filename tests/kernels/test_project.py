import pytest
import torch.nn.functional as F

from ipca.kernels.project import project
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


@pytest.mark.parametrize("shape", [*SHAPES, (40, 8, 96, 300)], ids=str)
@pytest.mark.parametrize(("dtype", "factors"), PLACES, ids=str)
def test_as_exact_as_pytorch(shape, dtype, factors):
    t = draw(*shape, dtype, factors)
    with poisoned():
        h = project(t.x, t.A, scaling=0.7)
    x, A = wide(t.x, t.A)
    assert_within_twice(h, 0.7 * F.linear(t.x, t.A.to(dtype)), 0.7 * x @ A.mT)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("factor_layout", ["contiguous", "transposed"])
def test_strided_operands(layout, factor_layout):
    t = draw(37, 8, 50, 5)
    with poisoned():
        h = project(strided(t.x, layout), strided(t.A, factor_layout))
    assert_within_twice(h, t.x @ t.A.mT, t.x.double() @ t.A.double().mT)


@every_configuration("project")
def test_every_configuration_computes_the_same(kernel, kind, config):
    with configured(kernel, kind, config, R=40) as dtype:
        t = draw(150, 8, 300, 40, dtype)
        h = project(t.x, t.A)
    assert_within_twice(h, F.linear(t.x, t.A), t.x.double() @ t.A.double().mT)


@pytest.mark.parametrize("p", [0.1, 0.9, 1.0])
def test_dropout_is_that_of_pytorch(p):
    t = draw(37, 8, 133, 5)
    seed = new_seed(t.x.device)
    z = apply_dropout(t.x, seed, p)
    assert_within_twice(project(t.x, t.A, seed, p), z @ t.A.mT, z.double() @ t.A.double().mT)
