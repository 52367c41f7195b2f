"""Forward and backward of one or several layers over one input, put together from a backend's products.

Forward    h_i = z A_iᵀ for all layers at once;
           then a layer at a time y_i = x W_iᵀ + scaling · (h_i B_iᵀ − h0_i B0_iᵀ) + bias.
Backward   a layer at a time g_i = scaling · dy_i B_i, dB_i and dbias_i, dx += dy_i W_i + mask ∘ (g_i A_i − g0_i A0_i);
           then dA_i = g_iᵀ z for all layers at once.

x (M, K) | z = dropout(x) | h_i, g_i (M, R_i) | y_i, dy_i (M, N_i). Kept for backward: x, h_i and the seed of dropout.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false

from ipca.ops import torch_kernels as plain
from ipca.ops.backend import BackendChoice


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
    """Which gradients of a layer are asked for."""

    weight: bool
    A: bool
    B: bool
    bias: bool


class Grads(NamedTuple):
    """The gradients of a layer, None where not asked for."""

    weight: Tensor | None = None
    A: Tensor | None = None
    B: Tensor | None = None
    bias: Tensor | None = None


def forward(
    x: Tensor, layers: list[Layer], seed: Tensor | None, p: float, choice: BackendChoice
) -> tuple[list[Tensor], list[Tensor]]:
    """``y_i`` and ``h_i``, as rows, of ``x (…, K)``."""
    given, x = x, x.reshape(-1, x.shape[-1])
    ranks = [layer.A.shape[0] for layer in layers]
    if guard_or_false(x.shape[0] == 0):
        return [x.new_empty(0, layer.weight.shape[0]) for layer in layers], [x.new_empty(0, R) for R in ranks]
    if choice.backend == "triton":
        from ipca.kernels.few_tokens import few_tokens, takes

        if takes(x, max(ranks)):
            both = [few_tokens(x, *layer[:6], seed, p, scaling=layer.scaling) for layer in layers]
            return [y for y, _ in both], [h for _, h in both]
    merged = choice.backend == "merged"
    As, A0s = [layer.A for layer in layers], [layer.A0 for layer in layers if layer.A0 is not None and not merged]
    h, h0 = _small(choice).project(x, _rows(As), _rows(A0s) if A0s else None, seed, p)
    hs, h0s = _columns(h, ranks), [None] * len(layers) if h0 is None else _columns(h0, ranks)
    if merged:
        return [plain.linear_merged(x, *layer) for layer in layers], hs
    linear, rows = _large(choice)[0], given if choice.backend == "reference" else x
    ys = []
    for layer, own_h, own_h0 in zip(layers, hs, h0s, strict=True):
        ys.append(linear(rows, layer.weight, own_h, layer.B, own_h0, layer.B0, layer.bias, scaling=layer.scaling))
    return ys, hs


def backward(
    dys: list[Tensor | None],
    x: Tensor,
    hs: list[Tensor],
    layers: list[Layer],
    seed: Tensor | None,
    p: float,
    choice: BackendChoice,
    needs_x: bool,
    needs: list[Needs],
) -> tuple[Tensor | None, list[Grads]]:
    """``dx`` and each layer's gradients; a ``dy`` that is None counts as 0."""
    if guard_or_false(x.shape[0] == 0):
        empty = [_no_rows(layer, need) for layer, need in zip(layers, needs, strict=True)]
        return torch.zeros_like(x) if needs_x else None, empty
    dx, grads = None, []
    gs: dict[int, Tensor] = {}
    for i, (dy, h, layer, need) in enumerate(zip(dys, hs, layers, needs, strict=True)):
        if dy is None:
            grads.append(Grads())
            continue
        g, g0, dB, dbias = _low_rank_grads(dy, h, layer, choice, needs_x, need)
        grads.append(Grads(dy.mT @ x if need.weight else None, None, dB, dbias))
        if g is not None and need.A:
            gs[i] = g
        if needs_x:
            dx = _input_grad(dy, layer, g, g0, seed, p, choice, dx)
    if gs:
        together = torch.cat([*gs.values()], dim=1) if len(gs) > 1 else next(iter(gs.values()))
        dA = _small(choice).outer(together, x, layers[next(iter(gs))].A.dtype, seed, p)
        for i, part in zip(gs, dA.split([g.shape[1] for g in gs.values()]), strict=True):
            grads[i] = grads[i]._replace(A=part.clone() if len(gs) > 1 else part)
    return dx, grads


def _low_rank_grads(
    dy: Tensor, h: Tensor, layer: Layer, choice: BackendChoice, needs_x: bool, need: Needs
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """``g``, ``g0``, ``dB`` and ``dbias``, from one read of ``dy`` where one kernel gives them all."""
    small, scaling = _small(choice), layer.scaling
    merged = choice.backend == "merged"
    needs_g, B0 = need.A or (needs_x and not merged), layer.B0 if needs_x and not merged else None
    if needs_g and need.B and small.fuses(dy, layer.B, B0):
        return small.products(dy, h, layer.B, B0, scaling=scaling, needs_bias=need.bias)
    g, g0 = small.project(dy, layer.B.mT, None if B0 is None else B0.mT) if needs_g else (None, None)
    g, g0 = (value if value is None or scaling == 1.0 else value * scaling for value in (g, g0))
    dB = small.outer(h, dy, layer.B.dtype, scaling=scaling, transposed=True) if need.B else None
    return g, g0, dB, dy.sum(0) if need.bias else None


def _input_grad(
    dy: Tensor,
    layer: Layer,
    g: Tensor | None,
    g0: Tensor | None,
    seed: Tensor | None,
    p: float,
    choice: BackendChoice,
    out: Tensor | None,
) -> Tensor:
    if choice.backend == "merged":
        weight = plain.effective_weight(layer.weight, layer.A, layer.B, layer.A0, layer.B0, layer.scaling)
        return dy @ weight if out is None else out.addmm_(dy, weight)
    return _large(choice)[1](dy, layer.weight, g, layer.A, g0, layer.A0, seed, p, out=out)


def _small(choice: BackendChoice) -> Any:
    """The module that has ``project``, ``products`` and ``outer``."""
    if not choice.low_rank_in_triton:
        return plain
    from ipca.kernels import low_rank

    return low_rank


def _large(choice: BackendChoice) -> tuple[Any, Any]:
    """``linear`` and ``input_grad``."""
    if choice.backend == "triton":
        from ipca.kernels.linear import input_grad, linear

        return linear, input_grad
    if choice.backend == "addmm":
        return plain.linear_low_first, plain.input_grad_low_first
    return plain.linear_base_first, plain.input_grad_base_first


def _columns(h: Tensor, ranks: list[int]) -> list[Tensor]:
    """The parts of ``h`` side by side, each in memory of its own: what an op returns may not overlap."""
    if len(ranks) == 1:
        return [h]
    return [part.clone(memory_format=torch.contiguous_format) for part in h.split(ranks, dim=1)]


def _rows(factors: list[Tensor]) -> Tensor:
    return torch.cat(factors) if len(factors) > 1 else factors[0]


def _no_rows(layer: Layer, need: Needs) -> Grads:
    given = (layer.weight, layer.A, layer.B, layer.bias)
    return Grads(*(torch.zeros_like(t) if n and t is not None else None for t, n in zip(given, need, strict=True)))
