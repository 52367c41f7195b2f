"""Symmetric indefinite systems: ``A = L D Lᵀ`` without pivoting, its inertia, and a bound on its error.

Pivoting would move single rows and columns between steps. Without it nearly all the work is in products of blocks, with
half the operations of an LU factorization, and a batch takes the same steps for every matrix. The price: a small pivot
lets the entries grow. ``growth`` records how far, so that no count relies on a factor that lost its digits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ipca.svd.inner_loops import PANEL, ldlt_panel_
from ipca.svd.lazy import lazy_property
from ipca.svd.random_vectors import probe_bound, probes

_BLOCK = 256
_EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class LDLT:
    """``A = L D Lᵀ`` for a batch of symmetric matrices.

    Attributes:
        factor: ``(batch, n, n)``; ``L`` below the diagonal (its own diagonal is 1), ``D`` on it, the rest undefined.
        positive: ``(batch,)``; how many ``D`` are positive, which is how many eigenvalues of ``A`` are.
        growth: ``(batch, n)``; the diagonal of ``|L| |D| |Lᵀ|``.
    """

    factor: Tensor
    positive: Tensor
    growth: Tensor

    @property
    def error(self) -> Tensor:
        """``(batch,)``: a bound on ``‖A − L D Lᵀ‖₂``, as ``|A − L D Lᵀ| <= n eps |L| |D| |Lᵀ|`` in every entry.

        The norm of the right side, which is positive semidefinite, is at most its trace. Usually far above the error.

        Source: Higham, "Accuracy and Stability of Numerical Algorithms", 2nd edition, theorems 9.3 and 10.3.
        """
        return self.growth.shape[1] * _EPS * self.growth.sum(1)

    def multiply(self, X: Tensor) -> Tensor:
        """``L D Lᵀ X`` for ``X (batch, n, k)``."""
        Y = X.clone()
        for c in self._blocks:
            Y[:, c] += self.factor[:, c, c].tril(-1).mT @ X[:, c] + self.factor[:, c.stop :, c].mT @ X[:, c.stop :]
        Y *= self.factor.diagonal(dim1=-2, dim2=-1)[..., None]
        out = Y.clone()
        for c in self._blocks:
            out[:, c] += self.factor[:, c, c].tril(-1) @ Y[:, c]
            out[:, c.stop :] += self.factor[:, c.stop :, c] @ Y[:, c]
        return out

    def solve(self, X: Tensor) -> Tensor:
        """``A⁻¹ X`` for ``X (batch, n, k)``."""
        if X.is_cuda:
            return self.solve_by_products(X)
        D = self.factor.diagonal(dim1=-2, dim2=-1)[..., None]
        Y = torch.linalg.solve_triangular(self.factor, X, upper=False, unitriangular=True).div_(D)
        return torch.linalg.solve_triangular(self.factor.mT, Y, upper=True, unitriangular=True)

    def solve_by_products(self, X: Tensor) -> Tensor:
        """The same with :attr:`inverses`, ``4 ⌈n / 256⌉`` products whatever the batch.

        For a GPU: PyTorch hands more than eight triangular systems to a routine of cuBLAS that is meant for small ones.
        """
        Y = X.clone()
        for c, inverse in zip(self._blocks, self.inverses, strict=True):
            Y[:, c] = inverse @ Y[:, c]
            Y[:, c.stop :].baddbmm_(self.factor[:, c.stop :, c], Y[:, c], alpha=-1)
        Y /= self.factor.diagonal(dim1=-2, dim2=-1)[..., None]
        for c, inverse in zip(reversed(self._blocks), reversed(self.inverses), strict=True):
            Y[:, c].baddbmm_(self.factor[:, c.stop :, c].mT, Y[:, c.stop :], alpha=-1)
            Y[:, c] = inverse.mT @ Y[:, c]
        return Y

    @lazy_property
    def inverses(self) -> list[Tensor]:
        """Of the diagonal blocks of ``L``, each ``(batch, k, k)``."""
        return [_inverse(self.factor[:, c, c]) for c in self._blocks]

    @property
    def _blocks(self) -> list[slice]:
        n = self.factor.shape[-1]
        return [slice(j, min(j + _BLOCK, n)) for j in range(0, n, _BLOCK)]


def _inverse(L: Tensor) -> Tensor:
    """``L⁻¹`` for the unit lower triangle of ``L (batch, k, k)``."""
    eye = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device).expand_as(L)
    return torch.linalg.solve_triangular(L, eye, upper=False, unitriangular=True)


def factorize_(A: Tensor) -> LDLT:
    """Factorize the symmetric ``A (batch, n, n)``, of which only the lower triangle counts, in place."""
    batch, n, _ = A.shape
    growth = A.new_zeros(batch, n)
    positive = torch.zeros(batch, dtype=torch.int64, device=A.device)
    tiny = _EPS * A.diagonal(dim1=-2, dim2=-1).abs().amax(-1) + torch.finfo(A.dtype).tiny
    for first in range(0, n, _BLOCK):
        last = min(first + _BLOCK, n)
        for k in range(first, last, PANEL):
            end = min(k + PANEL, last)
            ldlt_panel_(A[:, k:, k:end], growth[:, k:], positive, tiny)
            _subtract_(A, slice(k, end), slice(end, last))
        for c in range(last, n, _BLOCK):
            _subtract_(A, slice(first, last), slice(c, min(c + _BLOCK, n)))
    return LDLT(A, positive, growth)


def _subtract_(A: Tensor, done: slice, columns: slice) -> None:
    """``A −= L D Lᵀ`` over the finished columns ``done``, in ``columns`` and from their diagonal down."""
    D = A[:, done, done].diagonal(dim1=-2, dim2=-1)
    right = A[:, columns, done] * D[:, None]
    A[:, columns.start :, columns].baddbmm_(A[:, columns.start :, done], right.mT, alpha=-1)


def factorize_shifted(G: Tensor, shift: Tensor) -> LDLT:
    """``G − shift I = L D Lᵀ`` for ``G (batch, n, n)``, which stays as it is, and ``shift (batch,)``."""
    A = torch.empty_like(G)
    for k in range(0, G.shape[-1], _BLOCK):
        A[:, k:, k : k + _BLOCK] = G[:, k:, k : k + _BLOCK]
    A.diagonal(dim1=-2, dim2=-1).sub_(shift[:, None])
    return factorize_(A)


def count_above(G: Tensor, threshold: Tensor, room: Tensor, seed: int = 0) -> Tensor:
    """The number of eigenvalues of each symmetric ``G (batch, n, n)`` that exceed ``threshold (batch,)``, by inertia.

    ``room (batch,)``: how far an error may move eigenvalues without harm. Where the bound on the unpivoted
    factorization's error is above that, the error is measured, and where that is too large as well Bunch and Kaufman's
    pivoted factorization counts instead.
    """
    factor = factorize_shifted(G, threshold)
    counts, unsure = factor.positive, ~(factor.error <= room)
    if bool(unsure.any()):
        x = probes(G, seed)
        unsure &= ~(probe_bound(G @ x - threshold[:, None, None] * x - factor.multiply(x)) <= room)
    del factor  # its memory is wanted again
    for i in torch.nonzero(unsure)[:, 0].tolist():
        counts[i] = count_above_pivoted(G[i], threshold[i])
    return counts


def count_above_pivoted(G: Tensor, threshold: Tensor | float) -> int:
    """The number of eigenvalues of one symmetric ``G (n, n)`` above ``threshold``, by Bunch and Kaufman's LDLᵀ."""
    A = G.clone()
    A.diagonal().sub_(threshold)
    LD, pivots, _ = torch.linalg.ldl_factor_ex(A)  # a pivot of exactly 0 is no error: it is not above
    # A negative pivot marks a row of a 2 × 2 block, which Bunch–Kaufman picks only where one eigenvalue is positive.
    positive = ((LD.diagonal() > 0) & (pivots > 0)).sum() + (pivots < 0).sum() // 2
    return int(positive)
