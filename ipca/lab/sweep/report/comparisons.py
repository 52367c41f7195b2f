"""Views of a sweep: the comparison and the rate at which the report compares methods."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from ipca.lab.baselines import kind_of
from ipca.lab.compare import best_rate
from ipca.lab.sweep.plan import MATCHED
from ipca.lab.sweep.report.data import Sweep

TITLES = {
    "same": "the same learning rate",
    "sqrt-sigma": "√σ-matched learning rates",
    "update": "equal early updates",
    "tuned": "each method's tuned learning rate",
    "best": "each method's best learning rate",
}
_NOTES = {
    "same": "every method at {lr:g}",
    "sqrt-sigma": "{lr:g} divided by √σ of the window in every layer; methods without a σ at {lr:g}",
    "update": "rates at which the first steps change the weights as much as the reference window does at {lr:g}; "
    "methods that were not matched at {lr:g}",
    "tuned": "found by a search on separate seeds",
    "best": "for each seed the rate of the grid with the best mean target over the other seeds",
}


@dataclass(frozen=True)
class View:
    """A selection of one run per method and seed.

    Attributes:
        key: of :data:`TITLES`.
        lr: the nominal rate; None if each method has its own.
    """

    sweep: Sweep
    key: str
    lr: float | None

    @property
    def title(self) -> str:
        return TITLES[self.key]

    @property
    def note(self) -> str:
        return _NOTES[self.key].format(lr=self.lr)

    def values(self, method: str, metric: str) -> dict[int, float]:
        """``{seed: metric}`` of the successful runs."""
        if self.key != "best":
            return self.sweep.values(method, metric, self.comparison(method), self.lr)
        rates = self.rates.get(method, {})
        return {
            seed: value
            for seed, lr in rates.items()
            for at, value in self.sweep.values(method, metric, "same", lr).items()
            if at == seed
        }

    def comparison(self, method: str) -> str:
        """The comparison that holds the rows of ``method``: ``"same"`` for methods that this view does not match.

        Methods that it matches, but that have not been run or could not be matched, have no rows.
        """
        if self.key in ("best", "tuned"):
            return "same" if self.key == "best" else "tuned"
        is_reference = self.key == "update" and method == self.sweep.reference
        return self.key if kind_of(method) in MATCHED.get(self.key, ()) and not is_reference else "same"

    @cached_property
    def rates(self) -> Mapping[str, dict[int, float]]:
        """``{method: {seed: rate}}`` of the view ``"best"``."""
        return {method: best_rates(self.sweep, method) for method in self.sweep.methods}


def views(sweep: Sweep) -> list[View]:
    """Every comparison of the table at :func:`middle_rate`, then the methods at their best rates.

    Best rates are those found by ``tune``, else those of the grid, if it has at least two rates and two seeds.
    """
    keys = [key for key in ("same", "sqrt-sigma", "update") if key in sweep.comparisons]
    here = [View(sweep, key, middle_rate(sweep)) for key in keys]
    if "tuned" in sweep.comparisons:
        here.append(View(sweep, "tuned", None))
    elif len(sweep.lrs) > 1 and len(sweep.seeds) > 1:
        here.append(View(sweep, "best", None))
    return [view for view in here if any(view.values(m, "target") or view.values(m, "retained") for m in sweep.methods)]


def middle_rate(sweep: Sweep) -> float | None:
    """The rate at which methods are compared: the middle one of the grid (the lower of two)."""
    return sweep.lrs[(len(sweep.lrs) - 1) // 2] if sweep.lrs else None


def best_rates(sweep: Sweep, method: str) -> dict[int, float]:
    """``{seed: rate}`` by :func:`ipca.lab.compare.best_rate`, among the rates that were run with all of its seeds.

    Empty for a single seed; seeds for which every rate failed with another seed are left out.
    """
    runs = [run for run in sweep.ends if (run.method, run.comparison) == (method, "same") and run.seed is not None]
    seeds = {run.seed for run in runs}
    complete = {lr for lr in sweep.lrs if {run.seed for run in runs if run.lr == lr} == seeds}
    rows = [{"lr": r.lr, "seed": r.seed, "target": r.metrics.get("target")} for r in runs if r.lr in complete]
    if len(seeds) < 2 or not rows:
        return {}
    return {seed: lr for seed, lr in best_rate(rows).items() if not math.isnan(lr)}
