"""out = scaling · Σ partial[s], in the order of s: the second half of every split sum."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ipca.kernels.launch import grid_of, programs

BLOCK = 1024


@triton.jit
def _add_up_kernel(partial_ptr, out_ptr, numel, splits, scaling, BLOCK: tl.constexpr):
    scaling = tl.cast(scaling, tl.float32)  # float64 from torch.compile
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for _ in range(splits):
        total += tl.load(partial_ptr + offs, mask=mask, other=0.0)
        partial_ptr += numel
    tl.store(out_ptr + offs, (scaling * total).to(out_ptr.dtype.element_ty), mask=mask)


def add_up(partial: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """``scaling · partial.sum(0)`` of a contiguous fp32 ``partial (splits, …)``, rounded once to ``dtype``."""
    out = torch.empty(partial.shape[1:], dtype=dtype, device=partial.device)
    numel = out.numel()
    grid_of(_add_up_kernel, (triton.cdiv(numel, BLOCK),))(partial, out, numel, partial.shape[0], scaling, BLOCK=BLOCK)
    return out


def split_rows(M: int, tiles: int, BLOCK_M: int, device: torch.device) -> tuple[int, int]:
    """The number of splits of ``M`` and the rows of each, so that ``tiles`` times them fill the device twice.

    The number of splits does not depend on ``M``, which may be symbolic; late splits of a short ``M`` are empty.
    """
    splits = max(1, 2 * programs(device) // tiles)
    return splits, triton.cdiv(triton.cdiv(M, splits), BLOCK_M) * BLOCK_M
