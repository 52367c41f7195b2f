"""The op's formula in plain, differentiable PyTorch: y = x Wᵀ + bias + scaling · (z Dᵀ) Eᵀ.

x (…, K) | W (N, K) | A, A0 (R, K) | B, B0 (N, R) | bias (N,) | y (…, N) | z = dropout(x)

    one pair of factors              D = A                  E = B
    with the frozen pair A0, B0      D = [A − A0; A0]       E = [B, B − B0]        E D = B A − B0 A0

Where ``A = A0`` and ``B = B0`` the product ``E D`` is exactly 0, and where they have moved little the change keeps its
digits: a difference of two products would lose them in rounding.

The kernels are tested against this, torch.compile gets it on a CPU, and it runs where PyTorch has to trace into the op
(second derivatives, ``torch.func``).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ipca.ops.dropout import apply_dropout


def one_pair(A: Tensor, B: Tensor, A0: Tensor | None, B0: Tensor | None) -> tuple[Tensor, Tensor]:
    """``D (S, K), E (N, S)`` with ``E D = B A − B0 A0``, S = 2 R; or ``A, B`` without a frozen pair.

    Subtracted in the factors' own dtype, to be rounded once to that of a product.
    """
    if A0 is None or B0 is None:
        return A, B
    A0, B0 = A0.to(A.dtype), B0.to(B.dtype)  # FSDP's mixed precision casts parameters, and leaves buffers as they are
    return torch.cat([A - A0, A0]), torch.cat([B, B - B0], dim=1)


def pc_linear(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None,
    A0: Tensor | None,
    B0: Tensor | None,
    scaling: float,
    noise: Tensor | None = None,
    p: float = 0.0,
) -> Tensor:
    """``y (…, N)``."""
    D, E = (factor.to(x.dtype) for factor in one_pair(A, B, A0, B0))
    z = x if noise is None else apply_dropout(x.reshape(-1, x.shape[-1]), noise, p).view(x.shape)
    return F.linear(x, weight, bias) + scaling * F.linear(F.linear(z, D), E)
