"""Views of a sweep: the comparison and the rate at which the report compares methods, and what was learned there."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import mean, stdev

from ipca.lab.baselines import kind_of
from ipca.lab.compare import best_rate
from ipca.lab.sweep.plan import MATCHED, TUNING_RANGE
from ipca.lab.sweep.report.data import Sweep
from ipca.lab.sweep.report.words import listed, name, number

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
_LITTLE = 0.1
"""A rate at which the target rises by less than this share of its largest rise has taught next to nothing."""
_ERRORS = 2.0
"""A rise of fewer standard errors over seeds is noise."""


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
        """How the rates were chosen, and for which methods the choice is at the edge of what was tried."""
        edges = [f"{name(method)} ({which})" for method, which in self.edges.items()]
        said = f"; at the edge of the rates tried, so that others may be better: {listed(edges)}" if edges else ""
        return _NOTES[self.key].format(lr=self.lr) + said

    @cached_property
    def edges(self) -> dict[str, str]:
        """Methods whose own rates are mostly the lowest or the highest that was tried: ``{method: "the lowest"}``."""
        found = {}
        for method, own in self.rates.items():
            sides = Counter(edge_of(self.sweep, lr, self.key) for lr in own.values())
            for which, n in sides.most_common(1):
                if which is not None and 2 * n > len(own):
                    found[method] = which
        return found

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
        """``{method: {seed: rate}}`` of the views ``"best"`` and ``"tuned"``, else empty."""
        if self.key == "best":
            return {method: best_rates(self.sweep, method) for method in self.sweep.methods}
        found: dict[str, dict[int, float]] = {}
        for run in self.sweep.ends:
            if self.key == run.comparison == "tuned" and run.seed is not None and run.lr is not None:
                found.setdefault(run.method, {})[run.seed] = run.lr
        return found


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


def why_this_rate(sweep: Sweep) -> str:
    """The reason for :func:`middle_rate`."""
    n = len(sweep.lrs)
    if n == 1:
        return "the only one of the grid"
    which = "the middle one" if n % 2 else "the lower one" if n == 2 else "the lower middle one"
    return f"{which} of the grid's {n}: fixed before any result"


def edge_of(sweep: Sweep, lr: float, key: str) -> str | None:
    """``"the lowest"`` or ``"the highest"`` where ``lr`` is the last rate that was tried on that side."""
    if not sweep.lrs:
        return None
    low, high, near = sweep.lrs[0], sweep.lrs[-1], 1.0
    if key == "tuned":  # a search does not reach the ends of its range
        low, high, near = low / TUNING_RANGE, high * TUNING_RANGE, 1.05
    return "the lowest" if lr <= low * near else "the highest" if lr >= high / near else None


@dataclass(frozen=True)
class Learned:
    """The mean target of the windows in a view; ``str()`` says it, and ``doubt`` why it says little of forgetting."""

    target: float
    base: float
    doubt: str | None

    def __str__(self) -> str:
        return f"Mean target of the windows there {number(self.target)}, of the untrained model {number(self.base)}."


def learned(view: View) -> Learned | None:
    """What the windows learned in ``view``, which has a rate; None without a target of them or of the untrained model.

    Nothing was learned if the mean target is less than two standard errors over seeds above that of the untrained model
    (for a single seed: not above it), next to nothing if it rises by less than a tenth of its rise at another rate.
    """
    base = view.sweep.base.get("target")
    here = _targets(view)
    if base is None or not here:
        return None
    noise = _ERRORS * stdev(here) / math.sqrt(len(here)) if len(here) > 1 else 0.0
    rise, doubt = mean(here) - base, None
    others = {lr: mean(found) - base for lr in view.sweep.lrs if (found := _targets(replace(view, lr=lr)))}
    best = max(others, key=lambda lr: others[lr])
    if rise <= noise:
        doubt = "nothing was learned at this rate"
    elif rise < _LITTLE * others[best]:
        doubt = "next to nothing was learned at this rate"
    if doubt and others[best] > max(rise, noise):
        doubt += f" (at {best:g} the target is {number(others[best] + base)})"
    return Learned(mean(here), base, doubt)


def _targets(view: View) -> list[float]:
    """For each seed the mean target over the windows."""
    seeds: dict[int, list[float]] = {}
    for method in view.sweep.positions or view.sweep.methods:
        for seed, value in view.values(method, "target").items():
            seeds.setdefault(seed, []).append(value)
    return [mean(values) for values in seeds.values()]


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
