"""g = scaling · dy B, g0 = scaling · dy B0, dB = scaling · dyᵀ h and dbias = Σ dy from one read of dy.

dy (M, N) | h (M, R) | B, B0 (N, R) | g, g0 (M, R) | dbias (N,).  Each sum is split among programs, which store fp32
partials; :mod:`ipca.kernels.reduce` adds those in a fixed order. No atomics: the same inputs give the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ipca.kernels.configs import padded_rank, precision
from ipca.kernels.launch import grid_of
from ipca.kernels.reduce import add_up, split_rows
from ipca.kernels.tuning import choose

MOST_COMPONENTS = 64
"""Of all factors together: what :func:`products` takes."""


def fuses(dy: Tensor, B: Tensor, B0: Tensor | None) -> bool:
    """Whether :func:`products` pays: the partials of ``g``, written and read, are less than a second read of ``dy``."""
    (N, R), pairs = B.shape, 1 if B0 is None else 2
    config = choose("products", dy, N=N, K=0, R=R, frozen=B0 is not None, rerun=None)
    return R * pairs <= MOST_COMPONENTS and 8 * R * pairs <= config.BLOCK_N * dy.element_size()


@triton.jit(do_not_specialize=["M", "rows_each"])  # they vary from step to step
def _products_kernel(
    dy_ptr,
    b_ptr,
    b0_ptr,
    h_ptr,
    g_ptr,
    g0_ptr,
    db_ptr,
    dbias_ptr,
    M,
    N,
    rows_each,
    stride_dym,
    stride_dyn,
    stride_bn,
    stride_br,
    stride_b0n,
    stride_b0r,
    R: tl.constexpr,
    HAS_FROZEN: tl.constexpr,
    NEEDS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Partials ``g (tile of N, M, R)``, ``db (split of M, N, R)`` and ``dbias (split of M, N)``."""
    pid_n, split = tl.program_id(0), tl.program_id(1)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R)
    mask_n, mask_r = offs_n < N, offs_r < R
    mask_b = mask_n[:, None] & mask_r[None, :]
    offs_n64 = offs_n.to(tl.int64)
    element = dy_ptr.dtype.element_ty
    b = tl.load(b_ptr + offs_n64[:, None] * stride_bn + offs_r[None, :] * stride_br, mask=mask_b, other=0.0).to(element)
    if HAS_FROZEN:
        rows_b0 = b0_ptr + offs_n64[:, None] * stride_b0n
        b0 = tl.load(rows_b0 + offs_r[None, :] * stride_b0r, mask=mask_b, other=0.0).to(element)
    db = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    dbias = tl.zeros((BLOCK_N,), dtype=tl.float32)
    first = split * rows_each
    for first_m in range(first, min(first + rows_each, M), BLOCK_M):
        offs_m = first_m + tl.arange(0, BLOCK_M)
        offs_m64, mask_m = offs_m.to(tl.int64), offs_m < M
        rows_dy = dy_ptr + offs_m64[:, None] * stride_dym
        dy = tl.load(rows_dy + offs_n64[None, :] * stride_dyn, mask=mask_m[:, None] & mask_n[None, :], other=0.0)
        mask_h = mask_m[:, None] & mask_r[None, :]
        h = tl.load(h_ptr + offs_m64[:, None] * R + offs_r[None, :], mask=mask_h, other=0.0)
        db = tl.dot(dy.T, h, db, input_precision=PRECISION)
        offs_g = (pid_n.to(tl.int64) * M + offs_m64)[:, None] * R + offs_r[None, :]
        tl.store(g_ptr + offs_g, tl.dot(dy, b, input_precision=PRECISION), mask=mask_h)
        if HAS_FROZEN:
            tl.store(g0_ptr + offs_g, tl.dot(dy, b0, input_precision=PRECISION), mask=mask_h)
        if NEEDS_BIAS:
            dbias += tl.sum(dy.to(tl.float32), axis=0)
    rows_db = db_ptr + (split.to(tl.int64) * N + offs_n64)[:, None] * R
    tl.store(rows_db + offs_r[None, :], db, mask=mask_b)
    if NEEDS_BIAS:
        tl.store(dbias_ptr + split.to(tl.int64) * N + offs_n64, dbias, mask=mask_n)


def products(
    dy: Tensor,
    h: Tensor,
    B: Tensor,
    B0: Tensor | None = None,
    *,
    scaling: float,
    needs_bias: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """``g = scaling · dy B``, ``g0 = scaling · dy B0``, ``dB = scaling · dyᵀ h``, ``dbias``, from one read of ``dy``.

    ``g, g0`` have the dtype of ``dy``, ``dB`` that of ``B``, ``dbias`` that of ``dy``. At most ``MOST_COMPONENTS``,
    frozen ones included.
    """
    (M, N), R = dy.shape, B.shape[1]
    frozen = B if B0 is None else B0

    def rerun() -> object:
        return products(dy, h, B, B0, scaling=scaling, needs_bias=needs_bias)

    config = choose("products", dy, N=N, K=0, R=R, frozen=B0 is not None, rerun=rerun)
    tiles = triton.cdiv(N, config.BLOCK_N)
    splits, rows_each = split_rows(M, tiles, config.BLOCK_M, dy.device)
    g = dy.new_empty(tiles, M, R, dtype=torch.float32)
    g0 = None if B0 is None else torch.empty_like(g)
    dB = dy.new_empty(splits, N, R, dtype=torch.float32)
    dbias = dy.new_empty(splits, N, dtype=torch.float32) if needs_bias else None
    grid_of(_products_kernel, (tiles, splits))(
        dy,
        B,
        frozen,
        h,
        g,
        g if g0 is None else g0,
        dB,
        dB if dbias is None else dbias,
        M,
        N,
        rows_each,
        *dy.stride(),
        *B.stride(),
        *frozen.stride(),
        R=R,
        HAS_FROZEN=B0 is not None,
        NEEDS_BIAS=needs_bias,
        PRECISION=precision(dy),
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        BLOCK_R=padded_rank(R, MOST_COMPONENTS),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return (
        add_up(g, scaling, dy.dtype),
        None if g0 is None else add_up(g0, scaling, dy.dtype),
        add_up(dB, scaling, B.dtype),
        None if dbias is None else add_up(dbias, 1.0, dy.dtype),
    )
