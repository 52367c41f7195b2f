"""Forward and backward of ``pc_linear`` for every backend, as an autograd function and as the body of an op.

    forward    h = z Dᵀ           y = x Wᵀ + scaling · h Eᵀ + bias
    backward   g = scaling · dy E      dA = g_Aᵀ z      dB = scaling · dyᵀ (z Aᵀ)      dbias = Σ dy
               dx = dy W + mask ∘ (g D)

x (M, K) | z = dropout(x) | h, g (M, S) | y, dy (M, N). ``D, E`` are the factors as one pair, see
:mod:`ipca.ops.reference`: ``D = A, E = B``, S = R, or with a frozen pair ``D = [A − A0; A0], E = [B, B − B0]`` and
S = 2 R. There ``g_A`` is the left half of ``g``, and ``z Aᵀ`` the sum of the halves of ``h``; no kernel knows the form.

In eager mode this is one ``torch.autograd.Function``: dispatching a registered op costs as much as a small layer. While
tracing for CUDA it is the body of a ``triton_op``, see :mod:`ipca.ops.cuda`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx.experimental.symbolic_shapes import guard_or_false

from ipca.ops import reference, torch_kernels
from ipca.ops.backend import BackendChoice, choose, linear_shape, off_cuda

Pair = tuple[Tensor, Tensor]
"""``D, E``."""


class Layer(NamedTuple):
    """The tensors of one layer, as in :func:`ipca.ops.pc_linear`."""

    weight: Tensor
    A: Tensor
    B: Tensor
    bias: Tensor | None
    A0: Tensor | None
    B0: Tensor | None
    scaling: float


class Needs(NamedTuple):
    """The gradients that autograd needs."""

    x: bool
    weight: bool
    A: bool
    B: bool
    bias: bool


class PCLinear(torch.autograd.Function):
    """The op in eager mode. Kept for backward: the inputs, ``z Aᵀ``, and on a CPU ``D, E`` and the mask of dropout."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, weight, A, B, bias, A0, B0, noise, scaling, p, backend, training = inputs
        y, h, ctx.pair = forward(x, Layer(weight, A, B, bias, A0, B0, scaling), noise, p, backend, training)
        ctx.settings = scaling, p, backend
        ctx.save_for_backward(x, h, weight, A, B, bias, A0, B0, noise)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, h, weight, A, B, bias, A0, B0, noise = ctx.saved_tensors
        scaling, p, backend = ctx.settings
        needs, layer = Needs(*ctx.needs_input_grad[:5]), Layer(weight, A, B, bias, A0, B0, scaling)
        if torch.is_grad_enabled():
            grads = differentiable_backward(dy, x, layer, noise, p, needs)
        else:
            grads = backward(dy, x, h, layer, noise, p, backend, needs, ctx.pair)
        return (*grads, *(None,) * 7)


def forward(
    x: Tensor, layer: Layer, noise: Tensor | None, p: float, backend: str, training: bool
) -> tuple[Tensor, Tensor, Pair | None]:
    """``y (…, N)``, ``z Aᵀ (…, R)``, and the pair ``D, E`` where it is worth keeping for :func:`backward`."""
    rows = _rows(x)
    choice = _choose(backend, rows, layer, p, training)
    with _on_device_of(x):
        y, h, pair = _forward(x, rows, layer, noise, p, choice)
    return _shaped_like(x, y), _shaped_like(x, h), pair


def backward(
    dy: Tensor,
    x: Tensor,
    h: Tensor,
    layer: Layer,
    noise: Tensor | None,
    p: float,
    backend: str,
    needs: Needs,
    pair: Pair | None = None,
) -> tuple[Tensor | None, ...]:
    """``dx, dW, dA, dB, dbias``, None where not needed."""
    rows = _rows(x)
    choice = _choose(backend, rows, layer, p, True)
    with _on_device_of(x):
        dx, *grads = _backward(_rows(dy), rows, _rows(h), layer, noise, p, choice, needs, pair)
    return (None if dx is None else dx.view(x.shape), *grads)


def differentiable_backward(
    dy: Tensor, x: Tensor, layer: Layer, noise: Tensor | None, p: float, needs: Needs
) -> tuple[Tensor | None, ...]:
    """The same gradients by the reference, to be differentiated again."""
    weight, A, B, bias, A0, B0, scaling = layer
    with torch.enable_grad(), _on_device_of(x):
        y = reference.pc_linear(x, weight, A, B, bias, A0, B0, scaling, noise, p)
    wanted = [t for t, need in zip((x, weight, A, B, bias), needs, strict=True) if need and t is not None]
    found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
    return tuple(next(found) if need else None for need in needs)


def check_backend(x: Tensor, layer: Layer, p: float, backend: str) -> None:
    """Raise RuntimeError if ``backend``, set by name, cannot run."""
    _choose(backend, _rows(x), layer, p, True)


