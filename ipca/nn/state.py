"""What happens to a WindowLayer's tensors when a plain state dict is loaded into it, and when it is cast."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ipca._dtensor import part_like
from ipca.nn.extra_state import check_extra_state
from ipca.nn.initialization import InitialFactors
from ipca.nn.layer_kinds import to_matrix
from ipca.nn.lowrank import add_low_rank

if TYPE_CHECKING:
    from ipca.nn.window_layer import WindowLayer


def incoming_state(
    layer: WindowLayer, state_dict: dict[str, Any], prefix: str, assign: bool
) -> tuple[dict[str, Any], InitialFactors | None]:
    """What ``layer`` is to load: a state dict of its own, or for that of a plain layer its own and where it starts.

    Args:
        assign: as for ``load_state_dict``; without it a plain weight is cast to the dtype that ``layer`` keeps.

    Raises:
        TypeError, ValueError: it contradicts ``layer``, has another shape, or its window cannot be found.
    """
    if prefix + "weight" in state_dict and prefix + "base_weight" not in state_dict:
        return _state_of_plain(layer, state_dict, prefix, assign)
    check_extra_state(layer, state_dict, prefix)
    return state_dict, None


def _state_of_plain(
    layer: WindowLayer, state_dict: dict[str, Any], prefix: str, assign: bool
) -> tuple[dict[str, Any], InitialFactors]:
    """The state dict that ``layer`` would have had on the plain layer's ``weight``; changes nothing."""
    plain, kept = state_dict[prefix + "weight"], layer.base_weight
    weight = to_matrix(layer.kind, plain)
    if weight.shape != layer.base_matrix().shape:
        raise ValueError(f"the weight has shape {tuple(plain.shape)}, this layer {tuple(kept.shape)}.")
    if not assign:
        weight = weight.to(dtype=kept.dtype, device=weight.device if kept.is_meta else kept.device)
    start = layer._initial_factors(weight)
    own = {**start.factors(), "base_weight": layer._base_for(weight, start), "_extra_state": layer.get_extra_state()}
    rest = {key: value for key, value in state_dict.items() if key != prefix + "weight"}
    return {**rest, **{prefix + name: value for name, value in own.items()}}, start


@torch.no_grad()
def reround(layer: WindowLayer, kept: Tensor, A0: Tensor, B0: Tensor) -> None:
    """Let a ``layer`` of the residual form, after a cast, keep ``W − scaling · B0 A0`` for its factors' new rounding.

    ``kept (…, out, in)``, ``A0`` and ``B0`` are those before the cast; their sum is rounded once.
    """
    new = layer.base_weight
    if kept.is_meta or new.is_meta or (layer.lora_A0.dtype == A0.dtype and new.dtype == kept.dtype):
        return
    change = [(layer.scaling, B0, A0), (-layer.scaling, layer.lora_B0.to(B0.device), layer.lora_A0.to(A0.device))]
    new.copy_(part_like(layer.as_weight(add_low_rank(kept, change, dtype=new.dtype)), new))
