"""Forward and backward of ``pc_linear`` for every backend, as an autograd function and as the body of an op.

    forward    h = z Dᵀ           y = x Wᵀ + scaling · h Eᵀ + bias
    backward   g = scaling · dy E      dA = g_Aᵀ z      dB = scaling · dyᵀ (z Aᵀ)      dbias = Σ dy
               dx = dy W + mask ∘ (g D)

x (M, K) | z = dropout(x) | h, g (M, S) | y, dy (M, N). ``D, E`` are the factors as one pair, see :mod:`ipca.ops.pair`:
``D = A, E = B``, S = R, or with a frozen pair ``D = [A − A0; A0], E = [B, B − B0]`` and S = 2 R. There ``g_A`` is the
left half of ``g``, and ``z Aᵀ`` the sum of the halves of ``h``; no kernel knows the form.

In eager mode this is one ``torch.autograd.Function``: dispatching a registered op costs as much as a small layer. While
tracing for CUDA it is the body of a ``triton_op``, see :mod:`ipca.ops.cuda`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor

from ipca.ops import reference, torch_kernels
from ipca.ops.backend import choose, linear_shape, off_cuda
from ipca.ops.pair import Pair, kept_pair, one_pair


class Layer(NamedTuple):
    """The tensors of one layer, as in :func:`ipca.ops.pc_linear`."""

    weight: Tensor
    A: Tensor
    B: Tensor
    bias: Tensor | None
    A0: Tensor | None
    B0: Tensor | None
    scaling: float


_AS_IT_IS = nullcontext()
Kept = tuple[Tensor, ...]
"""What forward has made and backward needs again: ``D, E``, of the backend ``merged`` its weight, or nothing."""


class Plan(NamedTuple):
    """What computes one call: the functions for its products, of Triton or of PyTorch."""

    backend: str
    in_triton: bool
    project: Callable[..., Tensor]
    products: Callable[..., tuple[Tensor, Tensor, Tensor | None]]
    outer: Callable[..., Tensor]
    linear: Callable[..., Tensor]
    input_grad: Callable[..., Tensor]


class Needs(NamedTuple):
    """The gradients that autograd needs."""

    x: bool
    weight: bool
    A: bool
    B: bool
    bias: bool


class PCLinear(torch.autograd.Function):
    """The op in eager mode. Saved for backward: the inputs, ``z Aᵀ`` and what :func:`forward` keeps."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, weight, A, B, bias, A0, B0, scaling, noise, p, plan = inputs
        y, h, kept = forward(x, Layer(weight, A, B, bias, A0, B0, scaling), noise, p, plan, True)
        ctx.settings = scaling, p, plan
        ctx.save_for_backward(x, h, noise, weight, A, B, bias, A0, B0, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, h, noise, weight, A, B, bias, A0, B0, *kept = ctx.saved_tensors
        scaling, p, plan = ctx.settings
        needs, layer = Needs(*ctx.needs_input_grad[:5]), Layer(weight, A, B, bias, A0, B0, scaling)
        if torch.is_grad_enabled():
            grads = differentiable_backward(dy, x, layer, noise, p, needs)
        else:
            grads = backward(dy, x, h, layer, noise, p, plan, needs, tuple(kept))
        return (*grads, *(None,) * 6)


def forward(
    x: Tensor, layer: Layer, noise: Tensor | None, p: float, plan: Plan, training: bool
) -> tuple[Tensor, Tensor, Kept]:
    """``y (…, N)``, and if ``training`` for :func:`backward`: ``z Aᵀ (…, R)`` and what it would compute anew."""
    rows = _rows(x)
    with _on_device_of(x):
        y, h, kept = _forward(x, rows, layer, noise, p, plan, training)
    return _shaped_like(x, y), _shaped_like(x, h) if training else h, kept


def backward(
    dy: Tensor,
    x: Tensor,
    h: Tensor,
    layer: Layer,
    noise: Tensor | None,
    p: float,
    plan: Plan,
    needs: Needs,
    kept: Kept = (),
) -> tuple[Tensor | None, ...]:
    """``dx, dW, dA, dB, dbias``, None where not needed; what is ``kept`` is of a forward by the same ``plan``."""
    rows = _rows(x)
    with _on_device_of(x):
        dx, *grads = _backward(_rows(dy), rows, _rows(h), layer, noise, p, plan, needs, kept)
    return (dx if dx is None or x.ndim == 2 else dx.view(x.shape), *grads)


def differentiable_backward(
    dy: Tensor, x: Tensor, layer: Layer, noise: Tensor | None, p: float, needs: Needs
) -> tuple[Tensor | None, ...]:
    """The same gradients by the reference, to be differentiated again.

    They are with respect to views: an input that is computed from another, as ``A`` may be from ``x``, is a constant to
    the other's gradient.
    """
    weight, A, B, bias, A0, B0, scaling = layer
    with torch.enable_grad(), _on_device_of(x):
        views = [tensor if tensor is None else tensor.view_as(tensor) for tensor in (x, weight, A, B, bias)]
        y = reference.pc_linear(*views, A0=A0, B0=B0, scaling=scaling, noise=noise, p=p)  # type: ignore[misc,arg-type]
    wanted = [view for view, need in zip(views, needs, strict=True) if need and view is not None]
    found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
    return tuple(next(found) if need else None for need in needs)


def _forward(
    given: Tensor, x: Tensor, layer: Layer, noise: Tensor | None, p: float, plan: Plan, training: bool
) -> tuple[Tensor, Tensor, Kept]:
    """``y``, ``z Aᵀ`` as rows, and what to keep; ``x (M, K)`` are the rows of ``given (…, K)``.

    For the sake of the bits of nn.Linear PyTorch's products take ``given``, in the shape that the caller has.
    """
    weight, A, bias, scaling = layer.weight, layer.A, layer.bias, layer.scaling
    if _holds(x.shape[0] == 0):
        return x.new_empty(0, weight.shape[0]), x.new_empty(0, A.shape[0]), ()
    D, E = pair = _pair(layer, x, plan, training)
    if plan.backend == "merged":
        merged = torch_kernels.merged_weight(weight, D, E, scaling)
        h = plan.project(x, A) if training else x.new_empty(0, 0)
        y = _rows(F.linear(given, merged, bias))
        return y, h, (merged,) if _holds(x.shape[0] >= weight.shape[0]) else ()  # no more memory than x
    if plan.backend == "triton":
        from ipca.kernels.few_tokens import few_tokens, takes

        if takes(x, D.shape[0]):
            y, h = few_tokens(x, weight, D, E, bias, noise, p, scaling=scaling)
            return y, _of_A(h, A) if training else h, pair
    h = plan.project(x, D, noise, p)
    y = plan.linear(given if plan.backend == "reference" else x, weight, h, E, bias, scaling=scaling)
    return y, _of_A(h, A) if training else h, pair


def _backward(
    dy: Tensor,
    x: Tensor,
    h: Tensor,
    layer: Layer,
    noise: Tensor | None,
    p: float,
    plan: Plan,
    needs: Needs,
    kept: Kept,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    weight, A, B, bias, *_, scaling = layer
    if _holds(x.shape[0] == 0):
        given = (x, weight, A, B, bias)
        dx, dW, dA, dB, dbias = (
            torch.zeros_like(tensor) if need and tensor is not None else None
            for need, tensor in zip(needs, given, strict=True)
        )
        return dx, dW, dA, dB, dbias
    merged, R = plan.backend == "merged", A.shape[0]
    dx = g = dA = dB = dbias = None
    dW = dy.mT @ x if needs.weight else None
    D, E = (A, B) if merged else kept or _pair(layer, x, plan, True)
    needs_g = needs.A or (needs.x and not merged)
    if needs_g and needs.B and _fuses(plan, dy, E, R):
        g, dB, dbias = plan.products(dy, h, E, B.dtype, scaling=scaling, needs_bias=needs.bias)
    else:
        g = plan.project(dy, E.mT, scaling=scaling) if needs_g else None
        dB = plan.outer(h, dy, B.dtype, scaling=scaling, transposed=True) if needs.B else None
        dbias = dy.sum(0) if needs.bias else None
    if needs.A:
        dA = plan.outer(g.narrow(1, 0, R), x, A.dtype, noise, p)  # type: ignore[union-attr]
    if needs.x and merged:
        dx = dy @ (kept[0] if kept else torch_kernels.merged_weight(weight, *_pair(layer, x, plan, True), scaling))
    elif needs.x:
        dx = plan.input_grad(dy, weight, g, D, noise, p)
    return dx, dW, dA, dB, dbias


def _pair(layer: Layer, x: Tensor, plan: Plan, training: bool) -> Pair:
    """``D, E``; in PyTorch cast to the dtype of ``x`` once, while the kernels cast as they read."""
    factors = layer.A, layer.B, layer.A0, layer.B0
    if plan.in_triton:
        return one_pair(*factors)
    if not training and not x.is_cuda:
        return kept_pair(*factors, x.dtype)
    D, E = one_pair(*factors)
    return (D, E) if D.dtype == x.dtype else (D.to(x.dtype), E.to(x.dtype))


def _of_A(h: Tensor, A: Tensor) -> Tensor:
    """``z Aᵀ (M, R)`` of ``h = z Dᵀ``."""
    return h if h.shape[1] == A.shape[0] else torch.add(*h.chunk(2, dim=1))


def plan_for(backend: str, x: Tensor, layer: Layer, p: float, training: bool) -> Plan:
    """The plan for ``x (…, K)``.

    Raises:
        RuntimeError: a backend set by name cannot run.
    """
    if backend == "auto" and not x.is_cuda:  # in every call of every layer: the shape does not matter
        choice = off_cuda(x.device)
    else:
        choice = choose(backend, linear_shape(x, layer.weight, layer.A, layer.A0, p, training))
    return _plan(choice.backend, choice.low_rank_in_triton)


@cache
def _plan(backend: str, in_triton: bool) -> Plan:
    by: Any = torch_kernels
    if in_triton:
        from ipca.kernels import outer, products, project

        small = (project.project, products.products, outer.outer)
    else:
        small = (by.project, by.products, by.outer)
    if backend == "triton":
        from ipca.kernels import linear

        large = (linear.linear, linear.input_grad)
    elif backend == "addmm":
        large = (by.linear_low_first, by.input_grad_low_first)
    else:
        large = (by.linear_base_first, by.input_grad_base_first)
    return Plan(backend, in_triton, *small, *large)


def _fuses(plan: Plan, dy: Tensor, E: Tensor, R: int) -> bool:
    """Whether one kernel for all products pays; in PyTorch, which reads ``dy`` for each of them, it is no loss."""
    if not plan.in_triton:
        return True
    from ipca.kernels.products import fuses

    return fuses(dy, E, R)


def _holds(condition: bool | torch.SymBool) -> bool:
    """Whether ``condition`` on sizes holds; False where tracing does not know the sizes."""
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # imports sympy, which eager mode does not need

    return guard_or_false(condition)


def _rows(x: Tensor) -> Tensor:
    """``x (…, K)`` as ``(M, K)``.

    While tracing by strides where they allow it: else Inductor writes what it has not yet computed once for every
    kernel that reads it.
    """
    K = x.shape[-1]
    if isinstance(x, FunctionalTensor) and x.is_contiguous():
        return torch.as_strided(x, (x.numel() // K, K), (K, 1), x.storage_offset())
    return x if x.ndim == 2 else x.reshape(-1, K)


def _shaped_like(x: Tensor, rows: Tensor) -> Tensor:
    """``rows (M, N)`` as ``(…, N)`` for ``x (…, K)``.

    Not a view: autograd forbids in-place changes of a view that an op returns, which ``nn.ReLU(inplace=True)`` behind a
    layer makes, and FSDP2 warns of it.
    """
    return rows if x.ndim == 2 else torch.ops.aten._unsafe_view(rows, [*x.shape[:-1], rows.shape[-1]])


def _on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """A context for kernels: the device of ``x`` is current, and autocast is off, as the dtypes are settled."""
    if not x.is_cuda:
        return without_autocast(x)
    stack = ExitStack()
    stack.enter_context(torch.cuda.device(x.device))
    stack.enter_context(without_autocast(x))
    return stack


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A context in which products on the device of ``x`` keep their tensors' dtypes."""
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return _AS_IT_IS
    return torch.autocast(x.device.type, enabled=False)
