"""Are these the components they claim to be? The residual bounds the vectors, two inertia counts prove the indices.

By Sylvester's law of inertia the number of positive pivots of an LDLᵀ factorization of ``WᵀW − x² I`` is the number
of singular values above ``x``. Let ρ be the residual of a window ``[s, s + r)``. Orthonormal vectors with residual ρ
belong to ``r`` distinct singular values within ρ of ``S`` (Kahan). So any two thresholds outside of these prove it,

    x ≥ S_first + δ,   #(σ > x) = s        and        y ≤ S_last − δ,   #(σ > y) = s + r,      δ = max(4ρ, 1e-9 σ₁),

as ``r`` of the ``s + r`` values above ``y`` are the window's and ``s`` lie above it. A count at an end of the spectrum
(s = 0, s + r = d) is not needed.

Where a path says how far the window's neighbors are, the thresholds lie a quarter of the way toward them, and never
nearer to the window than ``n eps σ₁²``, the rounding error of the Gram matrix; a factorization whose own error could
reach the window does not count. So a window that cuts a tie, or lies so low that these errors hide it, is never proven
by accident: it is left uncertified.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ipca.svd.blocks import Blocks
from ipca.svd.ldlt import factorize_shifted
from ipca.svd.random_vectors import PROBES, normal

_EPS = torch.finfo(torch.float64).eps
_PROBES = 16


class Proof(NamedTuple):
    """Whether a window's indices are proven, and the proof or the reason in words."""

    certified: bool
    words: str


def residual(W: Blocks, U: Tensor, S: Tensor, V: Tensor, WV: Tensor | None = None) -> Tensor:
    """``max(‖W V − U S‖₂, ‖Wᵀ U − V S‖₂)`` for each matrix of a batch, in units of ``W / scale``.

    ``WV`` is the product ``W V`` where it is known already.
    """
    right = (W.matmul(V) if WV is None else WV) - U * S[:, None]
    left = W.rmatmul(U) - V * S[:, None]
    return torch.maximum(_spectral_norm(right), _spectral_norm(left))


def orthogonality(U: Tensor, V: Tensor) -> Tensor:
    """``max(‖UᵀU − I‖₂, ‖VᵀV − I‖₂)`` for each matrix of a batch."""
    eye = torch.eye(U.shape[-1], dtype=U.dtype, device=U.device)
    return torch.maximum(_spectral_norm(U.mT @ U - eye), _spectral_norm(V.mT @ V - eye))


def count_above(G: Tensor, threshold: Tensor, room: Tensor, seed: int = 0) -> Tensor:
    """How many eigenvalues of each symmetric ``G (batch, n, n)`` exceed ``threshold (batch,)``.

    ``room (batch,)``: how far an error may move eigenvalues without harm. Where the bound on the unpivoted
    factorization's error is above that, the error is measured, and where it is too large indeed Bunch and Kaufman's
    pivoting counts again.
    """
    factor = factorize_shifted(G, threshold)
    counts, unsure = factor.positive, ~(factor.error <= room)
    if bool(unsure.any()):
        x = probes(G, seed)
        unsure &= ~(norm_bound(G @ x - threshold[:, None, None] * x - factor.multiply(x)) <= room)
    del factor  # its memory is wanted again
    for i in torch.nonzero(unsure)[:, 0].tolist():
        counts[i] = count_above_pivoted(G[i], threshold[i])
    return counts


def count_above_pivoted(G: Tensor, threshold: Tensor | float) -> int:
    """How many eigenvalues of one symmetric ``G (n, n)`` exceed ``threshold``, by Bunch and Kaufman's LDLᵀ."""
    A = G.clone()
    A.diagonal().sub_(threshold)
    LD, pivots, _ = torch.linalg.ldl_factor_ex(A)  # a pivot of exactly 0 is no error: it is not above
    # A negative pivot marks a row of a 2 × 2 block, which Bunch–Kaufman picks only where one eigenvalue is positive.
    positive = ((LD.diagonal() > 0) & (pivots > 0)).sum() + (pivots < 0).sum() // 2
    return int(positive)


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
    delta = torch.maximum(4 * rho, 1e-9 * sigma1)
    rounding = n * _EPS * sigma1.square()
    words: list[list[str]] = [[] for _ in S]
    failed: list[str | None] = [None for _ in S]
    if start > 0:
        nearest = (S[:, 0] + delta).square() + rounding
        x2 = nearest if neighbors is None else torch.maximum(nearest, _towards(S[:, 0], neighbors[:, 0]))
        counts = count_above(G, x2, room=x2 - (S[:, 0] + rho).square())
        for i, count in enumerate(counts.tolist()):
            words[i].append(f"{count} above")
            if count != start:
                failed[i] = f"{count} singular values lie above the window, not {start}"
    if end < n:
        low = S[:, -1] - delta
        nearest = low.square() - rounding
        y2 = nearest if neighbors is None else torch.minimum(nearest, _towards(S[:, -1], neighbors[:, 1]))
        hidden = (low <= 0) | (low.square() <= 2 * rounding)
        counts = count_above(G, y2, room=(S[:, -1] - rho).square() - y2)
        for i, (count, too_low) in enumerate(zip(counts.tolist(), hidden.tolist(), strict=True)):
            words[i].append(f"{count} through")
            if too_low and failed[i] is None:
                level = (S[i, -1] / sigma1[i]).item()
                failed[i] = f"the window ends at {level:.1e} of the largest singular value, too low to count"
            elif count != end and failed[i] is None:
                failed[i] = f"{count} singular values lie above the window's end, not {end}"
    proofs = [Proof(True, "inertia: " + (", ".join(w) or "every component")) for w in words]
    return [proof if f is None else Proof(False, f) for proof, f in zip(proofs, failed, strict=True)]


