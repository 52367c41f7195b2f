"""What the rows say by PROTOCOL.md's rules: each method at its best rate, fresh middle windows against the others."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import mean

from ipca.lab.statistics import LEVEL, Interval, difference, estimate, holm, mean_interval
from studies.continual.design import COMPARED, SEEDS, Scores, best_rate, chosen, grid
from studies.continual.rows import Row, Rows

MIDDLE = "fresh"
ALIKE = 0.01
"""Largest difference of ACC between methods that are called alike."""
METRICS = ("acc", "bwt", "retained_after")


@dataclass(frozen=True)
class Compared:
    """ACC of fresh middle windows minus that of ``method``, over the ``n`` seeds of both.

    Attributes:
        interval, narrow: 95 % and 90 %, of the mean.
        p, adjusted: of the exact sign-flip test, without and with Holm's correction; the latter where it was made.
        why: the reason why there is no verdict; empty if there is one.
    """

    method: str
    n: int
    mean: float
    interval: Interval
    narrow: Interval
    p: float
    why: str
    adjusted: float | None = None

    @property
    def verdict(self) -> str:
        """``"alike"``, ``"higher"``, ``"lower"`` or ``"not shown"``; empty without a verdict. Alike comes first."""
        if self.why or self.adjusted is None:
            return ""
        ends = [abs(end) for end in self.narrow if math.isfinite(end)]  # none if all differences are equal
        return "alike" if max(ends, default=abs(self.mean)) <= ALIKE else self.direction or "not shown"

    @property
    def direction(self) -> str:
        """``"higher"`` or ``"lower"`` where a difference is shown; empty otherwise."""
        if self.why or self.adjusted is None or self.adjusted > LEVEL:
            return ""
        return "higher" if self.mean > 0 else "lower"

    @property
    def words(self) -> str:
        """The verdict, with the direction of methods that are alike where it is shown: ``"alike (higher)"``."""
        return f"alike ({self.direction})" if self.verdict == "alike" and self.direction else self.verdict


class Analysis:
    """The rows of a folder."""

    def __init__(self, rows: Rows) -> None:
        self._rows, self._scores = rows.all(), rows.scores()

    @property
    def before(self) -> float:
        """The accuracy on digits before the first task, the same for all streams."""
        found = (row["retained_before"] for row in self._rows.values() if "retained_before" in row)
        return float(next(found, math.nan))

    def seeds(self, method: str) -> list[int]:
        """The seeds that have a stream at every rate of the method's grid."""
        scores = self._scores.get(method, {})
        rates = grid(method, scores)
        return [seed for seed in range(SEEDS) if all(seed in scores.get(rate, {}) for rate in rates)]

    def rates(self, method: str) -> tuple[float, ...]:
        """The method's grid."""
        return grid(method, self._scores.get(method, {}))

    def best(self, method: str) -> float | None:
        """The rate with the highest mean ACC over the complete seeds; None without two of them."""
        seeds = self.seeds(method)
        return best_rate(self._of(method, seeds)) if len(seeds) > 1 else None

    def taken(self, method: str) -> Counter[float]:
        """The rates that are best on the other seeds, each with the number of seeds that are taken at it."""
        return Counter(self._chosen(method).values())

    def is_edge(self, method: str) -> bool:
        """Whether the best rate, of all seeds or of the others of one, is the lowest or the highest of the grid."""
        rates = self.rates(method)
        return not {rates[0], rates[-1]}.isdisjoint({self.best(method), *self.taken(method)})

    def tuned(self, method: str, metric: str = "acc") -> dict[int, float]:
        """By seed the metric at the rate that is best on the other seeds; 0 of a stream that diverged."""
        at = self._at(method)
        return {seed: at[rate, seed].get(metric, 0.0) for seed, rate in self._chosen(method).items()}

    def at_rate(self, method: str, rate: float, metric: str) -> float | None:
        """The mean of a metric over all streams at one rate; None where there are none."""
        found = [row.get(metric, 0.0) for (each, _), row in self._at(method).items() if each == rate]
        return mean(found) if found else None

    def _at(self, method: str) -> dict[tuple[float, int], Row]:
        return {(run.rate, run.seed): row for run, row in self._rows.items() if run.method == method}

    def _chosen(self, method: str) -> dict[int, float]:
        seeds = self.seeds(method)
        return chosen(self._of(method, seeds)) if seeds else {}

    def compared(self) -> list[Compared]:
        """The primary comparisons that have two seeds, with the correction over all that have a verdict."""
        found = [each for each in map(self._compared, COMPARED) if each is not None]
        adjusted = iter(holm([each.p for each in found if not each.why]))
        return [each if each.why else replace(each, adjusted=next(adjusted)) for each in found]

    def _compared(self, method: str) -> Compared | None:
        found = difference(self.tuned(MIDDLE), self.tuned(method))
        if found is None:
            return None
        values = self._differences(method, "acc")
        intervals = mean_interval(values), mean_interval(values, level=0.9)
        return Compared(method, found.n, found.mean, *intervals, found.p, self._why(method, found.n))

    def difference(self, method: str, metric: str) -> tuple[float, Interval]:
        """The mean of a metric of fresh middle windows minus that of ``method``, and its 95 % interval."""
        values = self._differences(method, metric)
        return mean(values), mean_interval(values)

    def _differences(self, method: str, metric: str) -> list[float]:
        """A metric of fresh middle windows minus that of ``method``, by seed."""
        ours, theirs = self.tuned(MIDDLE, metric), self.tuned(method, metric)
        return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]

    def _why(self, method: str, n: int) -> str:
        if n < SEEDS:
            return f"collecting: {n} of {SEEDS} seeds"
        edges = [each for each in (MIDDLE, method) if self.is_edge(each)]
        return f"the best rate of {' and '.join(edges)} is an edge of the grid" if edges else ""

    def _of(self, method: str, seeds: list[int]) -> Scores:
        scores: Mapping[float, Mapping[int, float]] = self._scores[method]
        return {rate: {seed: scores[rate][seed] for seed in seeds} for rate in self.rates(method)}

    def mean_of(self, method: str, metric: str) -> tuple[float, Interval] | None:
        """The mean of a metric at best rates, and its 95 % interval; None without values."""
        values = [value for value in self.tuned(method, metric).values() if math.isfinite(value)]
        found = estimate(values)
        return None if found is None else (found.mean, mean_interval(values))
