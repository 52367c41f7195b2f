"""Singular components of a chosen window: ``window_svd`` and what it returns."""

from ipca.svd.dispatch import FLOAT_DTYPES, TOLERANCES, check_matrix, singular_values, tolerance, window_svd
from ipca.svd.result import SVDReport, WindowSVD

__all__ = [
    "FLOAT_DTYPES",
    "TOLERANCES",
    "SVDReport",
    "WindowSVD",
    "check_matrix",
    "singular_values",
    "tolerance",
    "window_svd",
]
