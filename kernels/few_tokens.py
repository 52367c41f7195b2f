"""y, h = the forward pass for few tokens in one kernel: x Wᵀ and z Dᵀ in one loop, then the low-rank part.

x (M, K) | z = dropout(x) | W (N, K) | D (R, K) | E (N, R) | y (M, N) | h (M, R).  Every program computes ``h`` of its
rows anew, which costs R / BLOCK_N more arithmetic and saves a launch: with few tokens reading W takes all the time.
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
    """Whether this kernel is used for ``x`` and R components: few tokens for certain, and all components at once."""
    return bool(statically_known_true(x.shape[0] <= MOST_TOKENS)) and most_components_at_once(arithmetic(x)) >= R


@triton.jit(do_not_specialize=["M", "threshold"])  # they vary from step to step
def _few_tokens_kernel(
    x_ptr,
    w_ptr,
    d_ptr,
    e_ptr,
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
    stride_dr,
    stride_dk,
    stride_en,
    stride_er,
    scaling,
    threshold,
    keep_scale,
    R: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    scaling, keep_scale = tl.cast(scaling, tl.float32), tl.cast(keep_scale, tl.float32)  # float64 from torch.compile
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R)
    mask_m, mask_n, mask_r = offs_m < M, offs_n < N, offs_r < R
    rows_x = x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm
    rows_w = w_ptr + offs_n.to(tl.int64)[:, None] * stride_wn
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    h = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    if DROPOUT:
        seed = tl.load(seed_ptr)
    for first_k in range(0, K, BLOCK_K):
        offs_k = first_k + tl.arange(0, BLOCK_K).to(tl.int64)[None, :]
        mask_k = offs_k < K
        x = tl.load(rows_x + offs_k * stride_xk, mask=mask_m[:, None] & mask_k, other=0.0)
        w = tl.load(rows_w + offs_k * stride_wk, mask=mask_n[:, None] & mask_k, other=0.0)
        d = tl.load(d_ptr + offs_r[:, None] * stride_dr + offs_k * stride_dk, mask=mask_r[:, None] & mask_k, other=0.0)
        acc = tl.dot(x, w.T, acc, input_precision=PRECISION)
        if DROPOUT:
            x = dropped(x, seed, offs_m, first_k, threshold, keep_scale, BLOCK_M, BLOCK_K)
        h = tl.dot(x, d.to(x.dtype).T, h, input_precision=PRECISION)

    rows_e = e_ptr + offs_n.to(tl.int64)[:, None] * stride_en
    e = tl.load(rows_e + offs_r[None, :] * stride_er, mask=mask_n[:, None] & mask_r[None, :], other=0.0)
    element = y_ptr.dtype.element_ty
    h = h.to(element)
    acc = tl.dot(h, (e.to(tl.float32) * scaling).to(element).T, acc, input_precision=PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    rows_y = y_ptr + offs_m.to(tl.int64)[:, None] * N
    tl.store(rows_y + offs_n[None, :], acc.to(element), mask=mask_m[:, None] & mask_n[None, :])
    if tl.program_id(0) == 0:
        rows_h = h_ptr + offs_m.to(tl.int64)[:, None] * R
        tl.store(rows_h + offs_r[None, :], h, mask=mask_m[:, None] & mask_r[None, :])


def few_tokens(
    x: Tensor,
    weight: Tensor,
    D: Tensor,
    E: Tensor,
    bias: Tensor | None = None,
    seed: Tensor | None = None,
    p: float = 0.0,
    *,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """``y = x Wᵀ + scaling · h Eᵀ + bias (M, N)`` and ``h = z Dᵀ (M, R)``, of the dtype of ``x``. Any strides.

    For as many components as :func:`takes` allows.
    """
    (M, K), N, R = x.shape, weight.shape[0], D.shape[0]
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    h = torch.empty(M, R, dtype=x.dtype, device=x.device)

    def rerun() -> tuple[Tensor, Tensor]:
        return few_tokens(x, weight, D, E, bias, seed, p, scaling=scaling)

    config = choose("few_tokens", x, N=N, K=K, R=R, dropout=p > 0, rerun=rerun)
    grid_of(_few_tokens_kernel, (triton.cdiv(N, config.BLOCK_N), triton.cdiv(M, config.BLOCK_M)))(
        x,
        weight,
        D,
        E,
        weight if bias is None else bias.contiguous(),
        y,
        h,
        weight if seed is None else seed,
        M,
        N,
        K,
        *x.stride(),
        *weight.stride(),
        *D.stride(),
        *E.stride(),
        scaling,
        *dropout_arguments(p),
        R=R,
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
