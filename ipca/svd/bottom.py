"""The last window: inverse block Krylov at shift 0."""

from __future__ import annotations

import torch

from ipca.svd.candidate import Candidate
from ipca.svd.problem import MatrixBatch
from ipca.svd.shift_invert import inverse_krylov


def bottom(problem: MatrixBatch, window: range, tol: float) -> Candidate | None:
    """The window's right singular vectors for every matrix of ``problem``; the window ends the spectrum."""
    assert window.stop == problem.n
    problem.gram  # noqa: B018  first, as what follows takes its float32 copy
    goal = tol * problem.sigma1
    shift = torch.zeros_like(goal)
    above = torch.full_like(shift, problem.n, dtype=torch.int64)
    return inverse_krylov(problem, problem.factorize(shift), shift, above, window, goal)
