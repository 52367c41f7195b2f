"""The products of forward and backward in plain PyTorch, named like the Triton kernels for them.

x (M, K) | weight (N, K) | A, A0 (R, K) | B, B0 (N, R) | h, h0, g, g0 (M, R) | z = dropout(x). Factors are cast to the
dtype of what they multiply.

The large product comes in two orders: *base first*, ``x Wᵀ`` and then the low-rank part on top, as the formula is
written, and *low first*, where the matrix product of ``W`` adds itself to the low-rank part (beta = 1).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ipca.ops.dropout import apply_dropout


def one_pair(dtype: torch.dtype, A: Tensor, B: Tensor, A0: Tensor | None, B0: Tensor | None) -> tuple[Tensor, Tensor]:
    """``D, E`` in ``dtype`` with ``E D = B A − B0 A0``, or ``A, B`` where there is no frozen pair.

    ``D = [A − A0; A0] (2 R, K)``, ``E = [B, B − B0] (N, 2 R)``. Subtracted in the factors' own dtype and rounded once,
    so that a small change of the factors keeps its digits; and ``E D`` is exactly 0 where they have not changed.
    """
    if A0 is None or B0 is None:
        return A.to(dtype), B.to(dtype)
    A0, B0 = A0.to(A.dtype), B0.to(B.dtype)  # FSDP's mixed precision casts parameters, and leaves buffers as they are
    return torch.cat([A - A0, A0]).to(dtype), torch.cat([B, B - B0], dim=1).to(dtype)


def project(
    x: Tensor, A: Tensor, A0: Tensor | None = None, seed: Tensor | None = None, p: float = 0.0
) -> tuple[Tensor, Tensor | None]:
    """``h = z Aᵀ`` and ``h0 = z A0ᵀ``."""
    z = x if seed is None else apply_dropout(x, seed, p)
    return F.linear(z, _like(A, x)), None if A0 is None else F.linear(z, _like(A0, x))


def products(
    dy: Tensor,
    h: Tensor,
    B: Tensor,
    B0: Tensor | None = None,
    *,
    scaling: float,
    needs_bias: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """``g = scaling · dy B``, ``g0 = scaling · dy B0``, ``dB = scaling · dyᵀ h``, ``dbias = Σ dy``."""
    g, g0 = project(dy, B.mT, None if B0 is None else B0.mT)
    dB = outer(h, dy, B.dtype, scaling=scaling, transposed=True)
    return scaled(g, scaling), None if g0 is None else scaled(g0, scaling), dB, dy.sum(0) if needs_bias else None


def outer(
    g: Tensor,
    x: Tensor,
    dtype: torch.dtype,
    seed: Tensor | None = None,
    p: float = 0.0,
    *,
    scaling: float = 1.0,
    transposed: bool = False,
) -> Tensor:
    """``scaling · gᵀ z (R, K)``, or its transpose, as ``dtype``."""
    z = x if seed is None else apply_dropout(x, seed, p)
    return scaled(z.mT @ g if transposed else g.mT @ z, scaling).to(dtype)


def linear_base_first(
    x: Tensor,
    weight: Tensor,
    h: Tensor,
    B: Tensor,
    h0: Tensor | None = None,
    B0: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scaling: float,
) -> Tensor:
    """``y = x Wᵀ + bias``, then ``y += scaling · (h Bᵀ − h0 B0ᵀ)``: to the bit that of ``nn.Linear`` if they cancel.

    For the sake of those bits ``x (…, K)`` comes as the caller has it, and ``y (…, N)`` likewise.
    """
    y = F.linear(x, weight, bias)
    if h0 is not None and B0 is not None:
        return y.add_(scaled(_difference(h, B, h0, B0), scaling).view(y.shape))
    rows = y.reshape(-1, y.shape[-1])
    return rows.addmm_(h, _like(B, x).mT, alpha=scaling)


def linear_low_first(
    x: Tensor,
    weight: Tensor,
    h: Tensor,
    B: Tensor,
    h0: Tensor | None = None,
    B0: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scaling: float,
) -> Tensor:
    """``y = scaling · (h Bᵀ − h0 B0ᵀ) + bias``, then ``y += x Wᵀ``."""
    if h0 is None or B0 is None:
        start, beta = (x.new_empty(()), 0.0) if bias is None else (bias, 1.0)
        y = torch.addmm(start, h, _like(B, x).mT, beta=beta, alpha=scaling)
    else:
        y = scaled(_difference(h, B, h0, B0), scaling)
        y = y if bias is None else y.add_(bias)
    return y.addmm_(x, weight.mT)


def linear_merged(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None,
    A0: Tensor | None,
    B0: Tensor | None,
    scaling: float,
) -> Tensor:
    """``y = x W_effᵀ + bias`` with ``W_eff`` in the dtype of ``weight``."""
    return F.linear(x, effective_weight(weight, A, B, A0, B0, scaling), bias)


def effective_weight(
    weight: Tensor, A: Tensor, B: Tensor, A0: Tensor | None, B0: Tensor | None, scaling: float
) -> Tensor:
    """``W + scaling · (B A − B0 A0)``, rounded once to the dtype of ``weight``."""
    if A0 is None or B0 is None:
        return torch.addmm(weight, _like(B, weight), _like(A, weight), alpha=scaling)
    wide = torch.promote_types(weight.dtype, torch.float32)  # a difference of products rounded to 16 bits loses them
    A0, B0 = A0.to(A.dtype), B0.to(B.dtype)  # see one_pair
    low = (B.to(wide) @ A.to(wide)).sub_(B0.to(wide) @ A0.to(wide))
    return weight.to(wide).add(scaled(low, scaling)).to(weight.dtype)


def input_grad_base_first(
    dy: Tensor,
    weight: Tensor,
    g: Tensor,
    A: Tensor,
    g0: Tensor | None = None,
    A0: Tensor | None = None,
    seed: Tensor | None = None,
    p: float = 0.0,
) -> Tensor:
    """``dx = dy W``, then ``dx += mask ∘ (g A − g0 A0)``."""
    dx = dy @ weight
    if seed is not None:
        return dx.add_(_low_grad(g, A, g0, A0, seed, p))
    dx.addmm_(g, _like(A, dy))
    return dx if g0 is None or A0 is None else dx.addmm_(g0, _like(A0, dy), alpha=-1)


def input_grad_low_first(
    dy: Tensor,
    weight: Tensor,
    g: Tensor,
    A: Tensor,
    g0: Tensor | None = None,
    A0: Tensor | None = None,
    seed: Tensor | None = None,
    p: float = 0.0,
) -> Tensor:
    """``dx = mask ∘ (g A − g0 A0)``, then ``dx += dy W``."""
    return _low_grad(g, A, g0, A0, seed, p).addmm_(dy, weight)


def _low_grad(g: Tensor, A: Tensor, g0: Tensor | None, A0: Tensor | None, seed: Tensor | None, p: float) -> Tensor:
    low = g @ _like(A, g)
    if g0 is not None and A0 is not None:
        low = low.sub_(g0 @ _like(A0, g))
    return low if seed is None else apply_dropout(low, seed, p)


def _difference(h: Tensor, B: Tensor, h0: Tensor, B0: Tensor) -> Tensor:
    return F.linear(h, _like(B, h)).sub_(F.linear(h0, _like(B0, h)))


def _like(factor: Tensor, x: Tensor) -> Tensor:
    """A factor in the dtype of ``x``; contiguous, else a trained and a frozen one may be summed in different orders."""
    return factor.to(x.dtype).contiguous()


def scaled(value: Tensor, scaling: float) -> Tensor:
    """``scaling · value`` in place; as ``add(…, alpha=scaling)``, inductor 2.13 loses the factor beside a product."""
    return value if scaling == 1.0 else value.mul_(scaling)
