"""Singular components of a chosen window: ``window_svd``, its result, and a cache of results."""

from ipca.svd.cache import CacheEntry, CacheKey, SpectralCache, cached_window_svd
from ipca.svd.decompose import singular_values, window_svd
from ipca.svd.result import SVDReport, WindowSVD

__all__ = [
    "CacheEntry",
    "CacheKey",
    "SVDReport",
    "SpectralCache",
    "WindowSVD",
    "cached_window_svd",
    "singular_values",
    "window_svd",
]
