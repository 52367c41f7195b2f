"""Matrices divided by a power of two and widened to float64, a block of rows at a time and never as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce

import torch
from torch import Tensor

_ROWS, _COLUMNS = 256, 512


def largest_entry(W: Tensor) -> Tensor:
    """``max|W|`` of each matrix of ``W (batch, m, n)``, without a copy of it; NaN or Inf where it holds one."""
    # not by torch.stack, which autocast on a CPU refuses for float16
    return reduce(torch.maximum, (rows.abs().amax((1, 2)) for rows in W.split(_ROWS, dim=1)))


class Blocks:
    """Float64 products with ``W / scale`` for a batch of tall matrices ``W (batch, m, n)``, ``m >= n``.

    ``scale (batch,)`` is the power of two at or below ``max|W|``, so that squares neither overflow nor underflow and
    the division is exact.
    """

    def __init__(self, W: Tensor) -> None:
        assert W.ndim == 3
        assert W.shape[1] >= W.shape[2]
        self.W = W
        largest = largest_entry(W).double()
        power = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 1)
        self.scale = torch.where(largest > 0, power, 1.0)

    def __len__(self) -> int:
        return self.W.shape[0]

    def __getitem__(self, rows: list[int]) -> Blocks:
        """Some of the matrices."""
        part = object.__new__(Blocks)
        part.W, part.scale = self.W[rows], self.scale[rows]
        return part

    def rows(self, dtype: torch.dtype = torch.float64) -> Iterator[Tensor]:
        """``W / scale`` in blocks ``(batch, rows, n)``."""
        for rows in self.W.split(_ROWS, dim=1):
            yield rows.to(torch.float64, copy=True).div_(self.scale[:, None, None]).to(dtype)

    def dense(self) -> Tensor:
        """``W / scale (batch, m, n)`` as one float64 tensor."""
        return self.W.to(torch.float64, copy=True).div_(self.scale[:, None, None])

    def gram(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """``Wᵀ W (batch, n, n)``, multiplied in ``dtype``: the lower triangle is computed, the
        upper one copied.
        """
        n = self.W.shape[2]
        G = torch.empty(len(self), n, n, dtype=dtype, device=self.W.device)
        columns = [slice(j, min(j + _COLUMNS, n)) for j in range(0, n, _COLUMNS)]
        for i, block in enumerate(self.rows(dtype)):
            for c in columns:
                G[:, c.start :, c].baddbmm_(block[:, :, c.start :].mT, block[:, :, c], beta=int(i > 0))
        for c in columns:
            G[:, c, c.stop :] = G[:, c.stop :, c].mT
        return G

    def matmul(self, V: Tensor) -> Tensor:
        """``W V (batch, m, k)`` for ``V (batch, n, k)``."""
        return torch.cat([block @ V for block in self.rows()], dim=1)

    def rmatmul(self, U: Tensor) -> Tensor:
        """``Wᵀ U (batch, n, k)`` for ``U (batch, m, k)``."""
        out = torch.zeros(len(self), self.W.shape[2], U.shape[2], dtype=torch.float64, device=self.W.device)
        for block, rows in zip(self.rows(), U.split(_ROWS, dim=1), strict=True):
            out.baddbmm_(block.mT, rows)
        return out
