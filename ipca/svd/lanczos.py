"""Lanczos recurrences from random vectors: the distribution of singular values, and a bound on a norm.

The density of states is the distribution of singular values without any of them: the Gram matrix's spectral measure at
a random vector is known to a few dozen Gauss nodes after as many Lanczos steps, and the average over random vectors is
the spectrum's distribution function, to ``√(d / (2 · chains))`` indices or so.

Source: Lin, Saad & Yang, "Approximating spectral densities of large matrices", SIAM Review 58 (2016).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ipca.svd.inner_loops import lanczos_step_
from ipca.svd.random_vectors import DENSITY, NORM, normal

Multiply = Callable[[Tensor], Tensor]
STEPS, CHAINS = 32, 16
_PROBABILITY = 1e-9


@dataclass(frozen=True)
class Density:
    """The distribution of each matrix's singular values: ``fraction[l][i]`` of them lie below ``values[l][i]``."""

    values: list[np.ndarray]
    fraction: list[np.ndarray]
    n: int

    def value_at(self, index: Tensor) -> Tensor:
        """``(batch,)``: the value above which about ``index (batch,)`` singular values lie."""
        below = 1 - index.double().cpu().numpy() / self.n
        found = [np.interp(p, F, x) for p, F, x in zip(below, self.fraction, self.values, strict=True)]
        return torch.from_numpy(np.array(found)).to(index.device)


def spectral_density(G: Tensor, seed: int) -> Density:
    """The density of the singular values whose squares are the eigenvalues of ``G (batch, n, n)``, in float32."""
    batch, n, _ = G.shape
    nodes, vectors = _nodes(*_lanczos(lambda rows: rows @ G, G, min(STEPS, n), seed, DENSITY))
    sigma = nodes.clamp_min(0).sqrt().reshape(batch, CHAINS, -1).numpy()
    weights = vectors[:, 0].square().reshape(batch, CHAINS, -1).numpy()
    values, fraction = zip(*(_average(s, w) for s, w in zip(sigma, weights, strict=True)), strict=True)
    return Density(list(values), list(fraction), n)


def norm_bound(multiply: Multiply, like: Tensor, steps: int, seed: int) -> Tensor:
    """``(batch,)``: a bound on the largest eigenvalue of a positive semidefinite operator, by :data:`CHAINS` chains.

    The largest node ``θ`` of a chain of ``k`` steps is below ``(1 − ε) λ₁`` with a probability of at most
    ``1.648 √n exp(−√ε (2k − 1))``; that of ``p`` chains, with its ``p``-th power. So ``θ / (1 − ε)`` is a bound, and
    that it is not has a probability of 1e-9; :func:`norm_bound_steps` tells ``k`` for an ``ε``.

    Args:
        multiply: of rows ``(batch, CHAINS, n)``.
        like: ``(batch, ·, n)``, whose device and dtype the rows have.
        steps: ``k``.
        seed: of the start.

    Source: Kuczyński & Woźniakowski, "Estimating the largest eigenvalue by the power and Lanczos algorithms with a
    random start", SIAM J. Matrix Anal. Appl. 13 (1992), on the probabilistic relative failure.
    """
    nodes, _ = _nodes(*_lanczos(multiply, like, steps, seed, NORM))
    epsilon = (_exponent(like.shape[-1]) / (2 * steps - 1)) ** 2
    return (nodes[:, -1].reshape(len(like), CHAINS).amax(1) / (1 - epsilon)).to(like.device)


def norm_bound_steps(n: int, epsilon: float) -> int:
    """The steps of :func:`norm_bound` that leave it within ``1 / (1 − ε)`` of the largest Ritz value."""
    return math.ceil((_exponent(n) / epsilon**0.5 + 1) / 2)


def _exponent(n: int) -> float:
    """``√ε (2k − 1)``, at which the bound of the theorem is the ``CHAINS``-th root of the probability."""
    return math.log(1.648 * n**0.5) - math.log(_PROBABILITY) / CHAINS


def _lanczos(multiply: Multiply, like: Tensor, steps: int, seed: int, purpose: int) -> tuple[Tensor, Tensor]:
    """``alpha, beta (batch · CHAINS, steps)`` in float64 on the CPU; every matrix starts from the same vectors."""
    batch, n = len(like), like.shape[-1]
    start = normal(seed, purpose, (CHAINS, n), torch.float32)
    basis = like.new_empty(steps + 1, batch * CHAINS, n)
    basis[0] = (start / start.norm(dim=-1, keepdim=True)).repeat(batch, 1)
    alpha, beta = (like.new_empty(batch * CHAINS, steps) for _ in range(2))
    for step in range(steps):
        product = multiply(basis[step].reshape(batch, CHAINS, n)).reshape(-1, n)
        lanczos_step_(basis, product, alpha, beta, step)
    return alpha.double().cpu(), beta.double().cpu()


def _nodes(alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """The Gauss nodes ``(chains, steps)`` of the recurrences, ascending, and the eigenvectors of their matrices."""
    below = torch.diag_embed(beta[:, :-1], offset=-1)
    return torch.linalg.eigh(torch.diag_embed(alpha) + below + below.mT)


def _average(sigma: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean distribution function of one matrix's chains, each interpolated between its nodes' mid-ranks.

    Below a chain's first node its line goes on until it reaches 0: a tall matrix's spectrum ends far from there.
    """
    middle = weights.cumsum(1) - weights / 2
    step = (sigma[:, 1] - sigma[:, 0]) / (weights[:, 0] + weights[:, 1]) if sigma.shape[1] > 1 else 0.0
    first = np.maximum(sigma[:, 0] - weights[:, 0] * step, 0.0)
    grid = np.unique(np.concatenate([first, sigma.ravel()]))
    each = [
        np.interp(grid, np.append(low, s), np.append(0.0, f), right=1.0)
        for low, s, f in zip(first, sigma, middle, strict=True)
    ]
    return grid, np.maximum.accumulate(np.mean(each, axis=0))