def _forward(
    given: Tensor, x: Tensor, layer: Layer, noise: Tensor | None, p: float, choice: BackendChoice
) -> tuple[Tensor, Tensor, Pair | None]:
    """``y``, ``z Aᵀ`` as rows, and ``D, E``; ``x (M, K)`` are the rows of ``given (…, K)``."""
    weight, A, bias, scaling = layer.weight, layer.A, layer.bias, layer.scaling
    if guard_or_false(x.shape[0] == 0):
        return x.new_empty(0, weight.shape[0]), x.new_empty(0, A.shape[0]), None
    project, linear = _low_rank_kernels(choice)[0], _large_kernels(choice)[0]
    if choice.backend == "merged":
        return torch_kernels.linear_merged(x, *layer), project(x, A, noise, p), None
    D, E = pair = _pair(layer, x, choice)
    if choice.backend == "triton":
        from ipca.kernels.few_tokens import few_tokens, takes

        if takes(x, D.shape[0]):
            y, h = few_tokens(x, weight, D, E, bias, noise, p, scaling=scaling)
            return y, _of_A(h, A), pair
    h = project(x, D, noise, p)
    # For the sake of the bits of nn.Linear the reference gets x in the shape that the caller has.
    y = linear(given if choice.backend == "reference" else x, weight, h, E, bias, scaling=scaling)
    return y, _of_A(h, A), pair


def _backward(
    dy: Tensor,
    x: Tensor,
    h: Tensor,
    layer: Layer,
    noise: Tensor | None,
    p: float,
    choice: BackendChoice,
    needs: Needs,
    pair: Pair | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    weight, A, B, bias, A0, B0, scaling = layer
    if guard_or_false(x.shape[0] == 0):
        given = (x, weight, A, B, bias)
        dx, dW, dA, dB, dbias = (
            torch.zeros_like(tensor) if need and tensor is not None else None
            for need, tensor in zip(needs, given, strict=True)
        )
        return dx, dW, dA, dB, dbias
    merged = choice.backend == "merged"
    project, products, outer = _low_rank_kernels(choice)
    dx = g = dA = dB = dbias = None
    dW = dy.mT @ x if needs.weight else None
    D, E = (A, B) if merged else (_pair(layer, x, choice) if pair is None else pair)
    needs_g = needs.A or (needs.x and not merged)
    if needs_g and needs.B and _fuses(choice, dy, E, len(A)):
        g, dB, dbias = products(dy, h, E, B.dtype, scaling=scaling, needs_bias=needs.bias)
    else:
        g = project(dy, E.mT, scaling=scaling) if needs_g else None
        dB = outer(h, dy, B.dtype, scaling=scaling, transposed=True) if needs.B else None
        dbias = dy.sum(0) if needs.bias else None
    if needs.A:
        dA = outer(g.narrow(1, 0, len(A)), x, A.dtype, noise, p)  # type: ignore[union-attr]
    if needs.x and merged:
        dx = dy @ torch_kernels.effective_weight(weight, A, B, A0, B0, scaling)
    elif needs.x:
        dx = _large_kernels(choice)[1](dy, weight, g, D, noise, p)
    return dx, dW, dA, dB, dbias


def _pair(layer: Layer, x: Tensor, choice: BackendChoice) -> Pair:
    """``D, E``; in PyTorch cast to the dtype of ``x`` once, while the kernels cast as they read."""
    D, E = reference.one_pair(layer.A, layer.B, layer.A0, layer.B0)
    return (D, E) if choice.low_rank_in_triton else (D.to(x.dtype), E.to(x.dtype))


def _of_A(h: Tensor, A: Tensor) -> Tensor:
    """``z Aᵀ (M, R)`` of ``h = z Dᵀ``."""
    R = A.shape[0]
    return h if h.shape[1] == R else h.narrow(1, 0, R) + h.narrow(1, R, R)


def _choose(backend: str, rows: Tensor, layer: Layer, p: float, training: bool) -> BackendChoice:
    if backend == "auto" and not rows.is_cuda:  # once in forward and once in backward of every layer
        return off_cuda(rows.device)
    return choose(backend, linear_shape(rows, layer.weight, layer.A, layer.A0, p, training))


def _low_rank_kernels(choice: BackendChoice) -> tuple[Any, Any, Any]:
    """``project``, ``products`` and ``outer``."""
    if not choice.low_rank_in_triton:
        return torch_kernels.project, torch_kernels.products, torch_kernels.outer
    from ipca.kernels.outer import outer
    from ipca.kernels.products import products
    from ipca.kernels.project import project

    return project, products, outer


def _fuses(choice: BackendChoice, dy: Tensor, E: Tensor, R: int) -> bool:
    """Whether one kernel for all products pays; in PyTorch, which reads ``dy`` for each of them, it is no loss."""
    if not choice.low_rank_in_triton:
        return True
    from ipca.kernels.products import fuses

    return fuses(dy, E, R)


def _large_kernels(choice: BackendChoice) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """``linear`` and ``input_grad``."""
    if choice.backend == "triton":
        from ipca.kernels.linear import input_grad, linear

        return linear, input_grad
    if choice.backend == "addmm":
        return torch_kernels.linear_low_first, torch_kernels.input_grad_low_first
    return torch_kernels.linear_base_first, torch_kernels.input_grad_base_first


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
    casts = without_autocast(x)
    if not x.is_cuda:
        return casts
    stack = ExitStack()
    stack.enter_context(torch.cuda.device(x.device))
    stack.enter_context(casts)
    return stack


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A context in which products on the device of ``x`` keep their tensors' dtypes."""
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)
