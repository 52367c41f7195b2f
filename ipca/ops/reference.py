"""y = x Wᵀ + bias + scaling · low(x) in plain PyTorch, on any device: what every faster backend must equal.

x (…, K) | W (N, K) | A, A0 (R, K) | B, B0 (N, R) | bias (N,) | y (…, N) | h = z Aᵀ (…, R)

    low(z) = (z Aᵀ) Bᵀ                          one pair of factors
    low(z) = (z Aᵀ) Bᵀ − (z A0ᵀ) B0ᵀ            with the frozen pair A0, B0

The second is a difference of two products of equal shape, not one product of rank 2R: the same arithmetic on equal
factors cancels to exactly 0. Factors are cast to the dtype of ``x``.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def pc_linear(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None,
    A0: Tensor | None,
    B0: Tensor | None,
    scaling: float,
    z: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``y`` and ``h``; ``z`` is the input of the low-rank branch where dropout makes it differ from ``x``."""
    y = F.linear(x, weight, bias)
    # As rows and with contiguous factors: else F.linear may take different paths for a trained and a frozen factor.
    rows = (x if z is None else z).reshape(-1, x.shape[-1])
    h, low = _low_rank(rows, A, B)
    if A0 is not None and B0 is not None:
        low = low - _low_rank(rows, A0, B0)[1]
    return y.add(low.view(y.shape), alpha=scaling), h.view(*x.shape[:-1], A.shape[0])


def _low_rank(rows: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """``rows Aᵀ (M, R)`` and ``(rows Aᵀ) Bᵀ (M, N)``."""
    h = F.linear(rows, A.to(rows.dtype).contiguous())
    return h, F.linear(h, B.to(rows.dtype).contiguous())


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
    needs: tuple[bool, bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """``dx, dW, dA, dB, dbias`` where ``needs`` asks for them, from ``dy (…, N)`` and ``dh (…, R)``.

    With ``g = scaling · dy B + dh (…, R)``::

        dx = dy W + g A − scaling · (dy B0) A0        dW = dyᵀ x
        dA = gᵀ x                                     dB = scaling · dyᵀ h        dbias = Σ dy
    """
    needs_x, needs_W, needs_A, needs_B, needs_bias = needs
    dtype = dy.dtype
    dx = dW = dA = dB = dbias = None
    rows = dy.reshape(-1, dy.shape[-1])  # (M, N)
    if needs_x or needs_A:
        g = scaling * (dy @ B.to(dtype))
        g = g if dh is None else g + dh
        if needs_A:
            dA = (g.reshape(-1, g.shape[-1]).mT @ x.reshape(-1, x.shape[-1])).to(A.dtype)
        if needs_x:
            dx = dy @ weight + g @ A.to(dtype)
            if A0 is not None and B0 is not None:
                dx = dx - scaling * (dy @ B0.to(dtype)) @ A0.to(dtype)
    if needs_B:
        dB = (scaling * (rows.mT @ h.reshape(-1, h.shape[-1]))).to(B.dtype)
    if needs_W:
        dW = rows.mT @ x.reshape(-1, x.shape[-1])
    if needs_bias:
        dbias = rows.sum(0)
    return dx, dW, dA, dB, dbias
