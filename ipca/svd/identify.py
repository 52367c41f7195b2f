"""Which window of singular components a given low-rank product is, and how far it is from them."""

from __future__ import annotations

import torch
from torch import Tensor

from ipca.svd.blocks import Blocks
from ipca.svd.certificate import count_above_pivoted
from ipca.svd.decompose import window_svd
from ipca.svd.result import WindowSVD
from ipca.window import Window

_SURELY = 0.5  # an index that is off by one gives about 1


def identify_window(W: Tensor, B: Tensor, A: Tensor, start: int | None = None) -> tuple[WindowSVD, float]:
    """The window of ``W (m, n)`` whose components ``B (m, r) A (r, n)`` comes nearest to, and how near.

    Args:
        start: the window's index, where it is known; else one inertia count between two of the product's Ritz values
            ``svd(QᵀWP)``, ``Q`` and ``P`` bases of its columns and rows, finds it, right to one index at least.

    Returns:
        The window's components, in float64, and the largest of: the sine of the angle between the columns of ``B`` and
        of ``U``; that between the rows of ``A`` and of ``Vh``; ``‖B A − U S Vh‖_F / ‖S‖``. It is about the rounding of
        ``B`` and ``A`` where the product is the window, and about 1 where it is another or none.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`ipca.window_svd`.
    """
    W = W.detach() if W.device.type in ("cpu", "cuda") else W.detach().cpu()
    B, A = B.detach().to(W.device, torch.float64), A.detach().to(W.device, torch.float64)
    Q, left = torch.linalg.qr(B)
    P, right = torch.linalg.qr(A.mT)
    rank, last = A.shape[0], min(W.shape) - A.shape[0]
    middle = _start(W, Q, P) if start is None else start
    nearest = None
    for index in [middle] if start is not None else [middle, middle - 1, middle + 1]:
        if 0 <= index <= last:
            found = window_svd(W, Window(index, rank), dtype=torch.float64)
            off = max(_sine(Q, found.U), _sine(P, found.Vh.mT), _difference(Q @ left, right.mT @ P.mT, found))
            if nearest is None or off < nearest[1]:
                nearest = found, off
            if off < _SURELY:
                break
    assert nearest is not None
    return nearest


def singular_values_above(W: Tensor, value: float) -> int:
    """``#(σ > value)`` of ``W (m, n)``: the positive pivots of an LDLᵀ factorization of ``WᵀW − value² I`` (Sylvester).

    Right where no singular value is within about ``n eps σ₁² / value`` of ``value``, eps that of float64.
    """
    tall = Blocks((W if W.shape[0] >= W.shape[1] else W.mT).detach()[None])
    return count_above_pivoted(tall.gram()[0], (value / tall.scale[0]).square())


def _difference(B: Tensor, A: Tensor, found: WindowSVD) -> float:
    """``‖B A − U S Vh‖_F / ‖S‖``, from factors alone."""
    columns = torch.linalg.qr(torch.cat([B, -found.U * found.S], dim=1), mode="r").R
    rows = torch.linalg.qr(torch.cat([A, found.Vh]).mT, mode="r").R
    size = found.S.norm().clamp_min(torch.finfo(torch.float64).tiny)
    return ((columns @ rows.mT).norm() / size).item()


def _start(W: Tensor, Q: Tensor, P: Tensor) -> int:
    """The index of the first of ``r`` components that span ``Q (m, r)`` and ``P (n, r)``.

    Ritz values err by the square of an angle, so the count is taken in the middle of the widest gap between two.
    """
    ritz, r = torch.linalg.svdvals(Q.mT @ W.double() @ P), Q.shape[1]
    if r == 1:
        start = singular_values_above(W, ritz.item())
    else:
        upper = int((ritz[:-1] - ritz[1:]).argmax())
        start = singular_values_above(W, ((ritz[upper] + ritz[upper + 1]) / 2).item()) - upper - 1
    return min(max(start, 0), min(W.shape) - r)


def _sine(X: Tensor, Y: Tensor) -> float:
    """Of the largest angle between the column spans of two orthonormal bases of equal size."""
    return torch.linalg.matrix_norm(X - Y @ (Y.mT @ X), 2).item()
