"""A weight divided by a power of two and widened to float64, a block of rows at a time and never as a whole."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

_ROWS = 256


class Blocks:
    """Float64 products with ``W / scale`` for a tall ``W (m, n)``, ``m >= n``.

    ``scale`` is the power of two at or below ``max|W|``, so that squares neither overflow nor underflow and the
    division is exact.
    """

    def __init__(self, W: Tensor) -> None:
        assert W.shape[0] >= W.shape[1]
        self.W = W
        largest = W.abs().amax().item()
        self.scale = math.ldexp(1.0, math.frexp(largest)[1] - 1) if largest > 0 else 1.0

    def __iter__(self) -> Iterator[Tensor]:
        for rows in self.W.split(_ROWS):
            yield rows.to(torch.float64, copy=True).div_(self.scale)

    def dense(self) -> Tensor:
        """``W (m, n)`` as one float64 tensor."""
        return self.W.to(torch.float64, copy=True).div_(self.scale)

    def gram(self) -> Tensor:
        """``Wᵀ W (n, n)``."""
        n = self.W.shape[1]
        G = torch.zeros(n, n, dtype=torch.float64, device=self.W.device)
        for block in self:
            G.addmm_(block.mT, block)
        return G

    def matmul(self, V: Tensor) -> Tensor:
        """``W V (m, k)`` for ``V (n, k)``."""
        return torch.cat([block @ V for block in self])

    def rmatmul(self, U: Tensor) -> Tensor:
        """``Wᵀ U (n, k)`` for ``U (m, k)``."""
        out = torch.zeros(self.W.shape[1], U.shape[1], dtype=torch.float64, device=self.W.device)
        for block, rows in zip(self, U.split(_ROWS), strict=True):
            out.addmm_(block.mT, rows)
        return out
