"""The op's formula in plain, differentiable PyTorch: y = x Wᵀ + bias + scaling · (z Dᵀ) Eᵀ.

x (…, K) | W (N, K) | A, A0 (R, K) | B, B0 (N, R) | bias (N,) | y (…, N) | z = dropout(x)

``D, E`` are the factors as one pair, see :mod:`ipca.ops.pair`.

The kernels are tested against this, torch.compile gets it on a CPU, and it runs where PyTorch has to trace into the op
(second derivatives, ``torch.func``).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ipca.ops.dropout import apply_dropout
from ipca.ops.pair import one_pair


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
