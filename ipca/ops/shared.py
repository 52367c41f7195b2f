"""The op ``ipca::pc_linear_shared``: several adapted layers over one input, such as q, k and v of an attention block.

``x`` is read once for all their ``h`` and once for all their ``dA``; with dropout they share one mask. The op exists
twice, as :mod:`ipca.ops.linear` explains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ipca.ops import backend as backends
from ipca.ops import low_rank_linear as split
from ipca.ops import reference
from ipca.ops.dropout import new_seed
from ipca.ops.linear import check, differentiated_again, on_device_of, pc_linear, shaped_like, to_autocast, transformed
from ipca.ops.low_rank_linear import Layer, Needs


def forward(
    x: Tensor,
    weight: list[Tensor],
    A: list[Tensor],
    B: list[Tensor],
    bias: list[Tensor],
    A0: list[Tensor],
    B0: list[Tensor],
    seed: Tensor | None,
    scaling: list[float],
    has_bias: list[bool],
    dropout: float,
    backend: str,
    build: str,
    training: bool,
) -> list[Tensor]:
    """``y_i (…, N_i)``, then ``h_i (…, R_i)``; ``A0, B0`` are empty without frozen factors."""
    layers = _layers(weight, A, B, bias, A0, B0, scaling, has_bias)
    with on_device_of(x):
        ys, hs = split.forward(x, layers, seed, dropout, _choice(x, layers, dropout, backend, training))
    return [shaped_like(x, rows) for rows in (*ys, *hs)]


def backward(
    dy: list[Tensor],
    has_dy: list[bool],
    x: Tensor,
    h: list[Tensor],
    weight: list[Tensor],
    A: list[Tensor],
    B: list[Tensor],
    bias: list[Tensor],
    A0: list[Tensor],
    B0: list[Tensor],
    seed: Tensor | None,
    scaling: list[float],
    has_bias: list[bool],
    dropout: float,
    backend: str,
    build: str,
    needs_x: bool,
    needs: list[bool],
) -> list[Tensor]:
    """``dx`` if asked for, then each layer's ``dW, dA, dB, dbias`` of which ``needs`` (4 a layer) asks for."""
    layers = _layers(weight, A, B, bias, A0, B0, scaling, has_bias)
    rows, given = x.reshape(-1, x.shape[-1]), iter(dy)
    dys = [
        next(given).reshape(-1, layer.weight.shape[0]) if has else None
        for has, layer in zip(has_dy, layers, strict=True)
    ]
    wanted = [Needs(*needs[4 * i : 4 * i + 4]) for i in range(len(layers))]
    with on_device_of(x):
        choice = _choice(x, layers, dropout, backend, True)
        flat_h = [t.reshape(-1, t.shape[-1]) for t in h]
        dx, grads = split.backward(dys, rows, flat_h, layers, seed, dropout, choice, needs_x, wanted)
    found = [] if dx is None else [dx.view(x.shape)]
    return found + [g for grad in grads for g in grad if g is not None]


def _layers(
    weight: list[Tensor],
    A: list[Tensor],
    B: list[Tensor],
    bias: list[Tensor],
    A0: list[Tensor],
    B0: list[Tensor],
    scaling: list[float],
    has_bias: list[bool],
) -> list[Layer]:
    biases = iter(bias)
    frozen_A, frozen_B = (A0, B0) if A0 else ([None] * len(A), [None] * len(B))
    every = zip(weight, A, B, has_bias, frozen_A, frozen_B, scaling, strict=True)
    return [Layer(W, a, b, next(biases) if has else None, a0, b0, s) for W, a, b, has, a0, b0, s in every]


def _choice(x: Tensor, layers: list[Layer], dropout: float, backend: str, training: bool) -> backends.BackendChoice:
    """That of the widest layer, for all."""
    widest = max(layers, key=lambda layer: layer.weight.shape[0])
    rows = x.reshape(-1, x.shape[-1])
    return backends.choose(backend, backends.linear_shape(rows, widest.weight, widest.A, widest.A0, dropout, training))


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    """Keep the inputs and every ``h_i``."""
    x, weight, A, B, bias, A0, B0, seed, *settings, _ = inputs
    ctx.scaling, ctx.has_bias, ctx.dropout, ctx.backend, ctx.build = settings
    ctx.count = len(weight)
    ctx.save_for_backward(x, seed, *output[ctx.count :], *weight, *A, *B, *bias, *A0, *B0)
    ctx.lengths = [len(part) for part in (output[ctx.count :], weight, A, B, bias, A0, B0)]
    ctx.set_materialize_grads(False)


