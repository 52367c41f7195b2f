import math
import re

import pytest
import torch

from ipca import Window, window_svd
from ipca.svd import singular_values, solve
from ipca.svd.decompose import TOLERANCES, check_matrix
from ipca.svd.matrix_batch import MatrixBatch

F64 = torch.float64
PATHS = {"gram_eigh": (75, 64), "tridiagonal": (257, 300)}


@pytest.mark.parametrize(
    ("d", "rank", "path"),
    [(127, 8, "gram_eigh"), (128, 8, "tridiagonal"), (191, 60, "gram_eigh"), (192, 192, "tridiagonal")],
)
def test_the_path_follows_the_size(d, rank, path):
    assert window_svd(torch.randn(d, d + 3), Window.middle(rank)).report.path == path


@pytest.mark.parametrize("shape", PATHS.values(), ids=PATHS)
def test_the_same_input_gives_the_same_bits(shape):
    W = torch.randn(shape)
    kept = W.clone()
    first, second = window_svd(W, Window.middle(6)), window_svd(W, Window.middle(6))
    assert torch.equal(first.U, second.U)
    assert torch.equal(first.S, second.S)
    assert torch.equal(first.Vh, second.Vh)
    assert torch.equal(W, kept)


@pytest.mark.parametrize(
    ("tol", "dtype", "want"),
    [
        ("fast", torch.float32, torch.float32),
        ("fast", F64, F64),
        ("default", torch.bfloat16, torch.float32),
        ("exact", torch.float16, F64),
        (1e-6, torch.float32, torch.float32),
        (9e-7, torch.float32, F64),
        (1e-12, F64, F64),
    ],
)
def test_the_dtype_follows_the_tolerance(tol, dtype, want):
    found = window_svd(torch.randn(7, 5).to(dtype), Window.middle(2), tol=tol)
    assert found.U.dtype == found.S.dtype == found.Vh.dtype == want
    assert found.report.residual <= TOLERANCES.get(tol, tol)
    asked = window_svd(torch.randn(7, 5).to(dtype), Window.middle(2), tol=tol, dtype=torch.bfloat16)
    assert asked.U.dtype == asked.S.dtype == asked.Vh.dtype == torch.bfloat16


