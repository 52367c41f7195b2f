"""Layers: ``from ipca.nn import LinearPC``."""

from ipca.nn.linear import LinearPC
from ipca.nn.start import (
    FORMS,
    InitCertificate,
    WindowStart,
    certify_start,
    check_options,
    default_adapter_dtype,
    window_start,
)

__all__ = [
    "FORMS",
    "InitCertificate",
    "LinearPC",
    "WindowStart",
    "certify_start",
    "check_options",
    "default_adapter_dtype",
    "window_start",
]
