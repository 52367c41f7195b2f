"""h = z Aᵀ and h0 = z A0ᵀ from one read of x, with z = dropout(x).

x (M, K) | A, A0 (R, K) | h, h0 (M, R).  Accumulates in fp32; factors are cast to the dtype of x in registers.
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
    a_ptr,
    a0_ptr,
    h_ptr,
    h0_ptr,
    seed_ptr,
    M,
    K,
    stride_xm,
    stride_xk,
    stride_ar,
    stride_ak,
    stride_a0r,
    stride_a0k,
    threshold,
    keep_scale,
    R: tl.constexpr,
    HAS_FROZEN: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_m, mask_r = offs_m < M, offs_r < R
    rows_x = x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm
    rows_a = a_ptr + offs_r[:, None] * stride_ar
    rows_a0 = a0_ptr + offs_r[:, None] * stride_a0r
    h = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    h0 = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    if DROPOUT:
        seed = tl.load(seed_ptr)
    for first_k in range(0, K, BLOCK_K):
        offs_k = first_k + tl.arange(0, BLOCK_K).to(tl.int64)
        mask_k = offs_k < K
        z = tl.load(rows_x + offs_k[None, :] * stride_xk, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        mask_a = mask_r[:, None] & mask_k[None, :]
        a = tl.load(rows_a + offs_k[None, :] * stride_ak, mask=mask_a, other=0.0)
        if DROPOUT:
            z = dropped(z, seed, offs_m, first_k, threshold, keep_scale, BLOCK_M, BLOCK_K)
        h = tl.dot(z, a.to(z.dtype).T, h, input_precision=PRECISION)
        if HAS_FROZEN:
            a0 = tl.load(rows_a0 + offs_k[None, :] * stride_a0k, mask=mask_a, other=0.0)
            h0 = tl.dot(z, a0.to(z.dtype).T, h0, input_precision=PRECISION)
    offs_h = offs_m.to(tl.int64)[:, None] * R + offs_r[None, :]
    mask_h = mask_m[:, None] & mask_r[None, :]
    tl.store(h_ptr + offs_h, h.to(h_ptr.dtype.element_ty), mask=mask_h)
    if HAS_FROZEN:
        tl.store(h0_ptr + offs_h, h0.to(h0_ptr.dtype.element_ty), mask=mask_h)


def project(
    x: Tensor, A: Tensor, A0: Tensor | None = None, seed: Tensor | None = None, p: float = 0.0
) -> tuple[Tensor, Tensor | None]:
    """``h, h0``, of the dtype of ``x``; ``h0`` is None without ``A0``. Any strides."""
    (M, K), R = x.shape, A.shape[0]
    h = torch.empty(M, R, dtype=x.dtype, device=x.device)
    h0 = None if A0 is None else torch.empty_like(h)
    frozen = A if A0 is None else A0

    def rerun() -> object:
        return project(x, A, A0, seed, p)

    config = choose("project", x, N=R, K=K, R=R, frozen=A0 is not None, dropout=p > 0, rerun=rerun)
    BLOCK_R = padded_rank(R, config.BLOCK_R)
    grid_of(_project_kernel, (triton.cdiv(M, config.BLOCK_M), triton.cdiv(R, BLOCK_R)))(
        x,
        A,
        frozen,
        h,
        h if h0 is None else h0,
        x if seed is None else seed,
        M,
        K,
        *x.stride(),
        *A.stride(),
        *frozen.stride(),
        *dropout_arguments(p),
        R=R,
        HAS_FROZEN=A0 is not None,
        DROPOUT=p > 0,
        PRECISION=precision(x),
        BLOCK_M=config.BLOCK_M,
        BLOCK_K=config.BLOCK_K,
        BLOCK_R=BLOCK_R,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return h, h0