def certify_first(
    W: Blocks, G: Tensor, S: Tensor, V: Tensor, rho: Tensor, sigma1: Tensor, neighbor: Tensor, seed: int
) -> list[Proof]:
    """The same for the windows ``[0, r)``, by one Cholesky factorization, and in float32 where ``G`` is float32.

    If ``y² I − WᵀW + V diag(2 S²) Vᵀ`` is positive definite, at most ``r`` singular values reach ``y``, as the last
    term has rank ``r``; the residual says that at least ``r`` do if ``y <= S_last − ρ``. Here ``y²`` is moved down by
    what ``G`` can be off from ``WᵀW``, measured, and by the factorization's own error.

    Args:
        W, G: the matrices, and ``WᵀW (batch, n, n)``.
        V: ``(batch, n, r)``, the right singular vectors.
        neighbor: ``(batch,)``, an estimate of the value at ``r``.
        seed: of the random vectors that ``G`` is measured with.
    """
    r, dtype = S.shape[1], G.dtype
    lowest = (S[:, -1] - torch.maximum(4 * rho, 1e-9 * sigma1)).clamp_min(0).square()
    y2 = torch.minimum(lowest, (S[:, -1].square() + neighbor.square()) / 2)
    largest = y2 + 2 * S[:, 0].square()  # entry of M: what its factorization is off by is √n eps of it
    error = gram_error(W, G, seed) + G.shape[-1] ** 0.5 * torch.finfo(dtype).eps * largest
    M = torch.baddbmm(G, (V * (2 * S.square())[:, None]).to(dtype), V.mT.to(dtype), beta=-1)
    M.diagonal(dim1=-2, dim2=-1).add_((y2 - error).to(dtype)[:, None])
    definite = torch.linalg.cholesky_ex(M).info == 0
    return [
        Proof(True, f"inertia: {r} through")
        if proven
        else Proof(False, f"it is not proven that no more than {r} singular values reach the window's end")
        for proven in definite.tolist()
    ]


def gram_error(W: Blocks, G: Tensor, seed: int) -> Tensor:
    """``(batch,)``: a bound on ``‖G − WᵀW‖₂``, measured as :func:`norm_bound` says."""
    x = probes(G, seed)
    difference = torch.cat([rows.double() @ x for rows in G.split(512, dim=1)], dim=1) - W.rmatmul(W.matmul(x))
    return norm_bound(difference)


def probes(G: Tensor, seed: int) -> Tensor:
    """Standard normal columns ``(batch, n, 16)`` in float64, their entries representable in the dtype of ``G``."""
    x = normal(seed, PROBES, (G.shape[-1], _PROBES), torch.float64).to(G.device, G.dtype).double()
    return x.expand(len(G), -1, -1)


def norm_bound(EX: Tensor) -> Tensor:
    """``(batch,)``: a bound on ``‖E‖₂`` from ``E X (batch, m, 16)`` for standard normal columns ``X``.

    The mean of ``‖E x‖²`` is ``‖E‖_F²``; three times its root is returned. Sixteen columns find a third of ``‖E‖_F`` or
    less once in a million times where ``E`` has rank 1, and more rarely yet elsewhere.
    """
    return 3 * EX.square().sum(1).mean(1).sqrt()


def certify_full(spectrum: Tensor, start: int, rank: int, d: int, m: int) -> Proof:
    """The same question after a full SVD, whose order is the proof unless the window's edge cuts a tie.

    ``m`` is the larger side of the matrix; singular values closer than ``m eps σ₁`` cannot be told apart.
    """
    smallest = m * _EPS * spectrum[0].item()
    for edge in (start, start + rank):
        if 0 < edge < d and (spectrum[edge - 1] - spectrum[edge]).item() <= smallest:
            return Proof(False, f"the window's edge at index {edge} cuts a tie: its components are not unique")
    return Proof(True, "full SVD: no tie at the window's edges")


def _towards(edge: Tensor, neighbor: Tensor) -> Tensor:
    """A quarter of the way from ``edge`` to ``neighbor``, in squares; ``edge`` where the neighbor is unknown."""
    known = torch.where(neighbor.isfinite(), neighbor, edge).square()
    return edge.square() + (known - edge.square()) / 4


def _spectral_norm(X: Tensor) -> Tensor:
    """``‖X‖₂`` of each matrix; scaled, as the small numbers here would vanish when squared."""
    largest = X.abs().amax((1, 2), keepdim=True)
    Y = X / torch.where(largest > 0, largest, 1)
    return torch.linalg.eigvalsh(Y.mT @ Y)[:, -1].clamp_min(0).sqrt() * largest[:, 0, 0]
