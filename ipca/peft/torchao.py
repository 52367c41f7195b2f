"""PEFT's layer around a linear layer with a weight of torchao, with a window of the dequantized weight."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.torchao import TorchaoLoraLinear
from torch import nn

from ipca.peft.layers import QuantizedWindowLora


class WindowTorchaoLinear(QuantizedWindowLora, TorchaoLoraLinear):
    """A base of type ``nn.Linear`` whose weight torchao has quantized."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        kwargs.setdefault("get_apply_tensor_subclass", None)  # merging needs it, and says so
        super().__init__(base_layer, adapter_name, **kwargs)
