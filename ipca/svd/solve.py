"""Path selection: which algorithms are tried for a window, and how their results are accepted.

A path proposes right singular vectors. They count where, after Rayleigh–Ritz on ``W`` itself, the residual is within
the tolerance and the certificate proves the indices. What no path gets accepted is left to the full SVD.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ipca.svd import certificate
from ipca.svd.certificate import Proof
from ipca.svd.dense import gram_eigh, tridiagonal
from ipca.svd.krylov import orthonormalize, top, top_gram
from ipca.svd.matrix_batch import Candidate, MatrixBatch
from ipca.svd.shift_invert import bottom, interior
from ipca.svd.tridiagonal import available

_DIRECT = 1e-10
"""Residual and orthogonality up to which ``U = W V / S`` is as good as Rayleigh–Ritz would make it."""


def full_svd(batch: MatrixBatch, window: range) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``U (batch, m, r), S (batch, r), V (batch, n, r)`` of the window, and the whole spectra ``(batch, n)``.

    For small matrices, wide windows, ties and null spaces. Needs about eight times the matrix in float64 while it runs.
    """
    U, S, Vh = torch.linalg.svd(batch.dense(), full_matrices=False)
    batch.flops += 4 * batch.m * batch.n**2 + 22 * batch.n**3
    part = slice(window.start, window.stop)
    return U[..., part].clone(), S[:, part].clone(), Vh[:, part].mT.clone(), S


PATHS: dict[str, Callable[[MatrixBatch, range, float], Candidate | None]] = {
    "top": top,
    "interior": interior,
    "bottom": bottom,
    "tridiagonal": tridiagonal,
    "gram_eigh": gram_eigh,
}


@dataclass(frozen=True)
class Thresholds:
    """Sizes at which the paths of a class of devices meet.

    Attributes:
        top_from: smallest ``d`` for block Krylov at the start of the spectrum.
        top_share: the share of ``d`` before which such a window ends.
        interior_from: smallest ``d`` for inverse block Krylov inside the spectrum.
        bottom_from: the same at the end of the spectrum.
        bottom_aspect: the largest m / d there; the spectrum of a taller matrix ends far from the shift 0.
        interior_share: the largest rank for these, as a share of ``d``.
        tridiagonal_from: smallest ``d`` for the tridiagonal path, below which all eigenvectors of the Gram matrix are
            found at once; None where neither is there.
    """

    top_from: int
    top_share: float
    interior_from: int
    bottom_from: int
    bottom_aspect: float
    interior_share: float
    tridiagonal_from: int | None


THRESHOLDS = {
    # From timings of every path at d from 64 to 3072 on one core; bench/bench_window_svd.py forces each path again.
    "cpu": Thresholds(768, 1 / 32, 3072, 2048, 1.2, 1 / 8, 192),
    # Not measured: an operation count, and the launches that a small matrix cannot pay for.
    "cuda": Thresholds(256, 1 / 32, 256, 256, 1.2, 1 / 4, None),
}


def plan(device_type: str, m: int, d: int, window: range) -> list[str]:
    """The paths to try in turn for an ``(m, d)`` matrix, ``m >= d``, before the full SVD."""
    limits, rank = THRESHOLDS[device_type], len(window)
    paths = []
    narrow = rank <= limits.interior_share * d
    if d >= limits.top_from and window.stop <= limits.top_share * d:
        paths.append("top")
    elif narrow and window.stop == d and d >= limits.bottom_from and m <= limits.bottom_aspect * d:
        paths.append("bottom")
    if narrow and d >= limits.interior_from:
        paths.append("interior")
    if limits.tridiagonal_from is not None:
        paths.append("tridiagonal" if d >= limits.tridiagonal_from and available() else "gram_eigh")
    return paths


@dataclass(frozen=True)
class Solution:
    """One matrix's window ``U (m, r), S (r,), V (n, r)`` in units of ``W / scale``, its error, and its proof."""

    U: Tensor
    S: Tensor
    V: Tensor
    path: str
    error: float
    proof: Proof
    flops: float


def solve_window(batch: MatrixBatch, window: range, tol: float) -> list[Solution]:
    """The window of every matrix: of the first path that is accepted for it, else of the full SVD."""
    found: dict[int, Solution] = {}
    zero = (batch.largest == 0).tolist()
    for path in plan(batch.W.device.type, batch.m, batch.n, window):
        left = [i for i in range(batch.size) if i not in found and not zero[i]]
        if not left:
            break
        for i, solution in zip(left, _try_path(path, batch.part(left), window, tol), strict=True):
            if solution is not None:
                found[i] = solution
    return [found[i] if i in found else _solve_fully(batch.part([i]), window) for i in range(batch.size)]


