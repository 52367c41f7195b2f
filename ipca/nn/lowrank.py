"""weight + Σ c · B A, in float64 and a block of rows at a time, rounded once at the end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_ROWS = 256

Term = tuple[float, Tensor, Tensor]
"""``(c, B (out, r), A (r, in))``."""


def add_low_rank(weight: Tensor, terms: Sequence[Term], dtype: torch.dtype | None = None) -> Tensor:
    """``weight (out, in) + Σ c · B A`` as a new tensor of ``dtype``, by default that of ``weight``."""
    out = torch.empty(weight.shape, dtype=dtype or weight.dtype, device=weight.device)
    for rows, block in wide_blocks(weight, terms):
        out[rows] = block
    return out


@torch.no_grad()
def wide_blocks(weight: Tensor, terms: Sequence[Term]) -> Iterator[tuple[slice, Tensor]]:
    """``weight + Σ c · B A`` as float64 blocks of rows (float32 where the device has no float64)."""
    wide = torch.float32 if weight.device.type == "mps" else torch.float64
    A_wide = [A.to(wide) for _, _, A in terms]
    for start in range(0, weight.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        block = weight[rows].to(wide, copy=True)
        for (c, B, _), A in zip(terms, A_wide, strict=True):
            block.addmm_(B[rows].to(wide), A, alpha=c)
        yield rows, block
