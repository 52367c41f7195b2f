"""Every backend computes the op: through Triton's interpreter on a CPU, through the kernels on a GPU."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import ipca
from ipca.ops import BACKENDS, op, pc_linear, reference
from ipca.ops import backend as backends
from ipca.ops.dropout import new_seed
from tests.helpers.kernel_inputs import DEVICE, DTYPES, assert_within_twice, draw, poisoned, strided, wide

SCALING = 0.7
TRAINED = ("x", "weight", "A", "B", "bias")
FORMS = pytest.mark.parametrize("intact", [False, True], ids=["residual", "intact"])
EVERY = pytest.mark.parametrize("backend", BACKENDS)
FAST = pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])


@pytest.fixture(autouse=True)
def _backend(request):
    """The backend of the test's parameter, and the one before again at its end."""
    before = ipca.set_backend(
        request.node.callspec.params.get("backend", "auto") if hasattr(request.node, "callspec") else "auto"
    )
    yield
    ipca.set_backend(before)


def inputs(M=37, N=70, K=133, R=5, dtype=torch.float32, factors=None, *, intact, train=TRAINED):
    t = draw(M, N, K, R, dtype, factors)
    if not intact:
        t.A0 = t.B0 = None
    for name in train:
        getattr(t, name).requires_grad_()
    return t


def call(t, p=0.0):
    return pc_linear(t.x, t.weight, t.A, t.B, t.bias, scaling=SCALING, A0=t.A0, B0=t.B0, dropout=p)


def formula(t, seed=None, p=0.0):
    A, B = t.A.to(t.x.dtype), t.B.to(t.x.dtype)
    frozen = (None, None) if t.A0 is None else (t.A0.to(t.x.dtype), t.B0.to(t.x.dtype))
    return reference.pc_linear(t.x, t.weight, A, B, t.bias, *frozen, SCALING, seed, p)


def in_float64(t):
    names = [name for name, value in vars(t).items() if value is not None]
    new = SimpleNamespace(A0=None, B0=None, bias=None)
    for name, value in zip(names, wide(*(getattr(t, name) for name in names)), strict=True):
        setattr(new, name, value.detach().requires_grad_(getattr(t, name).requires_grad))
    return new


def leaves(t):
    return [v for name in TRAINED if (v := getattr(t, name)) is not None and v.requires_grad]


def check(t, p=0.0):
    """Output and every gradient against float64 and the formula in plain PyTorch."""
    torch.manual_seed(3)
    with poisoned():
        y = call(t, p)
        found = torch.autograd.grad(y, leaves(t), t.dy)
    torch.manual_seed(3)
    seed = new_seed(t.x.device) if p else None
    exact_t = in_float64(t)
    plain, exact = formula(t, seed, p), formula(exact_t, seed, p)
    assert_within_twice(y.detach(), plain, exact)
    others = torch.autograd.grad(plain, leaves(t), t.dy)
    exacts = torch.autograd.grad(exact, leaves(exact_t), t.dy.double())
    for got, other, true in zip(found, others, exacts, strict=True):
        assert_within_twice(got, other, true)


@EVERY
@FORMS
@pytest.mark.parametrize("shape", [(37, 70, 133, 5), (1, 1, 1, 1), (60, 72, 136, 40), (5, 40, 24, 200)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_and_gradients_are_as_exact_as_pytorch(backend, intact, shape, dtype):
    check(inputs(*shape, dtype, intact=intact))


@EVERY
@FORMS
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)], ids=str)
def test_wide_factors_on_a_narrow_weight(backend, intact, dtype):
    check(inputs(dtype=dtype, factors=torch.float32, intact=intact))


@pytest.mark.parametrize("backend", ["triton", "addmm", "reference"])
@FORMS
@pytest.mark.usefixtures("kernel_masks")
@pytest.mark.parametrize("R", [5, 40])
def test_dropout_drops_the_same_entries_in_every_backend_and_in_backward(backend, intact, R):
    check(inputs(R=R, intact=intact), p=0.3)


@EVERY
@FORMS
@pytest.mark.parametrize("trained", [("A",), ("B",), ("A", "B"), ("x",), ("bias",), ("weight",), ("x", "B")], ids=str)
def test_only_what_trains_gets_a_gradient(backend, intact, trained):
    t = inputs(intact=intact, train=trained)
    check(t)
    call(t).backward(t.dy)
    assert [name for name in TRAINED if getattr(t, name).grad is not None] == [n for n in TRAINED if n in trained]


