"""The three inner loops of the window SVD in plain PyTorch, for one matrix or a batch of them.

Each is a sequence of tiny dependent steps, which no library offers for a batch; everything around them is large
products and triangular solves. ``csrc/`` holds the same three for a GPU, and ``tests/csrc`` compares them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

PANEL = 64
"""Columns that :func:`ldlt_panel_` factorizes at once."""
_LEAF = 16


def ldlt_panel_(panel: Tensor, growth: Tensor, positive: Tensor, tiny: Tensor) -> None:
    """Factorize the first columns of symmetric matrices, ``A = L D Lᵀ`` without pivoting, in place.

    Args:
        panel: ``(batch, rows, k)``, ``k <= rows``, the last dimension contiguous: the columns of what is left of each
            matrix. Of its first ``k`` rows only the lower triangle counts. Becomes ``L`` (unit lower triangular, its
            ones not stored) with ``D`` in the place of the ones.
        growth: ``(batch, rows)``; row ``i`` gains ``Σ_j L_ij² |D_j|``, a term of the diagonal of ``|L| |D| |Lᵀ|``.
        positive: ``(batch,)``, int64; gains the number of ``D_j > 0``.
        tiny: ``(batch,)``, positive; a pivot smaller in magnitude becomes ``−tiny``, so that nothing is divided by 0
            and an eigenvalue at the shift counts as not above it.
    """
    k = panel.shape[-1]
    for matrix, least in zip(panel, tiny.tolist(), strict=True):
        _diagonal_block_(matrix[:k], least)
    top, below = panel[:, :k], panel[:, k:]
    D = top.diagonal(dim1=-2, dim2=-1)
    if below.shape[1]:
        below.copy_(torch.linalg.solve_triangular(top.mT, below, upper=True, left=False, unitriangular=True))
        below.div_(D[:, None])
    weights = D.abs()
    growth[:, :k] += (top.tril(-1).square() @ weights[..., None])[..., 0] + weights
    growth[:, k:] += (below.square() @ weights[..., None])[..., 0]
    positive += (D > 0).sum(-1)


def _diagonal_block_(block: Tensor, tiny: float) -> None:
    """``L D Lᵀ`` of one ``(k, k)`` block; in NumPy on a CPU, whose calls cost a quarter of PyTorch's here."""
    A = block.numpy() if block.device.type == "cpu" else block
    with np.errstate(all="ignore"):  # entries that grow beyond all bounds show in the growth
        _leaves_(A, tiny)


def _leaves_(A: Any, tiny: float) -> None:
    k = A.shape[0]
    for first in range(0, k, _LEAF):
        last = min(first + _LEAF, k)
        for j in range(first, last):
            if not abs(A[j, j]) >= tiny:
                A[j, j] = -tiny
            old = A[j + 1 :, j] + 0
            A[j + 1 :, j] /= A[j, j]
            A[j + 1 :, j + 1 : last] -= A[j + 1 :, j, None] * old[None, : last - j - 1]
        L = A[last:, first:last]
        A[last:, last:] -= L @ (L * A.diagonal()[first:last]).T


def scaled_cholesky(G: Tensor) -> tuple[Tensor, Tensor]:
    """``T (batch, p, p)``, upper triangular, such that ``X T`` is orthonormal where ``G = XᵀX (batch, p, p)``.

    With ``C = D G D``, ``D = diag(G)^-1/2``, and the Cholesky factor ``C + shift I = K Kᵀ``: ``T = D K^-T``. The shift
    is 0, and where a pivot of ``K`` comes out below ``16 p eps`` the least of ``16 p eps · 100^i`` with which none does
    (then ``X T`` is well conditioned, not yet orthonormal). A zero column stays zero. Only the lower triangle of ``G``
    is meant to count.

    Returns:
        ``T`` and the shifts ``(batch,)``. Where ``G`` is not finite no shift helps, and ``T`` is not finite either.

    Source: Fukaya et al., "Shifted Cholesky QR for computing the QR factorization of ill-conditioned matrices",
    SIAM J. Sci. Comput. 42 (2020); the scaling is van der Sluis's.
    """
    p = G.shape[-1]
    least = 16 * p * torch.finfo(G.dtype).eps
    diagonal = G.diagonal(dim1=-2, dim2=-1)
    scale = torch.where(diagonal > 0, diagonal.rsqrt(), 0)
    eye = torch.eye(p, dtype=G.dtype, device=G.device)
    C = G * scale[:, None] * scale[..., None]
    C.diagonal(dim1=-2, dim2=-1).masked_fill_(diagonal <= 0, 1)
    shift = torch.zeros_like(diagonal[:, 0])
    retry = torch.full_like(shift, least)
    for _ in range(8):
        K, info = torch.linalg.cholesky_ex(C + shift[:, None, None] * eye)
        pivots = K.diagonal(dim1=-2, dim2=-1).square().amin(-1)
        failed = (info != 0) | ~(pivots >= least)
        if not failed.any():
            break
        shift = torch.where(failed, retry, shift)
        retry = torch.where(failed, 100 * retry, retry)
    return scale[..., None] * torch.linalg.solve_triangular(K.mT, eye.expand_as(K), upper=True), shift


def lanczos_step_(basis: Tensor, product: Tensor, alpha: Tensor, beta: Tensor, step: int) -> None:
    """One step of independent Lanczos recurrences with full reorthogonalization.

    With ``v_j = basis[j]`` and ``w = product = G v_step``: ``alpha_step = ⟨v_step, w⟩``; ``w`` is made orthogonal to
    ``v_0 … v_step`` by classical Gram–Schmidt, twice; ``beta_step = ‖w‖``; ``v_{step+1} = w / beta_step``, or 0 where
    ``w`` vanished to rounding: the space is exhausted. Nothing here looks for NaN.

    Args:
        basis: ``(steps + 1, chains, n)``; row ``step + 1`` is written.
        product: ``(chains, n)``; overwritten.
        alpha, beta: ``(chains, steps)``; column ``step`` is written.
        step: ``0 <= step < steps``.
    """
    seen = basis[: step + 1].transpose(0, 1)
    alpha[:, step] = (basis[step] * product).sum(-1)
    before = product.norm(dim=-1)
    for _ in range(2):
        product -= ((seen @ product[..., None]).mT @ seen)[:, 0]
    norm = product.norm(dim=-1)
    norm = torch.where(norm > 64 * torch.finfo(basis.dtype).eps * before, norm, 0)
    beta[:, step] = norm
    basis[step + 1] = product * torch.where(norm > 0, 1 / norm, 0)[:, None]
