"""The singular vectors nearest to a shift, by block Krylov with ``(WᵀW − shift I)⁻¹``."""

from __future__ import annotations

import torch
from torch import Tensor

from ipca.svd.candidate import Candidate
from ipca.svd.krylov import Krylov, RitzPairs
from ipca.svd.ldlt import LDLT
from ipca.svd.orthonormal import orthonormalize
from ipca.svd.problem import MatrixBatch

_WIDTH = 16
"""Columns of a block: narrow ones need fewer columns in all, wide ones multiply faster."""


def inverse_krylov(
    problem: MatrixBatch, factor: LDLT, shift: Tensor, above: Tensor, window: range, goal: Tensor
) -> Candidate | None:
    """The window's vectors, found as those of the largest ``1 / (σ² − shift)`` in magnitude on either side.

    With ``k`` eigenvalues of ``WᵀW`` above the shift, component ``j`` has place ``j − k`` in the ascending order of
    ``1 / (σ² − shift)``: a negative place counts from the largest, which lies just above the shift.

    Args:
        factor: of ``WᵀW − shift I``, ``shift (batch,)``.
        above: ``(batch,)``; how many eigenvalues lie above the shift, by its inertia.
        window: the indices wanted.
        goal: ``(batch,)``; the residual to reach.

    Returns:
        None where the window lies so many indices from the shift that another path is cheaper: the shift sits in a
        cluster.
    """
    n = problem.n
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
        """One more solve, which follows, leaves ``‖M v − θ v‖ / θ²`` of a pair's residual in ``WᵀW``."""
        sigma = (shift[:, None] + 1 / pairs.values).clamp_min(0).sqrt()
        right_side = (pairs.values > 0) == (places < 0)
        error = pairs.residuals / (pairs.values.square() * sigma)
        return sigma, torch.where(right_side, error, torch.inf)

    krylov = Krylov(solve, problem.start(min(_WIDTH, n)), min(n, 5 * reach + 12 * _WIDTH))
    edges = slice(window.start - wanted.start, window.stop - wanted.start)
    found = krylov.converge(places, measure, edges, goal, first=5 * reach)
    V = orthonormalize(solve(found.V))
    problem.flops += (2 * n**2 + 6 * n * krylov.size) * solves
    return Candidate(V, found.neighbors, lambda V: orthonormalize(problem.factorize(shift).solve(V)))
