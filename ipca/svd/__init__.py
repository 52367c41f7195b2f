"""Singular components of a chosen window: ``window_svd``, what it returns, and a cache of what it found."""

from ipca.svd.batch import workspace
from ipca.svd.cache import SpectralCache, cached_window_svd
from ipca.svd.decompose import FLOAT_DTYPES, TOLERANCES, check_matrix, singular_values, tolerance, window_svd
from ipca.svd.parallel import side_by_side
from ipca.svd.result import SVDReport, WindowSVD

__all__ = [
    "FLOAT_DTYPES",
    "TOLERANCES",
    "SVDReport",
    "SpectralCache",
    "WindowSVD",
    "cached_window_svd",
    "check_matrix",
    "side_by_side",
    "singular_values",
    "tolerance",
    "window_svd",
    "workspace",
]
