"""SharedInput: several adapted layers over one input, which reads it once."""

from __future__ import annotations

from torch import Tensor, nn

from ipca.nn.linear import LinearPC
from ipca.ops import pc_linear_shared


class SharedInput(nn.Module):
    """``q, k, v`` of an attention block, or ``gate, up`` of an MLP, run together over one ``x``.

    ``y_i = layer_i(x)``, as if each were called by itself, but ``x`` is read once for all low-rank inputs ``z A_iᵀ``
    and once for all gradients of ``A_i``. With dropout the layers share one mask.

    >>> self.qkv = SharedInput(q=q_proj, k=k_proj, v=v_proj)
    >>> q, k, v = self.qkv(x)

    The layers are submodules under the names given, so that adapters save, load and merge as usual. A layer that is
    merged or disabled, or that has forward hooks, sends all of them through their own ``forward``.

    Args:
        layers: ``LinearPC`` of one form, ``in_features``, dropout and factor dtype.

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
        layers = [layer for layer in self.children() if isinstance(layer, LinearPC)]
        if any(layer.is_plain or layer.is_disabled or _has_hooks(layer) for layer in layers):
            return tuple(layer(x) for layer in layers)
        dropout = layers[0].dropout if layers[0].training else 0.0
        return tuple(pc_linear_shared(x, [layer.tensors() for layer in layers], dropout=dropout))


def _has_hooks(layer: LinearPC) -> bool:
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return any(hooks)
