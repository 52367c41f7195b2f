"""Divergence at an equal score on the new task, along the scale of the final change or along training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from studies.frontier.rows import Line

Vector = NDArray[np.float64]
_POINTS = 2001


@dataclass(frozen=True)
class Curve:
    """A run's cross-entropy on the new task, and another metric, as smooth functions of λ or of the step.

    Both are interpolated by PCHIP (Fritsch & Carlson, SIAM Journal on Numerical Analysis 17, 1980) through the
    measured points and the base: the divergence is nearly quadratic in λ, so straight lines would overstate it. The
    root of the divergence is nearly linear, and closer to the truth between the base and the first point.
    """

    at: Vector
    new: Vector
    other: Vector

    def when(self, target: float) -> float | None:
        """The other metric where the cross-entropy on the new task first is ``target`` or less; None if it never is."""
        return self._first(self.other, target)

    def where(self, target: float) -> float | None:
        """The λ, or the step, at which the cross-entropy on the new task first is ``target`` or less."""
        return self._first(self.at, target)

    def _first(self, values: Vector, target: float) -> float | None:
        reached = np.flatnonzero(self.new <= target)
        return float(values[reached[0]]) if len(reached) else None

    @property
    def lowest(self) -> float:
        """The lowest cross-entropy on the new task."""
        return float(self.new.min())


def along_scale(lines: Iterable[Line], metric: str, scales: Sequence[float], *, root: bool = False) -> Curve | None:
    """The curve of a run over λ from 0 to 1, through the measurements at ``scales``; None for one that diverged.

    Args:
        root: interpolate the root of the metric; below 0, where only rounding takes a divergence, it counts as 0.
    """
    lines = list(lines)
    final = max(line["step"] for line in lines)
    chosen = [line for line in lines if line["step"] in (0, final) and line["scale"] in (0.0, *scales)]
    return _curve(chosen, "scale", metric, root)


def along_training(lines: Iterable[Line], metric: str, *, root: bool = False) -> Curve | None:
    """The curve of a run over its steps, through the measurements at the checkpoints; None for one that diverged."""
    return _curve([line for line in lines if line["step"] == 0 or line["scale"] == 1.0], "step", metric, root)


def _curve(lines: list[Line], variable: str, metric: str, root: bool) -> Curve | None:
    from scipy.interpolate import PchipInterpolator  # takes a second to import

    if any(line["status"] != "ok" for line in lines):
        return None
    points = sorted((line[variable], line["ce_new"], line[metric]) for line in lines)
    x, new, other = np.array(points, dtype=np.float64).T
    at = np.linspace(x[0], x[-1], _POINTS)
    found = PchipInterpolator(x, np.sqrt(other.clip(0)))(at) ** 2 if root else PchipInterpolator(x, other)(at)
    return Curve(at, PchipInterpolator(x, new)(at), found)
