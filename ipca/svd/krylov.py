"""Block Krylov: the eigenvectors that a symmetric operator amplifies most, from an orthonormal basis that grows.

With ``M`` the operator and ``Q`` an orthonormal basis of ``span{X, M X, M² X, …}``, the eigenpairs of ``T = Qᵀ M Q``
that lie outermost converge first. ``Z = M Q`` is kept, so that residuals cost one product and nothing is estimated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ipca.svd.candidate import Candidate
from ipca.svd.orthonormal import orthonormalize

Operator = Callable[[Tensor], Tensor]
_FLOOR = 1e-3
"""Closer neighbors than this share of ``tol`` are not worth more work: the certificate tells."""


@dataclass(frozen=True)
class RitzPairs:
    """Approximate eigenpairs of the operator: ``values (batch, k)``, ``vectors (batch, n, k)`` orthonormal.

    ``residuals (batch, k)`` are ``‖M v − θ v‖``.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor


Measure = Callable[[RitzPairs], tuple[Tensor, Tensor]]
"""From Ritz pairs to singular values and to bounds on their residuals, both ``(batch, k)`` in units of ``W``."""


class Krylov:
    """A basis of at most ``limit`` columns for ``operator`` on ``(batch, n, ·)``, grown by blocks like ``start``."""

    def __init__(self, operator: Operator, start: Tensor, limit: int) -> None:
        batch, n, self.width = start.shape
        limit = max(limit, self.width)
        self.operator = operator
        # Rows in memory are columns of the basis, so that those not reached take no memory.
        self.basis, self.images = (start.new_empty(batch, limit, n).mT for _ in range(2))
        self.projected = start.new_zeros(batch, limit, limit)
        self.size = 0
        self._append(orthonormalize(start))

    def grow(self) -> None:
        """Add the next block."""
        seen = self.basis[:, :, : self.size]
        self._append(orthonormalize(self.images[:, :, self.size - self.width : self.size], seen))

    def _append(self, block: Tensor) -> None:
        new = slice(self.size, self.size + self.width)
        self.basis[:, :, new] = block
        image = self.operator(block)
        self.images[:, :, new] = image
        self.size = new.stop
        self.projected[:, : self.size, new] = self.basis[:, :, : self.size].mT @ image

    def ritz(self, wanted: Tensor) -> RitzPairs:
        """The pairs at the places ``wanted (batch, k)``, counted from the smallest value; negative from the largest."""
        size = self.size
        values, vectors = torch.linalg.eigh(self.projected[:, :size, :size].double(), UPLO="U")
        places = wanted % size
        values = values.gather(1, places)
        vectors = vectors.gather(2, places[:, None].expand(-1, size, -1)).to(self.basis.dtype)
        V = self.basis[:, :, :size] @ vectors
        residual = self.images[:, :, :size] @ vectors - V * values[:, None].to(V.dtype)
        return RitzPairs(values, V, residual.norm(dim=1).double())

    def converge(self, wanted: Tensor, measure: Measure, edges: slice, tol: Tensor, first: int) -> Candidate:
        """Grow until the pairs ``wanted`` are good, or the basis is full.

        Args:
            wanted: as in :meth:`ritz`; besides the window's places those of its neighbors.
            measure: how good a pair is.
            edges: which of ``wanted`` are the window.
            tol: ``(batch,)``; the residual to reach. Where the window's neighbors lie closer than that, a tenth of
                their distance is.
            first: the size at which to look for the first time.
        """
        look = first
        while True:
            full = self.size + self.width > self.basis.shape[2]
            if full or self.size >= look:
                pairs = self.ritz(wanted)
                sigma, error = measure(pairs)
                gaps = sigma[:, :-1] - sigma[:, 1:]
                inside = [gaps[:, i] for i in (edges.start - 1, edges.stop - 1) if 0 <= i < gaps.shape[1]]
                target = torch.stack([tol, *(g.abs() / 10 for g in inside)]).amin(0).clamp_min(_FLOOR * tol)
                if full or bool((error[:, edges].amax(1) <= target).all()):
                    return Candidate(pairs.vectors[:, :, edges], _outside(sigma, edges))
                look = self.size + max(self.width, self.size // 8)
            self.grow()


def _outside(sigma: Tensor, edges: slice) -> Tensor:
    """The neighbors' values ``(batch, 2)``: the one above, or infinity, and the one below, or 0."""
    above = sigma[:, 0] if edges.start else torch.full_like(sigma[:, 0], torch.inf)
    below = sigma[:, -1] if edges.stop < sigma.shape[1] else torch.zeros_like(sigma[:, 0])
    return torch.stack([above, below], dim=1)
