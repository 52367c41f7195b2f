"""Checks of calls that PEFT makes past its layers. PEFT has no hook for them, so we wrap four of its functions.

``peft.utils.hotswap`` writes into the parameters: a file with more ranks than the window, such as ``[A; A0]`` of
another PCConfig, replaces all four factors, but any other would leave ``A0, B0`` beside factors that did not start
there. ``LoraModel.add_weighted_adapter`` combines only ``A, B``. Both are refused. Before ``LoraModel.inject_adapter``
the model's head is added to ``modules_to_save``; after it all adapted layers are known, and a key of ``window_pattern``
that matches none of them gives a warning, as one of ``rank_pattern`` does. ``PeftModel.save_pretrained`` warns where
running statistics of BatchNorm moved in training.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import wraps
from typing import Any

from peft import LoraModel, PeftModel
from peft.utils import hotswap
from torch import Tensor, nn

from ipca.model.heads import find_heads, warn_of_loose_parameters
from ipca.model.running_statistics import warn_moved_statistics, watch_statistics
from ipca.peft.config import PCConfig
from ipca.peft.layers import WindowLora


def check_hotswap(model: nn.Module, state_dict: Mapping[str, Tensor], adapter: str) -> None:
    """Raise ValueError where ``state_dict`` lacks the factors of a window, or has only ``A`` and ``B`` of it."""
    for path, layer in model.named_modules():
        if not (isinstance(layer, WindowLora) and layer.holds(adapter)) or layer.pairs(adapter) is None:
            continue
        incoming = state_dict.get(f"{path.replace('_orig_mod.', '')}.lora_A.{adapter}.weight")
        if incoming is None or len(incoming) <= len(layer.lora_A[adapter].weight):
            raise ValueError(
                f"{path}: the adapter {adapter!r} trains a window of rank {layer.r[adapter]}, into which only a LoRA "
                "of a larger rank can be hot-swapped, such as the saved adapter of a window of this rank; load the "
                "first adapter with stock PEFT, without a PCConfig, to swap others."
            )


def check_weighted(model: LoraModel, adapters: Sequence[str]) -> None:
    """Raise ValueError where one of ``adapters`` trains a window."""
    windows = [name for name in adapters if isinstance(model.peft_config.get(name), PCConfig)]
    if windows:
        raise ValueError(
            f"{windows[0]!r} trains a window, and add_weighted_adapter would combine the trained factors without their "
            "initial ones: save the adapters, load them with stock PEFT, without a PCConfig, and combine those."
        )


def add_heads(model: nn.Module, config: PCConfig) -> None:
    """Name the head of ``model`` in the configuration's ``modules_to_save``, unless it was read from a folder."""
    if config.records.saved:
        return
    chosen, excluded = config.target_modules or (), config.exclude_modules or ()
    heads = find_heads(model, chosen, (excluded,) if isinstance(excluded, str) else excluded)
    named = config.modules_to_save or []
    config.modules_to_save = [*named, *(name for name in heads if name not in named)] or None
    warn_of_loose_parameters(model)


def warn_unmatched(model: nn.Module, config: PCConfig, adapter: str) -> None:
    """Warn of keys of ``window_pattern`` that match no layer of the adapter."""
    layers = (m for m in model.modules() if isinstance(m, WindowLora) and m.holds(adapter))
    unmatched = config.unmatched_windows(layer.path for layer in layers) if config.window_pattern else []
    if unmatched:
        warnings.warn(
            f"The following window_pattern keys did not match any targeted module and were ignored: {unmatched}.",
            RuntimeWarning,
            stacklevel=3,
        )


def install_guards() -> None:
    """Put the checks above before or after PEFT's four functions, for the whole process."""
    swap, combine = hotswap.hotswap_adapter_from_state_dict, LoraModel.add_weighted_adapter
    inject, save = LoraModel.inject_adapter, PeftModel.save_pretrained

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

    @wraps(inject)
    def checked_inject(self: LoraModel, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = self.peft_config[adapter_name]
        if isinstance(config, PCConfig):
            add_heads(model, config)
        inject(self, model, adapter_name, *args, **kwargs)
        if isinstance(config, PCConfig):
            warn_unmatched(model, config, adapter_name)
            watch_statistics(model)

    @wraps(save)
    def checked_save(self: PeftModel, *args: Any, **kwargs: Any) -> None:
        save(self, *args, **kwargs)
        saved = [name for name, _ in self.named_modules() if name.endswith(".modules_to_save")]
        warn_moved_statistics(self, saved)

    hotswap.hotswap_adapter_from_state_dict = checked_swap
    LoraModel.add_weighted_adapter = checked_combine  # type: ignore[method-assign]
    LoraModel.inject_adapter = checked_inject  # type: ignore[assignment,method-assign]
    PeftModel.save_pretrained = checked_save  # type: ignore[method-assign]
