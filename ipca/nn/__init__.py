"""Layers: ``from ipca.nn import LinearPC``."""

from ipca.nn.linear import LinearPC
from ipca.nn.start import FORMS, InitCertificate, WindowStart, certify_start, window_start

__all__ = ["FORMS", "InitCertificate", "LinearPC", "WindowStart", "certify_start", "window_start"]