def autograd_rule(run: Callable[..., list[Tensor]]) -> Callable[..., tuple[Any, ...]]:
    """The op's gradient, through ``run``."""

    def rule(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
        x, seed, *rest = ctx.saved_tensors
        parts = []
        for length in ctx.lengths:
            parts.append(rest[:length])
            rest = rest[length:]
        dys, dhs = grads[: ctx.count], grads[ctx.count :]
        if any(map(differentiated_again, dys)) or any(dh is not None for dh in dhs):
            return _through_the_reference(ctx, dys, dhs, x, seed, *parts)
        has_dy = [dy is not None for dy in dys]
        needs_x, *of = ctx.needs_input_grad[:5]
        biases = iter(of[3])
        flags = [[W, a, b, has and next(biases)] for W, a, b, has in zip(*of[:3], ctx.has_bias, strict=True)]
        needs = [need and has for has, flag in zip(has_dy, flags, strict=True) for need in flag]
        settings = (ctx.scaling, ctx.has_bias, ctx.dropout, ctx.backend, ctx.build, needs_x, needs)
        found = iter(run([dy for dy in dys if dy is not None], has_dy, x, *parts, seed, *settings))
        dx = next(found) if needs_x and any(has_dy) else None
        each = [next(found) if need else None for need in needs]
        dW, dA, dB = (each[i::4] for i in range(3))
        dbias = [each[4 * i + 3] for i, has in enumerate(ctx.has_bias) if has]
        frozen = [None] * ctx.lengths[-1]
        return (dx, dW, dA, dB, dbias, frozen, list(frozen), *(None,) * 7)

    return rule


def _through_the_reference(
    ctx: Any,
    dys: list[Tensor | None],
    dhs: list[Tensor | None],
    x: Tensor,
    seed: Tensor | None,
    h: list[Tensor],
    *parts: list[Tensor],
) -> tuple[Any, ...]:
    """All gradients, a layer at a time, by operations that are differentiable themselves."""
    dx: Any = None
    each: list[list[Tensor]] = [[], [], [], []]
    weight, A, B, bias, A0, B0 = parts
    layers = _layers(weight, A, B, bias, A0, B0, ctx.scaling, ctx.has_bias)
    for layer, own_h, dy, dh in zip(layers, h, dys, dhs, strict=True):
        W, a, b, has, a0, b0, scaling = layer
        dy = x.new_zeros(*x.shape[:-1], W.shape[0]) if dy is None else dy
        needs = [True, True, True, True, has is not None]
        more, *own = reference.pc_linear_backward(dy, dh, x, own_h, W, a, b, a0, b0, scaling, seed, ctx.dropout, needs)
        dx = more if dx is None else dx + more
        for grads, grad in zip(each, own, strict=True):
            if grad is not None:
                grads.append(grad)
    frozen = [None] * ctx.lengths[-1]
    return (dx, *each, frozen, list(frozen), *(None,) * 7)


pc_linear_shared_op = torch.library.custom_op("ipca::pc_linear_shared", forward, mutates_args=())


@pc_linear_shared_op.register_fake
def _(x: Tensor, weight: list[Tensor], A: list[Tensor], *_: Any) -> list[Tensor]:
    return [x.new_empty(*x.shape[:-1], rows.shape[0]) for rows in (*weight, *A)]


pc_linear_shared_op.register_autograd(autograd_rule(backward), setup_context=setup_context)


def pc_linear_shared(x: Tensor, layers: Sequence[Layer], *, dropout: float = 0.0) -> list[Tensor]:
    """``[pc_linear(x, layer) for layer in layers]`` with ``x`` read once for all ``h`` and once for all ``dA``.

    Args:
        x: ``(…, K)``.
        layers: the tensors of each, see :class:`ipca.ops.Layer`; all with frozen factors or none, factors of one dtype.
        dropout: as in :func:`pc_linear`, with one mask for all.

    Returns:
        ``(…, N_i)`` of each layer.

    Raises:
        ValueError: as :func:`pc_linear`, or layers that cannot share.
        RuntimeError: as :func:`pc_linear`.
    """
    for layer in layers:
        check(x, layer.weight, layer.A, layer.B, layer.bias, layer.A0, layer.B0, dropout)
    kinds = {(layer.A0 is not None, layer.A.dtype) for layer in layers}
    if len(kinds) != 1:
        raise ValueError(
            f"shared layers need one form and one dtype of factors, got {len(layers)} of {sorted(map(str, kinds))}."
        )
    if transformed():
        return [pc_linear(x, W, A, B, b, A0=A0, B0=B0, scaling=s, dropout=dropout) for W, A, B, b, A0, B0, s in layers]
    weights, As, Bs, biases, A0s, B0s, scalings = (list(part) for part in zip(*layers, strict=True))
    count = len(layers)
    x, *cast = to_autocast(x, *weights, *biases)
    weights, biases = cast[:count], cast[count:]
    seed = new_seed(x.device) if dropout > 0 else None
    op, build = op_for(x)
    outputs = op(
        x,
        weights,
        As,
        Bs,
        [bias for bias in biases if bias is not None],
        [A0.detach() for A0 in A0s if A0 is not None],
        [B0.detach() for B0 in B0s if B0 is not None],
        seed,
        scalings,
        [bias is not None for bias in biases],
        dropout,
        backends.get_backend(),
        build,
        torch.is_grad_enabled(),
    )
    return list(outputs[:count])


def op_for(x: Tensor) -> tuple[Callable[..., list[Tensor]], str]:
    """The op for the device of ``x`` and its build."""
    if not x.is_cuda:
        return pc_linear_shared_op, ""
    from ipca.ops import cuda

    return cuda.pc_linear_shared_cuda_op, cuda.BUILD
