"""Adapted layers, quantized weights, and the explanation of the backend that runs a layer."""

from ipca.nn.conv import ConvPC
from ipca.nn.embedding import EmbeddingPC
from ipca.nn.experts import ExpertsPC, StackPC
from ipca.nn.explanation import Explanation, backends, explain
from ipca.nn.initialization import InitCertificate, InitialFactors
from ipca.nn.linear import LinearPC
from ipca.nn.quantization import dequantize, quantization_kind, quantize_like
from ipca.nn.quantized_linear import QuantizedLinearPC
from ipca.nn.window_layer import WindowLayer

__all__ = [
    "ConvPC",
    "EmbeddingPC",
    "ExpertsPC",
    "Explanation",
    "InitCertificate",
    "InitialFactors",
    "LinearPC",
    "QuantizedLinearPC",
    "StackPC",
    "WindowLayer",
    "backends",
    "dequantize",
    "explain",
    "quantization_kind",
    "quantize_like",
]