def _try_path(path: str, batch: MatrixBatch, window: range, tol: float) -> list[Solution | None]:
    """The accepted results of one path; where there are others, they are polished and judged once more."""
    try:
        candidate = PATHS[path](batch, window, tol)
    except (torch.linalg.LinAlgError, np.linalg.LinAlgError):  # type: ignore[attr-defined]  # no convergence
        candidate = None
    if candidate is None:
        return [None] * batch.size
    found = _judge(path, batch, window, tol, candidate)
    if candidate.polish is None or all(found):
        return found
    polished = Candidate(candidate.polish(candidate.V), neighbors=None)
    again = _judge(path, batch, window, tol, polished)
    return [first or second for first, second in zip(found, again, strict=True)]


def _judge(path: str, batch: MatrixBatch, window: range, tol: float, candidate: Candidate) -> list[Solution | None]:
    """The solutions within ``tol`` and proven, None for the other matrices."""
    U, S, V, rho, orthogonality = _triplets(batch, candidate)
    errors = torch.maximum(rho / batch.sigma1, orthogonality).tolist()
    if not min(errors) <= tol:
        return [None] * batch.size  # no result that a proof would pay for
    if path == "top" and window.start == 0 and candidate.neighbors is not None:
        batch.flops += batch.n**3 / 3
        G = top_gram(batch, tol)
        proofs = certificate.certify_first(batch, G, S, V, rho, candidate.neighbors[:, 1])
    else:
        if candidate.counts is None:
            batch.flops += ((window.start > 0) + (window.stop < batch.n)) * batch.n**3 / 3
        proofs = certificate.certify(
            batch.gram, S, rho, batch.sigma1, window.start, candidate.neighbors, candidate.counts
        )
    return [
        Solution(U[i], S[i], V[i], path, e, proof, batch.flops) if e <= tol and proof.certified else None
        for i, (e, proof) in enumerate(zip(errors, proofs, strict=True))
    ]


def _triplets(batch: MatrixBatch, candidate: Candidate) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``U, S, V`` on the space of the candidate, their residuals and their orthogonality ``(batch,)``.

    Vectors that are good to rounding need no Rayleigh–Ritz: ``U = W V / S``. Where that leaves too much, as small
    values lose digits in the Gram matrix, those of ``(W V)ᵀ W V`` on the window's own scale come first. Frobenius norms
    bound the spectral ones.
    """
    V = candidate.V
    batch.flops += 4 * batch.m * batch.n * V.shape[-1]
    if candidate.counts is not None:
        X = batch.matmul(V)
        for rotated in (False, True):
            if rotated:
                Q = torch.linalg.eigh(torch.bmm(X.mT, X))[1].flip(-1)
                X, V = torch.bmm(X, Q), torch.bmm(V, Q)
            S = torch.linalg.vector_norm(X, dim=1)
            if not all(row == sorted(row, reverse=True) for row in S.tolist()):
                continue
            U = X / S[:, None]
            rho = torch.linalg.vector_norm(batch.rmatmul(U) - V * S[:, None], dim=(1, 2))
            orthogonality = torch.maximum(_skew(U), _skew(V))
            if bool((torch.maximum(rho / batch.sigma1, orthogonality) <= _DIRECT).all()):  # False where S holds 0
                return U, S, V, rho, orthogonality
    U, S, V, WV = rayleigh_ritz(batch, candidate.V)
    return U, S, V, certificate.residual(batch, U, S, V, WV), certificate.orthogonality(U, V)


def _skew(U: Tensor) -> Tensor:
    """``‖UᵀU − I‖_F`` for each matrix of a batch."""
    X = torch.bmm(U.mT, U)
    X.diagonal(dim1=-2, dim2=-1).sub_(1)
    return torch.linalg.vector_norm(X, dim=(1, 2))


def rayleigh_ritz(batch: MatrixBatch, V: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best ``U, S, V`` and their ``W V`` within the space that the orthonormal columns of ``V (batch, n, r)`` span.

    On ``W`` itself: the Gram matrix squares the condition number, so that small singular values lose digits. This wins
    those of ``S`` and ``U`` back, and the residual shows what is left.
    """
    X = batch.matmul(V)
    Q = orthonormalize(X)
    U, S, Rh = torch.linalg.svd(Q.mT @ X)
    return Q @ U, S, V @ Rh.mT, X @ Rh.mT


def _solve_fully(batch: MatrixBatch, window: range) -> Solution:
    """The window of one matrix by the full SVD."""
    U, S, V, spectrum = full_svd(batch, window)
    sigma1 = spectrum[0, 0].item()
    rho = certificate.residual(batch, U, S, V).item()
    error = max(rho / sigma1 if sigma1 > 0 else 0.0, certificate.orthogonality(U, V).item())
    proof = certificate.certify_full(spectrum[0], window.start, len(window), batch.n, batch.m)
    return Solution(U[0], S[0], V[0], "full", error, proof, batch.flops)
