"""Proof that components are those of the window: a residual for the vectors, two inertia counts for the indices.

By Sylvester's law of inertia the number of positive pivots of an LDLᵀ factorization of ``WᵀW − x² I`` is the number
of singular values above ``x``. Let ρ be the residual of a window ``[s, s + r)``. Orthonormal vectors with residual ρ
belong to ``r`` distinct singular values within ρ of ``S`` (Kahan). So any two thresholds outside of these prove it,

    x ≥ S_first + δ,   #(σ > x) = s        and        y ≤ S_last − δ,   #(σ > y) = s + r,      δ = max(4ρ, 1e-9 σ₁),

as ``r`` of the ``s + r`` values above ``y`` are the window's and ``s`` lie above it. A count at an end of the spectrum
(s = 0, s + r = d) is not needed.

Where a path estimates the window's neighbors, the thresholds lie a quarter of the way toward them, and never nearer to
the window than ``n eps σ₁²``, the rounding error of the Gram matrix; a factorization whose own error could reach the
window does not count. So a window that cuts a tie, or lies so low that these errors hide it, is never proven by
accident: it is left uncertified.

A path that reduces the Gram matrix to a tridiagonal one ``T``, or knows all its eigenvalues, counts on these. By Weyl's
inequality an eigenvalue moves by no more than the distance of ``T`` from the Gram matrix, so the thresholds move away
from the window by that distance as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ipca.svd.eigensolvers import Eigensolver
from ipca.svd.krylov import gram_operator, in_single_precision
from ipca.svd.lanczos import CHAINS, norm_bound, norm_bound_steps
from ipca.svd.ldlt import count_above
from ipca.svd.matrix_batch import MatrixBatch
from ipca.svd.random_vectors import probe_bound, probes

_EPS = torch.finfo(torch.float64).eps
_SLACK = 1e-4
"""For rounding in float32, relative to a norm."""
_PRODUCTS = 4
"""Share of ``n`` columns, as a divisor, whose products cost about what a Gram matrix and its factorization do."""


class Proof(NamedTuple):
    """The verdict on a window's indices, and the proof, or the reason why there is none, in words."""

    certified: bool
    words: str


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


def residual(batch: MatrixBatch, U: Tensor, S: Tensor, V: Tensor, WV: Tensor | None = None) -> Tensor:
    """``max(‖W V − U S‖₂, ‖Wᵀ U − V S‖₂)`` for each matrix of a batch, in units of ``W / scale``.

    ``WV`` is the product ``W V`` where it is known already.
    """
    right = (batch.matmul(V) if WV is None else WV) - U * S[:, None]
    left = batch.rmatmul(U) - V * S[:, None]
    return torch.maximum(_spectral_norm(right), _spectral_norm(left))


def orthogonality(U: Tensor, V: Tensor) -> Tensor:
    """``max(‖UᵀU − I‖₂, ‖VᵀV − I‖₂)`` for each matrix of a batch."""
    eye = torch.eye(U.shape[-1], dtype=U.dtype, device=U.device)
    return torch.maximum(_spectral_norm(U.mT @ U - eye), _spectral_norm(V.mT @ V - eye))


def certify(
    G: Tensor, S: Tensor, rho: Tensor, sigma1: Tensor, start: int, neighbors: Tensor | None = None
) -> list[Proof]:
    """Prove that ``S`` holds the singular values ``[start, start + r)`` of the matrices whose Gram matrices are ``G``.

    Args:
        G: ``(batch, n, n)``.
        S: ``(batch, r)``, descending.
        rho: ``(batch,)``, the residuals.
        sigma1: ``(batch,)``.
        start: the index that ``S[:, 0]`` claims to have.
        neighbors: ``(batch, 2)``, estimates of the values at ``start − 1`` and ``start + r``, none by default.
    """
    n, end = G.shape[-1], start + S.shape[1]
    if neighbors is None:
        neighbors = S.new_full((len(S), 2), torch.inf)
    each = [x.tolist() for x in (S[:, 0], S[:, -1], rho, sigma1, neighbors)]
    edges = [
        _edges(first, last, off, largest, n * _EPS * largest**2, before, behind)
        for first, last, off, largest, (before, behind) in zip(*each, strict=True)
    ]

    def count(thresholds: list[float], room: list[float]) -> list[int]:
        return count_above(G, sigma1.new_tensor(thresholds), sigma1.new_tensor(room)).tolist()

    above: Sequence[int | None] = [None] * len(S)
    through = above
    if start > 0:
        above = count(
            [e.upper for e in edges],
            [e.upper - (f + off) ** 2 for e, f, off in zip(edges, each[0], each[2], strict=True)],
        )
    if end < n:
        through = count(
            [e.lower for e in edges],
            [(f - off) ** 2 - e.lower for e, f, off in zip(edges, each[1], each[2], strict=True)],
        )
    return [_verdict(range(start, end), *found) for found in zip(edges, above, through, strict=True)]


