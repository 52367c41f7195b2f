"""y, h = the forward pass for few tokens in one kernel: x Wᵀ and x Aᵀ in one loop, then the low-rank part.

x (M, K) | W (N, K) | A, A0 (R, K) | B, B0 (N, R) | y (M, N) | h (M, R).  Every program computes ``h`` of its rows anew,
which costs R / BLOCK_N more arithmetic and saves a launch: with few tokens reading W takes all the time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ipca.kernels.configs import arithmetic, most_components_at_once, padded_rank, precision
from ipca.kernels.dropout import dropped
from ipca.kernels.launch import dropout_arguments, grid_of
from ipca.kernels.tuning import choose

MOST_TOKENS = 256


def takes(x: Tensor, R: int) -> bool:
    """Whether this kernel is used for ``x`` and a rank: few tokens for certain, and components that fit at once."""
    return bool(statically_known_true(x.shape[0] <= MOST_TOKENS)) and most_components_at_once(arithmetic(x)) >= R


@triton.jit(do_not_specialize=["M", "threshold"])  # they vary from step to step
def _few_tokens_kernel(
    x_ptr,
    w_ptr,
    a_ptr,
    b_ptr,
    a0_ptr,
    b0_ptr,
    bias_ptr,
    y_ptr,
    h_ptr,
    seed_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_ar,
    stride_ak,
    stride_bn,
    stride_br,
    stride_a0r,
    stride_a0k,
    stride_b0n,
    stride_b0r,
    scaling,
    threshold,
    keep_scale,
    R: tl.constexpr,
    HAS_FROZEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R)
    mask_m, mask_n, mask_r = offs_m < M, offs_n < N, offs_r < R
    rows_x = x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm
    rows_w = w_ptr + offs_n.to(tl.int64)[:, None] * stride_wn
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    h = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    h0 = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    if DROPOUT:
        seed = tl.load(seed_ptr)
    for first_k in range(0, K, BLOCK_K):
        offs_k = first_k + tl.arange(0, BLOCK_K).to(tl.int64)[None, :]
        mask_k = offs_k < K
        x = tl.load(rows_x + offs_k * stride_xk, mask=mask_m[:, None] & mask_k, other=0.0)
        w = tl.load(rows_w + offs_k * stride_wk, mask=mask_n[:, None] & mask_k, other=0.0)
        a = tl.load(a_ptr + offs_r[:, None] * stride_ar + offs_k * stride_ak, mask=mask_r[:, None] & mask_k, other=0.0)
        acc = tl.dot(x, w.T, acc, input_precision=PRECISION)
        if DROPOUT:
            x = dropped(x, seed, offs_m, first_k, threshold, keep_scale, BLOCK_M, BLOCK_K)
        h = tl.dot(x, a.to(x.dtype).T, h, input_precision=PRECISION)
        if HAS_FROZEN:
            rows_a0 = a0_ptr + offs_r[:, None] * stride_a0r
            a0 = tl.load(rows_a0 + offs_k * stride_a0k, mask=mask_r[:, None] & mask_k, other=0.0)
            h0 = tl.dot(x, a0.to(x.dtype).T, h0, input_precision=PRECISION)

    mask_b = mask_n[:, None] & mask_r[None, :]
    rows_b = b_ptr + offs_n.to(tl.int64)[:, None] * stride_bn
    b = tl.load(rows_b + offs_r[None, :] * stride_br, mask=mask_b, other=0.0)
    element = y_ptr.dtype.element_ty
    low = tl.dot(h.to(element), b.to(element).T, input_precision=PRECISION)
    if HAS_FROZEN:
        rows_b0 = b0_ptr + offs_n.to(tl.int64)[:, None] * stride_b0n
        b0 = tl.load(rows_b0 + offs_r[None, :] * stride_b0r, mask=mask_b, other=0.0)
        low -= tl.dot(h0.to(element), b0.to(element).T, input_precision=PRECISION)
    acc += scaling * low
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    rows_y = y_ptr + offs_m.to(tl.int64)[:, None] * N
    tl.store(rows_y + offs_n[None, :], acc.to(element), mask=mask_m[:, None] & mask_n[None, :])
    if tl.program_id(0) == 0:
        rows_h = h_ptr + offs_m.to(tl.int64)[:, None] * R
        tl.store(rows_h + offs_r[None, :], h.to(element), mask=mask_m[:, None] & mask_r[None, :])


def few_tokens(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None = None,
    A0: Tensor | None = None,
    B0: Tensor | None = None,
    seed: Tensor | None = None,
    p: float = 0.0,
    *,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """``y (M, N)`` and ``h = z Aᵀ (M, R)``, of the dtype of ``x``, for ranks that :func:`takes` allows. Any strides."""
    (M, K), N, R = x.shape, weight.shape[0], A.shape[0]
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    h = torch.empty(M, R, dtype=x.dtype, device=x.device)
    frozen_A, frozen_B = (A, B) if A0 is None or B0 is None else (A0, B0)

    def rerun() -> tuple[Tensor, Tensor]:
        return few_tokens(x, weight, A, B, bias, A0, B0, seed, p, scaling=scaling)

    config = choose("few_tokens", x, N=N, K=K, R=R, frozen=A0 is not None, dropout=p > 0, rerun=rerun)
    grid_of(_few_tokens_kernel, (triton.cdiv(N, config.BLOCK_N), triton.cdiv(M, config.BLOCK_M)))(
        x,
        weight,
        A,
        B,
        frozen_A,
        frozen_B,
        x if bias is None else bias.contiguous(),
        y,
        h,
        x if seed is None else seed,
        M,
        N,
        K,
        *x.stride(),
        *weight.stride(),
        *A.stride(),
        *B.stride(),
        *frozen_A.stride(),
        *frozen_B.stride(),
        scaling,
        *dropout_arguments(p),
        R=R,
        HAS_FROZEN=A0 is not None,
        HAS_BIAS=bias is not None,
        DROPOUT=p > 0,
        PRECISION=precision(x),
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        BLOCK_K=config.BLOCK_K,
        BLOCK_R=padded_rank(R, most_components_at_once(arithmetic(x))),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return y, h
