"""The LoRA variant that PEFT asks about an adapter of a PCConfig: start, forward, merge."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor

if TYPE_CHECKING:
    from ipca.peft.config import PCConfig
    from ipca.peft.layers import WindowLora


class WindowVariant(LoraVariant):
    """``y = base(x) + scaling · (z Aᵀ Bᵀ − z A0ᵀ B0ᵀ)``; the second product is computed as the first one is.

    Therefore the difference is exactly 0 while ``A = A0`` and ``B = B0``.
    """

    @staticmethod
    def init(module: WindowLora, adapter_name: str, config: PCConfig, **_: Any) -> None:
        module.init_adapter(adapter_name, config)

    @staticmethod
    def forward(module: WindowLora, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        return result + module.low_rank(active_adapter, x)

    @staticmethod
    @torch.no_grad()
    def merge_safe(module: WindowLora, active_adapter: str, orig_weight: Tensor) -> Tensor:
        wide = torch.promote_types(orig_weight.dtype, torch.float32)
        return (orig_weight.to(wide) + module.change(active_adapter).to(wide)).to(orig_weight.dtype)

    @staticmethod
    @torch.no_grad()
    def merge_unsafe(module: WindowLora, active_adapter: str, orig_weight: Tensor) -> None:
        orig_weight.copy_(WindowVariant.merge_safe(module, active_adapter, orig_weight))

    @staticmethod
    @torch.no_grad()
    def unmerge(module: WindowLora, active_adapter: str, orig_weight: Tensor) -> Tensor:
        wide = torch.promote_types(orig_weight.dtype, torch.float32)
        return (orig_weight.to(wide) - module.change(active_adapter).to(wide)).to(orig_weight.dtype)
