"""pc_linear: argument checks, autocast and the noise of dropout around the product."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from ipca._dtensor import is_sharded
from ipca.ops import op, reference, torch_kernels
from ipca.ops.backend import choose, get_backend, linear_shape
from ipca.ops.dropout import new_noise
from ipca.ops.op import Layer
from ipca.ops.pair import autocast_dtype, balanced_pair, one_pair

# The C++ method: torch.autograd.Function.apply adds a binding of default arguments, which there are none of.
_apply = super(torch.autograd.Function, op.PCLinear).apply


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
    layer = Layer(weight, A, B, bias, A0, B0, scaling)
    _check(x, layer, dropout)
    return pc_linear_of_layer(x, layer, dropout)


def pc_linear_of_layer(x: Tensor, layer: Layer, dropout: float) -> Tensor:
    """:func:`pc_linear` of a module's tensors: on a CPU plain ones are checked by the products themselves."""
    compiling = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    plain = type(x) is Tensor and type(layer.A) is nn.Parameter
    if compiling or x.is_cuda or not plain or x.shape[-1] != layer.weight.shape[1]:
        _check(x, layer, dropout)
    weight, A, B, bias, A0, B0, scaling = layer
    x, weight, bias = to_autocast(x, weight, bias)
    if A0 is not None and B0 is not None and (A0.requires_grad or B0.requires_grad):
        A0, B0 = A0.detach(), B0.detach()
    A, B, A0, B0, scaling = balanced_pair(A, B, A0, B0, scaling, x)
    layer = Layer(weight, A, B, bias, A0, B0, scaling)
    if transformed():
        return _under_transform(x, layer, dropout)
    backend = get_backend()
    noise = new_noise(x, dropout, seed_only=backend not in ("auto", "reference")) if dropout > 0 else None
    if compiling:
        return _traced(x, layer, noise, dropout, backend)
    training = trains(x, layer)
    plan = op.plan_for(backend, x, layer, dropout, training)
    if not training:
        return op.forward(x, layer, noise, dropout, plan, False)[0]
    y: Tensor = _apply(x, *layer, noise, dropout, plan)
    return y


def trains(x: Tensor, layer: Layer) -> bool:
    """Whether the product takes part in a graph for gradients."""
    bias_trains = layer.bias is not None and layer.bias.requires_grad
    others = x.requires_grad or layer.weight.requires_grad or bias_trains
    return torch.is_grad_enabled() and (layer.A.requires_grad or layer.B.requires_grad or others)


def _traced(x: Tensor, layer: Layer, noise: Tensor | None, dropout: float, backend: str) -> Tensor:
    """What torch.compile gets: on CUDA the kernels, elsewhere the formula, which Inductor fuses with what is around."""
    if x.is_cuda:
        return _traced_on_cuda(x, layer, noise, dropout, backend)
    if backend != "auto":
        choose(backend, linear_shape(x, layer.weight, layer.A, layer.A0, dropout, True))  # raises if it cannot run
    with op.without_autocast(x):
        if backend == "merged":
            pair = one_pair(layer.A, layer.B, layer.A0, layer.B0)
            return F.linear(x, torch_kernels.merged_weight(layer.weight, *pair, layer.scaling), layer.bias)
        return reference.pc_linear(x, *layer, noise, dropout)


def _traced_on_cuda(x: Tensor, layer: Layer, noise: Tensor | None, dropout: float, backend: str) -> Tensor:
    from ipca.ops import cuda

    *tensors, scaling = layer
    settings = (scaling, dropout, backend, cuda.BUILD, torch.is_grad_enabled())
    y: Tensor = cuda.pc_linear_op(x, *tensors, noise, *settings)[0]
    return y


def to_autocast(x: Tensor, *others: Tensor | None) -> list[Any]:
    """All tensors in the autocast dtype where autocast is on and ``x`` is not float64, as for ``nn.Linear``."""
    dtype = autocast_dtype(x)
    if dtype is None:
        return [x, *others]
    return [tensor if tensor is None else tensor.to(dtype) for tensor in (x, *others)]


def transformed() -> bool:
    """Whether a ``torch.func`` transform (grad, vmap, jvp) or a ``forward_ad.dual_level`` is running."""
    return not torch.compiler.is_compiling() and (_in_functorch() or forward_ad._current_level >= 0)


def _in_functorch() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


def _under_transform(x: Tensor, layer: Layer, dropout: float) -> Tensor:
    """The reference, which ``torch.func`` can transform and which has derivatives in forward mode."""
    if get_backend() not in ("auto", "reference"):
        raise RuntimeError(
            f"backend {get_backend()!r} has no rule for torch.func transforms and derivatives in forward mode; "
            "call ipca.set_backend('auto') or ipca.set_backend('reference') first."
        )
    if dropout > 0 and _in_functorch():
        raise RuntimeError("pc_linear has no dropout under torch.func transforms; call eval() or set dropout=0.")
    noise = new_noise(x, dropout, seed_only=False) if dropout > 0 else None
    with op.without_autocast(x):
        return reference.pc_linear(x, *layer, noise, dropout)


def _check(x: Tensor, layer: Layer, dropout: float) -> None:
    """Raise for arguments that do not fit, before anything is computed."""
    weight, A, B, bias, A0, B0, _ = layer
    if any(map(is_sharded, (x, weight, A, B, bias, A0, B0))):
        raise TypeError(
            "pc_linear got a DTensor. A layer sharded by fully_shard computes within the forward pass of the module "
            "that was wrapped: call that module. Tensor parallel plans cannot shard an adapted layer: leave it out."
        )
    (N, K), R = weight.shape, A.shape[0]
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
