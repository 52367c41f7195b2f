"""out = gᵀ z for a tall pair: dA = gᵀ dropout(x) from one read of x, and dB = dyᵀ h where no other product reads dy.

g (M, R) | x (M, K) | z = dropout(x) | out (R, K) or (K, R).  The sum over M is split among programs, which store fp32
partials; :mod:`ipca.kernels.reduce` adds those in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ipca.kernels.configs import padded_rank, precision
from ipca.kernels.dropout import dropped
from ipca.kernels.launch import dropout_arguments, grid_of
from ipca.kernels.reduce import add_up, split_rows
from ipca.kernels.tuning import choose


@triton.jit(do_not_specialize=["M", "rows_each", "threshold"])  # they vary from step to step
def _outer_kernel(
    g_ptr,
    x_ptr,
    out_ptr,
    seed_ptr,
    M,
    K,
    rows_each,
    stride_gm,
    stride_xm,
    stride_xk,
    stride_or,
    stride_ok,
    threshold,
    keep_scale,
    R: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """A block of one split's partial: all the rows of the split, a block of columns, a block of components."""
    keep_scale = tl.cast(keep_scale, tl.float32)  # float64 from torch.compile
    first_k, split = tl.program_id(0) * BLOCK_K, tl.program_id(1)
    offs_k = first_k + tl.arange(0, BLOCK_K)
    offs_r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_k, mask_r = offs_k < K, offs_r < R
    offs_k64 = offs_k.to(tl.int64)
    acc = tl.zeros((BLOCK_K, BLOCK_R), dtype=tl.float32)
    if DROPOUT:
        seed = tl.load(seed_ptr)
    first = split * rows_each
    for first_m in range(first, min(first + rows_each, M), BLOCK_M):
        offs_m = first_m + tl.arange(0, BLOCK_M)
        offs_m64, mask_m = offs_m.to(tl.int64), offs_m < M
        rows_x = x_ptr + offs_m64[:, None] * stride_xm
        z = tl.load(rows_x + offs_k64[None, :] * stride_xk, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        if DROPOUT:
            z = dropped(z, seed, offs_m, first_k, threshold, keep_scale, BLOCK_M, BLOCK_K)
        mask_g = mask_m[:, None] & mask_r[None, :]
        g = tl.load(g_ptr + offs_m64[:, None] * stride_gm + offs_r[None, :], mask=mask_g, other=0.0)
        acc = tl.dot(z.T, g, acc, input_precision=PRECISION)
    rows_out = out_ptr + split.to(tl.int64) * R * K + offs_k64[:, None] * stride_ok
    tl.store(rows_out + offs_r.to(tl.int64)[None, :] * stride_or, acc, mask=mask_k[:, None] & mask_r[None, :])


def outer(
    g: Tensor,
    x: Tensor,
    dtype: torch.dtype,
    seed: Tensor | None = None,
    p: float = 0.0,
    *,
    scaling: float = 1.0,
    transposed: bool = False,
) -> Tensor:
    """``scaling · gᵀ z (R, K)`` as ``dtype``, or its transpose ``(K, R)``; rows of ``g`` contiguous, ``x`` strided."""
    (M, K), R = x.shape, g.shape[1]

    def rerun() -> Tensor:
        return outer(g, x, dtype, seed, p, scaling=scaling, transposed=transposed)

    config = choose("outer", x, N=R, K=K, R=R, dropout=p > 0, rerun=rerun)
    BLOCK_R = padded_rank(R, config.BLOCK_R)
    columns, blocks = triton.cdiv(K, config.BLOCK_K), triton.cdiv(R, BLOCK_R)
    splits, rows_each = split_rows(M, columns * blocks, config.BLOCK_M, x.device)
    shape = (splits, K, R) if transposed else (splits, R, K)
    partial = torch.empty(shape, dtype=torch.float32, device=x.device)
    grid_of(_outer_kernel, (columns, splits, blocks))(
        g,
        x,
        partial,
        partial if seed is None else seed,
        M,
        K,
        rows_each,
        g.stride(0),
        *x.stride(),
        *((1, R) if transposed else (K, 1)),
        *dropout_arguments(p),
        R=R,
        DROPOUT=p > 0,
        PRECISION=precision(x),
        BLOCK_M=config.BLOCK_M,
        BLOCK_K=config.BLOCK_K,
        BLOCK_R=BLOCK_R,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return add_up(partial, scaling, dtype)
