"""One window of a batch of tall matrices: the planned paths in turn, each judged, behind them the full SVD."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ipca.svd import certificate
from ipca.svd.blocks import Blocks, largest_entry
from ipca.svd.bottom import bottom
from ipca.svd.candidate import Candidate
from ipca.svd.certificate import Proof
from ipca.svd.dense import full_svd
from ipca.svd.interior import interior
from ipca.svd.orthonormal import orthonormalize
from ipca.svd.plan import plan
from ipca.svd.problem import MatrixBatch
from ipca.svd.range import lapack_range
from ipca.svd.top import top, uses_float32

PATHS: dict[str, Callable[[MatrixBatch, range, float], Candidate | None]] = {
    "top": top,
    "interior": interior,
    "bottom": bottom,
    "range": lapack_range,
}


@dataclass(frozen=True)
class Solution:
    """One matrix's window ``U (m, r), S (r,), V (n, r)`` in units of ``W / scale``, and how far it can be trusted."""

    U: Tensor
    S: Tensor
    V: Tensor
    path: str
    error: float
    proof: Proof
    flops: float


def solve(problem: MatrixBatch, window: range, tol: float) -> list[Solution]:
    """The window of every matrix of ``problem``; a path's result counts only where it is within ``tol`` and proven."""
    found: dict[int, Solution] = {}
    empty = (largest_entry(problem.blocks.W) == 0).tolist()
    for name in plan(problem.blocks.W.device.type, problem.m, problem.n, window):
        left = [i for i in range(len(problem.blocks)) if i not in found and not empty[i]]
        if not left:
            break
        for i, solution in zip(left, _attempt(name, problem.part(left), window, tol), strict=True):
            if solution is not None:
                found[i] = solution
    return [found[i] if i in found else _full(problem.part([i]), window) for i in range(len(problem.blocks))]


def _attempt(name: str, problem: MatrixBatch, window: range, tol: float) -> list[Solution | None]:
    """What one path finds; where that is not good enough, once more after polishing."""
    try:
        candidate = PATHS[name](problem, window, tol)
    except (torch.linalg.LinAlgError, np.linalg.LinAlgError):  # type: ignore[attr-defined]  # no convergence
        candidate = None
    if candidate is None:
        return [None] * len(problem.blocks)
    found = _judge(name, problem, window, tol, candidate.V, candidate.neighbors)
    if candidate.polish is None or all(found):
        return found
    again = _judge(name, problem, window, tol, candidate.polish(candidate.V), None)
    return [first or second for first, second in zip(found, again, strict=True)]


def _judge(
    name: str, problem: MatrixBatch, window: range, tol: float, V: Tensor, neighbors: Tensor | None
) -> list[Solution | None]:
    U, S, V, WV = rayleigh_ritz(problem.blocks, V)
    rho = certificate.residual(problem.blocks, U, S, V, WV)
    error = torch.maximum(rho / problem.sigma1, certificate.orthogonality(U, V))
    problem.flops += 4 * problem.m * problem.n * len(window)
    if not bool((error <= tol).any()):
        return [None] * len(problem.blocks)
    proofs = _prove(name, problem, window, tol, S, V, rho, neighbors)
    return [
        Solution(U[i], S[i], V[i], name, e, proof, problem.flops) if e <= tol and proof.certified else None
        for i, (e, proof) in enumerate(zip(error.tolist(), proofs, strict=True))
    ]


def _prove(
    name: str,
    problem: MatrixBatch,
    window: range,
    tol: float,
    S: Tensor,
    V: Tensor,
    rho: Tensor,
    neighbors: Tensor | None,
) -> list[Proof]:
    if name == "top" and window.start == 0 and neighbors is not None:
        G = problem.gram32 if uses_float32(problem, tol) else problem.gram
        problem.flops += problem.n**3 / 3
        return certificate.certify_first(problem.blocks, G, S, V, rho, problem.sigma1, neighbors[:, 1], problem.seed)
    problem.flops += ((window.start > 0) + (window.stop < problem.n)) * problem.n**3 / 3
    return certificate.certify(problem.gram, S, rho, problem.sigma1, window.start, neighbors)


def rayleigh_ritz(W: Blocks, V: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best ``U, S, V`` and their ``W V`` within the space that the orthonormal columns of ``V (batch, n, r)`` span.

    The Gram matrix squares the condition number, so that small singular values lose digits; this, on ``W`` itself,
    wins those of ``S`` and ``U`` back, and the residual shows what is left.
    """
    X = W.matmul(V)
    Q = orthonormalize(X)
    U, S, Rh = torch.linalg.svd(Q.mT @ X)
    return Q @ U, S, V @ Rh.mT, X @ Rh.mT


def _full(problem: MatrixBatch, window: range) -> Solution:
    U, S, V, spectrum = full_svd(problem, window)
    sigma1 = spectrum[0, 0].item()
    rho = certificate.residual(problem.blocks, U, S, V).item()
    error = max(rho / sigma1 if sigma1 > 0 else 0.0, certificate.orthogonality(U, V).item())
    proof = certificate.certify_full(spectrum[0], window.start, len(window), problem.n, problem.m)
    return Solution(U[0], S[0], V[0], "full", error, proof, problem.flops)
