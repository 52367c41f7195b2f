"""Every path against float64's full SVD, on spectra that are easy, steep, flat and broken."""

from dataclasses import replace

import pytest
import torch

from ipca import Window, window_svd
from ipca.svd import solve
from ipca.svd.krylov import Krylov, orthonormalize
from ipca.svd.matrix_batch import MatrixBatch
from ipca.svd.solve import THRESHOLDS, plan

F64 = torch.float64
EPS = torch.finfo(F64).eps


def orthonormal(m, n):
    return torch.linalg.qr(torch.randn(m, n, dtype=F64))[0]


def spectrum(kind, d):
    k = torch.arange(d, dtype=F64)
    return {
        "even": 2 - k / d,
        "power law": (1 + k) ** -0.8,
        "outliers": torch.cat([torch.linspace(60, 4, 20), torch.linspace(2, 0.1, d - 20)]).double(),
        "exponential": 10 ** (-4 * k / d),
        "flat": 1 + 1e-3 * (1 - k / d),
    }[kind]


def matrix(m, n, S):
    return (orthonormal(m, len(S)) * S) @ orthonormal(n, len(S)).mT


@pytest.fixture
def only(monkeypatch):
    """Let only one path be tried before the full SVD."""
    return lambda name: monkeypatch.setattr(solve, "plan", lambda *_: [name])


def assert_window(found, W, S, start, rank, tol=1e-6):
    part = slice(start, start + rank)
    values = S[part]
    U, Vh = found.U, found.Vh
    eye = torch.eye(rank, dtype=F64)
    assert found.report.certified
    assert found.report.residual <= tol
    assert torch.linalg.matrix_norm(U.mT @ U - eye, ord=2) <= tol
    assert torch.linalg.matrix_norm(Vh @ Vh.mT - eye, ord=2) <= tol
    assert torch.linalg.matrix_norm(W @ Vh.mT - U * found.S, ord=2) <= 1.01 * tol * S[0]
    assert torch.linalg.matrix_norm(W.mT @ U - Vh.mT * found.S, ord=2) <= 1.01 * tol * S[0]
    outer = S[max(start - 1, 0)] - S[start], S[start + rank - 1] - S[min(start + rank, len(S) - 1)]
    gap = min([g.item() for g in outer if g > 0])
    assert (found.S - values).abs().max() < gap / 2  # no index is off by one


CASES = [
    ("top", 0, 9), ("top", 3, 5), ("interior", 100, 9), ("interior", 0, 9), ("interior", 291, 9), ("interior", 137, 33),
    ("bottom", 291, 9), ("tridiagonal", 100, 9),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["even", "power law", "outliers", "exponential", "flat"])
@pytest.mark.parametrize(("path", "start", "rank"), CASES)
@pytest.mark.parametrize("shape", [(300, 300), (420, 300)], ids=["square", "tall"])
def test_a_path_finds_the_window_or_leaves_it_to_the_full_svd(only, path, start, rank, kind, shape):
    S = spectrum(kind, 300)
    W = matrix(*shape, S)
    only(path)
    found = window_svd(W, Window(start, rank))
    assert_window(found, W, S, start, rank)
    hard = (path == "bottom" and kind in ("power law", "even", "flat", "outliers")) or kind == "flat"
    hard = hard or (path == "top" and kind == "even")  # float32 is at its end where no gap helps
    assert found.report.path == path or (hard and found.report.path == "full")


