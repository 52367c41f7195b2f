"""A window by LAPACK's range solver: eigenvectors of the float64 Gram matrix, by index, then Rayleigh–Ritz on W.

The Gram matrix squares the condition number, so small singular values lose digits; Rayleigh–Ritz on ``W`` wins those
of ``S`` and ``U`` back, and the residual shows what is left.
"""

from __future__ import annotations

import scipy.linalg
import torch
from torch import Tensor

from ipca.svd.blocks import Blocks


def range_svd(W: Blocks, G: Tensor, start: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """``U (m, r), S (r,), V (n, r)`` of the window ``[start, start + rank)`` of the tall matrix ``W``.

    Args:
        W: the matrix, on the CPU.
        G: its Gram matrix ``(n, n)``.
    """
    n = G.shape[0]
    indices = (n - start - rank, n - start - 1)  # LAPACK counts upwards
    _, V = scipy.linalg.eigh(G.numpy(), subset_by_index=indices, driver="evr", check_finite=False)
    return rayleigh_ritz(W, torch.from_numpy(V))


def rayleigh_ritz(W: Blocks, V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The best ``U, S, V`` within the space that the orthonormal columns of ``V (n, r)`` span."""
    U, S, Qh = torch.linalg.svd(W.matmul(V), full_matrices=False)
    return U, S, V @ Qh.mT
