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
from typing import NamedTuple

import torch
from torch import Tensor

from ipca.svd.ldlt import count_above
from ipca.svd.matrix_batch import Counts, MatrixBatch
from ipca.svd.random_vectors import norm_bound, probes

_EPS = torch.finfo(torch.float64).eps


class Proof(NamedTuple):
    """The verdict on a window's indices, and the proof, or the reason why there is none, in words."""

    certified: bool
    words: str


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
    G: Tensor,
    S: Tensor,
    rho: Tensor,
    sigma1: Tensor,
    start: int,
    neighbors: Tensor | None = None,
    counts: Counts | None = None,
) -> list[Proof]:
    """Prove that ``S`` holds the singular values ``[start, start + r)`` of the matrices whose Gram matrices are ``G``.

    Args:
        G: ``(batch, n, n)``.
        S: ``(batch, r)``, descending.
        rho: ``(batch,)``, the residuals.
        sigma1: ``(batch,)``.
        start: the index that ``S[:, 0]`` claims to have.
        neighbors: ``(batch, 2)``, estimates of the values at ``start − 1`` and ``start + r``, none by default.
        counts: in place of factorizations of ``G``.
    """
    n, end = G.shape[-1], start + S.shape[1]
    if neighbors is None:
        neighbors = S.new_full((len(S), 2), torch.inf)
    errors = [0.0] * len(S) if counts is None else counts.error
    each = [x.tolist() for x in (S[:, 0], S[:, -1], rho, sigma1, neighbors)]
    x2, x2_room, y2, y2_room, too_low = ([] for _ in range(5))
    for first, last, off, largest, (before, behind), error in zip(*each, errors, strict=True):
        delta = max(4 * off, 1e-9 * largest)
        rounding = n * _EPS * largest**2 + error
        x2.append(max((first + delta) ** 2 + rounding, _toward(first, before)))
        x2_room.append(x2[-1] - (first + off) ** 2)
        y2.append(min((last - delta) ** 2 - rounding, _toward(last, behind)))
        y2_room.append((last - off) ** 2 - y2[-1])
        hidden = last <= delta or (last - delta) ** 2 <= 2 * rounding
        too_low.append(
            f"the window ends at {last / largest:.1e} of the largest singular value, too low to count" * hidden
        )

    def above(thresholds: list[float], room: list[float]) -> list[int]:
        if counts is not None:
            return counts.above(thresholds)
        return count_above(G, sigma1.new_tensor(thresholds), sigma1.new_tensor(room)).tolist()

    words: list[list[str]] = [[] for _ in S]
    failed = [""] * len(S)
    if start > 0:
        for i, count in enumerate(above(x2, x2_room)):
            words[i].append(f"{count} above")
            if count != start:
                failed[i] = f"{count} singular values lie above the window, not {start}"
    if end < n:
        for i, count in enumerate(above(y2, y2_room)):
            words[i].append(f"{count} through")
            wrong = f"{count} singular values lie above the window's end, not {end}" if count != end else ""
            failed[i] = failed[i] or too_low[i] or wrong
    proofs = ("inertia: " + (", ".join(w) or "every component") for w in words)
    return [Proof(not f, f or proof) for f, proof in zip(failed, proofs, strict=True)]


def certify_first(batch: MatrixBatch, G: Tensor, S: Tensor, V: Tensor, rho: Tensor, neighbor: Tensor) -> list[Proof]:
    """Prove the same for the windows ``[0, r)`` by one Cholesky factorization, in float32 where ``G`` is float32.

    If ``y² I − WᵀW + V diag(2 S²) Vᵀ`` is positive definite, at most ``r`` singular values reach ``y``, as the last
    term has rank ``r``; the residual says that at least ``r`` do if ``y <= S_last − ρ``. Here ``y²`` is moved down by
    what ``G`` can be off from ``WᵀW``, measured, and by the factorization's own error.

    Args:
        batch, G: the matrices, and ``WᵀW (batch, n, n)``.
        S, V: ``(batch, r)`` and ``(batch, n, r)``, the singular values and right singular vectors.
        rho: ``(batch,)``, the residuals.
        neighbor: ``(batch,)``, an estimate of the value at ``r``.
    """
    r, dtype = S.shape[1], G.dtype
    lowest = (S[:, -1] - torch.maximum(4 * rho, 1e-9 * batch.sigma1)).clamp_min(0).square()
    y2 = torch.minimum(lowest, (S[:, -1].square() + neighbor.square()) / 2)
    largest = y2 + 2 * S[:, 0].square()  # entry of M: its factorization is off by √n eps of it
    error = gram_error(batch, G) + G.shape[-1] ** 0.5 * torch.finfo(dtype).eps * largest
    M = torch.baddbmm(G, (V * (2 * S.square())[:, None]).to(dtype), V.mT.to(dtype), beta=-1)
    M.diagonal(dim1=-2, dim2=-1).add_((y2 - error).to(dtype)[:, None])
    definite = torch.linalg.cholesky_ex(M).info == 0
    return [
        Proof(True, f"inertia: {r} through")
        if proven
        else Proof(False, f"it is not proven that no more than {r} singular values reach the window's end")
        for proven in definite.tolist()
    ]


def gram_error(batch: MatrixBatch, G: Tensor) -> Tensor:
    """``(batch,)``: a bound on ``‖G − WᵀW‖₂`` by :func:`~ipca.svd.random_vectors.norm_bound`."""
    x = probes(G, batch.seed)
    product = torch.cat([rows.double() @ x for rows in G.split(512, dim=1)], dim=1)
    return norm_bound(product - batch.rmatmul(batch.matmul(x)))


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
