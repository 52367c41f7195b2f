"""The products of forward and backward in plain PyTorch, named like the Triton kernels for them.

x (M, K) | weight (N, K) | D (S, K) | E (N, S) | h, g (M, S) | z = dropout(x) | noise, p: see :mod:`ipca.ops.dropout`

The large product comes in two orders: *base first*, ``x Wᵀ`` and then the low-rank part on top, as the formula is
written, and *low first*, where the matrix product of ``W`` adds itself to the low-rank part (beta = 1).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor

from ipca.ops.dropout import keep_mask, keep_scale


def project(x: Tensor, D: Tensor, noise: Tensor | None = None, p: float = 0.0, *, scaling: float = 1.0) -> Tensor:
    """``scaling · z Dᵀ``."""
    z, scale = (x, scaling) if noise is None else (_masked(x, noise, p), scaling * keep_scale(p))
    return scaled(F.linear(z, _as(D, x.dtype)), scale)


def products(
    dy: Tensor, h: Tensor, E: Tensor, dtype: torch.dtype, *, scaling: float, needs_bias: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``g = scaling · dy E``, ``dB = scaling · dyᵀ h`` as ``dtype``, and ``dbias = Σ dy`` if needed."""
    dB = outer(h, dy, dtype, scaling=scaling, transposed=True)
    return project(dy, E.mT, scaling=scaling), dB, dy.sum(0) if needs_bias else None


def outer(
    g: Tensor,
    x: Tensor,
    dtype: torch.dtype,
    noise: Tensor | None = None,
    p: float = 0.0,
    *,
    scaling: float = 1.0,
    transposed: bool = False,
) -> Tensor:
    """``scaling · gᵀ z (R, K)``, or its transpose, as ``dtype``."""
    z, scale = (x, scaling) if noise is None else (_masked(x, noise, p), scaling * keep_scale(p))
    return _as(scaled(z.mT @ g if transposed else g.mT @ z, scale), dtype)


def linear_base_first(
    x: Tensor, weight: Tensor, h: Tensor, E: Tensor, bias: Tensor | None = None, *, scaling: float
) -> Tensor:
    """``y = x Wᵀ + bias``, then ``y += scaling · h Eᵀ``: to the bit that of ``nn.Linear`` if ``h Eᵀ`` is 0.

    For the sake of those bits ``x (…, K)`` comes as the caller has it; ``y (M, N)``.
    """
    y = F.linear(x, weight, bias)
    rows = y if y.ndim == 2 else y.reshape(-1, y.shape[-1])
    return rows.addmm_(h, _as(E, x.dtype).mT, alpha=scaling)


def linear_low_first(
    x: Tensor, weight: Tensor, h: Tensor, E: Tensor, bias: Tensor | None = None, *, scaling: float
) -> Tensor:
    """``y = scaling · h Eᵀ + bias``, then ``y += x Wᵀ``; while tracing a sum, as an ``addmm_`` in a graph copies y."""
    if isinstance(x, FunctionalTensor):
        return F.linear(x, weight, bias) + F.linear(h, (scaling * E).to(x.dtype))
    start, beta = (x.new_empty(()), 0.0) if bias is None else (bias, 1.0)
    y = torch.addmm(start, h, _as(E, x.dtype).mT, beta=beta, alpha=scaling)
    return y.addmm_(x, weight.mT)


def merged_weight(weight: Tensor, D: Tensor, E: Tensor, scaling: float) -> Tensor:
    """``W_eff = W + scaling · E D``, of the dtype of ``weight``."""
    return torch.addmm(weight, _as(E, weight.dtype), _as(D, weight.dtype), alpha=scaling)


def input_grad_base_first(
    dy: Tensor, weight: Tensor, g: Tensor, D: Tensor, noise: Tensor | None = None, p: float = 0.0
) -> Tensor:
    """``dx = dy W``, then ``dx += mask ∘ (g D)``."""
    dx, D = dy @ weight, _as(D, dy.dtype)
    if noise is None:
        return dx.addmm_(g, D)
    return dx.addcmul_(g @ D, _ones_where_kept(dx, noise, p), value=keep_scale(p))


def input_grad_low_first(
    dy: Tensor, weight: Tensor, g: Tensor, D: Tensor, noise: Tensor | None = None, p: float = 0.0
) -> Tensor:
    """``dx = mask ∘ (g D)``, then ``dx += dy W``; while tracing a sum."""
    low = g @ _as(D, dy.dtype)
    if noise is not None:
        low = scaled(low.mul_(_ones_where_kept(low, noise, p)), keep_scale(p))
    return dy @ weight + low if isinstance(dy, FunctionalTensor) else low.addmm_(dy, weight)


def _masked(x: Tensor, noise: Tensor, p: float) -> Tensor:
    """``z`` but for its scale, which is left to a smaller tensor."""
    return _ones_where_kept(x, noise, p).mul_(x)


def _ones_where_kept(x: Tensor, noise: Tensor, p: float) -> Tensor:
    """The mask of ``x`` as numbers; PyTorch converts bytes faster than booleans."""
    return keep_mask(x, noise, p).view(torch.uint8).to(x.dtype)


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``, without the call where it has that dtype."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def scaled(value: Tensor, scaling: float) -> Tensor:
    """``scaling · value`` in place; as ``add(…, alpha=scaling)``, inductor 2.13 loses the factor beside a product."""
    return value if scaling == 1.0 else value.mul_(scaling)
