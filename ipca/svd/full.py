"""A window cut out of the full float64 SVD: for small matrices, wide windows, ties, null spaces, and GPU tensors.

Needs about eight times the matrix in float64 while it runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ipca.svd.blocks import Blocks


def full_svd(W: Blocks, start: int, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``U (m, r), S (r,), V (n, r)`` of the window, and the whole spectrum ``(n,)``, of the tall matrix ``W``."""
    U, S, Vh = torch.linalg.svd(W.dense(), full_matrices=False)
    window = slice(start, start + rank)
    return U[:, window].clone(), S[window].clone(), Vh[window].mT.clone(), S
