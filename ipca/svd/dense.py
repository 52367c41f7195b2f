"""Dense paths for a CPU: a tridiagonal reduction of the Gram matrix, and its whole eigendecomposition.

Both know the number of eigenvalues above any threshold without a factorization: by Sturm counts on ``T``, and by the
order of the eigenvalues.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ipca.svd.matrix_batch import Candidate, Counts, MatrixBatch

_EPS = torch.finfo(torch.float64).eps


def tridiagonal(batch: MatrixBatch, window: range, tol: float) -> Candidate:
    """The window's right singular vectors by index from ``WᵀW = Q T Qᵀ``; ``tol`` is that of LAPACK."""
    n = batch.n
    wider = range(max(window.start - 1, 0), min(window.stop + 1, n))
    reduced = batch.tridiagonal
    pairs = [T.eigenpairs(wider) for T in reduced]
    values, V = (torch.stack(part) for part in zip(*pairs, strict=True))
    batch.flops += 4 * n**2 * len(wider)

    def above(x2: list[float]) -> list[int]:
        return [T.count_above(x) for T, x in zip(reduced, x2, strict=True)]

    inside = slice(window.start - wider.start, window.stop - wider.start)
    return Candidate(V[..., inside], _neighbors(values, inside), counts=Counts(above, [T.error for T in reduced]))


def gram_eigh(batch: MatrixBatch, window: range, tol: float) -> Candidate:
    """The window's right singular vectors from all eigenvectors of ``WᵀW``; ``tol`` is that of LAPACK."""
    n = batch.n
    values, V = batch.eigh

    def above(x2: list[float]) -> list[int]:
        return (values > values.new_tensor(x2)[:, None]).sum(1).tolist()

    counts = Counts(above, (4 * n * _EPS * values[:, 0]).tolist())
    ascending = V[..., n - window.stop : n - window.start]
    return Candidate(ascending.flip(-1), _neighbors(values, slice(window.start, window.stop)), counts=counts)


def _neighbors(values: Tensor, inside: slice) -> Tensor:
    """The singular values next to those ``inside``, from eigenvalues ``(batch, k)``: infinity and 0 at the ends."""
    sigma = values.clamp_min(0).sqrt()
    above = sigma[:, inside.start - 1] if inside.start else torch.full_like(sigma[:, 0], torch.inf)
    below = sigma[:, inside.stop] if inside.stop < sigma.shape[1] else torch.zeros_like(sigma[:, 0])
    return torch.stack([above, below], dim=1)
