"""Weights in float64 and their singular value decomposition."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class SVD(NamedTuple):
    """``W = U diag(S) Vh``: ``U (out, d)``, ``S (d,)`` descending, ``Vh (d, in)``, float64, ``d = min(out, in)``."""

    U: Tensor
    S: Tensor
    Vh: Tensor

    @property
    def left(self) -> Tensor:
        """The columns of ``U`` whose singular values are above rounding: a basis of the column space of ``W``."""
        size = max(self.U.shape[0], self.Vh.shape[1])
        return self.U[:, torch.finfo(self.S.dtype).eps * size * self.S[0] < self.S]


def wide(tensor: Tensor) -> Tensor:
    """``tensor`` in float64: on its own device, or on the CPU where that has none."""
    tensor = tensor.detach()
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).to(torch.float64)


def decompose(name: str, weight: Tensor) -> SVD:
    """The SVD of ``weight (out, in)``, of the layer ``name``.

    Raises:
        ValueError: the weight holds NaN or Inf.
    """
    check_finite(name, weight)
    return SVD(*torch.linalg.svd(weight, full_matrices=False))


def check_finite(name: str, weight: Tensor) -> None:
    """Raise ValueError where ``weight`` holds NaN or Inf."""
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(f"{name}: it holds NaN or Inf, and so has no spectrum; training may have diverged.")


def ratio(part: float, whole: float) -> float:
    """``part / whole``; 0 where both are 0, as for a weight that has not changed."""
    if whole == 0:
        return 0.0 if part == 0 else float("inf")
    return part / whole
