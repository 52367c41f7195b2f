"""Are these the components they claim to be? The residual bounds the vectors, two inertia counts prove the indices.

By Sylvester's law of inertia the number of positive pivots of an LDLᵀ factorisation of ``WᵀW − x² I`` is the number
of singular values above ``x``. With ρ the residual and δ = max(4ρ, 1e-9 σ₁), a window ``[s, s + r)`` is proven when

    #(σ > S_first + δ) = s        and        #(σ > S_last − δ) = s + r,

because orthonormal vectors with residual ρ belong to ``r`` distinct singular values within ρ of ``S`` (Kahan), and the
counts leave exactly ``r`` of them there. A count at an end of the spectrum (s = 0, s + r = d) is not needed.

The thresholds move outwards by ``n eps σ₁²``, the rounding error of the Gram matrix and of its factorisation, so a
window that cuts a tie, or lies so low that this error hides it, is never proven by accident: it is left uncertified.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ipca.svd.blocks import Blocks

_EPS = torch.finfo(torch.float64).eps


def largest_singular_value(G: Tensor, steps: int = 24) -> float:
    """A lower bound of σ₁, usually within a few per cent, by power iteration on the Gram matrix ``G``."""
    if not G.any():
        return 0.0
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(G.shape[0], generator=generator, dtype=G.dtype)
    for _ in range(steps):
        v = G @ (v / v.norm())
    return v.norm().sqrt().item()


def residual(W: Blocks, U: Tensor, S: Tensor, V: Tensor) -> float:
    """``max(‖W V − U S‖₂, ‖Wᵀ U − V S‖₂)``, in units of ``W / scale``."""
    right = W.matmul(V) - U * S
    left = W.rmatmul(U) - V * S
    return max(_spectral_norm(right), _spectral_norm(left))


def orthogonality(U: Tensor, V: Tensor) -> float:
    """``max(‖UᵀU − I‖₂, ‖VᵀV − I‖₂)``."""
    eye = torch.eye(U.shape[1], dtype=U.dtype, device=U.device)
    return max(_spectral_norm(U.mT @ U - eye), _spectral_norm(V.mT @ V - eye))


def count_above(G: Tensor, threshold: float) -> int:
    """How many eigenvalues of the symmetric ``G (n, n)`` exceed ``threshold``, from one LDLᵀ factorisation."""
    diagonal = G.diagonal().clone()
    G.diagonal().sub_(threshold)  # in place and undone: a second copy of G would be the peak of memory
    LD, pivots, _ = torch.linalg.ldl_factor_ex(G)  # a pivot of exactly 0 is no error: it is not above
    G.diagonal().copy_(diagonal)
    # A negative pivot marks a row of a 2 × 2 block, which Bunch–Kaufman picks only where one eigenvalue is positive.
    positive = ((LD.diagonal() > 0) & (pivots > 0)).sum() + (pivots < 0).sum() // 2
    return int(positive)


def certify(G: Tensor, S: Tensor, rho: float, sigma1: float, start: int) -> tuple[bool, str]:
    """Prove that ``S`` holds the singular values ``[start, start + len(S))`` of the matrix whose Gram matrix is ``G``.

    Returns:
        Whether it is proven, and the proof or the reason in words.
    """
    d, end = G.shape[0], start + S.shape[0]
    delta = max(4 * rho, 1e-9 * sigma1)
    rounding = d * _EPS * sigma1**2
    proof = []
    if start > 0:
        above = count_above(G, (S[0].item() + delta) ** 2 + rounding)
        if above != start:
            return False, f"{above} singular values lie above the window, not {start}"
        proof.append(f"{above} above")
    if end < d:
        low = S[-1].item() - delta
        if low <= 0 or low**2 <= 2 * rounding:
            return (
                False,
                f"the window ends at {S[-1].item() / sigma1:.1e} of the largest singular value, too low to count",
            )
        through = count_above(G, low**2 - rounding)
        if through != end:
            return False, f"{through} singular values lie above the window's end, not {end}"
        proof.append(f"{through} through")
    return True, "inertia: " + (", ".join(proof) or "every component")


def certify_full(spectrum: Tensor, start: int, rank: int, d: int, n: int) -> tuple[bool, str]:
    """The same question after a full SVD, whose order is the proof unless the window's edge cuts a tie.

    ``n`` is the larger side of the matrix; singular values closer than ``n eps σ₁`` cannot be told apart.
    """
    smallest = n * _EPS * spectrum[0].item()
    for edge in (start, start + rank):
        if 0 < edge < d and (spectrum[edge - 1] - spectrum[edge]).item() <= smallest:
            return False, f"the window's edge at index {edge} cuts a tie: its components are not unique"
    return True, "full SVD: no tie at the window's edges"


def _spectral_norm(X: Tensor) -> float:
    return torch.linalg.matrix_norm(X, ord=2).item()
