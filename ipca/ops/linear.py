"""The op ``ipca::pc_linear`` and the function that calls it: checks, autocast, a seed for dropout; then one op.

The op exists twice with one body and one autograd rule: here as a ``custom_op`` for every device, and in
:mod:`ipca.ops.cuda` as a ``triton_op``, which torch.compile sees through. That module is imported when the first CUDA
tensor arrives, because ``triton_op`` loads triton and ``import ipca`` must not.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor

from ipca._dtensor import is_sharded
from ipca.ops import backend as backends
from ipca.ops import low_rank_linear as split
from ipca.ops import reference
from ipca.ops.dropout import new_seed
from ipca.ops.low_rank_linear import Layer, Needs

Grad = Callable[..., list[Tensor]]


def forward(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None,
    A0: Tensor | None,
    B0: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout: float,
    backend: str,
    build: str,
    training: bool,
) -> tuple[Tensor, Tensor]:
    """``y (…, N)`` and ``h = z Aᵀ (…, R)``, see :mod:`ipca.ops.reference`; ``build`` is for torch.compile's cache."""
    rows = x.reshape(-1, x.shape[-1])
    choice = backends.choose(backend, backends.linear_shape(rows, weight, A, A0, dropout, training))
    with on_device_of(x):
        (y,), (h,) = split.forward(x, [Layer(weight, A, B, bias, A0, B0, scaling)], seed, dropout, choice)
    return shaped_like(x, y), shaped_like(x, h)


def shaped_like(x: Tensor, rows: Tensor) -> Tensor:
    """``rows (M, N)`` as ``(…, N)`` for ``x (…, K)``, and no view: autograd lets nobody change one that an op returns.

    ``nn.ReLU(inplace=True)`` behind a layer does, and FSDP2 warns of it.
    """
    return torch.ops.aten._unsafe_view(rows, [*x.shape[:-1], rows.shape[-1]])


def backward(
    dy: Tensor,
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None,
    A0: Tensor | None,
    B0: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout: float,
    backend: str,
    build: str,
    needs: list[bool],
) -> list[Tensor]:
    """Of ``dx, dW, dA, dB, dbias`` those that ``needs`` asks for."""
    rows, layer = x.reshape(-1, x.shape[-1]), Layer(weight, A, B, bias, A0, B0, scaling)
    choice = backends.choose(backend, backends.linear_shape(rows, weight, A, A0, dropout, True))
    with on_device_of(x):
        dx, (grads,) = split.backward(
            [dy.reshape(-1, dy.shape[-1])],
            rows,
            [h.reshape(-1, h.shape[-1])],
            [layer],
            seed,
            dropout,
            choice,
            needs[0],
            [Needs(*needs[1:])],
        )
    found = (dx if dx is None else dx.view(x.shape), *grads)
    return [grad for grad, need in zip(found, needs, strict=True) if need and grad is not None]


def on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Kernels start on the current device: make it that of ``x``. The dtypes are settled: no autocast."""
    stack = ExitStack()
    if x.is_cuda:
        stack.enter_context(torch.cuda.device(x.device))
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        stack.enter_context(torch.autocast(x.device.type, enabled=False))
    return stack


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep the inputs and ``h``; nothing else is stored."""
    x, weight, A, B, bias, A0, B0, seed, *settings, _ = inputs
    ctx.scaling, ctx.dropout, ctx.backend, ctx.build = settings
    ctx.save_for_backward(x, output[1], weight, A, B, bias, A0, B0, seed)
    ctx.set_materialize_grads(False)


