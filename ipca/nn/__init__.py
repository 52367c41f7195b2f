"""Layers: ``from ipca.nn import LinearPC``."""

from ipca.nn.explain import Explanation, backends, explain
from ipca.nn.linear import LinearPC
from ipca.nn.shared import SharedInput
from ipca.nn.start import (
    FORMS,
    InitCertificate,
    WindowStart,
    certify_start,
    check_options,
    default_adapter_dtype,
    start_from_svd,
    window_start,
)

__all__ = [
    "FORMS",
    "Explanation",
    "InitCertificate",
    "LinearPC",
    "SharedInput",
    "WindowStart",
    "backends",
    "certify_start",
    "check_options",
    "default_adapter_dtype",
    "explain",
    "start_from_svd",
    "window_start",
]
