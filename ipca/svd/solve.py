"""Path selection: which algorithms are tried for a window, and how their results are accepted.

An iteration proposes right singular vectors. They count where, after Rayleigh–Ritz on ``W`` itself, the residual is
within the tolerance and the certificate proves the indices; the dense paths judge their own results so. What no path
gets accepted is left to the full SVD.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ipca.svd import certificate
from ipca.svd.certificate import Solution
from ipca.svd.dense import gram_eigh, tridiagonal
from ipca.svd.eigensolvers import tridiagonal_available
from ipca.svd.krylov import rayleigh_ritz, top
from ipca.svd.matrix_batch import Candidate, MatrixBatch
from ipca.svd.shift_invert import bottom, interior


def full_svd(batch: MatrixBatch, window: range) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``U (batch, m, r), S (batch, r), V (batch, n, r)`` of the window, and the whole spectra ``(batch, n)``.

    For small matrices, wide windows, ties and null spaces. Needs about eight times the matrix in float64 while it runs.
    """
    U, S, Vh = torch.linalg.svd(batch.dense(), full_matrices=False)
    batch.flops += 4 * batch.m * batch.n**2 + 22 * batch.n**3
    part = slice(window.start, window.stop)
    return U[..., part].clone(), S[:, part].clone(), Vh[:, part].mT.clone(), S


ITERATIONS: dict[str, Callable[[MatrixBatch, range, float], Candidate | None]] = {
    "top": top,
    "interior": interior,
    "bottom": bottom,
}
DENSE: dict[str, Callable[[MatrixBatch, range, float], list[Solution | None]]] = {
    "tridiagonal": tridiagonal,
    "gram_eigh": gram_eigh,
}


@dataclass(frozen=True)
class Thresholds:
    """Sizes at which the paths of a class of devices meet.

    Attributes:
        top_from: smallest ``d`` for block Krylov at the start of the spectrum, of a square matrix; √(m / d) times this
            of a taller one.
        top_share: the share of ``d`` before which such a window ends.
        interior_from: smallest ``d`` for inverse block Krylov inside the spectrum.
        bottom_from: the same at the end of the spectrum.
        bottom_aspect: the largest m / d there; the spectrum of a taller matrix ends far from the shift 0.
        interior_share: the largest rank for these, as a share of ``d``.
        tridiagonal_from: smallest ``d`` for the tridiagonal path, below which all eigenvectors of the Gram matrix are
            found at once; None where neither is there.
        tridiagonal_narrow_from: the ``d`` from which it is faster for the narrowest windows, and for one component more
            with every two rows.
    """

    top_from: int
    top_share: float
    interior_from: int
    bottom_from: int
    bottom_aspect: float
    interior_share: float
    tridiagonal_from: int | None
    tridiagonal_narrow_from: int


THRESHOLDS = {
    # From timings of every path at d from 64 to 3072 on one core; bench/bench_window_svd.py forces each path again.
    "cpu": Thresholds(768, 1 / 32, 3072, 2048, 1.2, 1 / 8, 192, 112),
    # Not measured: an operation count, and the launches that a small matrix cannot pay for.
    "cuda": Thresholds(256, 1 / 32, 256, 256, 1.2, 1 / 4, None, 0),
}


def plan(device_type: str, m: int, d: int, window: range) -> list[str]:
    """The paths to try in turn for an ``(m, d)`` matrix, ``m >= d``, before the full SVD."""
    limits, rank = THRESHOLDS[device_type], len(window)
    paths = []
    narrow = rank <= limits.interior_share * d
    if d >= limits.top_from * math.sqrt(m / d) and window.stop <= limits.top_share * d:
        paths.append("top")
    elif narrow and window.stop == d and d >= limits.bottom_from and m <= limits.bottom_aspect * d:
        paths.append("bottom")
    if narrow and d >= limits.interior_from and (paths != ["top"] or limits.tridiagonal_from is None):
        paths.append("interior")
    if limits.tridiagonal_from is not None:
        reduced = d >= limits.tridiagonal_from or 2 * rank <= d - limits.tridiagonal_narrow_from
        paths.append("tridiagonal" if reduced and tridiagonal_available() else "gram_eigh")
    return paths


def solve_window(batch: MatrixBatch, window: range, tol: float) -> list[Solution]:
    """The window of every matrix: of the first path that is accepted for it, else of the full SVD."""
    found: dict[int, Solution] = {}
    left = [i for i, largest in enumerate(batch.largest.tolist()) if largest > 0]
    for path in plan(batch.W.device.type, batch.m, batch.n, window):
        if not left:
            break
        try:
            solutions = (DENSE.get(path) or partial(_iterate, path))(batch.part(left), window, tol)
        except (torch.linalg.LinAlgError, np.linalg.LinAlgError):  # type: ignore[attr-defined]  # no convergence
            continue
        found.update((i, one) for i, one in zip(left, solutions, strict=True) if one is not None)
        left = [i for i in left if i not in found]
    return [found[i] if i in found else _solve_fully(batch.part([i]), window) for i in range(batch.size)]


def _iterate(path: str, batch: MatrixBatch, window: range, tol: float) -> list[Solution | None]:
    """The accepted results of an iteration; where there are others, they are polished and judged once more."""
    candidate = ITERATIONS[path](batch, window, tol)
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
    batch.flops += 4 * batch.m * batch.n * len(window)
    U, S, V, WV = rayleigh_ritz(batch, candidate.V)
    rho = certificate.residual(batch, U, S, V, WV)
    errors = torch.maximum(rho / batch.sigma1, certificate.orthogonality(U, V)).tolist()
    if not min(errors) <= tol:
        return [None] * batch.size  # no result that a proof would pay for
    if path == "top" and window.start == 0 and candidate.neighbors is not None:
        proofs = certificate.certify_first(batch, S, V, rho, candidate.neighbors[:, 1], tol)
    else:
        batch.flops += ((window.start > 0) + (window.stop < batch.n)) * batch.n**3 / 3
        proofs = certificate.certify(batch.gram, S, rho, batch.sigma1, window.start, candidate.neighbors)
    return [
        Solution(U[i], S[i], V[i], path, e, proof, batch.flops) if e <= tol and proof.certified else None
        for i, (e, proof) in enumerate(zip(errors, proofs, strict=True))
    ]


def _solve_fully(batch: MatrixBatch, window: range) -> Solution:
    """The window of one matrix by the full SVD."""
    U, S, V, spectrum = full_svd(batch, window)
    sigma1 = spectrum[0, 0].item()
    rho = certificate.residual(batch, U, S, V).item()
    error = max(rho / sigma1 if sigma1 > 0 else 0.0, certificate.orthogonality(U, V).item())
    proof = certificate.certify_full(spectrum[0], window.start, len(window), batch.n, batch.m)
    return Solution(U[0], S[0], V[0], "full", error, proof, batch.flops)
