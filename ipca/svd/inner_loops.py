"""Three inner loops of the window SVD: in PyTorch, and by the CUDA kernels of ``csrc/`` where tensors are on a GPU.

Each is a sequence of tiny dependent steps, which no library offers for a batch; everything around them is large
products and triangular solves. The PyTorch code is the contract, and ``tests/csrc`` compares the kernels with it.
On a GPU nothing waits for the device. Where the extension cannot be had, the PyTorch code runs there after one warning.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ipca import _extension

PANEL = 64
"""Columns that :func:`ldlt_panel_` factorizes at once."""
_LEAF = 16
_SUFFIX = {torch.float32: "float32", torch.float64: "float64"}


def ldlt_panel_(panel: Tensor, growth: Tensor, positive: Tensor, tiny: Tensor) -> None:
    """Factorize the first columns of symmetric matrices, ``A = L D Lᵀ`` without pivoting, in place.

    Args:
        panel: ``(batch, rows, k)``, ``k <= rows``, the last dimension contiguous: the columns of what is left of each
            matrix. Of its first ``k`` rows only the lower triangle counts. Becomes ``L`` (unit lower triangular, its
            ones not stored) with ``D`` in the place of the ones.
        growth: ``(batch, rows)``; row ``i`` gains ``Σ_j L_ij² |D_j|``, a term of the diagonal of ``|L| |D| |Lᵀ|``.
        positive: ``(batch,)``, int64; gains the number of ``D_j > 0``.
        tiny: ``(batch,)``, positive; a pivot smaller in magnitude becomes ``−tiny``, so that nothing is divided by 0
            and an eigenvalue at the shift counts as not above it.
    """
    if extension := _extension_for(panel):
        launch_ldlt_panel(extension, panel, growth, positive, tiny)
        return
    k = panel.shape[-1]
    for matrix, least in zip(panel, tiny.tolist(), strict=True):
        _diagonal_block_(matrix[:k], least)
    top, below = panel[:, :k], panel[:, k:]
    D = top.diagonal(dim1=-2, dim2=-1)
    if below.shape[1]:
        below.copy_(torch.linalg.solve_triangular(top.mT, below, upper=True, left=False, unitriangular=True))
        below.div_(D[:, None])
    weights = D.abs()
    growth[:, :k] += (top.tril(-1).square() @ weights[..., None])[..., 0] + weights
    growth[:, k:] += (below.square() @ weights[..., None])[..., 0]
    positive += (D > 0).sum(-1)


def _diagonal_block_(block: Tensor, tiny: float) -> None:
    """``L D Lᵀ`` of one ``(k, k)`` block, in leaves of 16 columns."""
    A: Any = block.numpy() if block.device.type == "cpu" else block  # NumPy's calls cost a quarter of PyTorch's here
    k = A.shape[0]
    with np.errstate(all="ignore"):  # entries that grow beyond all bounds show in the growth
        for first in range(0, k, _LEAF):
            last = min(first + _LEAF, k)
            for j in range(first, last):
                if not abs(A[j, j]) >= tiny:  # also where the pivot is NaN
                    A[j, j] = -tiny
                old = A[j + 1 :, j] + 0
                A[j + 1 :, j] /= A[j, j]
                A[j + 1 :, j + 1 : last] -= A[j + 1 :, j, None] * old[None, : last - j - 1]
            L = A[last:, first:last]
            A[last:, last:] -= L @ (L * A.diagonal()[first:last]).T


def scaled_cholesky(G: Tensor) -> tuple[Tensor, Tensor]:
    """``T (batch, p, p)``, upper triangular, such that ``X T`` is orthonormal where ``G = XᵀX (batch, p, p)``.

    With ``C = D G D``, ``D = diag(G)^-1/2``, and the Cholesky factor ``C + shift I = K Kᵀ``: ``T = D K^-T``. The shift
    is 0, and where a pivot of ``K`` comes out below ``16 p eps`` the least of ``16 p eps · 100^i`` with which none does
    (then ``X T`` is well conditioned, not yet orthonormal). A zero column stays zero. Only the lower triangle of ``G``
    is meant to count.

    Returns:
        ``T`` and the shifts ``(batch,)``. Where ``G`` is not finite no shift helps, and ``T`` is not finite either.

    Source: Fukaya et al., "Shifted Cholesky QR for computing the QR factorization of ill-conditioned matrices",
    SIAM J. Sci. Comput. 42 (2020); the scaling is van der Sluis's.
    """
    if extension := _extension_for(G):
        return launch_scaled_cholesky(extension, G)
    p = G.shape[-1]
    least = 16 * p * torch.finfo(G.dtype).eps
    diagonal = G.diagonal(dim1=-2, dim2=-1)
    scale = torch.where(diagonal > 0, diagonal.rsqrt(), 0)
    eye = torch.eye(p, dtype=G.dtype, device=G.device)
    C = G * scale[:, None] * scale[..., None]
    C.diagonal(dim1=-2, dim2=-1).masked_fill_(diagonal <= 0, 1)
    shift = torch.zeros_like(diagonal[:, 0])
    retry = torch.full_like(shift, least)
    for _ in range(8):
        K, info = torch.linalg.cholesky_ex(C + shift[:, None, None] * eye)
        pivots = K.diagonal(dim1=-2, dim2=-1).square().amin(-1)
        failed = (info != 0) | ~(pivots >= least)
        if not failed.any():
            break
        shift = torch.where(failed, retry, shift)
        retry = torch.where(failed, 100 * retry, retry)
    return scale[..., None] * torch.linalg.solve_triangular(K.mT, eye.expand_as(K), upper=True), shift


def lanczos_step_(basis: Tensor, product: Tensor, alpha: Tensor, beta: Tensor, step: int) -> None:
    """One step of independent Lanczos recurrences with full reorthogonalization.

    With ``v_j = basis[j]`` and ``w = product = G v_step``: ``alpha_step = ⟨v_step, w⟩``; ``w`` is made orthogonal to
    ``v_0 … v_step`` by classical Gram–Schmidt, twice; ``beta_step = ‖w‖``; ``v_{step+1} = w / beta_step``, or 0 where
    ``w`` vanished to rounding: the space is exhausted. Nothing here looks for NaN.

    Args:
        basis: ``(steps + 1, chains, n)``; row ``step + 1`` is written.
        product: ``(chains, n)``; overwritten.
        alpha, beta: ``(chains, steps)``; column ``step`` is written.
        step: ``0 <= step < steps``.
    """
    if extension := _extension_for(basis):
        launch_lanczos_step(extension, basis, product, alpha, beta, step)
        return
    seen = basis[: step + 1].transpose(0, 1)
    alpha[:, step] = (basis[step] * product).sum(-1)
    before = product.norm(dim=-1)
    for _ in range(2):  # once leaves an overlap of eps times the cancellation, twice none ("twice is enough", Kahan)
        product -= ((seen @ product[..., None]).mT @ seen)[:, 0]
    norm = product.norm(dim=-1)
    norm = torch.where(norm > 64 * torch.finfo(basis.dtype).eps * before, norm, 0)
    beta[:, step] = norm
    basis[step + 1] = product * torch.where(norm > 0, 1 / norm, 0)[:, None]


def launch_ldlt_panel(extension: ModuleType, panel: Tensor, growth: Tensor, positive: Tensor, tiny: Tensor) -> None:
    """Launch the kernels of :func:`ldlt_panel_`; any strides, but those of a row and of ``positive``."""
    batch, rows, k = panel.shape
    _check("panel", panel, panel, (batch, rows, k), adjacent=True)
    _check("growth", growth, panel, (batch, rows))
    _check("positive", positive, panel, (batch,), torch.int64, adjacent=True)
    tiny = tiny.to(panel.dtype).contiguous()
    _check("tiny", tiny, panel, (batch,))
    getattr(extension, f"ldlt_panel_{_SUFFIX[panel.dtype]}")(
        *_device_and_stream(panel), panel.data_ptr(), *panel.stride()[:2], growth.data_ptr(), *growth.stride(),
        positive.data_ptr(), tiny.data_ptr(), batch, rows, k,
    )  # fmt: skip


def launch_scaled_cholesky(extension: ModuleType, G: Tensor) -> tuple[Tensor, Tensor]:
    """Launch the kernel of :func:`scaled_cholesky`, which reads the lower triangle of ``G``."""
    batch, p, _ = G.shape
    _check("G", G, G, (batch, p, p))
    G = G if G.stride(-1) == 1 else G.contiguous()
    T, shift = torch.empty_like(G, memory_format=torch.contiguous_format), G.new_empty(batch)
    getattr(extension, f"scaled_cholesky_{_SUFFIX[G.dtype]}")(
        *_device_and_stream(G), G.data_ptr(), *G.stride()[:2], T.data_ptr(), shift.data_ptr(), batch, p
    )
    return T, shift


def launch_lanczos_step(
    extension: ModuleType, basis: Tensor, product: Tensor, alpha: Tensor, beta: Tensor, step: int
) -> None:
    """Launch the kernel of :func:`lanczos_step_`; any strides, but those of a vector."""
    vectors, chains, n = basis.shape
    if not 0 <= step < vectors - 1:
        raise ValueError(f"step {step} of a basis with room for {vectors} vectors; 0 to {vectors - 2} fit.")
    _check("basis", basis, basis, (vectors, chains, n), adjacent=True)
    _check("product", product, basis, (chains, n), adjacent=True)
    _check("alpha", alpha, basis, (chains, vectors - 1))
    _check("beta", beta, basis, (chains, vectors - 1))
    alpha, beta = alpha[:, step], beta[:, step]
    getattr(extension, f"lanczos_step_{_SUFFIX[basis.dtype]}")(
        *_device_and_stream(basis), basis.data_ptr(), *basis.stride()[:2], product.data_ptr(), product.stride(0),
        alpha.data_ptr(), alpha.stride(0), beta.data_ptr(), beta.stride(0), chains, n, step,
    )  # fmt: skip


def _check(
    name: str,
    tensor: Tensor,
    like: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype | None = None,
    adjacent: bool = False,
) -> None:
    """Raise unless a kernel can take the tensor: it gets a raw pointer and would write past the end."""
    dtype = dtype or like.dtype
    if like.dtype not in _SUFFIX:
        raise TypeError(f"{name} is {like.dtype}; the kernels take float32 and float64.")
    if tensor.shape != shape or tensor.dtype != dtype or tensor.device != like.device:
        came, fits = (tuple(tensor.shape), tensor.dtype, tensor.device), (shape, dtype, like.device)
        raise ValueError(f"{name} is {' '.join(map(str, came))}; {' '.join(map(str, fits))} fits.")
    if adjacent and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name}'s last dimension has stride {tensor.stride(-1)}; 1 fits. Make it contiguous.")


def _device_and_stream(tensor: Tensor) -> tuple[int, int]:
    if not tensor.is_cuda:
        return 0, 0
    return tensor.get_device(), torch.cuda.current_stream(tensor.device).cuda_stream


def _extension_for(tensor: Tensor) -> ModuleType | None:
    """The CUDA extension where ``tensor`` is on a GPU that has it."""
    return _extension_on(tensor.get_device()) if tensor.is_cuda else None


@cache
def _extension_on(index: int) -> ModuleType | None:
    return _extension.load(index, torch.cuda.get_device_capability(index))
