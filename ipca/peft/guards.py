"""What PEFT does past its layers and their state dicts, refused where it would forget ``A0, B0``.

``peft.utils.hotswap`` writes into the parameters: a file with more ranks than the window, such as ``[A; A0]`` of a
PCConfig's, takes the place of all four factors, but any other would silently leave ``A0, B0`` beside factors that did
not start there. ``LoraModel.add_weighted_adapter`` combines the parameters ``A, B`` alone. PEFT has no door for saying
no to either, so both are asked here first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import wraps
from typing import Any

from peft import LoraModel
from peft.utils import hotswap
from torch import Tensor, nn

from ipca.peft.config import PCConfig
from ipca.peft.layers import WindowLora


def check_hotswap(model: nn.Module, state_dict: Mapping[str, Tensor], adapter: str) -> None:
    """Raise ValueError where ``state_dict`` would fill ``A`` and ``B`` of a window alone, or leave them out."""
    for path, layer in model.named_modules():
        if not (isinstance(layer, WindowLora) and layer.holds(adapter)) or layer.pairs(adapter) is None:
            continue
        incoming = state_dict.get(f"{path.replace('_orig_mod.', '')}.lora_A.{adapter}.weight")
        if incoming is None or len(incoming) <= len(layer.lora_A[adapter].weight):
            raise ValueError(
                f"{path}: the adapter {adapter!r} trains a window of rank {layer.r[adapter]}, into which a LoRA of a "
                "larger rank alone can be hot-swapped, such as the saved adapter of a window of this rank; load the "
                "first adapter with stock PEFT, without a PCConfig, to swap others."
            )


def check_weighted(model: LoraModel, adapters: Sequence[str]) -> None:
    """Raise ValueError where one of ``adapters`` trains a window."""
    windows = [name for name in adapters if isinstance(model.peft_config.get(name), PCConfig)]
    if windows:
        raise ValueError(
            f"{windows[0]!r} trains a window, and add_weighted_adapter would combine the trained factors without those "
            "they started from: save the adapters, load them with stock PEFT, without a PCConfig, and combine those."
        )


def install_guards() -> None:
    """Put the questions above before PEFT's two functions, for the whole process."""
    swap, combine = hotswap.hotswap_adapter_from_state_dict, LoraModel.add_weighted_adapter

    @wraps(swap)
    def checked_swap(
        model: nn.Module, state_dict: dict[str, Tensor], adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        check_hotswap(model, state_dict, adapter_name)
        swap(model, state_dict, adapter_name, *args, **kwargs)

    @wraps(combine)
    def checked_combine(self: LoraModel, adapters: list[str], *args: Any, **kwargs: Any) -> None:
        check_weighted(self, adapters)
        combine(self, adapters, *args, **kwargs)

    hotswap.hotswap_adapter_from_state_dict = checked_swap
    LoraModel.add_weighted_adapter = checked_combine  # type: ignore[method-assign]