@pytest.mark.parametrize(("path", "start"), [("top", 0), ("interior", 100), ("bottom", 291), ("tridiagonal", 100)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_dtypes_and_a_wide_matrix(only, path, start, dtype):
    W = matrix(290, 300, spectrum("exponential", 290) * 3)[:, :].to(dtype)
    S = torch.linalg.svdvals(W.double())
    start = min(start, 290 - 9)
    only(path)
    assert_window(window_svd(W, Window(start, 9), dtype=F64), W.double(), S, start, 9)


@pytest.mark.parametrize(("path", "start"), [("top", 0), ("interior", 140), ("bottom", 291)])
def test_exact_tolerance(only, path, start):
    S = spectrum("exponential", 300)
    W = matrix(300, 300, S)
    only(path)
    found = window_svd(W, Window(start, 9), tol="exact")
    assert_window(found, W, S, start, 9, tol=1e-9)


@pytest.mark.parametrize("path", ["top", "interior", "bottom"])
def test_the_same_seed_gives_the_same_bits_and_another_the_same_window(only, path):
    S = spectrum("exponential", 300)
    W, start = matrix(300, 300, S), {"top": 0, "interior": 140, "bottom": 291}[path]
    only(path)
    first, again, other = (window_svd(W, Window(start, 9), seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.U, again.U)
    assert torch.equal(first.Vh, again.Vh)
    assert not torch.equal(first.Vh, other.Vh)
    assert ((first.U * first.S) @ first.Vh - (other.U * other.S) @ other.Vh).norm() <= 1e-5


@pytest.mark.parametrize("path", ["top", "interior", "bottom"])
@pytest.mark.parametrize("shift", [-1, 1])
def test_a_path_that_is_off_by_one_is_found_out(monkeypatch, path, shift):
    S = spectrum("exponential", 300)
    W, start = matrix(300, 300, S), {"top": 1, "interior": 140, "bottom": 290}[path]
    right = solve.ITERATIONS[path]

    def wrong(batch, window, tol):
        moved = range(window.start + shift, window.stop + shift)
        return (solve.ITERATIONS["interior"] if path == "bottom" else right)(batch, moved, tol)

    monkeypatch.setattr(solve, "plan", lambda *_: ["wrong"])
    monkeypatch.setitem(solve.ITERATIONS, "wrong", wrong)
    found = window_svd(W, Window(start, 9))
    assert found.report.path == "full"
    assert_window(found, W, S, start, 9)


@pytest.mark.parametrize("path", ["top", "interior", "bottom", "tridiagonal"])
@pytest.mark.parametrize("S", [torch.cat([torch.ones(40), torch.zeros(260)]), torch.ones(300)], ids=["rank 40", "ties"])
def test_ties_and_null_spaces_are_left_to_the_full_svd_without_a_proof(only, path, S):
    W = matrix(300, 300, S.double())
    start = {"top": 0, "interior": 100, "bottom": 291, "tridiagonal": 100}[path]
    only(path)
    found = window_svd(W, Window(start, 9))
    assert (found.report.path, found.report.certified) == ("full", False)
    assert found.report.residual <= 1e-12


@pytest.mark.parametrize("path", ["interior", "tridiagonal"])
def test_a_window_inside_the_range_of_a_rank_deficient_matrix(only, path):
    S = torch.cat([torch.linspace(2, 1, 80), torch.zeros(220)]).double()
    W = matrix(300, 300, S)
    only(path)
    found = window_svd(W, Window(30, 9))
    assert found.report.path == path
    assert_window(found, W, S, 30, 9)


def test_several_windows_share_the_gram_matrix_and_the_density(only):
    W = matrix(640, 600, spectrum("exponential", 600)).float()
    only("interior")
    windows = [Window.at(f, 16) for f in (0.25, 0.5, 0.75)]
    together = window_svd(W, windows)
    apart = [window_svd(W, window) for window in windows]
    for one, other in zip(together, apart, strict=True):
        assert torch.equal(one.S, other.S)
        assert torch.equal(one.Vh, other.Vh)
        assert one.report.path == "interior"
    gram = 640 * 600**2
    assert together[0].report.flops == apart[0].report.flops
    assert all(
        one.report.flops <= other.report.flops - gram for one, other in zip(together[1:], apart[1:], strict=True)
    )


@pytest.mark.parametrize(
    ("device", "d", "window", "paths"),  # of a square matrix
    [
        ("cpu", 1, range(1), ["gram_eigh"]),
        ("cpu", 128, range(8), ["tridiagonal"]),
        ("cpu", 128, range(9), ["gram_eigh"]),
        ("cpu", 191, range(40), ["gram_eigh"]),
        ("cpu", 384, range(9), ["tridiagonal"]),
        ("cpu", 384, range(384), ["tridiagonal"]),
        ("cpu", 1024, range(300), ["tridiagonal"]),
        ("cpu", 1024, range(1, 33), ["tridiagonal"]),
        ("cpu", 2048, range(16), ["top", "tridiagonal"]),
        ("cpu", 4096, range(2016, 2080), ["interior", "tridiagonal"]),
        ("cpu", 2048, range(2032, 2048), ["bottom", "tridiagonal"]),
        ("cpu", 4096, range(16), ["top", "tridiagonal"]),
        ("cpu", 4096, range(4080, 4096), ["bottom", "interior", "tridiagonal"]),
        ("cpu", 2048, range(100, 400), ["tridiagonal"]),
        ("cuda", 255, range(9), []),
        ("cuda", 1024, range(300), []),
        ("cuda", 4096, range(2016, 2080), ["interior"]),
        ("cuda", 4096, range(4080, 4096), ["bottom", "interior"]),
    ],
)
def test_the_plan(device, d, window, paths):
    assert plan(device, d, d, window) == paths


def test_the_end_of_a_tall_spectrum_lies_inside():
    assert plan("cpu", 11008, 4096, range(4080, 4096)) == ["interior", "tridiagonal"]


def test_the_first_components_of_a_tall_matrix_cost_products_with_all_of_it():
    assert plan("cpu", 3072, 768, range(16)) == ["tridiagonal"]
    assert plan("cpu", 6144, 1536, range(16)) == ["top", "tridiagonal"]


def test_the_plan_where_scipy_exports_no_tridiagonal_routines(monkeypatch):
    monkeypatch.setattr(solve, "tridiagonal_available", lambda: False)
    assert plan("cpu", 384, 384, range(9)) == ["gram_eigh"]


def test_matrices_take_the_planned_path(monkeypatch):
    d = 500
    cpu = replace(THRESHOLDS["cpu"], top_from=400, interior_from=500, bottom_from=400)
    monkeypatch.setitem(THRESHOLDS, "cpu", cpu)
    W = torch.randn(d, d + 40)
    assert window_svd(W, Window.middle(8)).report.path == "interior"
    assert window_svd(W, Window.minor(8)).report.path == "bottom"
    W[:, :40] *= torch.linspace(9, 2, 40)
    assert window_svd(W, Window.principal(8)).report.path == "top"


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("condition", [1.0, 1e6, 1e12, 1e30])
def test_a_basis_is_orthonormal_however_ill_conditioned_the_block(dtype, condition):
    if dtype == torch.float32 and condition > 1e12:
        condition = 1e12
    scales = torch.logspace(0, -torch.tensor(condition).log10().item(), 12, dtype=F64)
    X = (torch.linalg.qr(torch.randn(2, 90, 12, dtype=F64))[0] * scales) @ torch.randn(12, 12, dtype=F64)
    against = torch.linalg.qr(torch.randn(2, 90, 20, dtype=F64))[0].to(dtype)
    Q = orthonormalize(X.to(dtype), against)
    bound = 200 * torch.finfo(dtype).eps
    assert torch.linalg.matrix_norm(Q.mT @ Q - torch.eye(12, dtype=dtype), ord=2).max() <= bound
    assert torch.linalg.matrix_norm(against.mT @ Q, ord=2).max() <= bound


def test_krylov_goes_on_when_the_space_is_exhausted():
    G = torch.diag(torch.cat([torch.full((5,), 3.0), torch.ones(55)])).double()[None]
    krylov = Krylov(lambda X: G @ X, torch.randn(1, 60, 8, dtype=F64), 40)
    while krylov.size < 40:
        krylov.grow()
    Q = krylov.basis[0]
    assert torch.linalg.matrix_norm(Q.mT @ Q - torch.eye(40, dtype=F64), ord=2) <= 1e-12
    pairs = krylov.ritz(torch.tensor([[-1, -5, -6, 0]]))
    torch.testing.assert_close(pairs.values, torch.tensor([[3.0, 3.0, 1.0, 1.0]], dtype=F64))
    assert pairs.residuals.max() <= 1e-12


def krylov_with(columns, limit):
    krylov = Krylov(lambda X: X, torch.randn(1, 60, 8, dtype=F64), limit)
    krylov.size = columns
    return krylov


@pytest.mark.parametrize(
    ("misses", "in_vain"),
    [
        ([(16, 9.0)], False),  # the first look
        ([(8, 9.0), (16, 9.0)], False),  # not half full
        ([(16, 9.0), (24, 9.0)], True),
        ([(16, 9.0), (24, 10.0)], True),
        ([(16, 9.0), (24, 7.0)], False),  # twice as fast, it is near 0 in a full basis
        ([(16, 9.0), (24, float("inf"))], False),  # pairs that have not come yet say nothing
        ([(16, float("inf")), (24, 9.0)], False),
        ([(32, 9.0), (40, 8.9)], True),
        ([(32, 9.0), (40, 4.0)], False),  # a step of the iteration mends that
    ],
)
def test_an_iteration_that_comes_to_nothing_is_given_up(misses, in_vain):
    assert krylov_with(misses[-1][0], 40)._in_vain(misses) is in_vain


@pytest.mark.parametrize("name", ["interior", "bottom", "top"])
def test_a_batch_solves_each_matrix_and_falls_back_for_one_alone(monkeypatch, name):
    S = spectrum("exponential", 300)
    tie = S.clone()
    window = {"interior": range(100, 109), "bottom": range(291, 300), "top": range(9)}[name]
    edge = window.stop if name == "top" else window.start
    tie[edge - 1] = tie[edge]
    W = torch.stack([matrix(300, 300, S), matrix(300, 300, tie), matrix(300, 300, 2 * S)])
    monkeypatch.setattr(solve, "plan", lambda *_: [name])
    found = solve.solve_window(MatrixBatch(W, 0), window, 1e-6)
    assert [one.path for one in found] == [name, "full", name]
    assert [one.proof.certified for one in found] == [True, False, True]
    batch = MatrixBatch(W, 0)
    for one, scale, values in zip(found, batch.scale, (S, tie, 2 * S), strict=True):
        torch.testing.assert_close(one.S * scale, values[window.start : window.stop], rtol=0, atol=1e-7)
        assert one.error <= 1e-6


HARD = [("top", 0), ("interior", 130), ("bottom", 291), ("tridiagonal", 130)]


@pytest.mark.parametrize(("path", "start"), HARD)
@pytest.mark.parametrize(("exponent", "dtype"), [(-100, torch.float32), (60, torch.float32), (-996, F64), (996, F64)])
def test_the_scale_does_not_matter(only, path, start, exponent, dtype):
    W = matrix(300, 300, spectrum("exponential", 300)).to(dtype)
    only(path)
    plain = window_svd(W, Window(start, 9))
    scaled = window_svd(torch.ldexp(W, torch.tensor(exponent)), Window(start, 9))
    assert (scaled.report.path, scaled.report.certified) == (path, True)
    assert torch.equal(scaled.Vh, plain.Vh)
    assert torch.equal(scaled.S, torch.ldexp(plain.S, torch.tensor(exponent)))


@pytest.mark.parametrize(("path", "start"), HARD)
def test_one_outlier_hides_no_component(only, path, start):
    W = matrix(300, 300, spectrum("exponential", 300))
    W[3, 4] = 1e4
    S = torch.linalg.svdvals(W)
    only(path)
    found = window_svd(W, Window(start, 9))
    assert found.report.certified
    assert ((found.S - S[start : start + 9]).abs() <= 1e-9 * S[0]).all()
    between = (S[start + 8] - S[min(start + 9, 299)]) / 2 if start + 9 < 300 else S[start + 8]
    assert (found.S[-1] - S[start + 8]).abs() <= between or found.report.path == "full"


@pytest.mark.parametrize("path", ["top", "interior", "bottom", "tridiagonal"])
def test_the_zero_matrix_is_left_to_the_full_svd(only, path):
    only(path)
    found = window_svd(torch.zeros(300, 280), Window.middle(4))
    assert (found.report.path, found.report.certified) == ("full", False)
    assert not found.S.any()


def test_a_stack_of_rank_deficient_matrices_is_solved_one_by_one():
    ranks = [60, 20, 0]
    W = torch.stack([matrix(90, 80, torch.cat([torch.linspace(2, 1, r), torch.zeros(80 - r)]).double()) for r in ranks])
    found = window_svd(W, Window(8, 8))
    assert [report.certified for report in found.reports] == [True, True, False]
    assert [report.path for report in found.reports] == ["gram_eigh", "gram_eigh", "full"]
    for one, each in zip(W, found.S, strict=True):
        assert (each - torch.linalg.svdvals(one)[8:16]).abs().max() <= 1e-12
    beyond = window_svd(W, Window(40, 8))
    assert [report.certified for report in beyond.reports] == [True, False, False]
    assert beyond.report.residual <= 1e-12


@pytest.mark.slow
@pytest.mark.parametrize(("start", "path"), [(0, "top"), (4000, "interior")])
def test_a_layer_of_8192_rows(start, path):
    W = torch.randn(8192, 8192).div_(90)
    W[:, :64] *= torch.linspace(12, 3, 64)
    found = window_svd(W.bfloat16(), Window(start, 8))
    assert (found.report.path, found.report.certified) == (path, True)
    W = W.bfloat16().double()
    assert torch.linalg.matrix_norm(W @ found.Vh.double().mT - found.U.double() * found.S.double()) <= 1e-5 * found.S[0]
