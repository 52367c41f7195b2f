"""Dense paths for a CPU: a tridiagonal reduction of the Gram matrix, and its whole eigendecomposition.

Both know the number of eigenvalues above any threshold without a factorization: by Sturm counts on ``T``, and by the
order of the eigenvalues.
"""

from __future__ import annotations

import math
from bisect import bisect_right

import torch

from ipca.svd.matrix_batch import Candidate, Counts, MatrixBatch

_EPS = torch.finfo(torch.float64).eps


def tridiagonal(batch: MatrixBatch, window: range, tol: float) -> Candidate:
    """The window's right singular vectors by index from ``WᵀW = Q T Qᵀ``; ``tol`` is that of LAPACK."""
    n = batch.n
    wider = range(max(window.start - 1, 0), min(window.stop + 1, n))
    pairs = [T.eigenpairs(wider) for T in batch.tridiagonal]
    batch.flops += 4 * n**2 * len(wider)

    def above(x2: list[float]) -> list[int]:
        return [T.count_above(x) for T, x in zip(batch.tridiagonal, x2, strict=True)]

    counts = Counts(above, [T.error for T in batch.tridiagonal])
    upper, lower = wider.stop - window.start, wider.stop - window.stop - 1  # in ascending order
    edges = [[_root(values, upper), _root(values, lower)] for values, _ in pairs]
    inside = slice(window.start - wider.start, window.stop - wider.start)
    V = torch.stack([vectors[:, inside] for _, vectors in pairs])
    return Candidate(V, V.new_tensor(edges), counts=counts)


def gram_eigh(batch: MatrixBatch, window: range, tol: float) -> Candidate:
    """The window's right singular vectors from all eigenvectors of ``WᵀW``; ``tol`` is that of LAPACK."""
    n = batch.n
    values, V = batch.eigh
    ascending = values.tolist()

    def above(x2: list[float]) -> list[int]:
        return [n - bisect_right(row, x) for row, x in zip(ascending, x2, strict=True)]

    counts = Counts(above, [4 * n * _EPS * row[-1] for row in ascending])
    edges = [[_root(row, n - window.start), _root(row, n - 1 - window.stop)] for row in ascending]
    inside = V[..., n - window.stop : n - window.start].flip(-1)
    return Candidate(inside, values.new_tensor(edges), counts=counts)


def _root(ascending: list[float], index: int) -> float:
    """The singular value at the index, infinity above the last one and 0 below the first."""
    if not 0 <= index < len(ascending):
        return math.inf if index > 0 else 0.0
    return max(ascending[index], 0.0) ** 0.5
