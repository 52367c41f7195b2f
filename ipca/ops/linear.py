"""pc_linear: argument checks, autocast and the dropout seed around the op ``ipca::pc_linear``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ipca._dtensor import is_sharded
from ipca.ops import op, reference
from ipca.ops.backend import get_backend
from ipca.ops.dropout import new_seed


class _EagerPCLinear(torch.autograd.Function):
    """The op in eager mode on a CPU, where dispatching a registered op costs as much as a small layer."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        x, weight, A, B, bias, A0, B0, seed, scaling, dropout, backend, _, training = inputs
        y, h, ctx.pair = op.forward_and_pair(
            x, op.Layer(weight, A, B, bias, A0, B0, scaling), seed, dropout, backend, training
        )
        op.setup_context(ctx, inputs, (y, h))
        return y, h

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return op.autograd_rule(partial(op.backward_from, ctx.pair))(ctx, *grads)


# The C++ method: torch.autograd.Function.apply adds a binding of default arguments, which there are none of.
_eager_pc_linear = super(torch.autograd.Function, _EagerPCLinear).apply

pc_linear_op = torch.library.custom_op("ipca::pc_linear", op.forward, mutates_args=())


@pc_linear_op.register_fake
def _(x: Tensor, weight: Tensor, A: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(*x.shape[:-1], weight.shape[0]), x.new_empty(*x.shape[:-1], A.shape[0])


pc_linear_op.register_autograd(op.autograd_rule(op.backward), setup_context=op.setup_context)


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
    product runs in the autocast dtype, as for ``nn.Linear``. :func:`ipca.set_backend` selects what computes it.

    Args:
        x: ``(…, K)``.
        weight: ``(N, K)``, of the dtype of ``x``.
        A, A0: ``(R, K)``, any float dtype; cast to that of ``x``.
        B, B0: ``(N, R)``, likewise.
        bias: ``(N,)`` or None.
        scaling: the factor of the low-rank term.
        dropout: probability of dropping an entry of the low-rank branch's input, the same entries for both pairs, in
            steps of 2⁻¹⁶.

    Returns:
        ``(…, N)``, of the dtype of ``x``, or the autocast dtype.

    Raises:
        TypeError: a tensor is a DTensor.
        ValueError: the shapes do not fit, only one of ``A0, B0`` is given, or ``dropout`` is not in [0, 1].
        RuntimeError: the backend set by name cannot run, or dropout under a ``torch.func`` transform.
    """
    _check(x, weight, A, B, bias, A0, B0, dropout)
    x, weight, bias = to_autocast(x, weight, bias)
    if A0 is not None and B0 is not None and (A0.requires_grad or B0.requires_grad):
        A0, B0 = A0.detach(), B0.detach()
    if transformed():
        return _under_transform(x, weight, A, B, bias, A0, B0, scaling, dropout)
    seed = new_seed(x.device) if dropout > 0 else None
    run, build = _op_for(x)
    settings = (scaling, dropout, get_backend(), build, torch.is_grad_enabled())
    return run(x, weight, A, B, bias, A0, B0, seed, *settings)[0]


def _op_for(x: Tensor) -> tuple[Callable[..., tuple[Tensor, Tensor]], str]:
    """The op for the device of ``x``, and its build hash; a CUDA tensor loads triton."""
    if not x.is_cuda:
        return (pc_linear_op if torch.compiler.is_compiling() else _eager_pc_linear), ""
    from ipca.ops import cuda

    return cuda.pc_linear_cuda_op, cuda.BUILD


def to_autocast(x: Tensor, *others: Tensor | None) -> list[Any]:
    """All tensors in the autocast dtype where autocast is on and ``x`` is not float64, as for ``nn.Linear``."""
    device = x.device.type
    if x.is_meta or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return [x, *others]
    dtype = torch.get_autocast_dtype(device)
    return [tensor if tensor is None else tensor.to(dtype) for tensor in (x, *others)]


def transformed() -> bool:
    """Whether a ``torch.func`` transform (grad, vmap, jvp) is running."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def _under_transform(
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
    """The reference, which ``torch.func`` can transform."""
    if get_backend() not in ("auto", "reference"):
        raise RuntimeError(
            f"backend {get_backend()!r} has no rule for torch.func transforms; "
            "call ipca.set_backend('auto') or ipca.set_backend('reference') first."
        )
    if dropout > 0:
        raise RuntimeError("pc_linear has no dropout under torch.func transforms; call eval() or set dropout=0.")
    with torch.autocast(x.device.type, enabled=False):
        return reference.pc_linear(x, weight, A, B, bias, A0, B0, scaling)[0]


def _check(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None,
    A0: Tensor | None,
    B0: Tensor | None,
    dropout: float,
) -> None:
    """Raise for arguments that do not fit, before anything is computed."""
    if any(is_sharded(tensor) for tensor in (x, weight, A, B, bias, A0, B0)):
        raise TypeError(
            "pc_linear got a DTensor. A layer sharded by fully_shard computes within the forward pass of the module "
            "that was wrapped: call that module. Tensor parallel plans cannot shard an adapted layer: leave it out."
        )
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
        raise ValueError("A0 and B0 go together: pass both or neither.")
    if A0 is not None and B0 is not None and (A0.shape != A.shape or B0.shape != B.shape):
        raise ValueError(f"A0 {tuple(A0.shape)} and B0 {tuple(B0.shape)} must have the shapes of A and B.")
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"dropout must lie in [0, 1], got {dropout}.")
