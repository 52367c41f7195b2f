"""LAPACK's dense solvers: the full float64 SVD, and eigenvectors of the Gram matrix by index."""

from __future__ import annotations

import scipy.linalg
import torch
from torch import Tensor

from ipca.svd.matrix_batch import Candidate, MatrixBatch


def full_svd(batch: MatrixBatch, window: range) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``U (batch, m, r), S (batch, r), V (batch, n, r)`` of the window, and the whole spectra ``(batch, n)``.

    For small matrices, wide windows, ties and null spaces. Needs about eight times the matrix in float64 while it runs.
    """
    U, S, Vh = torch.linalg.svd(batch.dense(), full_matrices=False)
    batch.flops += 4 * batch.m * batch.n**2 + 22 * batch.n**3
    part = slice(window.start, window.stop)
    return U[..., part].clone(), S[:, part].clone(), Vh[:, part].mT.clone(), S


def lapack_range(batch: MatrixBatch, window: range, tol: float) -> Candidate:
    """The window's right singular vectors by LAPACK's range eigensolver, on the CPU; ``tol`` is that of LAPACK."""
    n = batch.n
    wider = range(max(window.start - 1, 0), min(window.stop + 1, n))
    indices = (n - wider.stop, n - wider.start - 1)  # LAPACK counts upward
    vectors, neighbors = [], []
    for G in batch.gram:
        values, V = scipy.linalg.eigh(G.numpy(), subset_by_index=indices, driver="evr", check_finite=False)
        sigma = torch.from_numpy(values).clamp_min(0).sqrt().flip(0)
        above = sigma[0] if wider.start < window.start else sigma.new_tensor(torch.inf)
        below = sigma[-1] if wider.stop > window.stop else sigma.new_tensor(0.0)
        inside = slice(window.start - wider.start, window.stop - wider.start)
        vectors.append(torch.from_numpy(V).flip(1)[:, inside])
        neighbors.append(torch.stack([above, below]))
    batch.flops += 4 / 3 * n**3 + 4 * n**2 * len(wider)
    return Candidate(torch.stack(vectors), torch.stack(neighbors))
