"""Layers: ``from ipca.nn import LinearPC``."""

from ipca.nn.conv import ConvPC
from ipca.nn.embedding import EmbeddingPC
from ipca.nn.experts import ExpertsPC, StackPC
from ipca.nn.explanation import Explanation, backends, explain
from ipca.nn.initialization import (
    FORMS,
    InitCertificate,
    WindowStart,
    certify_start,
    check_options,
    default_adapter_dtype,
    start_from_svd,
    window_start,
)
from ipca.nn.linear import LinearPC
from ipca.nn.quantization import dequantised, quantised_kind, requantised
from ipca.nn.quantized_linear import QuantisedLinearPC
from ipca.nn.shared_input import SharedInput
from ipca.nn.window_layer import WindowLayer

__all__ = [
    "FORMS",
    "ConvPC",
    "EmbeddingPC",
    "ExpertsPC",
    "Explanation",
    "InitCertificate",
    "LinearPC",
    "QuantisedLinearPC",
    "SharedInput",
    "StackPC",
    "WindowLayer",
    "WindowStart",
    "backends",
    "certify_start",
    "check_options",
    "default_adapter_dtype",
    "dequantised",
    "explain",
    "quantised_kind",
    "requantised",
    "start_from_svd",
    "window_start",
]
