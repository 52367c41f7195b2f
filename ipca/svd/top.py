"""The first components: block Krylov with the Gram matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from ipca.svd.candidate import Candidate
from ipca.svd.krylov import Krylov, RitzPairs
from ipca.svd.orthonormal import orthonormalize
from ipca.svd.problem import MatrixBatch

_WIDTH, _BLOCKS = 16, 40


def top(problem: MatrixBatch, window: range, tol: float) -> Candidate:
    """The window's right singular vectors for every matrix of ``problem``; cheap where the window starts early.

    Squaring costs little here: an error of ``eps σ₁²`` in ``WᵀW`` is one of ``eps σ₁`` in singular values near σ₁. So
    float32 does where a tolerance above its rounding is asked for.
    """
    n, products = problem.n, 0
    G = problem.gram32 if uses_float32(problem, tol) else problem.gram

    def multiply(X: Tensor) -> Tensor:
        nonlocal products
        products += X.shape[-1]
        return G @ X

    def measure(pairs: RitzPairs) -> tuple[Tensor, Tensor]:
        sigma = pairs.values.clamp_min(0).sqrt()
        return sigma, pairs.residuals / sigma

    wanted = range(window.start - (window.start > 0), min(window.stop + 1, n))
    places = -1 - torch.arange(wanted.start, wanted.stop, device=G.device).expand(len(problem.blocks), -1)
    width = min(n, _WIDTH)
    krylov = Krylov(multiply, problem.start(width, G.dtype), min(n, _BLOCKS * width + 4 * window.stop))
    edges = slice(window.start - wanted.start, window.stop - wanted.start)
    found = krylov.converge(places, measure, edges, tol * problem.sigma1, first=3 * window.stop)
    problem.flops += (2 * n**2 + 6 * n * krylov.size) * products
    blocks = problem.blocks
    return Candidate(
        orthonormalize(found.V.double()),
        found.neighbors,
        lambda V: orthonormalize(blocks.rmatmul(blocks.matmul(V))),
    )


def uses_float32(problem: MatrixBatch, tol: float) -> bool:
    """Whether ``tol`` is above the rounding of float32; a GPU's float64 is as fast, as its TF32 would not do."""
    return tol >= 1e-6 and problem.blocks.W.device.type == "cpu"