def certify_counts(solver: Eigensolver, values: list[float], rho: float, sigma1: float, start: int, n: int) -> Proof:
    """Prove the same of one matrix by the counts of an eigensolver of its Gram matrix.

    Args:
        solver: of ``WᵀW (n, n)``.
        values: the ``r`` singular values, descending.
        rho, sigma1, start: as in :func:`certify`.
        n: the length of the spectrum.
    """
    end = start + len(values)
    edges = _edges(values[0], values[-1], rho, sigma1, n * _EPS * sigma1**2 + solver.error)
    above = solver.count_above(edges.upper) if start > 0 else None
    through = solver.count_above(edges.lower) if end < n else None
    return _verdict(range(start, end), edges, above, through)


class _Edges(NamedTuple):
    """Thresholds on either side of a window, in squares, and whether rounding hides the lower one."""

    upper: float
    lower: float
    hidden: str


def _edges(
    first: float,
    last: float,
    rho: float,
    sigma1: float,
    rounding: float,
    before: float = math.inf,
    behind: float = math.inf,
) -> _Edges:
    """For a window from ``first`` down to ``last``, between the estimated neighbors ``before`` and ``behind``."""
    delta = max(4 * rho, 1e-9 * sigma1)
    hidden = last <= delta or (last - delta) ** 2 <= 2 * rounding
    return _Edges(
        max((first + delta) ** 2 + rounding, _toward(first, before)),
        min((last - delta) ** 2 - rounding, _toward(last, behind)),
        f"the window ends at {last / sigma1:.1e} of the largest singular value, too low to count" * hidden,
    )


def _verdict(window: range, edges: _Edges, above: int | None, through: int | None) -> Proof:
    """The proof from the counts at the two thresholds, None at an end of the spectrum."""
    if above not in (None, window.start):
        return Proof(False, f"{above} singular values lie above the window, not {window.start}")
    if through is not None and edges.hidden:
        return Proof(False, edges.hidden)
    if through not in (None, window.stop):
        return Proof(False, f"{through} singular values lie above the window's end, not {window.stop}")
    words = [f"{above} above"] * (above is not None) + [f"{through} through"] * (through is not None)
    return Proof(True, "inertia: " + (", ".join(words) or "every component"))


def certify_first(batch: MatrixBatch, S: Tensor, V: Tensor, rho: Tensor, neighbor: Tensor, tol: float) -> list[Proof]:
    """Prove the same for the windows ``[0, r)``: at most ``r`` singular values reach the window's end.

    Where a gap lies behind the window, by a bound on ``‖W − W V Vᵀ‖₂``, see :func:`_norm_behind`. Else by one Cholesky
    factorization, in float32 where ``tol`` is above its rounding: if ``y² I − WᵀW + V diag(2 S²) Vᵀ`` is positive
    definite, at most ``r`` singular values reach ``y``, as the last term has rank ``r``. Here ``y²`` is moved down by
    what the Gram matrix can be off from ``WᵀW``, measured, and by the factorization's own error. The residual says that
    at least ``r`` values reach ``y`` if ``y <= S_last − ρ``.

    Args:
        batch: the matrices.
        S, V: ``(batch, r)`` and ``(batch, n, r)``, the singular values and right singular vectors.
        rho: ``(batch,)``, the residuals.
        neighbor: ``(batch,)``, an estimate of the value at ``r``.
        tol: of the window.
    """
    r, single = S.shape[1], in_single_precision(batch, tol)
    lowest = (S[:, -1] - torch.maximum(4 * rho, 1e-9 * batch.sigma1)).clamp_min(0)
    if single and bool((_norm_behind(batch, V, neighbor, lowest) <= lowest).all()):
        return [Proof(True, f"norm of what lies behind the window: {r} through")] * len(S)
    batch.flops += batch.n**3 / 3
    G = batch.gram32 if single else batch.gram
    y2 = torch.minimum(lowest.square(), (S[:, -1].square() + neighbor.square()) / 2)
    largest = y2 + 2 * S[:, 0].square()  # entry of M: its factorization is off by √n eps of it
    error = gram_error(batch, G) + G.shape[-1] ** 0.5 * torch.finfo(G.dtype).eps * largest
    M = torch.baddbmm(G, (V * (2 * S.square())[:, None]).to(G.dtype), V.mT.to(G.dtype), beta=-1)
    M.diagonal(dim1=-2, dim2=-1).add_((y2 - error).to(G.dtype)[:, None])
    return [
        Proof(True, f"inertia: {r} through")
        if definite
        else Proof(False, f"it is not proven that no more than {r} singular values reach the window's end")
        for definite in (torch.linalg.cholesky_ex(M).info == 0).tolist()
    ]


