"""Which paths decompose which window, in the order in which to try them: thresholds measured per class of device."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Thresholds:
    """Where the paths of a class of devices meet.

    Attributes:
        full_below: smallest ``d`` that is not left to the full SVD.
        full_share: ranks above this share of ``d`` are.
        top_from: smallest ``d`` for block Krylov at the start of the spectrum.
        top_share: the share of ``d`` before which such a window ends.
        interior_from: smallest ``d`` for inverse block Krylov inside the spectrum.
        bottom_from: the same at the end of the spectrum.
        bottom_aspect: the largest m / d there; the spectrum of a taller matrix ends far from the shift 0.
        interior_share: the largest rank for these, as a share of ``d``.
        lapack: whether the range solver is there.
    """

    full_below: int
    full_share: float
    top_from: int
    top_share: float
    interior_from: int
    bottom_from: int
    bottom_aspect: float
    interior_share: float
    lapack: bool


THRESHOLDS = {
    # From timings of every path at d from 256 to 2048 on 2 cores; bench/bench_window_svd.py forces each path again.
    "cpu": Thresholds(256, 1 / 4, 768, 1 / 32, 1536, 768, 1.2, 1 / 8, lapack=True),
    # Not measured: an operation count, and the launches that a small matrix cannot pay for.
    "cuda": Thresholds(256, 1 / 4, 256, 1 / 32, 256, 256, 1.2, 1 / 4, lapack=False),
}


def plan(device_type: str, m: int, d: int, window: range) -> list[str]:
    """The paths to try in turn for an ``(m, d)`` matrix, ``m >= d``; behind them all stands the full SVD."""
    limits, rank = THRESHOLDS[device_type], len(window)
    if d < limits.full_below or rank > limits.full_share * d:
        return []
    paths = []
    narrow = rank <= limits.interior_share * d
    if d >= limits.top_from and window.stop <= limits.top_share * d:
        paths.append("top")
    elif narrow and window.stop == d and d >= limits.bottom_from and m <= limits.bottom_aspect * d:
        paths.append("bottom")
    if narrow and d >= limits.interior_from:
        paths.append("interior")
    if limits.lapack:
        paths.append("range")
    return paths
