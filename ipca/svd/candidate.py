"""What a path proposes: vectors of a window, and how close its neighbors seem to be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Candidate:
    """Approximate right singular vectors of one window for a batch of matrices, not yet proven.

    Attributes:
        V: ``(batch, n, r)``, orthonormal.
        neighbors: ``(batch, 2)``; estimates of the singular values next to the window, above (infinity where the
            window starts the spectrum) and below (0 where it ends it).
        polish: one more step of the path's iteration on ``V``, where the path has one.
    """

    V: Tensor
    neighbors: Tensor
    polish: Callable[[Tensor], Tensor] | None = None
