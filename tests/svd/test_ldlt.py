"""L D Lᵀ against the matrix it came from, and against what LAPACK's pivoted factorization counts."""

import pytest
import torch

from ipca.svd.ldlt import LDLT, factorize_, factorize_shifted

F64 = torch.float64
SIZES = [1, 2, 7, 63, 64, 65, 129, 256, 257, 300, 700]


def symmetric(n, batch=2):
    A = torch.randn(batch, n, n, dtype=F64)
    return A + A.mT


def rebuilt(factor):
    L = factor.tril(-1) + torch.eye(factor.shape[-1], dtype=F64)
    return L @ (factor.diagonal(dim1=-2, dim2=-1)[..., None] * L.mT)


@pytest.mark.parametrize("n", SIZES)
def test_the_factors_rebuild_the_matrix_within_the_bound_they_state(n):
    A = symmetric(n)
    found = factorize_(A.clone())
    off = torch.linalg.matrix_norm(rebuilt(found.factor) - A, ord=2)
    assert (off <= found.error).all()
    L = found.factor.tril(-1) + torch.eye(n, dtype=F64)
    growth = (L.square() @ found.factor.diagonal(dim1=-2, dim2=-1).abs()[..., None])[..., 0]
    torch.testing.assert_close(found.growth, growth, rtol=1e-10, atol=0)


@pytest.mark.parametrize("n", SIZES)
def test_inertia_is_the_number_of_positive_eigenvalues(n):
    A = symmetric(n)
    assert torch.equal(factorize_(A.clone()).positive, (torch.linalg.eigvalsh(A) > 0).sum(-1))


@pytest.mark.parametrize("n", SIZES)
def test_only_the_lower_triangle_counts(n):
    A = symmetric(n)
    want = factorize_(A.clone())
    poisoned = A.tril() + torch.full_like(A, torch.nan).triu(1)
    found = factorize_(poisoned)
    assert torch.equal(found.factor.tril(), want.factor.tril())
    assert torch.equal(found.positive, want.positive)


@pytest.mark.parametrize("solve", [LDLT.solve, LDLT.solve_by_products])
@pytest.mark.parametrize("n", SIZES)
def test_solving(n, solve):
    A = symmetric(n) + 3 * n**0.5 * torch.diag_embed(torch.randn(2, n, dtype=F64).sign())
    X = torch.randn(2, n, 5, dtype=F64)
    found = factorize_(A.clone())
    assert (A @ solve(found, X) - X).norm() <= 1e-15 * n * found.growth.max() * torch.linalg.cond(A).max() * X.norm()


def test_a_shift_leaves_the_matrix_alone():
    G = symmetric(130)
    kept = G.clone()
    shift = torch.tensor([0.5, -2.0], dtype=F64)
    found = factorize_shifted(G, shift)
    assert torch.equal(G, kept)
    assert torch.equal(found.positive, (torch.linalg.eigvalsh(G) > shift[:, None]).sum(-1))


@pytest.mark.parametrize("n", [1, 3, 65])
def test_a_pivot_of_zero_counts_as_not_positive_and_shows_in_the_growth(n):
    A = torch.zeros(1, n, n, dtype=F64)
    assert factorize_(A.clone()).positive.item() == 0
    A[0, -1, 0] = A[0, 0, -1] = 1.0
    found = factorize_(A)
    assert torch.isfinite(found.factor).all()
    assert n == 1 or found.growth.max() > 1e10


def test_growth_without_pivoting_is_seen():
    A = torch.tensor([[[1e-12, 1.0], [1.0, 0.0]]], dtype=F64)
    assert factorize_(A).error > 1e-4


def test_the_factors_multiply_as_what_they_stand_for():
    A = symmetric(300)
    found = factorize_(A.clone())
    X = torch.randn(2, 300, 3, dtype=F64)
    torch.testing.assert_close(found.multiply(X), rebuilt(found.factor) @ X, rtol=1e-10, atol=1e-8)


@pytest.mark.parametrize("n", [257, 513])
@pytest.mark.parametrize("delta", [1e-6, 1e-7])
def test_the_bound_holds_where_rounding_errors_line_up(n, delta):
    """A pivot near 0 and columns constant in blocks: every rounding error points the same way."""
    G = 0.3 * torch.ones(1, n, n, dtype=F64) + torch.diag_embed(torch.rand(1, n, dtype=F64))
    shift = G[:, 0, 0] - delta
    found = factorize_shifted(G, shift)
    off = rebuilt(found.factor) - G + shift[:, None, None] * torch.eye(n, dtype=F64)
    assert torch.linalg.matrix_norm(off, ord=2) <= found.error