def _norm_behind(batch: MatrixBatch, V: Tensor, neighbor: Tensor, limit: Tensor) -> Tensor:
    """``(batch,)``: a bound on ``‖W − W V Vᵀ‖₂``, and so on the singular value at ``r``, as ``W V Vᵀ`` has rank ``r``.

    By :func:`~ipca.svd.lanczos.norm_bound`, with as many steps as can show it below ``limit`` where ``neighbor``, an
    estimate, is right. Infinity where that takes more products than a Gram matrix and its factorization cost.
    """
    room = 1 - ((1 + _SLACK) * neighbor / limit).square().amax().item()
    steps = norm_bound_steps(batch.n, 0.9 * room) if room > 0 else batch.n
    if steps * CHAINS > batch.n / _PRODUCTS:
        return torch.full_like(limit, torch.inf)
    W, P = batch.single, V.float()
    gram = gram_operator(W)

    def multiply(rows: Tensor) -> Tensor:
        X = gram(rows.mT - P @ (rows @ P).mT)
        return (X - P @ (P.mT @ X)).mT

    batch.flops += 4 * batch.m * batch.n * CHAINS * steps
    bound = norm_bound(multiply, W, steps, batch.seed).sqrt() * (1 + _SLACK)
    if batch.W.dtype == torch.float64:  # rounded to float32
        bound += torch.finfo(W.dtype).eps * torch.linalg.matrix_norm(W)
    return bound


def gram_error(batch: MatrixBatch, G: Tensor) -> Tensor:
    """``(batch,)``: a bound on ``‖G − WᵀW‖₂`` by :func:`~ipca.svd.random_vectors.probe_bound`."""
    x = probes(G, batch.seed)
    product = torch.cat([rows.double() @ x for rows in G.split(512, dim=1)], dim=1)
    return probe_bound(product - batch.rmatmul(batch.matmul(x)))


def certify_full(spectrum: Tensor, start: int, rank: int, d: int, m: int) -> Proof:
    """The proof after a full SVD: the order of its values, unless the window's edge cuts a tie.

    ``m`` is the larger side of the matrix; singular values closer than ``m eps σ₁`` cannot be told apart.
    """
    smallest = m * _EPS * spectrum[0].item()
    for edge in (start, start + rank):
        if 0 < edge < d and (spectrum[edge - 1] - spectrum[edge]).item() <= smallest:
            return Proof(False, f"the window's edge at index {edge} cuts a tie: its components are not unique")
    return Proof(True, "full SVD: no tie at the window's edges")


def _toward(edge: float, neighbor: float) -> float:
    """A quarter of the way from ``edge`` to ``neighbor``, in squares; ``edge`` where the neighbor is unknown.

    Away from the window, as a factorization near one of its values loses digits. Not halfway, as a neighbor's Ritz
    value that has not converged may be too far away: a quarter leaves the true one three quarters to be nearer.
    """
    return edge**2 + (neighbor**2 - edge**2) / 4 if math.isfinite(neighbor) else edge**2


def _spectral_norm(X: Tensor) -> Tensor:
    """``‖X‖₂`` of each matrix; scaled, as the small numbers here would vanish when squared."""
    largest = X.abs().amax((1, 2), keepdim=True)
    Y = X / torch.where(largest > 0, largest, 1)
    return torch.linalg.eigvalsh(Y.mT @ Y)[:, -1].clamp_min(0).sqrt() * largest[:, 0, 0]