@EVERY
@FORMS
def test_leading_dimensions_and_strides(backend, intact):
    t = inputs(24, intact=intact, train=())
    want = call(t)
    grids = t.x.view(2, 3, 4, 133), t.x.view(4, 6, 133).transpose(0, 1).contiguous().transpose(0, 1)
    for x in (*grids, strided(t.x, "transposed"), strided(t.x, "every other column")):
        y = pc_linear(x, t.weight, t.A, t.B, t.bias, scaling=SCALING, A0=t.A0, B0=t.B0)
        assert y.shape == (*x.shape[:-1], 70)
        torch.testing.assert_close(y.reshape(24, 70), want, rtol=1e-5, atol=1e-5)
    assert call(SimpleNamespace(**{**vars(t), "x": t.x[0]})).shape == (70,)


@EVERY
@FORMS
def test_a_strided_gradient(backend, intact):
    t = inputs(intact=intact)
    want = torch.autograd.grad(call(t), leaves(t), t.dy)
    for dy in (strided(t.dy, "transposed"), torch.ones((), device=DEVICE).expand(37, 70)):
        wanted = want if dy.stride() != (0, 0) else torch.autograd.grad(call(t), leaves(t), torch.ones_like(t.dy))
        for got, other in zip(torch.autograd.grad(call(t), leaves(t), dy), wanted, strict=True):
            torch.testing.assert_close(got, other, rtol=1e-4, atol=1e-4)


@EVERY
@FORMS
def test_no_tokens(backend, intact):
    t = inputs(0, intact=intact)
    y = call(t)
    assert y.shape == (0, 70)
    for leaf, grad in zip(leaves(t), torch.autograd.grad(y, leaves(t), t.dy), strict=True):
        assert grad.shape == leaf.shape
        assert not grad.any()


@FAST
@pytest.mark.parametrize("R", [5, 40, 130])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_factors_leave_exactly_the_product_with_the_weight(backend, R, dtype):
    """What is left is the backend's own product with ``W``: that of factors which are all zero."""
    t = inputs(R=R, dtype=dtype, intact=True, train=())
    t.A0, t.B0 = t.A.clone(), t.B.clone()
    y = call(t)
    t.A, t.B, t.A0, t.B0 = (torch.zeros_like(factor) for factor in (t.A, t.B, t.A0, t.B0))
    assert torch.equal(y, call(t))


