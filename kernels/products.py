"""g = scaling · dy E, dB = scaling · dyᵀ h and dbias = Σ dy from one read of dy.

dy (M, N) | E (N, S) | h (M, R) | g (M, S) | dB (N, R) | dbias (N,).  Each sum is split among programs, which store fp32
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
"""Of ``E``: what :func:`products` takes."""
_REGISTERS = 96
"""Components of ``E`` and ``h`` together, padded, that fit the registers of a program."""


def fuses(dy: Tensor, E: Tensor, R: int) -> bool:
    """Whether :func:`products` pays: the partials of ``g``, written and read, are less than a second read of ``dy``."""
    N, S = E.shape
    config = choose("products", dy, N=N, K=0, R=S, rerun=None)
    fits = S <= MOST_COMPONENTS and padded_rank(S, MOST_COMPONENTS) + padded_rank(R, MOST_COMPONENTS) <= _REGISTERS
    return fits and config.BLOCK_N * dy.element_size() >= 8 * S


@triton.jit(do_not_specialize=["M", "rows_each"])  # they vary from step to step
def _products_kernel(
    dy_ptr,
    e_ptr,
    h_ptr,
    g_ptr,
    db_ptr,
    dbias_ptr,
    M,
    N,
    rows_each,
    stride_dym,
    stride_dyn,
    stride_en,
    stride_es,
    S: tl.constexpr,
    R: tl.constexpr,
    NEEDS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Partials ``g (tile of N, M, S)``, ``db (split of M, N, R)`` and ``dbias (split of M, N)``."""
    pid_n, split = tl.program_id(0), tl.program_id(1)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_s, offs_r = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_R)
    mask_n, mask_s, mask_r = offs_n < N, offs_s < S, offs_r < R
    offs_n64 = offs_n.to(tl.int64)
    rows_e = e_ptr + offs_n64[:, None] * stride_en
    e = tl.load(rows_e + offs_s[None, :] * stride_es, mask=mask_n[:, None] & mask_s[None, :], other=0.0)
    e = e.to(dy_ptr.dtype.element_ty)
    db = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    dbias = tl.zeros((BLOCK_N,), dtype=tl.float32)
    first = split * rows_each
    for first_m in range(first, min(first + rows_each, M), BLOCK_M):
        offs_m = first_m + tl.arange(0, BLOCK_M)
        offs_m64, mask_m = offs_m.to(tl.int64), offs_m < M
        rows_dy = dy_ptr + offs_m64[:, None] * stride_dym
        dy = tl.load(rows_dy + offs_n64[None, :] * stride_dyn, mask=mask_m[:, None] & mask_n[None, :], other=0.0)
        rows_h = h_ptr + offs_m64[:, None] * R
        h = tl.load(rows_h + offs_r[None, :], mask=mask_m[:, None] & mask_r[None, :], other=0.0)
        db = tl.dot(dy.T, h, db, input_precision=PRECISION)
        rows_g = g_ptr + (pid_n.to(tl.int64) * M + offs_m64)[:, None] * S
        g = tl.dot(dy, e, input_precision=PRECISION)
        tl.store(rows_g + offs_s[None, :], g, mask=mask_m[:, None] & mask_s[None, :])
        if NEEDS_BIAS:
            dbias += tl.sum(dy.to(tl.float32), axis=0)
    rows_db = db_ptr + (split.to(tl.int64) * N + offs_n64)[:, None] * R
    tl.store(rows_db + offs_r[None, :], db, mask=mask_n[:, None] & mask_r[None, :])
    if NEEDS_BIAS:
        tl.store(dbias_ptr + split.to(tl.int64) * N + offs_n64, dbias, mask=mask_n)


def products(
    dy: Tensor, h: Tensor, E: Tensor, dtype: torch.dtype, *, scaling: float, needs_bias: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``g = scaling · dy E``, ``dB = scaling · dyᵀ h`` as ``dtype``, and ``dbias = Σ dy`` if needed.

    ``g`` and ``dbias`` have the dtype of ``dy``. As many columns of ``E`` and ``h`` as :func:`fuses` allows.
    """
    (M, N), S, R = dy.shape, E.shape[1], h.shape[1]

    def rerun() -> object:
        return products(dy, h, E, dtype, scaling=scaling, needs_bias=needs_bias)

    config = choose("products", dy, N=N, K=0, R=S, rerun=rerun)
    tiles = triton.cdiv(N, config.BLOCK_N)
    splits, rows_each = split_rows(M, tiles, config.BLOCK_M, dy.device)
    g = dy.new_empty(tiles, M, S, dtype=torch.float32)
    dB = dy.new_empty(splits, N, R, dtype=torch.float32)
    dbias = dy.new_empty(splits, N, dtype=torch.float32) if needs_bias else None
    grid_of(_products_kernel, (tiles, splits))(
        dy,
        E,
        h,
        g,
        dB,
        dB if dbias is None else dbias,
        M,
        N,
        rows_each,
        *dy.stride(),
        *E.stride(),
        S=S,
        R=R,
        NEEDS_BIAS=needs_bias,
        PRECISION=precision(dy),
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        BLOCK_S=padded_rank(S, MOST_COMPONENTS),
        BLOCK_R=padded_rank(R, MOST_COMPONENTS),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    bias = None if dbias is None else add_up(dbias, 1.0, dy.dtype)
    return add_up(g, scaling, dy.dtype), add_up(dB, scaling, dtype), bias