@pytest.mark.parametrize("m", [7, 1024, 1025, 2100])
@pytest.mark.parametrize("largest", [3e-40, 1.0, 1.5, 3e38])
def test_a_batch_multiplies_as_the_scaled_matrix_does(m, largest):
    W = torch.randn(m, 7)
    W *= largest / W.abs().max()
    W = torch.stack([W, W / 8])
    batch = MatrixBatch(W)
    dense = W.double() / batch.scale[:, None, None]
    assert ((dense.abs().amax((1, 2)) >= 1) & (dense.abs().amax((1, 2)) < 2)).all()
    assert all(math.log2(scale).is_integer() for scale in batch.scale)
    X, Y = torch.randn(2, 7, 3, dtype=F64), torch.randn(2, m, 3, dtype=F64)
    assert torch.equal(batch.dense(), dense)
    torch.testing.assert_close(batch.gram, dense.mT @ dense, rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(batch.matmul(X), dense @ X, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(batch.rmatmul(Y), dense.mT @ Y, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("d", [7, 600])
def test_the_gram_matrix_is_multiplied_once(d):
    W = torch.randn(1, d + 3, d)
    batch = MatrixBatch(W)
    triangle = batch.gram_triangle
    reduced = batch.tridiagonal[0]
    G = batch.gram
    torch.testing.assert_close(G, (batch.dense().mT @ batch.dense()), rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(batch.gram32, MatrixBatch(W).gram32, rtol=1e-5, atol=1e-3)
    assert torch.equal(G, G.mT)
    assert G.data_ptr() == triangle.data_ptr()
    assert batch.flops == (d + 3) * d**2 + 4 / 3 * d**3
    assert reduced.error == MatrixBatch(W).tridiagonal[0].error


NOT_DECOMPOSABLE = [
    ([[1.0]], TypeError, "expected a torch.Tensor, got list"),
    *[
        (torch.ones(3, 3, dtype=dtype), TypeError, f"cannot decompose a {dtype} tensor; dequantize or cast it")
        for dtype in (torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn)
    ],
    *[
        (torch.ones(shape), ValueError, f"with at least one entry, got shape {re.escape(str(shape))}")
        for shape in ((), (3,), (0, 3), (3, 0), (0, 3, 3), (1, 2, 3, 4))
    ],
    (torch.ones(3, 3, device="meta"), ValueError, "on the meta device and holds no values; load the weights first"),
    *[
        (torch.tensor([[1.0, bad], [0, 1]], dtype=dtype), ValueError, "the tensor holds NaN or Inf")
        for bad in (math.nan, math.inf, -math.inf)
        for dtype in (torch.float16, torch.float32)
    ],
]


@pytest.mark.parametrize("call", [lambda W: window_svd(W, Window(0, 1)), singular_values, check_matrix])
@pytest.mark.parametrize(("W", "error", "message"), NOT_DECOMPOSABLE)
def test_what_cannot_be_decomposed(call, W, error, message):
    with pytest.raises(error, match=message):
        call(W)


def test_one_nan_deep_in_a_stack_is_found():
    W = torch.randn(2, 2100, 3)
    W[1, 2099, 2] = math.nan
    with pytest.raises(ValueError, match="NaN or Inf"):
        window_svd(W, Window(0, 1))


def test_a_stack_where_a_matrix_is_wanted():
    for call in (singular_values, check_matrix):
        with pytest.raises(
            ValueError, match=r"expected a matrix \(m, n\) with at least one entry, got shape \(2, 3, 4\)"
        ):
            call(torch.ones(2, 3, 4))


@pytest.mark.parametrize("window", ["middle", 4, None, (), [4]])
def test_a_window_must_be_a_window(window):
    message = f"window must be a Window, for example Window.middle(16), or several; got {window!r}"
    with pytest.raises(TypeError, match=re.escape(message)):
        window_svd(torch.eye(3), window)


@pytest.mark.parametrize(
    ("window", "message"), [(Window(0, 9), "only 5"), (Window(4, 2), "ends at 6, but there are only 5")]
)
def test_a_window_must_fit(window, message):
    for shape in ((7, 5), (5, 7), (2, 7, 5)):
        with pytest.raises(ValueError, match=message):
            window_svd(torch.randn(shape), window)


def test_a_tolerance_of_unknown_name():
    with pytest.raises(ValueError, match="tol must be a number or one of fast, default, exact; got 'best'"):
        window_svd(torch.eye(3), Window(0, 1), tol="best")


@pytest.mark.parametrize("tol", [0, -1e-6, 1e-13, 1, 2.5, math.nan, math.inf])
def test_a_tolerance_out_of_range(tol):
    with pytest.raises(
        ValueError, match=rf"tol must be a number in \[1e-12, 1\), which float64 can reach; got {tol!r}"
    ):
        window_svd(torch.eye(3), Window(0, 1), tol=tol)


@pytest.mark.parametrize("path", PATHS)
def test_a_full_svd_that_misses_tol_raises(monkeypatch, path):
    exact = solve.full_svd

    def wrong(batch, window):
        U, S, V, spectrum = exact(batch, window)
        return U, S * (1 + 1e-3), V, spectrum

    monkeypatch.setattr(solve, "full_svd", wrong)
    monkeypatch.setattr(solve, "plan", lambda *_: [])
    with pytest.raises(RuntimeError, match=r"the full float64 SVD left a residual of .*, above tol=1e-06; raise tol"):
        window_svd(torch.randn(PATHS[path]), Window.middle(4))
    assert window_svd(torch.randn(PATHS[path]), Window.middle(4), tol=1e-2).report.residual > 1e-6


def test_a_dtype_that_is_no_float_is_refused():
    with pytest.raises(TypeError, match="dtype must be a 16-, 32- or 64-bit float"):
        window_svd(torch.randn(4, 4), Window(0, 2), dtype=torch.int32)


def test_a_sparse_tensor_is_refused():
    with pytest.raises(TypeError, match=r"cannot decompose a torch.sparse_coo tensor"):
        window_svd(torch.eye(4).to_sparse(), Window(0, 2))


def test_singular_values_beyond_the_dtype_are_refused():
    W = torch.full((8, 8), 3e38)
    with pytest.raises(ValueError, match=r"overflow torch\.float32; pass dtype=torch\.float64"):
        window_svd(W, Window(0, 2))
    assert window_svd(W, Window(0, 2), dtype=torch.float64).S[0].item() == pytest.approx(8 * W[0, 0].item())


def test_a_matrix_drawn_from_the_same_seed_is_no_trap():
    """The starting vectors come from another stream than torch.manual_seed's."""
    torch.manual_seed(0)
    rows = torch.randn(16, 700)
    from ipca.svd.random_vectors import DENSITY, KRYLOV, normal

    for purpose in (DENSITY, KRYLOV):
        drawn = normal(0, purpose, (16, 700), torch.float32)
        assert (drawn * rows).sum(1).abs().max() < 6 * 700**0.5
        assert torch.equal(drawn, normal(0, purpose, (16, 700), torch.float32))
        assert not torch.equal(drawn, normal(-1, purpose, (16, 700), torch.float32))


def test_autocast_and_a_default_device_change_nothing():
    W = torch.randn(300, 280)
    plain = window_svd(W, Window.middle(6))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = window_svd(W, Window.middle(6))
    with torch.device("meta"):
        elsewhere = window_svd(W, Window.middle(6))
    for other in (cast, elsewhere):
        assert torch.equal(other.Vh, plain.Vh)
        assert torch.equal(other.S, plain.S)


@pytest.mark.parametrize("seed", [None, "a", 1.5, True])
@pytest.mark.parametrize("size", [8, 200])
def test_a_seed_is_an_int_at_every_size(seed, size):
    with pytest.raises(TypeError, match="seed must be an int"):
        window_svd(torch.ones(size, size), Window.middle(2), seed=seed)