@EVERY
@FORMS
def test_second_derivatives_go_through_the_reference(backend, intact):
    t = inputs(5, 6, 7, 2, intact=intact, train=("x", "A", "B"))
    y = call(t)
    (dx,) = torch.autograd.grad(y.square().sum(), t.x, create_graph=True)
    found = torch.autograd.grad(dx.square().sum(), leaves(t))
    (dx,) = torch.autograd.grad(formula(t).square().sum(), t.x, create_graph=True)
    for got, want in zip(found, torch.autograd.grad(dx.square().sum(), leaves(t)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@EVERY
@FORMS
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_activation_checkpointing_gives_the_same_gradients(backend, intact, reentrant, p):
    if p and backend == "merged":
        pytest.skip("a merged weight has no dropout")
    t = inputs(intact=intact)
    results = []
    for run in (
        lambda: call(t, p),
        lambda: checkpoint(lambda x: call(SimpleNamespace(**{**vars(t), "x": x}), p), t.x, use_reentrant=reentrant),
    ):
        torch.manual_seed(1)
        y = run()
        t.x.grad = t.A.grad = None
        y.backward(t.dy)
        results.append((y, t.x.grad, t.A.grad))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@EVERY
def test_what_is_kept_for_backward_is_small(backend):
    """Besides inputs: ``D, E``, ``h``, and with dropout its seed, on a CPU a mask of a byte an entry of ``x``."""
    t = inputs(64, intact=True)
    given = {v.untyped_storage().data_ptr() for v in vars(t).values() if v is not None}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: kept.append(s) or s, lambda s: s):
        call(t, 0.0 if backend == "merged" else 0.5)
    own = [s for s in kept if s is not None and s.untyped_storage().data_ptr() not in given]
    drawn = t.x.numel() if backend == "reference" and DEVICE == "cpu" else 8
    pair = 2 * 5 * (70 + 133) * 4 if backend != "merged" else 0
    assert sum(s.nbytes for s in own) <= pair + 64 * 5 * 4 + drawn


# What decides.


def test_a_backend_that_cannot_run_says_why():
    t = inputs(dtype=torch.float32, intact=False, train=())
    ipca.set_backend("merged")
    with pytest.raises(
        RuntimeError, match=r"'merged' cannot run x \(37, 133\) .*dropout acts on the low-rank branch only"
    ):
        call(t, 0.5)
    ipca.set_backend("triton")
    with pytest.raises(RuntimeError, match=r"its kernels take float16, bfloat16 and float32, not torch\.float64"):
        call(in_float64(t))


def test_triton_without_a_gpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    ipca.set_backend("triton")
    x, W, A, B = torch.randn(3, 8), torch.randn(5, 8), torch.randn(2, 8), torch.randn(5, 2)
    with pytest.raises(
        RuntimeError, match=r"'triton' cannot run .* it needs a CUDA device, x is on cpu\. Call ipca\.set_b"
    ):
        pc_linear(x, W, A, B)


@FORMS
def test_backward_computes_as_forward_did_whatever_auto_would_take_by_then(monkeypatch, intact):
    t = inputs(90, intact=intact)
    want = torch.autograd.grad(call(t), leaves(t), t.dy)
    merged = backends.BackendChoice("merged", False, "")
    for before, after in ((op.off_cuda, lambda device: merged), (lambda device: merged, op.off_cuda)):
        monkeypatch.setattr(op, "off_cuda", before)
        y = call(t)
        monkeypatch.setattr(op, "off_cuda", after)
        for got, other in zip(torch.autograd.grad(y, leaves(t), t.dy), want, strict=True):
            torch.testing.assert_close(got, other, rtol=1e-4, atol=1e-4)


def test_names_and_the_environment(monkeypatch):
    assert ipca.set_backend("addmm") == "auto"
    assert ipca.set_backend("auto") == "addmm"
    with pytest.raises(ValueError, match=r"set_backend got 'cublas'; backends are 'auto', 'triton'"):
        ipca.set_backend("cublas")
    monkeypatch.setattr(backends, "_chosen", None)
    ask = "from ipca.ops.backend import get_backend; print(get_backend())"
    environment = os.environ | {"IPCA_BACKEND": "merged"}
    done = subprocess.run([sys.executable, "-c", ask], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "merged\n"
    monkeypatch.setattr(backends, "_of_environment", "tirton")
    with pytest.raises(ValueError, match="the environment variable IPCA_BACKEND got 'tirton'"):
        call(inputs(intact=False))


@pytest.fixture
def measured(monkeypatch):
    """Says what a table holds: milliseconds of each backend by form, dropout and shape."""
    from ipca.kernels import tables

    def says(frozen, dropout, rows):
        of = ["bfloat16", frozen, dropout, True]
        table = {"backends": [[of, list(shape), ms] for shape, ms in rows.items()], "source": "test.json"}
        monkeypatch.setattr(tables, "tables_for", lambda device: ((table,), ()))
        tables.forget()

    monkeypatch.setattr(backends, "_triton_unsupported", lambda problem: "")
    monkeypatch.setattr(backends, "_unchecked_reason", lambda device, kind: "")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Test GPU")
    yield says
    tables.forget()


MILLISECONDS = {
    (8192, 4096, 4096, 16): {"triton": 1.0, "addmm": 1.2, "merged": 0.9, "reference": 2.0},
    (256, 4096, 4096, 16): {"triton": 0.2, "addmm": 0.1, "merged": 0.3, "reference": 0.2},
}


def best(M, *, frozen=False, dropout=False):
    problem = backends.LinearShape(torch.device("cuda"), torch.bfloat16, M, 4096, 4096, 16, frozen, dropout, True)
    return backends.choose("auto", problem)


def test_auto_takes_the_fastest_of_the_nearest_measured_shape(measured):
    measured(False, False, MILLISECONDS)
    assert best(8192).backend == "merged"
    assert best(200).backend == "addmm"
    words = "measured at (M, N, K, R) = (8192, 4096, 4096, 16) in test.json: merged 0.900 ms, triton 1.000 ms, addmm"
    assert words in best(9000).reason


def test_auto_takes_nothing_that_cannot_run_or_loses_updates(measured):
    measured(False, True, MILLISECONDS)
    assert best(8192, dropout=True).backend == "triton"
    measured(True, False, MILLISECONDS)
    assert best(8192, frozen=True).backend == "triton"  # W + Δ rounded to bfloat16 is W where Δ is small
    measured(True, False, {(8192, 4096, 4096, 16): {"merged": 0.9}})  # the others raised as they were measured
    assert best(8192, frozen=True).backend == "addmm"


def test_auto_on_a_device_that_nobody_measured(measured):
    measured(False, False, MILLISECONDS)
    found = best(8192, frozen=True)
    assert (found.backend, found.low_rank_in_triton) == ("addmm", True)
    assert "no backend was measured on Test GPU or its kind; `ipca tune` measures" in found.reason
    assert best(8192, frozen=True, dropout=True).backend == "triton"
