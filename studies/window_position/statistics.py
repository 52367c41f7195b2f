"""Means and differences over seeds, as all of the study's tables compute them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ipca.lab.statistics import Interval, bootstrap_interval
from studies.window_position.rows import Values


def mean(values: Sequence[float]) -> float:
    """NaN of nothing."""
    return math.fsum(values) / len(values) if values else math.nan


def differences(first: Values, second: Values) -> list[float]:
    """``first − second`` over the seeds that ended well in both."""
    found = [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]
    return [value for value in found if math.isfinite(value)]


def interval(values: Sequence[float]) -> Interval:
    """The 95 % bootstrap interval of the mean; NaN where there is none, as of a single value."""
    return bootstrap_interval(values) if values else Interval(math.nan, math.nan)
