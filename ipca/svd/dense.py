"""A window cut out of the full float64 SVD: for small matrices, wide windows, ties and null spaces.

Needs about eight times the matrix in float64 while it runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ipca.svd.problem import MatrixBatch


def full_svd(problem: MatrixBatch, window: range) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``U (batch, m, r), S (batch, r), V (batch, n, r)`` of the window, and the whole spectra ``(batch, n)``."""
    U, S, Vh = torch.linalg.svd(problem.blocks.dense(), full_matrices=False)
    problem.flops += 4 * problem.m * problem.n**2 + 22 * problem.n**3
    part = slice(window.start, window.stop)
    return U[..., part].clone(), S[:, part].clone(), Vh[:, part].mT.clone(), S
