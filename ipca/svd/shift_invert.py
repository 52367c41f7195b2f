"""Shift-invert: the windows inside and at the end of a spectrum, by block Krylov with ``(WᵀW − shift I)⁻¹``."""

from __future__ import annotations

import torch
from torch import Tensor

from ipca.svd.krylov import Krylov, RitzPairs, orthonormalize
from ipca.svd.ldlt import LDLT
from ipca.svd.matrix_batch import Candidate, MatrixBatch

_WIDTH = 16
"""Columns of a block: narrow ones need fewer columns in all, wide ones multiply faster."""
_NEAR = 24
"""Indices by which a shift may miss the window's center: a nearer one costs another factorization, more than the few
columns it saves."""
_TRIES = 6


def interior(batch: MatrixBatch, window: range, tol: float) -> Candidate | None:
    """The window's right singular vectors, by a shift near its center; None where no shift comes near it."""
    goal = _goal(batch, tol)
    shift, factor = _shift_near(batch, (window.start + window.stop) / 2, max(len(window) // 2, _NEAR))
    return _inverse_krylov(batch, factor, shift, factor.positive, window, goal)


def bottom(batch: MatrixBatch, window: range, tol: float) -> Candidate | None:
    """The right singular vectors of a window that ends the spectrum, by the shift 0."""
    assert window.stop == batch.n
    goal = _goal(batch, tol)
    shift = torch.zeros_like(goal)
    above = torch.full_like(shift, batch.n, dtype=torch.int64)
    return _inverse_krylov(batch, batch.factorize(shift), shift, above, window, goal)


def _goal(batch: MatrixBatch, tol: float) -> Tensor:
    """``(batch,)``; the residual to reach, in units of ``W / scale``."""
    batch.gram  # noqa: B018  before σ₁, which would multiply a float32 Gram matrix of its own
    return tol * batch.sigma1


def _shift_near(batch: MatrixBatch, index: float, near: int) -> tuple[Tensor, LDLT]:
    """A shift with about ``index`` eigenvalues of ``WᵀW`` above it, and the factorization whose inertia counts them.

    The density of states is right to a few indices where the spectrum is smooth. Elsewhere its miss is known exactly
    after the factorization, and the next try corrects by it, or lies between two counts once both sides are known.
    """
    aim = torch.full_like(batch.sigma1, index)
    low, high = torch.zeros_like(aim), torch.full_like(aim, torch.inf)
    low_count, high_count = torch.full_like(aim, batch.n), torch.zeros_like(aim)
    sigma = batch.density.value_at(aim)
    for _ in range(_TRIES):
        factor = batch.factorize(sigma.square())
        missed = factor.positive - index
        done = missed.abs() <= near
        if done.all():
            break
        too_low = missed > 0
        low, low_count = torch.where(too_low, sigma, low), torch.where(too_low, factor.positive, low_count)
        high, high_count = torch.where(too_low, high, sigma), torch.where(too_low, high_count, factor.positive)
        aim = (aim - missed).clamp(0, batch.n)
        corrected = batch.density.value_at(aim)
        between = low + (high - low) * (low_count - index) / (low_count - high_count).clamp_min(1)
        bracketed = (low > 0) & high.isfinite()
        guess = torch.where(bracketed | (corrected <= low) | (corrected >= high), between, corrected)
        sigma = torch.where(done, sigma, torch.where(guess.isfinite(), guess, 2 * low))
        del factor  # before the next one takes its memory
    else:
        factor = batch.factorize(sigma.square())
    return sigma.square(), factor


def _inverse_krylov(
    batch: MatrixBatch, factor: LDLT, shift: Tensor, above: Tensor, window: range, goal: Tensor
) -> Candidate | None:
    """The window's vectors, found as those of the largest ``1 / (σ² − shift)`` in magnitude on either side.

    With ``k`` eigenvalues of ``WᵀW`` above the shift, component ``j`` has index ``j − k`` in the ascending order of
    ``1 / (σ² − shift)``: a negative index counts from the largest, which lies just above the shift.

    Args:
        factor: of ``WᵀW − shift I``, ``shift (batch,)``.
        above: ``(batch,)``; how many eigenvalues lie above the shift, by its inertia.
        window: the indices wanted.
        goal: ``(batch,)``; the residual to reach.

    Returns:
        None where the window lies so many indices from the shift that another path is cheaper, as the shift sits in a
        cluster, or where the iteration comes to nothing.
    """
    n = batch.n
    wanted = range(max(window.start - 1, 0), min(window.stop + 1, n))
    places = torch.arange(wanted.start, wanted.stop, device=shift.device) - above[:, None]
    reach = int(torch.maximum(above - wanted.start, wanted.stop - above).amax())
    if reach > max(n // 6, 2 * len(wanted)):
        return None
    solves = 0

    def solve(X: Tensor) -> Tensor:
        nonlocal solves
        solves += X.shape[-1]
        return factor.solve(X)

    def measure(pairs: RitzPairs) -> tuple[Tensor, Tensor]:
        # The solve that follows leaves ‖M v − θ v‖ / θ² of a pair's residual in WᵀW.
        sigma = (shift[:, None] + 1 / pairs.values).clamp_min(0).sqrt()
        right_side = (pairs.values > 0) == (places < 0)
        error = pairs.residuals / (pairs.values.square() * sigma)
        return sigma, torch.where(right_side, error, torch.inf)

    krylov = Krylov(solve, batch.random_columns(min(_WIDTH, n)), min(n, 5 * reach + 12 * _WIDTH))
    edges = slice(window.start - wanted.start, window.stop - wanted.start)
    found = krylov.converge(places, measure, edges, goal, first=5 * reach)
    if found is None:
        return None
    V, neighbors = found
    V = orthonormalize(solve(V))
    batch.flops += (2 * n**2 + 6 * n * krylov.size) * solves
    return Candidate(V, neighbors, lambda V: orthonormalize(batch.factorize(shift).solve(V)))
