"""The tridiagonal path and the eigendecomposition of the Gram matrix against LAPACK's gesdd in float64."""

import pytest
import torch

from ipca import Window, window_svd
from ipca.svd import dense, solve
from ipca.svd.eigensolvers import FullEigh, Tridiagonal
from ipca.svd.matrix_batch import MatrixBatch

F64 = torch.float64
EPS = torch.finfo(F64).eps
PATHS = ["tridiagonal", "gram_eigh"]
D = 150


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    """The only path that is tried before the full SVD."""
    monkeypatch.setattr(solve, "plan", lambda *_: [request.param])
    return request.param


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def matrix(m, n, S):
    U, V = (torch.linalg.qr(torch.randn(size, len(S), dtype=F64))[0] for size in (m, n))
    return (U * S.double()) @ V.mT


def outlier(m, n):
    W = torch.randn(m, n, dtype=F64)
    W[3, 4] = 1e4
    return W


def random(m, n):
    return torch.randn(m, n, dtype=F64)


STEPS = torch.linspace(2, 1, D)
MATRICES = {
    "random": lambda: random(D, D),
    "tall": lambda: random(4 * D, D),
    "wide": lambda: random(D, 4 * D),
    "clustered": lambda: matrix(D, D, 1 + torch.arange(D - 1, -1, -1).div(10, rounding_mode="floor") + 1e-7 * STEPS),
    "outlier": lambda: outlier(D, D + 9),
    "wide dynamic range": lambda: matrix(D, D, torch.logspace(0, -5, D)),
    "rank-deficient": lambda: matrix(D + 5, D, STEPS[: D - 20]),
    "ties": lambda: matrix(D, D, torch.arange(D - 1, -1, -1).div(5, rounding_mode="floor") + 1.0),
}


def assert_agrees(found, W, start, rank, tol=1e-6):
    """The values, and the product where gaps separate the window, are those of the full SVD."""
    W = W.double()
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    part, slack = slice(start, start + rank), tol * S[0]
    eye = torch.eye(rank, dtype=F64)
    V = found.Vh.mT
    assert (found.S - S[part]).abs().max() <= slack
    assert (found.U.mT @ found.U - eye).norm() <= tol
    assert (found.Vh @ V - eye).norm() <= tol
    assert (W @ V - found.U * found.S).norm() <= slack
    assert (W.mT @ found.U - V * found.S).norm() <= slack
    gap = min(
        (S[start - 1] - S[start] if start else S[0]).item(),
        (S[part.stop - 1] - S[part.stop] if part.stop < len(S) else S[-1]).item(),
    )
    if gap > 1e-3 * S[0]:
        want = (U[:, part] * S[part]) @ Vh[part]
        assert ((found.U * found.S) @ found.Vh - want).norm() <= tol * S[0] ** 2 / gap


@pytest.mark.parametrize("kind", MATRICES)
@pytest.mark.parametrize(("start", "rank"), [(0, 10), (30, 10), (70, 20), (20, 90), (100, 10), (D - 10, 10)])
def test_a_window_agrees_with_the_full_svd(path, kind, start, rank):
    W = MATRICES[kind]()
    found = window_svd(W, Window(start, rank))
    assert_agrees(found, W, start, rank, 1e-9)
    null = kind == "rank-deficient" and start + rank > D - 20
    assert found.report.certified is not null
    assert found.report.path == ("full" if null else path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, F64])
