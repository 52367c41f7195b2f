"""Body of the op ``ipca::pc_linear``: forward, backward and the autograd rule, for every backend.

    forward    h = z Aᵀ      y = x Wᵀ + scaling · (h Bᵀ − h0 B0ᵀ) + bias
    backward   g = scaling · dy B      dA = gᵀ z      dB = scaling · dyᵀ h      dbias = Σ dy
               dx = dy W + mask ∘ (g A − g0 A0)

x (M, K) | z = dropout(x) | h, h0, g, g0 (M, R) | y, dy (M, N). Saved for backward: x, h and the seed of dropout.

In PyTorch the frozen pair costs no product of its own: ``B A − B0 A0 = B (A − A0) + (B − B0) A0`` is one product of
rank 2 R, see :func:`ipca.ops.torch_kernels.one_pair`.

The op is registered twice with this body: in :mod:`ipca.ops.linear` as a ``custom_op`` for every device, and in
:mod:`ipca.ops.cuda` as a ``triton_op``, which torch.compile sees through.
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

Grad = Callable[..., list[Tensor]]
Pair = tuple[Tensor, Tensor]
"""``D, E`` of :func:`ipca.ops.torch_kernels.one_pair`."""


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
    layer = Layer(weight, A, B, bias, A0, B0, scaling)
    return forward_and_pair(x, layer, seed, dropout, backend, training)[:2]


def forward_and_pair(
    x: Tensor, layer: Layer, seed: Tensor | None, dropout: float, backend: str, training: bool
) -> tuple[Tensor, Tensor, Pair | None]:
    """``y`` and ``h`` of :func:`forward`, and the pair ``D, E`` where one was made, for :func:`backward_from`."""
    rows = x.reshape(-1, x.shape[-1])
    choice = _choose(backend, rows, layer, dropout, training)
    with _on_device_of(x):
        y, h, pair = _forward(x, rows, layer, seed, dropout, choice)
    return _shaped_like(x, y), _shaped_like(x, h), pair


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
    """The gradients among ``dx, dW, dA, dB, dbias`` that ``needs`` selects."""
    return backward_from(None, dy, x, h, weight, A, B, bias, A0, B0, seed, scaling, dropout, backend, build, needs)


def backward_from(pair: Pair | None, dy: Tensor, x: Tensor, h: Tensor, *rest: Any) -> list[Tensor]:
    """:func:`backward` with the ``pair`` that :func:`forward_and_pair` has made, or None."""
    weight, A, B, bias, A0, B0, seed, scaling, dropout, backend, _, needs = rest
    rows, of = x.reshape(-1, x.shape[-1]), Layer(weight, A, B, bias, A0, B0, scaling)
    choice = _choose(backend, rows, of, dropout, True)
    with _on_device_of(x):
        flat_dy, flat_h = dy.reshape(-1, dy.shape[-1]), h.reshape(-1, h.shape[-1])
        dx, *grads = _backward(flat_dy, rows, flat_h, of, seed, dropout, choice, Needs(*needs), pair)
    found = (None if dx is None else dx.view(x.shape), *grads)
    return [grad for grad, need in zip(found, needs, strict=True) if need and grad is not None]


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Save the inputs and ``h``; nothing else is stored."""
    x, weight, A, B, bias, A0, B0, seed, *settings, _ = inputs
    ctx.scaling, ctx.dropout, ctx.backend, ctx.build = settings
    ctx.save_for_backward(x, output[1], weight, A, B, bias, A0, B0, seed)
    ctx.set_materialize_grads(False)


def autograd_rule(run: Grad) -> Callable[..., tuple[Tensor | None, ...]]:
    """The op's gradient: by ``run`` or, where it is itself differentiated, by the reference."""

    def rule(ctx: Any, dy: Tensor | None, dh: Tensor | None) -> tuple[Tensor | None, ...]:
        x, h, weight, A, B, bias, A0, B0, seed = ctx.saved_tensors
        if dy is None and dh is None:
            return (None,) * 13
        needs = list(ctx.needs_input_grad[:5])
        # Tracing records the backward pass too, without meaning to differentiate it (create_graph=True does).
        differentiated = torch.is_grad_enabled() and not isinstance(dy, FunctionalTensor)
        if dh is not None or differentiated:
            dy = x.new_zeros(*x.shape[:-1], weight.shape[0]) if dy is None else dy
            given = (dy, dh, x, h, weight, A, B, A0, B0, ctx.scaling, seed, ctx.dropout, needs)
            grads: list[Tensor | None] = list(reference.pc_linear_backward(*given))
        else:
            settings = (ctx.scaling, ctx.dropout, ctx.backend, ctx.build, needs)
            found = iter(run(dy, x, h, weight, A, B, bias, A0, B0, seed, *settings))
            grads = [next(found) if need else None for need in needs]
        return (*grads, *(None,) * 8)

    return rule


def _forward(
    given: Tensor, x: Tensor, layer: Layer, seed: Tensor | None, p: float, choice: BackendChoice
) -> tuple[Tensor, Tensor, Pair | None]:
    """``y`` and ``h`` as rows, and ``D, E`` where they were made; ``x (M, K)`` are the rows of ``given (…, K)``."""
    weight, A, B, bias, A0, B0, scaling = layer
    if guard_or_false(x.shape[0] == 0):
        return x.new_empty(0, weight.shape[0]), x.new_empty(0, A.shape[0]), None
    if choice.backend == "triton":
        from ipca.kernels.few_tokens import few_tokens, takes

        if takes(x, A.shape[0]):
            return *few_tokens(x, weight, A, B, bias, A0, B0, seed, p, scaling=scaling), None
    project, linear = _low_rank_kernels(choice)[0], _large_kernels(choice)[0]
    if choice.backend == "merged":
        return torch_kernels.linear_merged(x, *layer), project(x, A, None, seed, p)[0], None
    # For the sake of the bits of nn.Linear the reference gets x in the shape that the caller has.
    large = given if choice.backend == "reference" else x
    if not choice.low_rank_in_triton:
        D, E = torch_kernels.one_pair(x.dtype, A, B, A0, B0)
        h, _ = project(x, D, None, seed, p)
        y = linear(large, weight, h, E, None, None, bias, scaling=scaling)
        return y, h if A0 is None else h[:, : len(A)] + h[:, len(A) :], (D, E)
    h, h0 = project(x, A, A0, seed, p)
    return linear(large, weight, h, B, h0, B0, bias, scaling=scaling), h, None


