"""Singular components of a chosen window: ``window_svd``, what it returns, and a cache of what it found."""

from ipca.svd.batch import workspace
from ipca.svd.cache import SpectralCache, cached_window_svd
from ipca.svd.decompose import FLOAT_DTYPES, TOLERANCES, check_matrix, singular_values, tolerance, window_svd
from ipca.svd.parallel import thread_map
from ipca.svd.result import SVDReport, WindowSVD

__all__ = [
    "FLOAT_DTYPES",
    "TOLERANCES",
    "SVDReport",
    "SpectralCache",
    "WindowSVD",
    "cached_window_svd",
    "check_matrix",
    "singular_values",
    "thread_map",
    "tolerance",
    "window_svd",
    "workspace",
]
