"""The dense paths: a window by an eigensolver of the Gram matrix, on a CPU one matrix at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ipca.svd import lapack
from ipca.svd.certificate import Solution, certify_counts, orthogonality, residual
from ipca.svd.eigensolvers import Eigensolver
from ipca.svd.krylov import rayleigh_ritz
from ipca.svd.matrix_batch import MatrixBatch

_DIRECT = 1e-2
"""Share of the tolerance up to which the residual and the orthogonality of ``U = W V / S`` need no Rayleigh–Ritz."""
_HALVED = 64
"""Columns from which half a product is faster than a whole one."""
_EPS = torch.finfo(torch.float64).eps


def tridiagonal(batch: MatrixBatch, window: range, tol: float) -> list[Solution | None]:
    """The windows by a tridiagonal reduction of ``WᵀW``."""
    batch.flops += 4 * batch.n**2 * len(window)
    return _solve("tridiagonal", batch, batch.tridiagonal, window, tol)


def gram_eigh(batch: MatrixBatch, window: range, tol: float) -> list[Solution | None]:
    """The windows by all eigenvectors of ``WᵀW``."""
    return _solve("gram_eigh", batch, batch.eigh, window, tol)


def _solve(
    path: str, batch: MatrixBatch, solvers: Sequence[Eigensolver], window: range, tol: float
) -> list[Solution | None]:
    batch.flops += 4 * batch.m * batch.n * len(window)
    return [_solve_one(path, batch.part([i]), solver, window, tol) for i, solver in enumerate(solvers)]


def _solve_one(path: str, batch: MatrixBatch, solver: Eigensolver, window: range, tol: float) -> Solution | None:
    V = solver.eigenvectors(window).mT[None]
    sigma1 = max(solver.largest(), 0.0) ** 0.5
    U, S, V, rho, skew = _direct(batch, V, sigma1, tol) or _by_rayleigh_ritz(batch, V)
    error = max(rho / sigma1, skew)
    if not error <= tol:
        return None  # no result that a proof would pay for
    proof = certify_counts(solver, S[0].tolist(), rho, sigma1, window.start, batch.n)
    return Solution(U[0], S[0], V[0], path, error, proof, batch.flops) if proof.certified else None


_Triplets = tuple[Tensor, Tensor, Tensor, float, float]
"""``U (1, m, r), S (1, r), V (1, n, r)``, the residual, and the distance from orthonormal columns."""


def _direct(batch: MatrixBatch, V: Tensor, sigma1: float, tol: float) -> _Triplets | None:
    """``U = W V / S`` for eigenvectors ``V`` of the Gram matrix; None where that is not good enough.

    Squaring loses digits: ``U_iᵀ U_j`` is off by ``eps σ₁² / (σ_i σ_j)``. Where that shows, the columns below a tenth
    of σ₁ are rotated by the eigenvectors of their own ``(W V)ᵀ W V``, whose largest value is that much smaller, then
    those below a tenth of the first of these, and so on. Frobenius norms bound the spectral ones.
    """
    X, largest, good = batch.matmul(V), sigma1, tol * _DIRECT
    while True:
        S = torch.linalg.vector_norm(X, dim=1)
        values = S[0].tolist()
        if values != sorted(values, reverse=True):  # equal to rounding
            S, order = S.sort(descending=True)
            X, V, values = X[..., order[0]], V[..., order[0]], S[0].tolist()
        if values[-1] > 0 and 4 * batch.n**0.5 * _EPS * (largest / values[-1]) ** 2 <= good:
            U = X / S
            rho = torch.linalg.vector_norm(batch.rmatmul(U).sub_(V * S)).item()
            skew = max(_distance_to_identity(U), _distance_to_identity(V))
            if rho <= good * sigma1 and skew <= good:
                return U, S, V, rho, skew
        first = sum(value > largest / 10 for value in values)
        if first == len(values) or values[first] == 0:
            return None
        head, tail = slice(first), slice(first, None)
        Q = torch.linalg.eigh(torch.bmm(X[..., tail].mT, X[..., tail]))[1].flip(-1).mT
        X, V = (torch.cat([A[..., head].mT, torch.bmm(Q, A[..., tail].mT)], dim=1).mT for A in (X, V))
        largest = values[first]


def _by_rayleigh_ritz(batch: MatrixBatch, V: Tensor) -> _Triplets:
    U, S, V, WV = rayleigh_ritz(batch, V)
    return U, S, V, residual(batch, U, S, V, WV).item(), orthogonality(U, V).item()


def _distance_to_identity(U: Tensor) -> float:
    """A bound on ``‖UᵀU − I‖_F`` for ``U (1, m, r)``, from one triangle where that is worth it."""
    r = U.shape[2]
    if r < _HALVED or not lapack.available("dsyrk"):
        X, factor = torch.bmm(U.mT, U)[0], 1.0
    else:
        X, factor = U.new_zeros(r, r), 2**0.5
        lapack.add_gram_(X, U[0])
    X.diagonal().sub_(1)
    return factor * torch.linalg.vector_norm(X).item()
