import numpy as np
import pytest
import torch

from ipca.svd.eigensolvers import Tridiagonal

F64 = torch.float64
EPS = torch.finfo(F64).eps
SIZES = [1, 2, 3, 7, 64, 129]


def gram(n):
    A = torch.randn(n + 3, n, dtype=F64)
    return A.mT @ A


def of_tridiagonal(diagonal, beside):
    T = Tridiagonal(torch.eye(len(diagonal), dtype=F64), 0)
    T.diagonal[:], T.beside[:] = diagonal, beside
    return T


@pytest.mark.parametrize("n", SIZES)
def test_eigenvectors_by_index(n):
    G = gram(n)
    kept, values = G.clone(), torch.linalg.eigvalsh(G).flip(0)
    T = Tridiagonal(G, 0)
    for wanted in (range(n), range(1), range(n // 2, n), range(n // 3, n // 3 + 1)):
        V = T.eigenvectors(wanted).mT
        bound = 20 * n * EPS * values[0]
        want = values[wanted.start : wanted.stop]
        assert torch.linalg.matrix_norm(G @ V - V * want, ord=2) <= bound
        assert torch.linalg.matrix_norm(V.mT @ V - torch.eye(len(wanted), dtype=F64), ord=2) <= 20 * n * EPS
    assert (T.values() - values).abs().max() <= 20 * n * EPS * values[0]
    assert 0.99 * values[0] <= T.largest() <= values[0]
    assert torch.equal(G, kept)


@pytest.mark.parametrize("n", SIZES)
def test_counts_agree_with_eigenvalues(n):
    G = gram(n)
    values = torch.linalg.eigvalsh(G)
    T = Tridiagonal(G, 0)
    for threshold in (-1.0, *((values[1:] + values[:-1]) / 2).tolist(), values[-1].item() + 1):
        assert T.count_above(threshold) == (values > threshold).sum()


@pytest.mark.parametrize("threshold", [-1.5, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("n", [2, 3, 4, 5, 8])
def test_counts_where_pivots_are_exactly_zero(n, threshold):
    """A zero diagonal has a pivot of 0 at once, and again after every second step."""
    T = of_tridiagonal(np.zeros(n), np.ones(n - 1))
    values = 2 * np.cos(np.pi * np.arange(1, n + 1) / (n + 1))
    if np.abs(values - threshold).min() > 1e-9:
        assert T.count_above(threshold) == (values > threshold).sum()


def test_an_eigenvalue_at_the_threshold_is_not_above_it():
    T = of_tridiagonal(np.array([1.0, 2.0, 3.0]), np.zeros(2))
    assert [T.count_above(x) for x in (0.5, 1.0, 2.0, 3.0)] == [3, 2, 1, 0]
    T = of_tridiagonal(np.zeros(3), np.zeros(2))
    assert [T.count_above(x) for x in (-1.0, 0.0)] == [3, 0]


@pytest.mark.parametrize("n", SIZES)
def test_the_error_is_small_and_bounds_a_perturbation(n):
    G = gram(n)
    assert Tridiagonal(G, 0).error <= 50 * n * EPS * torch.linalg.matrix_norm(G, ord=2)
    for kind in ("spread", "one entry"):
        T = Tridiagonal(G, 0)
        E = 1e-6 * np.random.default_rng(0).standard_normal(n) if kind == "spread" else 1e-6 * (np.arange(n) == n // 2)
        T.diagonal[:] += E
        assert np.abs(E).max() <= T.error <= 20 * np.linalg.norm(E)


def test_the_same_seed_measures_the_same_error():
    G = gram(40)
    first, again, other = (Tridiagonal(G, seed).error for seed in (0, 0, 1))
    assert first == again != other


def test_the_error_is_the_same_whichever_comes_first():
    G = gram(40)
    late, early = Tridiagonal(G, 0), Tridiagonal(G, 0)
    late.eigenvectors(range(3, 9))
    assert late.error == pytest.approx(early.error, rel=0.5)
