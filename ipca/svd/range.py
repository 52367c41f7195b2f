"""A window by LAPACK's range solver: eigenvectors of the float64 Gram matrix, by index."""

from __future__ import annotations

import scipy.linalg
import torch

from ipca.svd.candidate import Candidate
from ipca.svd.problem import MatrixBatch


def lapack_range(problem: MatrixBatch, window: range, tol: float) -> Candidate:
    """The window's right singular vectors for every matrix of ``problem``, on the CPU; ``tol`` is that of LAPACK."""
    n = problem.n
    wider = range(max(window.start - 1, 0), min(window.stop + 1, n))
    indices = (n - wider.stop, n - wider.start - 1)  # LAPACK counts upwards
    vectors, neighbors = [], []
    for G in problem.gram:
        values, V = scipy.linalg.eigh(G.numpy(), subset_by_index=indices, driver="evr", check_finite=False)
        sigma = torch.from_numpy(values).clamp_min(0).sqrt().flip(0)
        above = sigma[0] if wider.start < window.start else sigma.new_tensor(torch.inf)
        below = sigma[-1] if wider.stop > window.stop else sigma.new_tensor(0.0)
        inside = slice(window.start - wider.start, window.stop - wider.start)
        vectors.append(torch.from_numpy(V).flip(1)[:, inside])
        neighbors.append(torch.stack([above, below]))
    problem.flops += 4 / 3 * n**3 + 4 * n**2 * len(wider)
    return Candidate(torch.stack(vectors), torch.stack(neighbors))
