"""Layers: ``from ipca.nn import LinearPC``."""

from ipca.nn.conv import ConvPC
from ipca.nn.embedding import EmbeddingPC
from ipca.nn.experts import ExpertsPC, StackPC
from ipca.nn.explanation import Explanation, backends, explain
from ipca.nn.initialization import (
    FORMS,
    InitCertificate,
    InitialFactors,
    certify_init,
    check_options,
    default_adapter_dtype,
    factors_from_svd,
    initial_factors,
)
from ipca.nn.linear import LinearPC
from ipca.nn.quantization import dequantize, quantization_kind, quantize_like
from ipca.nn.quantized_linear import QuantizedLinearPC
from ipca.nn.shared_input import SharedInput
from ipca.nn.window_layer import WindowLayer

__all__ = [
    "FORMS",
    "ConvPC",
    "EmbeddingPC",
    "ExpertsPC",
    "Explanation",
    "InitCertificate",
    "InitialFactors",
    "LinearPC",
    "QuantizedLinearPC",
    "SharedInput",
    "StackPC",
    "WindowLayer",
    "backends",
    "certify_init",
    "check_options",
    "default_adapter_dtype",
    "dequantize",
    "explain",
    "factors_from_svd",
    "initial_factors",
    "quantization_kind",
    "quantize_like",
]
