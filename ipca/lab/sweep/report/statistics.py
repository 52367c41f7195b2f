"""Means over seeds with intervals, and differences paired over seeds with exact tests."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from statistics import mean

from ipca.lab.statistics import bootstrap_interval, holm, paired_test

LEVEL = 0.05
"""Of every test; intervals have 95 %."""


@dataclass(frozen=True)
class Estimate:
    """A mean over ``n`` seeds and its 95 % bootstrap interval; None of one seed, or where all values are equal."""

    mean: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Difference(Estimate):
    """A mean difference over the ``n`` seeds that both arms have.

    Attributes:
        p: of the exact sign-flip test.
        adjusted: ``p`` after Holm's correction, where :func:`corrected` made one.
        smallest: the ``p`` of ``n`` differences that all point the same way; no test of ``n`` seeds gives less.
    """

    p: float
    smallest: float
    adjusted: float | None = None

    @property
    def shown(self) -> bool:
        """Whether the corrected test rejects "no difference"."""
        return (self.p if self.adjusted is None else self.adjusted) <= LEVEL


def estimate(values: Iterable[float]) -> Estimate | None:
    """The mean of ``values`` with its interval; None of nothing."""
    numbers = tuple(values)
    if not numbers:
        return None
    low, high = _interval(numbers)
    return Estimate(mean(numbers), low, high, len(numbers))


def difference(a: Mapping[int, float], b: Mapping[int, float], alternative: str = "two-sided") -> Difference | None:
    """``a − b`` over the seeds of both; None where they share none.

    Args:
        alternative: ``"greater"`` asks whether ``a`` lies above ``b``, ``"two-sided"`` whether they differ.
    """
    seeds = sorted(a.keys() & b.keys())
    if not seeds:
        return None
    found = estimate(a[seed] - b[seed] for seed in seeds)
    assert found is not None
    smallest = min(1.0, 2.0**-found.n * (2 if alternative == "two-sided" else 1))
    p = paired_test([a[s] for s in seeds], [b[s] for s in seeds], alternative=alternative).p
    return Difference(found.mean, found.low, found.high, found.n, p, smallest)


def corrected(family: Mapping[str, Difference | None]) -> dict[str, Difference]:
    """The differences that exist, with Holm's correction over them all."""
    made = {name: found for name, found in family.items() if found is not None}
    adjusted = holm([found.p for found in made.values()])
    return {name: replace(found, adjusted=float(p)) for (name, found), p in zip(made.items(), adjusted, strict=True)}


@cache
def _interval(values: tuple[float, ...]) -> tuple[float | None, float | None]:
    """None where the values give no interval; cached, as figures and tables ask for the same again."""
    low, high = bootstrap_interval(values)
    return (low, high) if math.isfinite(low) and math.isfinite(high) else (None, None)
