"""The op ``ipca::pc_linear`` and the function that calls it: checks, autocast, dropout; then one op, one autograd rule.

Registered with ``custom_op``: ``torch.library.triton_op`` imports triton at decoration, or logs that it is missing, and
``import ipca`` must do neither.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ipca.ops import reference


@torch.library.custom_op("ipca::pc_linear", mutates_args=())
def pc_linear_op(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None,
    A0: Tensor | None,
    B0: Tensor | None,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """``y (…, N)`` and ``h = x Aᵀ (…, R)``, see :mod:`ipca.ops.reference`."""
    return reference.pc_linear(x, weight, A, B, bias, A0, B0, scaling)


@pc_linear_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None,
    A0: Tensor | None,
    B0: Tensor | None,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(*x.shape[:-1], weight.shape[0]), x.new_empty(*x.shape[:-1], A.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, A, B, _, A0, B0, ctx.scaling = inputs
    ctx.save_for_backward(x, output[1], weight, A, B, A0, B0)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, dh: Tensor | None) -> tuple[Tensor | None, ...]:
    x, h, weight, A, B, A0, B0 = ctx.saved_tensors
    if dy is None:
        if dh is None:
            return (None,) * 8
        dy = dh.new_zeros(*dh.shape[:-1], weight.shape[0])
    needs = ctx.needs_input_grad[:5]
    dx, dW, dA, dB, dbias = reference.pc_linear_backward(dy, dh, x, h, weight, A, B, A0, B0, ctx.scaling, needs)
    return dx, dW, dA, dB, dbias, None, None, None


pc_linear_op.register_autograd(_backward, setup_context=_setup_context)


def pc_linear(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float = 1.0,
    A0: Tensor | None = None,
    B0: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """``y = x Wᵀ + bias + scaling · (z Aᵀ Bᵀ − z A0ᵀ B0ᵀ)`` with ``z = dropout(x)``.

    Without ``A0, B0`` their term is absent. With them, and ``A = A0``, ``B = B0``, the low-rank term is exactly 0.
    Gradients flow to ``x``, ``weight``, ``A``, ``B`` and ``bias``; ``A0`` and ``B0`` are constants. Under autocast the
    product runs in the autocast dtype, as ``nn.Linear`` does.

    Args:
        x: ``(…, K)``.
        weight: ``(N, K)``, of the dtype of ``x``.
        A, A0: ``(R, K)``, any float dtype; cast to that of ``x``.
        B, B0: ``(N, R)``, likewise.
        bias: ``(N,)`` or None.
        scaling: the factor of the low-rank term.
        dropout: probability of dropping an entry of the low-rank branch's input, the same entries for both pairs.

    Returns:
        ``(…, N)``, of the dtype of ``x``, or the autocast dtype.

    Raises:
        ValueError: the shapes do not fit, only one of ``A0, B0`` is given, or ``dropout`` is not in [0, 1].
    """
    _check(x, weight, A, B, bias, A0, B0)
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"dropout must lie in [0, 1], got {dropout}.")
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = bias if bias is None else bias.to(dtype)
        with torch.autocast(device, enabled=False):
            return _pc_linear(x, weight, A, B, bias, A0, B0, scaling, dropout)
    return _pc_linear(x, weight, A, B, bias, A0, B0, scaling, dropout)


def _pc_linear(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None,
    A0: Tensor | None,
    B0: Tensor | None,
    scaling: float,
    dropout: float,
) -> Tensor:
    if A0 is not None and B0 is not None:
        A0, B0 = A0.detach(), B0.detach()
    if dropout > 0:
        return reference.pc_linear(x, weight, A, B, bias, A0, B0, scaling, z=F.dropout(x, dropout))[0]
    y, _ = pc_linear_op(x, weight, A, B, bias, A0, B0, scaling)
    return y


def _check(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None,
    A0: Tensor | None,
    B0: Tensor | None,
) -> None:
    N, K = weight.shape
    R = A.shape[0]
    if x.shape[-1] != K:
        raise ValueError(f"x has {x.shape[-1]} features, but weight {(N, K)} takes {K}.")
    if A.shape != (R, K) or B.shape != (N, R):
        raise ValueError(
            f"A {tuple(A.shape)} and B {tuple(B.shape)} do not fit weight {(N, K)}: want (R, K) and (N, R)."
        )
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, but weight {(N, K)} needs ({N},).")
    if (A0 is None) != (B0 is None):
        raise ValueError("A0 and B0 go together: give both or neither.")
    if A0 is not None and B0 is not None and (A0.shape != A.shape or B0.shape != B.shape):
        raise ValueError(f"A0 {tuple(A0.shape)} and B0 {tuple(B0.shape)} must have the shapes of A and B.")
