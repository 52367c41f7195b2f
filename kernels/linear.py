"""out = a w + scaling · (l cᵀ − l0 c0ᵀ) + bias in one pass over w and out: forward, and input gradient.

Forward, y = x Wᵀ + scaling · (h Bᵀ − h0 B0ᵀ) + bias:      a = x (M, K), w = Wᵀ, l = h (M, R), c = B (N, R).
Input gradient, dx = dy W + mask ∘ (g A − g0 A0):          a = dy, w = W, l = g, c = Aᵀ; N and K change places.

A persistent grid walks the tiles of ``out (M, N)`` in groups of rows that share columns of ``w`` in the L2 cache. The
low-rank part is added in the epilogue, a part of the tile's columns at a time: it needs an accumulator of its own,
since only a difference of two equal products is exactly 0. Accumulates in fp32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ipca.kernels.configs import arithmetic, linear_rank_block, precision, subtiles
from ipca.kernels.dropout import kept
from ipca.kernels.launch import allow_descriptors, descriptor_fits, dropout_arguments, grid_of, programs
from ipca.kernels.tuning import choose


@triton.jit
def low_rank(
    l_ptr,
    c_ptr,
    offs_m,
    offs_n,
    M,
    N,
    stride_cn,
    stride_cr,
    low,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``low + l cᵀ`` for rows ``offs_m`` of ``l (M, R)``, contiguous, and rows ``offs_n`` of ``c (N, R)``."""
    for block in tl.range(0, tl.cdiv(R, BLOCK_R), num_stages=1):
        offs_r = block * BLOCK_R + tl.arange(0, BLOCK_R)
        mask_r = offs_r[None, :] < R
        rows_l = l_ptr + offs_m.to(tl.int64)[:, None] * R + offs_r[None, :]
        l = tl.load(rows_l, mask=(offs_m < M)[:, None] & mask_r, other=0.0)  # noqa: E741
        rows_c = c_ptr + offs_n.to(tl.int64)[:, None] * stride_cn + offs_r[None, :].to(tl.int64) * stride_cr
        c = tl.load(rows_c, mask=(offs_n < N)[:, None] & mask_r, other=0.0)
        low = tl.dot(l, c.to(l.dtype).T, low, input_precision=PRECISION)
    return low