@pytest.mark.parametrize("shape", [(D, D), (90, 300)], ids=str)
def test_every_dtype(path, dtype, shape):
    W = torch.randn(shape).to(dtype)
    found = window_svd(W, Window.middle(8), dtype=F64)
    assert (found.report.path, found.report.certified) == (path, True)
    assert_agrees(found, W, (min(shape) - 8) // 2, 8, 1e-9)


@pytest.mark.parametrize("d", range(1, 6))
@pytest.mark.parametrize("longer", [0, 1, 40])
def test_tiny_matrices_and_every_window_of_them(path, d, longer):
    W = matrix(d + longer, d, torch.linspace(2, 1, d))
    for start in range(d):
        for rank in range(1, d - start + 1):
            found = window_svd(W, Window(start, rank))
            assert (found.report.path, found.report.certified) == (path, True)
            assert_agrees(found, W, start, rank, 100 * EPS)


def test_a_stack_equals_its_matrices_and_a_tie_falls_back_alone(path):
    S = STEPS.double()
    tie = S.clone()
    tie[40] = tie[39]
    W = torch.stack([matrix(D, D, S), matrix(D, D, tie), matrix(D, D, 2 * S)])
    batch = MatrixBatch(W)
    found = solve.solve_window(batch, range(40, 48), 1e-6)
    assert [one.path for one in found] == [path, "full", path]
    assert [one.proof.certified for one in found] == [True, False, True]
    for one, alone, scale in zip(found, W, batch.scale, strict=True):
        want = window_svd(alone, Window(40, 8))
        torch.testing.assert_close(one.S * scale, want.S, rtol=1e-12, atol=0)
        torch.testing.assert_close((one.U * one.S * scale) @ one.V.mT, (want.U * want.S) @ want.Vh, rtol=0, atol=1e-9)


def test_threads_give_the_same_bits(path, threads):
    W = torch.randn(6, 140, 150)
    threads(1)
    alone = window_svd(W, Window.middle(6))
    threads(2)
    together = window_svd(W, Window.middle(6))
    for name in ("U", "S", "Vh"):
        assert torch.equal(getattr(alone, name), getattr(together, name))


def test_several_windows_share_the_reduction(path):
    W = torch.randn(D, D)
    windows = [Window.principal(8), Window.middle(8), Window.minor(8)]
    together = window_svd(W, windows)
    for one, window in zip(together, windows, strict=True):
        apart = window_svd(W, window)
        assert torch.equal(one.S, apart.S)
        torch.testing.assert_close(one.Vh, apart.Vh, rtol=0, atol=1e-6)
    assert together[1].report.flops <= together[0].report.flops - D**3


@pytest.mark.parametrize("shift", [-1, 1])
@pytest.mark.parametrize("start", [1, 60, D - 9])
def test_an_index_off_by_one_is_found_out_by_the_counts(path, start, shift, monkeypatch):
    solver, S = {"tridiagonal": Tridiagonal, "gram_eigh": FullEigh}[path], STEPS.double()
    right, honest = solver.eigenvectors, dense.certify_counts
    judged = []

    def wrong(self, wanted):
        return right(self, range(wanted.start + shift, wanted.stop + shift))

    def certify(*arguments):
        judged.append(honest(*arguments))
        return judged[-1]

    monkeypatch.setattr(dense, "certify_counts", certify)
    monkeypatch.setattr(solver, "eigenvectors", wrong)
    W = matrix(D, D, S)
    found = window_svd(W, Window(start, 8))
    assert [proof.certified for proof in judged] == [False]
    assert "singular values lie above" in judged[0].words
    assert (found.report.path, found.report.certified) == ("full", True)
    assert_agrees(found, W, start, 8, 1e-12)


@pytest.mark.parametrize("edge", [60, 68])
@pytest.mark.parametrize(
    ("gap", "proven", "certified"), [(0.0, False, False), (1e-10, False, True), (1e-8, True, True)]
)
def test_a_window_that_cuts_a_tie_is_not_proven(path, edge, gap, proven, certified):
    S = STEPS.double()
    S[edge - 1] = S[edge] + gap
    W = matrix(D, D, S)
    found = window_svd(W, Window(60, 8))
    assert (found.report.path, found.report.certified) == (path if proven else "full", certified)
    assert_agrees(found, W, 60, 8, 1e-9)


@pytest.mark.parametrize(("level", "proven"), [(1e-9, False), (1e-8, False), (1e-4, True)])
def test_a_window_too_low_for_the_gram_matrix_is_left_to_the_full_svd(path, level, proven):
    S = STEPS.double()
    S[40:] = level * torch.linspace(1, 0.5, D - 40)
    W = matrix(D, D, S)
    found = window_svd(W, Window(60, 8))
    assert (found.report.path, found.report.certified) == (path if proven else "full", True)
    assert_agrees(found, W, 60, 8, 1e-9)


def test_a_wrong_reduction_proves_nothing(monkeypatch):
    """Eigenvalues of a perturbed T would count wrongly, were the error not measured and added to the thresholds."""
    monkeypatch.setattr(solve, "plan", lambda *_: ["tridiagonal"])
    W = matrix(D, D, STEPS)
    batch = MatrixBatch(W[None])
    (T,) = batch.tridiagonal
    T.diagonal[:] += 0.02
    (found,) = solve.solve_window(batch, range(60, 68), 1e-6)
    assert T.error > 0.02
    assert found.path == "full"


def test_a_routine_that_does_not_converge_leaves_the_window_to_the_full_svd(monkeypatch):
    def fail(*_):
        raise torch.linalg.LinAlgError("no convergence")

    for solver in (Tridiagonal, FullEigh):
        monkeypatch.setattr(solver, "eigenvectors", fail)
    found = window_svd(torch.randn(D, D), Window.middle(8))
    assert (found.report.path, found.report.certified) == ("full", True)
