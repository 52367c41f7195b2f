"""Density of states: the distribution of singular values by stochastic Lanczos, without any of them.

The Gram matrix's spectral measure at a random vector is known to a few dozen Gauss nodes after as many Lanczos steps,
and the average over random vectors is the spectrum's distribution function, to ``√(d / (2 · chains))`` indices or so.

Source: Lin, Saad & Yang, "Approximating spectral densities of large matrices", SIAM Review 58 (2016).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ipca.svd.inner_loops import lanczos_step_
from ipca.svd.random_vectors import DENSITY, normal

STEPS, CHAINS = 32, 16


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
    alpha, beta = _lanczos(G, min(STEPS, n), seed)
    nodes, vectors = torch.linalg.eigh(torch.diag_embed(alpha) + _subdiagonal(beta) + _subdiagonal(beta).mT)
    sigma = nodes.clamp_min(0).sqrt().reshape(batch, CHAINS, -1).numpy()
    weights = vectors[:, 0].square().reshape(batch, CHAINS, -1).numpy()
    values, fraction = zip(*(_average(s, w) for s, w in zip(sigma, weights, strict=True)), strict=True)
    return Density(list(values), list(fraction), n)


def _lanczos(G: Tensor, steps: int, seed: int) -> tuple[Tensor, Tensor]:
    """``alpha, beta (batch · CHAINS, steps)`` in float64 on the CPU; every matrix starts from the same vectors."""
    batch, n, _ = G.shape
    start = normal(seed, DENSITY, (CHAINS, n), torch.float32)
    basis = G.new_empty(steps + 1, batch * CHAINS, n)
    basis[0] = (start / start.norm(dim=-1, keepdim=True)).repeat(batch, 1)
    alpha, beta = (G.new_empty(batch * CHAINS, steps) for _ in range(2))
    for step in range(steps):
        product = (basis[step].reshape(batch, CHAINS, n) @ G).reshape(-1, n)
        lanczos_step_(basis, product, alpha, beta, step)
    return alpha.double().cpu(), beta.double().cpu()


def _subdiagonal(beta: Tensor) -> Tensor:
    return torch.diag_embed(beta[:, :-1], offset=-1)


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
