"""``ipca::pc_linear`` for CUDA as a ``triton_op``: what torch.compile traces, down to the kernels inside.

Importing this module loads triton. Backward is an op of its own: a kernel started in an autograd rule outside of an op
would go through PyTorch's tracing machinery. Eager mode takes :class:`ipca.ops.op.PCLinear` instead.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.library import triton_op

from ipca._cache_folder import default_cache_folder
from ipca.kernels import tables
from ipca.ops import op


def _build() -> str:
    """A hash of everything that decides how the ops decompose: their sources, the kernels', and every measured table.

    torch.compile caches graphs on disk under a key of an op's name and arguments, without its body. As an argument this
    hash keeps torch.compile from using a graph of an earlier version, or of a time before a measurement.
    """
    folders = (Path(__file__).parent, Path(tables.__file__).parent, tables.SHIPPED, default_cache_folder())
    files = sorted(path for folder in folders for path in folder.glob("*") if path.suffix in (".py", ".json"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


BUILD = _build()


def forward(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None,
    A0: Tensor | None,
    B0: Tensor | None,
    noise: Tensor | None,
    scaling: float,
    dropout: float,
    backend: str,
    build: str,
    training: bool,
) -> tuple[Tensor, Tensor]:
    """``y (…, N)`` and ``z Aᵀ (…, R)``, see :func:`ipca.ops.op.forward`; ``build`` is for torch.compile's cache."""
    layer = op.Layer(weight, A, B, bias, A0, B0, scaling)
    return op.forward(x, layer, noise, dropout, op.plan_for(backend, x, layer, dropout, training), training)[:2]


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
    noise: Tensor | None,
    scaling: float,
    dropout: float,
    backend: str,
    build: str,
    needs: list[bool],
) -> list[Tensor]:
    """The gradients among ``dx, dW, dA, dB, dbias`` that ``needs`` selects."""
    layer = op.Layer(weight, A, B, bias, A0, B0, scaling)
    plan = op.plan_for(backend, x, layer, dropout, True)
    grads = op.backward(dy, x, h, layer, noise, dropout, plan, op.Needs(*needs))
    return [grad for grad in grads if grad is not None]


pc_linear_op: Any = triton_op("ipca::pc_linear", forward, mutates_args=())
pc_linear_backward_op: Any = triton_op("ipca::pc_linear_backward", backward, mutates_args=())


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, A, B, bias, A0, B0, noise, *ctx.settings, _ = inputs
    ctx.save_for_backward(x, output[1], weight, A, B, bias, A0, B0, noise)
    ctx.set_materialize_grads(False)


def _autograd_rule(ctx: Any, dy: Tensor | None, dh: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:  # h has no gradient: it is an output for backward's sake
        return (None,) * 13
    needs = list(ctx.needs_input_grad[:5])
    found = iter(pc_linear_backward_op(dy, *ctx.saved_tensors, *ctx.settings, needs))
    return (*(next(found) if need else None for need in needs), *(None,) * 8)


pc_linear_op.register_autograd(_autograd_rule, setup_context=_setup_context)
