"""PEFT's layers around quantized linear layers of bitsandbytes and torchao, with a window of the dequantized weight.

Import it only when a base is quantized: importing PEFT's half for bitsandbytes imports bitsandbytes.
"""

from __future__ import annotations

from typing import Any

from peft.import_utils import is_bnb_available
from peft.tuners.lora.torchao import TorchaoLoraLinear
from torch import Tensor, nn

from ipca.nn.quantization import dequantize, quantization_kind, quantized_sha256
from ipca.peft.layers import WindowLora


class QuantizedWindowLora(WindowLora):
    """A base whose weight is quantized; it stays as it is, but for merging, after which PEFT quantizes it anew."""

    @property
    def kind(self) -> str:
        return str(quantization_kind(self.get_base_layer()))

    def can_keep(self) -> bool:
        return False

    def base_matrix(self) -> Tensor:
        return dequantize(self.get_base_layer())

    def base_sha256(self) -> str:
        return quantized_sha256(self.get_base_layer())


class WindowTorchaoLinear(QuantizedWindowLora, TorchaoLoraLinear):
    """A base of type ``nn.Linear`` whose weight torchao has quantized."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        kwargs.setdefault("get_apply_tensor_subclass", None)  # PEFT raises where merging needs it
        super().__init__(base_layer, adapter_name, **kwargs)


if is_bnb_available():
    from peft.tuners.lora import bnb

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


def quantized_class(kind: str) -> type[WindowLora]:
    """The layer around a base of a kind that :func:`ipca.nn.quantization.quantization_kind` names."""
    if kind.startswith("torchao-"):
        return WindowTorchaoLinear
    return WindowLinear8bitLt if kind == "int8" else WindowLinear4bit
