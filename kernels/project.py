"""h = z Dᵀ, with z = dropout(x), for few components.

x (M, K) | D (R, K) | h (M, R).  Accumulates in fp32; D is cast to the dtype of x in registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ipca.kernels.configs import padded_rank, precision
from ipca.kernels.dropout import dropped
from ipca.kernels.launch import dropout_arguments, grid_of
from ipca.kernels.tuning import choose


@triton.jit(do_not_specialize=["M", "threshold"])  # they vary from step to step
def _project_kernel(
    x_ptr,
    d_ptr,
    h_ptr,
    seed_ptr,
    M,
    K,
    stride_xm,
    stride_xk,
    stride_dr,
    stride_dk,
    threshold,
    keep_scale,
    scaling,
    R: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    scaling, keep_scale = tl.cast(scaling, tl.float32), tl.cast(keep_scale, tl.float32)  # float64 from torch.compile
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_m, mask_r = offs_m < M, offs_r < R
    rows_x = x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm
    rows_d = d_ptr + offs_r[:, None] * stride_dr
    h = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    if DROPOUT:
        seed = tl.load(seed_ptr)
    for first_k in range(0, K, BLOCK_K):
        offs_k = first_k + tl.arange(0, BLOCK_K).to(tl.int64)
        mask_k = offs_k < K
        z = tl.load(rows_x + offs_k[None, :] * stride_xk, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        d = tl.load(rows_d + offs_k[None, :] * stride_dk, mask=mask_r[:, None] & mask_k[None, :], other=0.0)
        if DROPOUT:
            z = dropped(z, seed, offs_m, first_k, threshold, keep_scale, BLOCK_M, BLOCK_K)
        h = tl.dot(z, d.to(z.dtype).T, h, input_precision=PRECISION)
    offs_h = offs_m.to(tl.int64)[:, None] * R + offs_r[None, :]
    tl.store(h_ptr + offs_h, (scaling * h).to(h_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_r[None, :])


def project(x: Tensor, D: Tensor, seed: Tensor | None = None, p: float = 0.0, *, scaling: float = 1.0) -> Tensor:
    """``scaling · z Dᵀ``, of the dtype of ``x``. Any strides."""
    (M, K), R = x.shape, D.shape[0]
    h = torch.empty(M, R, dtype=x.dtype, device=x.device)

    def rerun() -> Tensor:
        return project(x, D, seed, p, scaling=scaling)

    config = choose("project", x, N=R, K=K, R=R, dropout=p > 0, rerun=rerun)
    BLOCK_R = padded_rank(R, config.BLOCK_R)
    grid_of(_project_kernel, (triton.cdiv(M, config.BLOCK_M), triton.cdiv(R, BLOCK_R)))(
        x,
        D,
        h,
        h if seed is None else seed,
        M,
        K,
        *x.stride(),
        *D.stride(),
        *dropout_arguments(p),
        scaling,
        R=R,
        DROPOUT=p > 0,
        PRECISION=precision(x),
        BLOCK_M=config.BLOCK_M,
        BLOCK_K=config.BLOCK_K,
        BLOCK_R=BLOCK_R,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return h
