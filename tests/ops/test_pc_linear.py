"""What surrounds the op: autocast, dropout, torch.compile, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from ipca.ops import pc_linear
from ipca.ops.dropout import apply_dropout as mask
from ipca.ops.dropout import new_seed

N, K, R = 17, 29, 5
FORMS = pytest.mark.parametrize("intact", [False, True], ids=["residual", "intact"])


def factors(intact=False, dtype=torch.float32):
    A, B = torch.randn(R, K, dtype=dtype) / K**0.5, torch.randn(N, R, dtype=dtype)
    start = {"A0": A + torch.randn_like(A) / K**0.5, "B0": B.clone()} if intact else {}
    return A.requires_grad_(), B.requires_grad_(), start


def low_rank(z, A, B, start):
    y = z @ A.mT @ B.mT
    return y - z @ start["A0"].mT @ start["B0"].mT if start else y


@FORMS
@pytest.mark.parametrize("target", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast_gives_the_dtypes_of_a_linear_layer(intact, target, dtype, backward_inside):
    layer = nn.Linear(K, N, dtype=dtype)
    A, B, start = factors(intact)
    dtypes = []
    for forward in (layer, lambda x: pc_linear(x, layer.weight, A, B, layer.bias, **start)):
        x = torch.randn(6, K, dtype=dtype, requires_grad=True)
        layer.zero_grad()
        with torch.autocast("cpu", dtype=target):
            y = forward(x)
            if backward_inside:
                y.sum().backward()
        if not backward_inside:
            y.sum().backward()
        dtypes.append([y.dtype, x.grad.dtype, layer.weight.grad.dtype, layer.bias.grad.dtype])
    assert dtypes[0] == dtypes[1]
    assert A.grad.dtype == B.grad.dtype == torch.float32


def test_autocast_computes_as_the_layer_cast_by_hand():
    x, weight, bias = torch.randn(6, K), torch.randn(N, K), torch.randn(N)
    A, B, start = factors(intact=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = pc_linear(x, weight, A, B, bias, scaling=0.7, **start)
    x, weight, bias = (t.bfloat16() for t in (x, weight, bias))
    assert torch.equal(y, pc_linear(x, weight, A, B, bias, scaling=0.7, **start))


def test_equal_factors_leave_exactly_the_linear_layer_under_autocast():
    layer, x = nn.Linear(K, N), torch.randn(6, K)
    A, B, _ = factors()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(pc_linear(x, layer.weight, A, B, layer.bias, A0=A.detach(), B0=B.detach()), layer(x))


@FORMS
def test_dropout_of_everything_leaves_the_base(intact):
    x, weight, bias = torch.randn(6, K), torch.randn(N, K), torch.randn(N)
    A, B, start = factors(intact)
    y = pc_linear(x, weight, A, B, bias, dropout=1.0, **start)
    assert torch.equal(y, F.linear(x, weight, bias))
    y.sum().backward()
    assert not A.grad.any()
    assert not B.grad.any()


@FORMS
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_drops_whole_entries_of_the_branch_input_and_scales_the_rest(intact, p):
    A, B, start = factors(intact, torch.float64)
    x, weight = torch.randn(300, K, dtype=torch.float64), torch.randn(N, K, dtype=torch.float64)
    torch.manual_seed(3)
    y = pc_linear(x, weight, A, B, scaling=0.7, dropout=p, **start)
    torch.manual_seed(3)
    z = mask(x, new_seed(x.device), p)
    want = x @ weight.mT + 0.7 * low_rank(z, A, B, start)
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    leaves = (A, B)
    dy = torch.randn_like(y)
    for got, wanted in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(want, leaves, dy), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-11)


def test_a_dropped_entry_gets_the_gradient_of_the_base_alone():
    x, weight = torch.randn(6, K, requires_grad=True), torch.randn(N, K)
    A, B, _ = factors()
    torch.manual_seed(3)
    y = pc_linear(x, weight, A, B, dropout=0.5)
    torch.manual_seed(3)
    dropped = mask(torch.ones(6, K), new_seed(x.device), 0.5) == 0
    (dx,) = torch.autograd.grad(y.sum(), x)
    base = torch.ones(6, N) @ weight
    torch.testing.assert_close(dx[dropped], base[dropped])
    assert ((dx - base)[~dropped].abs() > 1e-4).all()


@FORMS
def test_dropout_keeps_the_expectation(intact):
    draws, p = 4000, 0.3
    x, weight = torch.randn(K, dtype=torch.float64), torch.randn(N, K, dtype=torch.float64)
    A, B, start = factors(intact, torch.float64)
    with torch.no_grad():
        y = pc_linear(x.expand(draws, K), weight, A, B, dropout=p, **start)
        terms = low_rank(torch.diag(x), A, B, start)
        deviation = (p / (1 - p) * terms.square().sum(0) / draws).sqrt()
        assert ((y.mean(0) - pc_linear(x, weight, A, B, **start)).abs() < 5 * deviation).all()
        assert (y.std(0) > 0).all()


def test_no_dropout_draws_no_random_number():
    A, B, _ = factors()
    x = torch.randn(6, K)
    before = torch.get_rng_state()
    pc_linear(x, torch.zeros(N, K), A, B, dropout=0.0)
    assert torch.equal(torch.get_rng_state(), before)


@FORMS
@pytest.mark.parametrize("shape", [(6, K), (2, 3, K)])
def test_the_output_may_be_changed_in_place(intact, shape):
    x, weight, (A, B, start) = torch.randn(shape), torch.randn(N, K), factors(intact)
    grads = []
    for inplace in (False, True):
        y = pc_linear(x, weight, A, B, scaling=0.7, **start)
        F.relu(y, inplace=inplace).sum().backward()
        grads.append((A.grad, B.grad))
        A.grad = B.grad = None
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


@FORMS
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_compiled_equals_eager_without_recompiling(intact, autocast, dropout):
    weight, bias = torch.randn(N, K), torch.randn(N)
    A, B, start = factors(intact)

    def step(x):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return pc_linear(x, weight, A, B, bias, scaling=0.7, dropout=dropout, **start)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for M in (5, 8, 3, 64):
        x = torch.randn(M, K, requires_grad=True)
        torch._dynamo.mark_dynamic(x, 0)
        torch.manual_seed(1)
        y = compiled(x)
        torch.manual_seed(1)
        want = step(x)
        dy = torch.randn_like(y)
        grads = (torch.autograd.grad(out, (x, A, B), dy) for out in (y, want))
        for got, wanted in ((y, want), *zip(*grads, strict=True)):
            bound = 8 * torch.finfo(y.dtype).eps * wanted.abs().max()  # each is within 4 of the exact value
            assert (got - wanted).abs().max() <= bound
    assert counter.frame_count == 1


def test_compiled_takes_strided_inputs():
    weight = torch.randn(N, K)
    A, B, start = factors(intact=True)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: pc_linear(x, weight, A, B, **start) + 1, backend="aot_eager", fullgraph=True)
    for x in (torch.randn(K, 6).mT, torch.randn(2, K, 3).transpose(1, 2), torch.randn(12, K)[::2]):
        want = pc_linear(x.double(), weight.double(), A, B, **start) + 1
        error = (pc_linear(x, weight, A, B, **start) + 1 - want).norm()
        assert (compiled(x) - want).norm() <= 2 * error


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"x": (6, 28)}, r"x has 28 features, but weight \(17, 29\) takes 29"),
        ({"x": (29, 6)}, r"x has 6 features, but weight \(17, 29\) takes 29"),
        ({"A": (5, 28)}, r"A \(5, 28\) and B \(17, 5\) do not fit weight \(17, 29\): want \(R, K\) and \(N, R\)"),
        ({"A": (29, 5)}, r"A \(29, 5\) and B \(17, 5\) do not fit"),
        ({"A": (4, 29)}, r"A \(4, 29\) and B \(17, 5\) do not fit"),
        ({"B": (5, 17)}, r"A \(5, 29\) and B \(5, 17\) do not fit"),
        ({"B": (1, 5)}, r"A \(5, 29\) and B \(1, 5\) do not fit"),
        ({"A": (5, 1)}, r"A \(5, 1\) and B \(17, 5\) do not fit"),
        ({"bias": (29,)}, r"bias has shape \(29,\), but weight \(17, 29\) needs \(17,\)"),
        ({"bias": (1,)}, r"bias has shape \(1,\), but weight"),
        ({"bias": (17, 1)}, r"bias has shape \(17, 1\), but weight"),
        ({"A0": (5, 29)}, "A0 and B0 go together: pass both or neither"),
        ({"B0": (17, 5)}, "A0 and B0 go together: pass both or neither"),
        ({"A0": (4, 29), "B0": (17, 4)}, r"A0 \(4, 29\) and B0 \(17, 4\) must have the shapes of A and B"),
        ({"A0": (5, 29), "B0": (1, 5)}, r"A0 \(5, 29\) and B0 \(1, 5\) must have the shapes of A and B"),
    ],
    ids=str,
)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_shapes_that_do_not_fit(shapes, message, dropout):
    shapes = {"x": (6, K), "weight": (N, K), "A": (R, K), "B": (N, R), **shapes}
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    with pytest.raises(ValueError, match=message):
        pc_linear(**tensors, dropout=dropout)
    assert all(torch.equal(tensors[name], kept[name]) for name in tensors)


def test_a_dropout_above_one():
    A, B, _ = factors()
    with pytest.raises(ValueError, match=r"dropout must lie in \[0, 1\], got 1\.5"):
        pc_linear(torch.randn(6, K), torch.randn(N, K), A, B, dropout=1.5)
