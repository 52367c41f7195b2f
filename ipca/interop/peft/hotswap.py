"""What PEFT's hot-swap may put into an adapter that trains a window.

``peft.utils.hotswap`` writes into the parameters and not through the state dict, so that ``A0, B0`` would silently stay
beside factors that did not start there. What has more ranks than the window, such as ``[A; A0]`` of a PCConfig's file,
takes the place of all four; anything else is refused, before PEFT changes a bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import wraps
from typing import Any

from peft.utils import hotswap
from torch import Tensor, nn

from ipca.interop.peft.layers import WindowLora


def refuse_smaller(model: nn.Module, state_dict: Mapping[str, Tensor], adapter: str) -> None:
    """Raise ValueError where ``state_dict`` would fill ``A`` and ``B`` of a window alone, or leave them out."""
    for path, layer in model.named_modules():
        if not (isinstance(layer, WindowLora) and layer.holds(adapter)) or layer.pairs(adapter) is None:
            continue
        incoming = state_dict.get(f"{path.replace('_orig_mod.', '')}.lora_A.{adapter}.weight")
        if incoming is None or len(incoming) <= len(layer.lora_A[adapter].weight):
            raise ValueError(
                f"{path}: the adapter {adapter!r} trains a window of rank {layer.r[adapter]}, into which only a saved "
                "adapter of that rank or more can be hot-swapped; load the adapters with stock PEFT, without a "
                "PCConfig, and swap those."
            )


def guard_hotswap() -> None:
    """Let PEFT ask :func:`refuse_smaller` first; it has no door of its own for that."""
    plain = hotswap.hotswap_adapter_from_state_dict

    @wraps(plain)
    def checked(model: nn.Module, state_dict: dict[str, Tensor], adapter_name: str, *args: Any, **kwargs: Any) -> None:
        refuse_smaller(model, state_dict, adapter_name)
        plain(model, state_dict, adapter_name, *args, **kwargs)

    hotswap.hotswap_adapter_from_state_dict = checked