def autograd_rule(run: Grad) -> Callable[..., tuple[Tensor | None, ...]]:
    """The op's gradient, through ``run`` or, where it is itself differentiated, through the reference."""

    def rule(ctx: Any, dy: Tensor | None, dh: Tensor | None) -> tuple[Tensor | None, ...]:
        x, h, weight, A, B, bias, A0, B0, seed = ctx.saved_tensors
        if dy is None and dh is None:
            return (None,) * 13
        needs = list(ctx.needs_input_grad[:5])
        if dh is not None or differentiated_again(dy):
            dy = x.new_zeros(*x.shape[:-1], weight.shape[0]) if dy is None else dy
            given = (dy, dh, x, h, weight, A, B, A0, B0, ctx.scaling, seed, ctx.dropout, needs)
            grads: list[Tensor | None] = list(reference.pc_linear_backward(*given))
        else:
            settings = (ctx.scaling, ctx.dropout, ctx.backend, ctx.build, needs)
            found = iter(run(dy, x, h, weight, A, B, bias, A0, B0, seed, *settings))
            grads = [next(found) if need else None for need in needs]
        return (*grads, *(None,) * 8)

    return rule


def differentiated_again(dy: Tensor | None) -> bool:
    """Whether a backward pass is itself recorded (``create_graph=True``); tracing records without meaning that."""
    return torch.is_grad_enabled() and not isinstance(dy, FunctionalTensor)


pc_linear_op = torch.library.custom_op("ipca::pc_linear", forward, mutates_args=())


@pc_linear_op.register_fake
def _(x: Tensor, weight: Tensor, A: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(*x.shape[:-1], weight.shape[0]), x.new_empty(*x.shape[:-1], A.shape[0])


pc_linear_op.register_autograd(autograd_rule(backward), setup_context=setup_context)


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
    product runs in the autocast dtype, as ``nn.Linear`` does. :func:`ipca.set_backend` says what computes it.

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
        RuntimeError: the backend asked for by name cannot run, or dropout under a ``torch.func`` transform.
    """
    check(x, weight, A, B, bias, A0, B0, dropout)
    x, weight, bias = to_autocast(x, weight, bias)
    A0, B0 = (None, None) if A0 is None or B0 is None else (A0.detach(), B0.detach())
    if transformed():
        return _under_transform(x, weight, A, B, bias, A0, B0, scaling, dropout)
    seed = new_seed(x.device) if dropout > 0 else None
    op, build = op_for(x)
    settings = (scaling, dropout, backends.get_backend(), build, torch.is_grad_enabled())
    return op(x, weight, A, B, bias, A0, B0, seed, *settings)[0]


def op_for(x: Tensor) -> tuple[Callable[..., tuple[Tensor, Tensor]], str]:
    """The op for the device of ``x`` and its build; a CUDA tensor loads triton."""
    if not x.is_cuda:
        return pc_linear_op, ""
    from ipca.ops import cuda

    return cuda.pc_linear_cuda_op, cuda.BUILD


def to_autocast(x: Tensor, *others: Tensor | None) -> list[Any]:
    """All tensors in the dtype of autocast, where that is on and ``x`` is not float64, as ``nn.Linear`` has it."""
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
    """The reference, which ``torch.func`` sees through."""
    if backends.get_backend() not in ("auto", "reference"):
        raise RuntimeError(
            f"backend {backends.get_backend()!r} has no rule for torch.func transforms; "
            "say ipca.set_backend('auto') or 'reference' around them."
        )
    if dropout > 0:
        raise RuntimeError("pc_linear has no dropout under torch.func transforms; call eval() or set dropout=0.")
    with torch.autocast(x.device.type, enabled=False):
        return reference.pc_linear(x, weight, A, B, bias, A0, B0, scaling)[0]


def check(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None,
    A0: Tensor | None,
    B0: Tensor | None,
    dropout: float,
) -> None:
    """Refuse what does not fit, before anything is computed."""
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
        raise ValueError("A0 and B0 go together: give both or neither.")
    if A0 is not None and B0 is not None and (A0.shape != A.shape or B0.shape != B.shape):
        raise ValueError(f"A0 {tuple(A0.shape)} and B0 {tuple(B0.shape)} must have the shapes of A and B.")
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"dropout must lie in [0, 1], got {dropout}.")
