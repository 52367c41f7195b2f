"""Block Krylov: the eigenvectors that a symmetric operator amplifies most; the path of the first components.

With ``M`` the operator and ``Q`` an orthonormal basis of ``span{X, M X, M² X, …}``, the eigenpairs of ``T = Qᵀ M Q``
that lie outermost converge first. ``Z = M Q`` is kept, so that residuals cost one product and nothing is estimated.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ipca.svd.inner_loops import scaled_cholesky
from ipca.svd.matrix_batch import Candidate, MatrixBatch

Operator = Callable[[Tensor], Tensor]
_WIDTH = 16
_SHARE = 4
"""Of ``n``, as a divisor: the columns from which another path is cheaper."""
_FAR = math.log(100)
"""Of the error over the tolerance: what another step of iteration would not mend."""
_LOOK = 48
"""Columns of the basis that show σ₁ to a few percent."""
_FLOOR = 1e-3
"""Neighbors closer than this share of ``tol`` are not worth more work: the certificate decides."""
_PASSES = 6
_BENIGN = 10.0


def top(batch: MatrixBatch, window: range, tol: float) -> Candidate | None:
    """The window's right singular vectors by block Krylov with ``WᵀW``; None where no gap helps it to converge."""
    n, products = batch.n, 0
    single = in_single_precision(batch, tol)
    if single:
        operator, dtype, cost = gram_operator(batch.single), torch.float32, 4 * batch.m * n
    else:
        operator, dtype, cost = batch.gram.matmul, torch.float64, 2 * n**2

    def multiply(X: Tensor) -> Tensor:
        nonlocal products
        products += X.shape[-1]
        return operator(X)

    def measure(pairs: RitzPairs) -> tuple[Tensor, Tensor]:
        sigma = pairs.values.clamp_min(0).sqrt()
        return sigma, pairs.residuals / sigma

    wanted = range(window.start - (window.start > 0), min(window.stop + 1, n))
    places = -1 - torch.arange(wanted.start, wanted.stop, device=batch.W.device).expand(batch.size, -1)
    width = min(n, _WIDTH)
    krylov = Krylov(multiply, batch.random_columns(width, dtype), min(n, max(n // _SHARE, 8 * width + 4 * window.stop)))
    if single:
        while krylov.size < _LOOK and not krylov.full:
            krylov.grow()
        batch.sigma1 = krylov.largest().sqrt() * (1 - 1e-5)  # float32 may round upward
    edges = slice(window.start - wanted.start, window.stop - wanted.start)
    found = krylov.converge(places, measure, edges, tol * batch.sigma1, first=3 * window.stop)
    batch.flops += (cost + 6 * n * krylov.size) * products
    if found is None:
        return None
    V, neighbors = found
    return Candidate(orthonormalize(V.double()), neighbors, lambda V: orthonormalize(batch.rmatmul(batch.matmul(V))))


def in_single_precision(batch: MatrixBatch, tol: float) -> bool:
    """Whether the first components are found in float32: on a CPU, where ``tol`` is above its rounding.

    Squaring costs little here: an error of ``eps σ₁²`` in ``WᵀW`` is one of ``eps σ₁`` in singular values near σ₁. A
    GPU multiplies float64 as fast as float32, and its faster TF32 would not do.
    """
    return tol >= 1e-6 and batch.W.device.type == "cpu"


def gram_operator(W: Tensor) -> Operator:
    """``X ↦ Wᵀ W X`` for ``W (batch, m, n)``, without ``WᵀW``."""
    return lambda X: torch.bmm(torch.bmm(X.mT, W.mT), W).mT


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

    @property
    def full(self) -> bool:
        """Whether there is no room for another block."""
        return self.size + self.width > self.basis.shape[2]

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

    def largest(self) -> Tensor:
        """``(batch,)``: the largest Ritz value, a lower bound of the operator's largest eigenvalue."""
        return torch.linalg.eigvalsh(self.projected[:, : self.size, : self.size].double(), UPLO="U")[:, -1]

    def ritz(self, wanted: Tensor) -> RitzPairs:
        """The pairs at the indices ``wanted (batch, k)``, ascending: 0 is the smallest value, −1 the largest."""
        size = self.size
        values, vectors = torch.linalg.eigh(self.projected[:, :size, :size].double(), UPLO="U")
        places = wanted % size
        values = values.gather(1, places)
        vectors = vectors.gather(2, places[:, None].expand(-1, size, -1)).to(self.basis.dtype)
        V = self.basis[:, :, :size] @ vectors
        residual = self.images[:, :, :size] @ vectors - V * values[:, None].to(V.dtype)
        return RitzPairs(values, V, residual.norm(dim=1).double())

    def converge(
        self, wanted: Tensor, measure: Measure, edges: slice, tol: Tensor, first: int
    ) -> tuple[Tensor, Tensor] | None:
        """Grow until the pairs ``wanted`` are good, or the basis is full.

        Args:
            wanted: as in :meth:`ritz`; besides the window's indices those of its neighbors.
            measure: how good a pair is.
            edges: which of ``wanted`` are the window.
            tol: ``(batch,)``; the residual to reach. Where the window's neighbors lie closer than that, a tenth of
                their distance is.
            first: the size at which to look for the first time.

        Returns:
            The window's vectors ``(batch, n, r)``, and the values ``(batch, 2)`` of its neighbors: the one above, or
            infinity, and the one below, or 0. None where every matrix would be far from good in a full basis.
        """
        look = first
        misses: list[tuple[int, float]] = []
        while True:
            if self.full or self.size >= look:
                pairs = self.ritz(wanted)
                sigma, error = measure(pairs)
                gaps = sigma[:, :-1] - sigma[:, 1:]
                inside = [gaps[:, i] for i in (edges.start - 1, edges.stop - 1) if 0 <= i < gaps.shape[1]]
                target = torch.stack([tol, *(g.abs() / 10 for g in inside)]).amin(0).clamp_min(_FLOOR * tol)
                worst = error[:, edges].amax(1)
                misses.append((self.size, (worst / tol).amin().log().item()))
                if self._in_vain(misses):
                    return None
                if self.full or bool((worst <= target).all()):
                    return pairs.vectors[:, :, edges], _neighbors(sigma, edges)
                look = self.size + max(self.width, self.size // 8)
            self.grow()

    def _in_vain(self, misses: list[tuple[int, float]]) -> bool:
        """Whether the error stays far from good in a full basis, even if it falls twice as fast as it last did.

        ``misses`` are sizes and logarithms of the error over what is wanted, infinity where nothing is known of it yet.
        Asked once the basis is half full.
        """
        limit, (size, miss) = self.basis.shape[2], misses[-1]
        if len(misses) < 2 or 2 * size < limit or not math.isfinite(miss):
            return False
        before, earlier = misses[-2]
        return miss - 2 * max(earlier - miss, 0.0) * (limit - size) / (size - before) > _FAR


def _neighbors(sigma: Tensor, edges: slice) -> Tensor:
    above = sigma[:, 0] if edges.start else torch.full_like(sigma[:, 0], torch.inf)
    below = sigma[:, -1] if edges.stop < sigma.shape[1] else torch.zeros_like(sigma[:, 0])
    return torch.stack([above, below], dim=1)


def rayleigh_ritz(batch: MatrixBatch, V: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best ``U, S, V`` and their ``W V`` within the space that the orthonormal columns of ``V (batch, n, r)`` span.

    On ``W`` itself: the Gram matrix squares the condition number, so that small singular values lose digits. This wins
    those of ``S`` and ``U`` back, and the residual shows what is left.
    """
    X = batch.matmul(V)
    Q = orthonormalize(X)
    U, S, Rh = torch.linalg.svd(Q.mT @ X)
    return Q @ U, S, V @ Rh.mT, X @ Rh.mT


def orthonormalize(X: Tensor, against: Tensor | None = None) -> Tensor:
    """An orthonormal basis of the columns of ``X (batch, n, p)``, orthogonal to those of ``against (batch, n, q)``.

    Cholesky QR: products and one small factorization a pass. At least two passes of projection and scaled Cholesky QR,
    and more until one enlarges no column much: a pass enlarges rounding errors as well. Columns that vanish under the
    projection come back as what rounding left of them, made orthonormal: directions as good as random.
    """
    for done in range(_PASSES):
        if against is not None:
            X = X - against @ (against.mT @ X)
        T, _ = scaled_cholesky(X.mT @ X)
        X = X @ T
        if done and bool(T.abs().amax() <= _BENIGN):
            break
    return X