@triton.jit
def _store_columns(
    acc,
    l_ptr,
    c_ptr,
    l0_ptr,
    c0_ptr,
    bias_ptr,
    out_ptr,
    seed_ptr,
    first_m,
    first_n,
    M,
    N,
    stride_cn,
    stride_cr,
    stride_c0n,
    stride_c0r,
    scaling,
    threshold,
    keep_scale,
    R: tl.constexpr,
    HAS_FROZEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Finish ``COLUMNS`` columns of a tile, from ``first_n`` on, and store them."""
    offs_m, offs_n = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, COLUMNS)
    low = tl.zeros((BLOCK_M, COLUMNS), dtype=tl.float32)
    low = low_rank(l_ptr, c_ptr, offs_m, offs_n, M, N, stride_cn, stride_cr, low, R, BLOCK_R, PRECISION)
    if HAS_FROZEN:
        low0 = tl.zeros((BLOCK_M, COLUMNS), dtype=tl.float32)
        low -= low_rank(l0_ptr, c0_ptr, offs_m, offs_n, M, N, stride_c0n, stride_c0r, low0, R, BLOCK_R, PRECISION)
    if DROPOUT:
        keep = kept(tl.load(seed_ptr), offs_m, first_n, threshold, BLOCK_M, COLUMNS)
        low = tl.where(keep, low * keep_scale, 0.0)
    acc += scaling * low
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    out = out_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    if ACCUMULATE:
        acc += tl.load(out, mask=mask, other=0.0).to(tl.float32)
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _quarters(acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """A tile's columns in four parts, from left to right."""
    left, right = _halves(acc, BLOCK_M, BLOCK_N)
    return _halves(left, BLOCK_M, BLOCK_N // 2) + _halves(right, BLOCK_M, BLOCK_N // 2)


@triton.jit
def _halves(acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and the right half of a tile's columns."""
    return tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit(do_not_specialize=["M", "threshold"])  # they vary from step to step
def _linear_kernel(
    a_ptr,
    w_ptr,
    l_ptr,
    c_ptr,
    l0_ptr,
    c0_ptr,
    bias_ptr,
    out_ptr,
    seed_ptr,
    M,
    N,
    K,
    stride_am,
    stride_ak,
    stride_wn,
    stride_wk,
    stride_cn,
    stride_cr,
    stride_c0n,
    stride_c0r,
    scaling,
    threshold,
    keep_scale,
    R: tl.constexpr,
    HAS_FROZEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    ROWS_ARE_N: tl.constexpr,  # w is stored (N, K), as in the forward, or (K, N)
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    SUBTILE: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    if TMA:
        a_tiles = tl.make_tensor_descriptor(a_ptr, [M, K], [stride_am, 1], [BLOCK_M, BLOCK_K])
        if ROWS_ARE_N:
            w_tiles = tl.make_tensor_descriptor(w_ptr, [N, K], [stride_wn, 1], [BLOCK_N, BLOCK_K])
        else:
            w_tiles = tl.make_tensor_descriptor(w_ptr, [K, N], [stride_wk, 1], [BLOCK_K, BLOCK_N])
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS):
        group, within = tile // (GROUP_M * tiles_n), tile % (GROUP_M * tiles_n)
        rows = min(tiles_m - group * GROUP_M, GROUP_M)
        first_m = (group * GROUP_M + within % rows) * BLOCK_M
        first_n = within // rows * BLOCK_N
        offs_m, offs_n = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for first_k in range(0, K, BLOCK_K):
            if TMA:
                a = a_tiles.load([first_m, first_k])
                w = w_tiles.load([first_n, first_k]).T if ROWS_ARE_N else w_tiles.load([first_k, first_n])
            else:
                offs_k = first_k + tl.arange(0, BLOCK_K).to(tl.int64)
                mask_k = offs_k < K
                rows_a = a_ptr + offs_m.to(tl.int64)[:, None] * stride_am
                a = tl.load(
                    rows_a + offs_k[None, :] * stride_ak, mask=(offs_m < M)[:, None] & mask_k[None, :], other=0.0
                )
                columns_w = w_ptr + offs_n.to(tl.int64)[None, :] * stride_wn
                mask_w = mask_k[:, None] & (offs_n < N)[None, :]
                w = tl.load(columns_w + offs_k[:, None] * stride_wk, mask=mask_w, other=0.0)
            acc = tl.dot(a, w, acc, input_precision=PRECISION)
        COLUMNS: tl.constexpr = BLOCK_N // SUBTILE
        if SUBTILE == 1:
            parts = (acc,)
        elif SUBTILE == 2:
            parts = _halves(acc, BLOCK_M, BLOCK_N)
        elif SUBTILE == 4:
            parts = _quarters(acc, BLOCK_M, BLOCK_N)
        else:
            left, right = _halves(acc, BLOCK_M, BLOCK_N)
            parts = _quarters(left, BLOCK_M, BLOCK_N // 2) + _quarters(right, BLOCK_M, BLOCK_N // 2)
        for part in tl.static_range(SUBTILE):
            _store_columns(
                parts[part],
                l_ptr,
                c_ptr,
                l0_ptr,
                c0_ptr,
                bias_ptr,
                out_ptr,
                seed_ptr,
                first_m,
                first_n + part * COLUMNS,
                M,
                N,
                stride_cn,
                stride_cr,
                stride_c0n,
                stride_c0r,
                scaling,
                threshold,
                keep_scale,
                R,
                HAS_FROZEN,
                HAS_BIAS,
                DROPOUT,
                ACCUMULATE,
                PRECISION,
                BLOCK_M,
                COLUMNS,
                BLOCK_R,
            )


def linear(
    x: Tensor,
    weight: Tensor,
    h: Tensor,
    B: Tensor,
    h0: Tensor | None = None,
    B0: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scaling: float,
    tma: bool | None = None,
) -> Tensor:
    """``y = x Wᵀ + scaling · (h Bᵀ − h0 B0ᵀ) + bias``, of the dtype of ``x``; ``h, h0`` contiguous."""
    return _launch(x, weight, True, h, B, h0, B0, bias, scaling, None, 0.0, None, tma)


def input_grad(
    dy: Tensor,
    weight: Tensor,
    g: Tensor,
    A: Tensor,
    g0: Tensor | None = None,
    A0: Tensor | None = None,
    seed: Tensor | None = None,
    p: float = 0.0,
    *,
    out: Tensor | None = None,
    tma: bool | None = None,
) -> Tensor:
    """``dx = dy W + mask ∘ (g A − g0 A0)``, of the dtype of ``dy``, added to ``out`` where that is given."""
    frozen = None if A0 is None else A0.mT
    return _launch(dy, weight.mT, False, g, A.mT, g0, frozen, None, 1.0, seed, p, out, tma)


def uses_descriptors(a: Tensor, w: Tensor) -> bool:
    """Whether TMA loads the two operands: Hopper or newer, matrix units in use, and both aligned."""
    if not a.is_cuda or torch.cuda.get_device_capability(a.device)[0] < 9 or arithmetic(a) == "float32":
        return False
    return descriptor_fits(a) and descriptor_fits(w)


def _launch(
    a: Tensor,
    w: Tensor,
    rows_are_n: bool,
    low: Tensor,
    c: Tensor,
    low0: Tensor | None,
    c0: Tensor | None,
    bias: Tensor | None,
    scaling: float,
    seed: Tensor | None,
    p: float,
    out: Tensor | None,
    tma: bool | None,
) -> Tensor:
    """Both uses of the kernel: ``w (N, K)`` as a view, stored so or transposed."""
    (M, K), N, R = a.shape, w.shape[0], low.shape[1]
    y = torch.empty(M, N, dtype=a.dtype, device=a.device) if out is None else out
    tma = uses_descriptors(a, w if rows_are_n else w.mT) if tma is None else tma
    if tma and a.is_cuda:
        allow_descriptors()

    def rerun() -> Tensor:
        return _launch(a, w, rows_are_n, low, c, low0, c0, bias, scaling, seed, p, None, tma)

    config = choose("linear", a, N=N, K=K, R=R, frozen=low0 is not None, dropout=p > 0, tma=tma, rerun=rerun)
    frozen = c if c0 is None else c0
    count = programs(a.device)
    grid_of(_linear_kernel, (count,))(
        a,
        w,
        low,
        c,
        low if low0 is None else low0,
        frozen,
        a if bias is None else bias.contiguous(),
        y,
        a if seed is None else seed,
        M,
        N,
        K,
        *a.stride(),
        *w.stride(),
        *c.stride(),
        *frozen.stride(),
        scaling,
        *dropout_arguments(p),
        R=R,
        HAS_FROZEN=low0 is not None,
        HAS_BIAS=bias is not None,
        DROPOUT=p > 0,
        ACCUMULATE=out is not None,
        ROWS_ARE_N=rows_are_n,
        TMA=tma,
        PRECISION=precision(a),
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        BLOCK_K=config.BLOCK_K,
        BLOCK_R=linear_rank_block(R, arithmetic(a)),
        GROUP_M=config.GROUP_M,
        SUBTILE=subtiles(config, arithmetic(a), frozen=low0 is not None, dropout=p > 0),
        PROGRAMS=count,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return y
