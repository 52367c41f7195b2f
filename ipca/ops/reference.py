"""Reference of the op in plain, differentiable PyTorch: y = x Wᵀ + bias + scaling · low(z).

x (…, K) | W (N, K) | A, A0 (R, K) | B, B0 (N, R) | bias (N,) | y (…, N) | z = dropout(x) | h = z Aᵀ (…, R)

    low(z) = (z Aᵀ) Bᵀ                          one pair of factors
    low(z) = (z Aᵀ) Bᵀ − (z A0ᵀ) B0ᵀ            with the frozen pair A0, B0

The second is a difference of two products of equal shape, not one product of rank 2R: the same arithmetic on equal
factors cancels to exactly 0. Factors are cast to the dtype of ``x``.

These functions are the formula itself. The kernels are tested against them, and they run where PyTorch has to trace
into the op (second derivatives, ``torch.func``).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ipca.ops.dropout import dropout


def pc_linear(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None,
    A0: Tensor | None,
    B0: Tensor | None,
    scaling: float,
    seed: Tensor | None = None,
    p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """``y`` and ``h``."""
    y = F.linear(x, weight, bias)
    # As rows and with contiguous factors: else F.linear may take different paths for a trained and a frozen factor.
    z = dropped(x, seed, p).reshape(-1, x.shape[-1])
    h, low = _low_rank(z, A, B)
    if A0 is not None and B0 is not None:
        low = low - _low_rank(z, A0, B0)[1]
    return y + scaling * low.view(y.shape), h.view(*x.shape[:-1], A.shape[0])


def _low_rank(rows: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """``rows Aᵀ (M, R)`` and ``(rows Aᵀ) Bᵀ (M, N)``."""
    h = F.linear(rows, A.to(rows.dtype).contiguous())
    return h, F.linear(h, B.to(rows.dtype).contiguous())


def dropped(x: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """Dropout of ``x (…, K)``, whose rows count through all leading dimensions; none without a seed."""
    return x if seed is None else dropout(x.reshape(-1, x.shape[-1]), seed, p).view(x.shape)


def pc_linear_backward(
    dy: Tensor,
    dh: Tensor | None,
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    A0: Tensor | None,
    B0: Tensor | None,
    scaling: float,
    seed: Tensor | None,
    p: float,
    needs: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """``dx, dW, dA, dB, dbias`` where ``needs`` selects them, from ``dy (…, N)`` and ``dh (…, R)``.

    With ``g = scaling · dy B + dh (…, R)`` and dropout's ``mask`` (its scale included)::

        dx = dy W + mask ∘ (g A − scaling · (dy B0) A0)         dW = dyᵀ x
        dA = gᵀ z                                               dB = scaling · dyᵀ h        dbias = Σ dy
    """
    needs_x, needs_W, needs_A, needs_B, needs_bias = needs
    dtype = dy.dtype
    dx = dW = dA = dB = dbias = None
    rows = dy.reshape(-1, dy.shape[-1])  # (M, N)
    if needs_x or needs_A:
        g = scaling * (dy @ B.to(dtype))
        g = g if dh is None else g + dh
        if needs_A:
            z = dropped(x, seed, p)
            dA = (g.reshape(-1, g.shape[-1]).mT @ z.reshape(-1, x.shape[-1])).to(A.dtype)
        if needs_x:
            low = g @ A.to(dtype)
            if A0 is not None and B0 is not None:
                low = low - scaling * (dy @ B0.to(dtype)) @ A0.to(dtype)
            dx = dy @ weight + dropped(low, seed, p)
    if needs_B:
        dB = (scaling * (rows.mT @ h.reshape(-1, h.shape[-1]))).to(B.dtype)
    if needs_W:
        dW = rows.mT @ x.reshape(-1, x.shape[-1])
    if needs_bias:
        dbias = rows.sum(0)
    return dx, dW, dA, dB, dbias
