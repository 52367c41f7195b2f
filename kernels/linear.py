"""out = a w + scaling · l cᵀ + bias in one pass over w and out: forward, and input gradient.

Forward, y = x Wᵀ + scaling · h Eᵀ + bias:       a = x (M, K), w = Wᵀ, l = h (M, R), c = E (N, R).
Input gradient, dx = dy W + mask ∘ (g D):         a = dy, w = W, l = g, c = Dᵀ; N and K change places.

A persistent grid walks the tiles of ``out (M, N)`` in groups of rows that share columns of ``w`` in the L2 cache. After
the loop over K the low-rank product is added into the same fp32 accumulator. Only under dropout, whose mask covers the
low-rank part and not the rest, it has one of its own, for a part of the tile's columns at a time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ipca.kernels.configs import arithmetic, linear_rank_block, precision, subtiles
from ipca.kernels.dropout import kept
from ipca.kernels.launch import descriptor_fits, dropout_arguments, grid_of, has_descriptors, programs
from ipca.kernels.tuning import choose


@triton.jit
def _add_low_rank(
    acc,
    l_ptr,
    c_ptr,
    offs_m,
    offs_n,
    M,
    N,
    stride_cn,
    stride_cr,
    scaling,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``acc + scaling · l cᵀ`` for rows ``offs_m`` of ``l (M, R)``, contiguous, and rows ``offs_n`` of ``c (N, R)``."""
    for block in tl.range(0, tl.cdiv(R, BLOCK_R), num_stages=1):
        offs_r = block * BLOCK_R + tl.arange(0, BLOCK_R)
        mask_r = offs_r[None, :] < R
        rows_l = l_ptr + offs_m.to(tl.int64)[:, None] * R + offs_r[None, :]
        l = tl.load(rows_l, mask=(offs_m < M)[:, None] & mask_r, other=0.0)  # noqa: E741
        rows_c = c_ptr + offs_n.to(tl.int64)[:, None] * stride_cn + offs_r[None, :].to(tl.int64) * stride_cr
        c = tl.load(rows_c, mask=(offs_n < N)[:, None] & mask_r, other=0.0).to(tl.float32) * scaling
        acc = tl.dot(l, c.to(l.dtype).T, acc, input_precision=PRECISION)
    return acc


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
    scaling,
    threshold,
    keep_scale,
    R: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    ROWS_ARE_N: tl.constexpr,  # w is stored (N, K), as in the forward, or (K, N)
    TMA: tl.constexpr,
    TMA_STORE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    SUBTILE: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    scaling, keep_scale = tl.cast(scaling, tl.float32), tl.cast(keep_scale, tl.float32)  # float64 from torch.compile
    COLUMNS: tl.constexpr = BLOCK_N // SUBTILE
    if TMA:
        a_tiles = tl.make_tensor_descriptor(a_ptr, [M, K], [stride_am, 1], [BLOCK_M, BLOCK_K])
        if ROWS_ARE_N:
            w_tiles = tl.make_tensor_descriptor(w_ptr, [N, K], [stride_wn, 1], [BLOCK_N, BLOCK_K])
        else:
            w_tiles = tl.make_tensor_descriptor(w_ptr, [K, N], [stride_wk, 1], [BLOCK_K, BLOCK_N])
    if TMA_STORE:
        out_tiles = tl.make_tensor_descriptor(out_ptr, [M, N], [N, 1], [BLOCK_M, COLUMNS])
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
        if not DROPOUT:
            acc = _add_low_rank(
                acc, l_ptr, c_ptr, offs_m, offs_n, M, N, stride_cn, stride_cr, scaling, R, BLOCK_R, PRECISION
            )
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
            out, first = parts[part], first_n + part * COLUMNS
            columns = first + tl.arange(0, COLUMNS)
            if DROPOUT:
                low = tl.zeros((BLOCK_M, COLUMNS), dtype=tl.float32)
                low = _add_low_rank(
                    low, l_ptr, c_ptr, offs_m, columns, M, N, stride_cn, stride_cr, scaling, R, BLOCK_R, PRECISION
                )
                keep = kept(tl.load(seed_ptr), offs_m, first, threshold, BLOCK_M, COLUMNS)
                out += tl.where(keep, low * keep_scale, 0.0)
            if HAS_BIAS:
                out += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
            if TMA_STORE:
                out_tiles.store([first_m, first], out.to(out_ptr.dtype.element_ty))
            else:
                places = out_ptr + offs_m.to(tl.int64)[:, None] * N + columns[None, :]
                mask = (offs_m < M)[:, None] & (columns < N)[None, :]
                tl.store(places, out.to(out_ptr.dtype.element_ty), mask=mask)


def linear(
    x: Tensor,
    weight: Tensor,
    h: Tensor,
    E: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float,
    tma: bool | None = None,
) -> Tensor:
    """``y = x Wᵀ + scaling · h Eᵀ + bias``, of the dtype of ``x``; ``h`` contiguous."""
    return _launch("linear", x, weight, h, E, bias, scaling, None, 0.0, tma)


def input_grad(
    dy: Tensor,
    weight: Tensor,
    g: Tensor,
    D: Tensor,
    seed: Tensor | None = None,
    p: float = 0.0,
    *,
    tma: bool | None = None,
) -> Tensor:
    """``dx = dy W + mask ∘ (g D)``, of the dtype of ``dy``; ``g`` contiguous."""
    return _launch("input_grad", dy, weight.mT, g, D.mT, None, 1.0, seed, p, tma)


def uses_descriptors(a: Tensor, w: Tensor) -> bool:
    """Whether TMA loads the two operands: the device has it, matrix units are in use, and both are aligned."""
    if not has_descriptors(a.device) or arithmetic(a) == "float32":
        return False
    return descriptor_fits(a) and descriptor_fits(w)


def _launch(
    use: str,
    a: Tensor,
    w: Tensor,
    low: Tensor,
    c: Tensor,
    bias: Tensor | None,
    scaling: float,
    seed: Tensor | None,
    p: float,
    tma: bool | None,
) -> Tensor:
    """Both uses of the kernel: ``w (N, K)`` as a view, stored so or transposed."""
    (M, K), N, R, rows_are_n = a.shape, w.shape[0], low.shape[1], use == "linear"
    out = torch.empty(M, N, dtype=a.dtype, device=a.device)
    tma = uses_descriptors(a, w if rows_are_n else w.mT) if tma is None else tma

    def rerun() -> Tensor:
        return _launch(use, a, w, low, c, bias, scaling, seed, p, tma)

    config = choose(use, a, N=N, K=K, R=R, dropout=p > 0, tma=tma, rerun=rerun)
    count = programs(a.device)
    grid_of(_linear_kernel, (count,), descriptors=tma and a.is_cuda)(
        a,
        w,
        low,
        c,
        w if bias is None else bias.contiguous(),
        out,
        w if seed is None else seed,
        M,
        N,
        K,
        *a.stride(),
        *w.stride(),
        *c.stride(),
        scaling,
        *dropout_arguments(p),
        R=R,
        HAS_BIAS=bias is not None,
        DROPOUT=p > 0,
        ROWS_ARE_N=rows_are_n,
        TMA=tma,
        TMA_STORE=tma and N * out.element_size() % 16 == 0,
        PRECISION=precision(a),
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        BLOCK_K=config.BLOCK_K,
        BLOCK_R=linear_rank_block(R, arithmetic(a), tma=tma),
        GROUP_M=config.GROUP_M,
        SUBTILE=subtiles(config, arithmetic(a), dropout=p > 0),
        PROGRAMS=count,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out
