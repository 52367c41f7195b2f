"""weight + Σ c · B A, in float64 and a block of rows at a time, rounded once at the end; of a matrix or a stack."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ipca._dtensor import full

_ROWS = 256

Term = tuple[float, Tensor, Tensor]
"""``(c, B (…, out, r), A (…, r, in))``."""
Rows = slice | tuple[int, slice]
"""An index of a block: rows of a matrix, or of one matrix of a stack."""


def add_low_rank(weight: Tensor, terms: Sequence[Term], dtype: torch.dtype | None = None) -> Tensor:
    """``weight (…, out, in) + Σ c · B A`` as a new tensor of ``dtype``, by default that of ``weight``.

    Sharded tensors are gathered: a collective, whose whole result every process gets.
    """
    weight, terms = full(weight), [(c, full(B), full(A)) for c, B, A in terms]
    out = torch.empty(weight.shape, dtype=dtype or weight.dtype, device=weight.device)
    for rows, block in wide_blocks(weight, terms):
        out[rows] = block
    return out


@torch.no_grad()
def wide_blocks(weight: Tensor, terms: Sequence[Term]) -> Iterator[tuple[Rows, Tensor]]:
    """``weight + Σ c · B A`` as float64 blocks of rows (float32 where the device has no float64), and their place."""
    if weight.ndim == 3:
        for i, matrix in enumerate(weight):
            for rows, block in wide_blocks(matrix, [(c, B[i], A[i]) for c, B, A in terms]):
                assert isinstance(rows, slice)
                yield (i, rows), block
        return
    wide = torch.float32 if weight.device.type == "mps" else torch.float64
    A_wide = [A.to(wide) for _, _, A in terms]
    for start in range(0, weight.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        block = weight[rows].to(wide, copy=True)
        for (c, B, _), A in zip(terms, A_wide, strict=True):
            block.addmm_(B[rows].to(wide), A, alpha=c)
        yield rows, block
