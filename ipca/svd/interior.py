"""A window inside a large spectrum: a shift from the density of states, one factorization, inverse block Krylov."""

from __future__ import annotations

import torch
from torch import Tensor

from ipca.svd.candidate import Candidate
from ipca.svd.ldlt import LDLT
from ipca.svd.problem import MatrixBatch
from ipca.svd.shift_invert import inverse_krylov

_NEAR = 24
"""Indices; to come nearer than that costs another factorization, more than the few columns it saves."""
_TRIES = 6


def interior(problem: MatrixBatch, window: range, tol: float) -> Candidate | None:
    """The window's right singular vectors for every matrix of ``problem``; None where no shift comes near it."""
    problem.gram  # noqa: B018  first, as what follows takes its float32 copy
    goal = tol * problem.sigma1
    shift, factor = _shift_near(problem, (window.start + window.stop) / 2, max(len(window) // 2, _NEAR))
    return inverse_krylov(problem, factor, shift, factor.positive, window, goal)


def _shift_near(problem: MatrixBatch, index: float, near: int) -> tuple[Tensor, LDLT]:
    """A shift with about ``index`` eigenvalues of ``WᵀW`` above it, and the factorization whose inertia counts them.

    The density of states is right to a few indices where the spectrum is smooth. Elsewhere its miss is known exactly
    after the factorization, and the next try corrects by it, or lies between two counts once both sides are known.
    """
    aim = torch.full_like(problem.sigma1, index)
    low, high = torch.zeros_like(aim), torch.full_like(aim, torch.inf)
    low_count, high_count = torch.full_like(aim, problem.n), torch.zeros_like(aim)
    sigma = problem.density.value_at(aim)
    for _ in range(_TRIES):
        factor = problem.factorize(sigma.square())
        missed = factor.positive - index
        done = missed.abs() <= near
        if done.all():
            break
        too_low = missed > 0
        low, low_count = torch.where(too_low, sigma, low), torch.where(too_low, factor.positive, low_count)
        high, high_count = torch.where(too_low, high, sigma), torch.where(too_low, high_count, factor.positive)
        aim = (aim - missed).clamp(0, problem.n)
        corrected = problem.density.value_at(aim)
        between = low + (high - low) * (low_count - index) / (low_count - high_count).clamp_min(1)
        bracketed = (low > 0) & high.isfinite()
        guess = torch.where(bracketed | (corrected <= low) | (corrected >= high), between, corrected)
        sigma = torch.where(done, sigma, torch.where(guess.isfinite(), guess, 2 * low))
        del factor  # before the next one takes its memory
    else:
        factor = problem.factorize(sigma.square())
    return sigma.square(), factor
