"""SharedInput: several adapted layers over one input, which reads it once."""

from __future__ import annotations

from typing import TypeGuard

from torch import Tensor, nn

from ipca.nn.linear import LinearPC
from ipca.ops import pc_linear_shared


class SharedInput(nn.Module):
    """``q, k, v`` of an attention block, or ``gate, up`` of an MLP, run together over one ``x``.

    ``y_i = layer_i(x)``, as if each were called by itself, but ``x`` is read once for all low-rank inputs ``z A_iᵀ``
    (not by the kernel for few tokens) and once for all gradients of ``A_i``. With dropout the layers share one mask.
    One backend runs for all of them, that of the widest layer.

    >>> block.qkv = SharedInput(q=block.q_proj, k=block.k_proj, v=block.v_proj)  # after apply_pc
    >>> del block.q_proj, block.k_proj, block.v_proj
    >>> q, k, v = block.qkv(x)

    The layers move to new names, here ``qkv.q``, and may not stay under the old ones too: ``save_adapter`` refuses a
    layer in two places. An adapter saved from there has the new names: it loads into a model that shares its layers in
    the same way, and not into the original base.

    Where a layer is merged or disabled, has hooks, or is no LinearPC any more, as after ``ipca.unload``, each runs
    through its own ``forward``.

    Args:
        layers: ``LinearPC`` already, of one form, ``in_features``, dropout and factor dtype.

    Raises:
        TypeError: a layer is not a LinearPC.
        ValueError: fewer than two layers, or layers that differ in one of these.

    Shapes: ``x (…, in)``, ``y_i (…, out_i)``.
    """

    def __init__(self, **layers: LinearPC) -> None:
        super().__init__()
        for name, layer in layers.items():
            if not isinstance(layer, LinearPC):
                raise TypeError(f"{name} is a {type(layer).__name__}; apply_pc first, then share the LinearPC layers.")
            self.add_module(name, layer)
        kinds = {
            name: (layer.form, layer.in_features, layer.dropout, layer.lora_A.dtype) for name, layer in layers.items()
        }
        if len(layers) < 2 or len(set(kinds.values())) != 1:
            raise ValueError(
                f"want two layers or more of the same form, in_features, dropout and adapter dtype, got {kinds}."
            )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        every = list(self.children())
        layers = [layer for layer in every if _can_share(layer)]
        if len(layers) < len(every):
            return tuple(layer(x) for layer in every)
        dropout = layers[0].dropout if layers[0].training else 0.0
        return tuple(pc_linear_shared(x, [layer.tensors() for layer in layers], dropout=dropout))


def _can_share(layer: nn.Module) -> TypeGuard[LinearPC]:
    """Whether nothing is lost where ``layer`` is not called itself."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return isinstance(layer, LinearPC) and not (layer.is_plain or layer.is_disabled or any(hooks))
