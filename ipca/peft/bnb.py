"""PEFT's layers around bitsandbytes' linear layers, with a window of the dequantized weight."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import bnb
from torch import nn

from ipca.peft.layers import QuantizedWindowLora


class WindowLinear4bit(QuantizedWindowLora, bnb.Linear4bit):
    """A base of type ``bitsandbytes.nn.Linear4bit``: NF4 or FP4.

    On some CPUs bitsandbytes packs the weight at its first evaluation, for good: its scales are rounded, and no
    gradient passes any more. The base of this layer is kept from that.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, **kwargs)
        base: Any = self.get_base_layer()
        base.support_avx512bf16_for_cpu = False


class WindowLinear8bitLt(QuantizedWindowLora, bnb.Linear8bitLt):
    """A base of type ``bitsandbytes.nn.Linear8bitLt``."""