def _backward(
    dy: Tensor,
    x: Tensor,
    h: Tensor,
    layer: Layer,
    seed: Tensor | None,
    p: float,
    choice: BackendChoice,
    needs: Needs,
    pair: Pair | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """``dx, dW, dA, dB, dbias``, None where not needed."""
    weight, A, B, bias, A0, B0, scaling = layer
    if guard_or_false(x.shape[0] == 0):
        given = (x, weight, A, B, bias)
        dx, dW, dA, dB, dbias = (
            torch.zeros_like(tensor) if need and tensor is not None else None
            for need, tensor in zip(needs, given, strict=True)
        )
        return dx, dW, dA, dB, dbias
    dW = dy.mT @ x if needs.weight else None
    if not choice.low_rank_in_triton and choice.backend != "merged":
        D, E = torch_kernels.one_pair(dy.dtype, A, B, A0, B0) if pair is None else pair
        g = torch_kernels.scaled(dy @ E, scaling) if needs.x or needs.A else None
        dB = torch_kernels.outer(h, dy, B.dtype, scaling=scaling, transposed=True) if needs.B else None
        dA = torch_kernels.outer(g[:, : len(A)], x, A.dtype, seed, p) if needs.A and g is not None else None
        dx = _large_kernels(choice)[1](dy, weight, g, D, None, None, seed, p) if needs.x else None
        return dx, dW, dA, dB, dy.sum(0) if needs.bias else None
    g, g0, dB, dbias = _low_rank_grads(dy, h, layer, choice, needs)
    dA = _low_rank_kernels(choice)[2](g, x, A.dtype, seed, p) if needs.A else None
    if not needs.x:
        return None, dW, dA, dB, dbias
    if choice.backend == "merged":
        return dy @ torch_kernels.effective_weight(weight, A, B, A0, B0, scaling), dW, dA, dB, dbias
    return _large_kernels(choice)[1](dy, weight, g, A, g0, A0, seed, p), dW, dA, dB, dbias


def _low_rank_grads(
    dy: Tensor, h: Tensor, layer: Layer, choice: BackendChoice, needs: Needs
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """``g``, ``g0``, ``dB`` and ``dbias``, from one read of ``dy`` where one kernel gives them all."""
    (project, products, outer), scaling = _low_rank_kernels(choice), layer.scaling
    merged = choice.backend == "merged"
    needs_g, B0 = needs.A or (needs.x and not merged), layer.B0 if needs.x and not merged else None
    if needs_g and needs.B and _fuses(choice, dy, layer.B, B0):
        return products(dy, h, layer.B, B0, scaling=scaling, needs_bias=needs.bias)
    g, g0 = project(dy, layer.B.mT, None if B0 is None else B0.mT) if needs_g else (None, None)
    g, g0 = (value if value is None or scaling == 1.0 else value * scaling for value in (g, g0))
    dB = outer(h, dy, layer.B.dtype, scaling=scaling, transposed=True) if needs.B else None
    return g, g0, dB, dy.sum(0) if needs.bias else None


def _choose(backend: str, rows: Tensor, layer: Layer, dropout: float, training: bool) -> BackendChoice:
    if backend == "auto" and not rows.is_cuda:  # once in forward and once in backward of every layer
        return off_cuda(rows.device)
    return choose(backend, linear_shape(rows, layer.weight, layer.A, layer.A0, dropout, training))


def _low_rank_kernels(choice: BackendChoice) -> tuple[Any, Any, Any]:
    """``project``, ``products`` and ``outer``."""
    if not choice.low_rank_in_triton:
        return torch_kernels.project, torch_kernels.products, torch_kernels.outer
    from ipca.kernels.outer import outer
    from ipca.kernels.products import products
    from ipca.kernels.project import project

    return project, products, outer


def _fuses(choice: BackendChoice, dy: Tensor, B: Tensor, B0: Tensor | None) -> bool:
    """Whether one kernel for all products pays; in PyTorch, which reads ``dy`` for each of them, it is no loss."""
    if not choice.low_rank_in_triton:
        return True
    from ipca.kernels.products import fuses

    return fuses(dy, B, B0)


def _large_kernels(choice: BackendChoice) -> tuple[Any, Any]:
    """``linear`` and ``input_grad``."""
    if choice.backend == "triton":
        from ipca.kernels.linear import input_grad, linear

        return linear, input_grad
    if choice.backend == "addmm":
        return torch_kernels.linear_low_first, torch_kernels.input_grad_low_first
    return torch_kernels.linear_base_first, torch_kernels.input_grad_base_first


def _shaped_like(x: Tensor, rows: Tensor) -> Tensor:
    """``rows (M, N)`` as ``(…, N)`` for ``x (…, K)``.

    Not a view: autograd forbids in-place changes of a view that an op returns, which ``nn.ReLU(inplace=True)`` behind a
    layer makes, and FSDP2 warns of it.
    """
    return torch.ops.aten._unsafe_view(rows, [*x.shape[:-1], rows.shape[-1]])


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
