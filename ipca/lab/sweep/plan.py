"""Which trials a sweep consists of, and the rates at which the methods' first updates are equally large."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean
from typing import Any

from ipca.lab.baselines import CONTROLS, check_method, kind_of
from ipca.lab.sweep.trial import Row, Trial
from ipca.window import Window, as_window

COMPARISONS = ("same", "sqrt-sigma", "update")
MATCHED = {"sqrt-sigma": ("window", "auto"), "update": ("window", "auto", "lora")}
"""The kinds of methods that a comparison gives rates of their own; with ``"update"`` the reference keeps the grid's."""
WINDOWS = ("0.0", "0.125", "0.25", "0.5", "0.75", "0.875", "1.0")
DEFAULT_METHODS = ("lora", *CONTROLS)
"""Besides the windows, in every sweep."""


@dataclass(frozen=True)
class Grid:
    """Methods × rates × seeds, compared in several ways.

    Attributes:
        windows: each a text form of :class:`ipca.Window`.
        lrs: learning rates, ascending.
        seeds: of the runs; the same for every method, so that differences are paired.
        methods: besides the windows, see :func:`ipca.lab.baselines.apply`.
        comparisons: of :data:`COMPARISONS`. ``"sqrt-sigma"`` is for windows and ``"auto"``, ``"update"`` for these and
            plain LoRA; ``"same"`` for everything, and always there.
        reference: the window that the controls and the matched updates refer to.
    """

    windows: tuple[str, ...]
    lrs: tuple[float, ...]
    seeds: tuple[int, ...]
    methods: tuple[str, ...]
    comparisons: tuple[str, ...]
    reference: str

    @classmethod
    def of(
        cls,
        windows: Sequence[Window | str | float],
        lrs: Sequence[float],
        seeds: int | Sequence[int],
        methods: Sequence[str],
        comparisons: Sequence[str],
        reference: str,
        rank: int | None = None,
    ) -> Grid:
        """A grid from what users write; ``rank`` is the one that a :class:`ipca.Window` must have.

        Raises:
            TypeError, ValueError: an unknown method or comparison, a rate that is not positive, nothing to do, or
                something given twice.
        """
        if isinstance(seeds, int) and seeds < 1:
            raise ValueError(f"seeds must be at least 1, or the seeds themselves; got {seeds}.")
        listed = range(seeds) if isinstance(seeds, int) else _several("seeds", seeds)
        grid = cls(
            tuple(_window(window, rank) for window in _several("windows", windows)),
            tuple(sorted(_rate(lr) for lr in _several("lrs", lrs))),
            tuple(_whole("seeds", seed) for seed in listed),
            tuple(check_method(method) for method in _several("methods", methods)),
            _several("comparisons", comparisons),
            check_method(reference),
        )
        grid.check()
        return grid

    def check(self) -> None:
        """Raise as :meth:`of` does."""
        for name in ("windows", "lrs", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"a sweep needs at least one of {name}.")
        for name in ("windows", "lrs", "seeds", "methods", "comparisons"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name} holds a value twice: {', '.join(map(str, values))}.")
        if not all(0 <= seed < 2**32 for seed in self.seeds):
            raise ValueError(f"seeds must lie from 0 to 2**32 - 1, got {', '.join(map(str, self.seeds))}.")
        wrong = [window for window in self.windows if kind_of(window) != "window"]
        wrong += [method for method in self.methods if kind_of(method) == "window"]
        if wrong:
            raise ValueError(f"{wrong[0]!r} is in the wrong list: windows in `windows`, all else in `methods`.")
        if not all(math.isfinite(lr) and lr > 0 for lr in self.lrs):
            raise ValueError(f"learning rates must be positive, got {', '.join(map(str, self.lrs))}.")
        unknown = [name for name in self.comparisons if name not in COMPARISONS]
        if unknown or "same" not in self.comparisons:
            raise ValueError(f"comparisons are 'same' and any of {', '.join(COMPARISONS[1:])}; got {self.comparisons}.")
        if "update" in self.comparisons and self.reference not in self.windows:
            raise ValueError(
                f"equal updates are those of the reference window {self.reference!r}, which is not among the windows "
                f"{', '.join(self.windows)}; add it, or leave the comparison 'update' out."
            )

    def all_methods(self) -> tuple[str, ...]:
        return (*self.windows, *self.methods)

    def direct_trials(self) -> list[Trial]:
        """The trials whose rate is known beforehand: same and √σ."""
        methods = {"same": self.all_methods()}
        if "sqrt-sigma" in self.comparisons:
            methods["sqrt-sigma"] = tuple(m for m in self.all_methods() if kind_of(m) in MATCHED["sqrt-sigma"])
        return [
            Trial(method, comparison, lr, lr, seed)
            for comparison, compared in methods.items()
            for method in compared
            for lr in self.lrs
            for seed in self.seeds
        ]

    def update_trials(self, rows: Sequence[Row]) -> list[Trial]:
        """The trials at matched updates; the ``rows`` of :meth:`direct_trials` hold the reference itself."""
        if "update" not in self.comparisons:
            return []
        rates = {method: matched_rates(rows, method, self.reference, self.lrs) for method in self._matched()}
        return [
            Trial(method, "update", lr, rates[method][lr], seed)
            for method in rates
            for lr in self.lrs
            if lr in rates[method]
            for seed in self.seeds
        ]

    def most_trials(self) -> int:
        """How many trials there are if no rate of equal updates is left out; those of tuning do not count."""
        matched = self._matched() if "update" in self.comparisons else []
        return len(self.direct_trials()) + len(matched) * len(self.lrs) * len(self.seeds)

    def _matched(self) -> list[str]:
        """The methods that are run at equal updates."""
        return [m for m in self.all_methods() if kind_of(m) in MATCHED["update"] and m != self.reference]

    def record(self) -> dict[str, Any]:
        return {name: list(getattr(self, name)) for name in ("windows", "lrs", "seeds", "methods", "comparisons")} | {
            "reference": self.reference
        }


def steps_of(checkpoints: Sequence[int]) -> tuple[int, ...]:
    """``checkpoints`` as users write them, ascending.

    Raises:
        TypeError, ValueError: they are no list of whole numbers of at least 1.
    """
    steps = tuple(sorted({_whole("checkpoints", step) for step in _several("checkpoints", checkpoints)}))
    if steps and steps[0] < 1:
        raise ValueError(f"checkpoints are optimizer steps counted from 1, got {steps[0]}.")
    return steps


def _several(name: str, values: Any) -> tuple[Any, ...]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a list, got {values!r}; write [{values!r}] for one.")
    return tuple(values)


def _whole(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be whole numbers, got {value!r}.") from None


def _rate(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"lrs must be learning rates, positive numbers; got {value!r}.") from None


def _window(value: Any, rank: int | None) -> str:
    """The one text of a window. The name of another method stays, and :meth:`Grid.check` says where it belongs."""
    if isinstance(value, str):
        with suppress(ValueError):
            return check_method(value)
    return check_method(as_window(value, rank).text)


def matched_rates(rows: Sequence[Row], method: str, reference: str, lrs: Sequence[float]) -> dict[float, float]:
    """For each rate of the reference the rate at which the ``early_update`` of ``method`` is as large.

    ``log early_update`` of the method, averaged over seeds, is taken as piecewise linear in ``log lr`` between its own
    runs at the same rates, and continued beyond them with slope 1, which is Adam's for small rates; with three
    significant digits. A rate at which the reference or all of the method's runs diverged is left out.
    """
    own = _early(rows, method)
    target = _early(rows, reference)
    points = sorted((math.log(lr), math.log(own[lr])) for lr in own)
    if not points:
        return {}
    return {lr: float(f"{math.exp(_solve(points, math.log(target[lr]))):.3g}") for lr in lrs if lr in target}


def _early(rows: Sequence[Row], method: str) -> dict[float, float]:
    """``{lr: mean early_update}`` of a method's runs at the same rate."""
    found: dict[float, list[float]] = {}
    for row in rows:
        if (row["method"], row["comparison"], row["step"]) == (method, "same", None) and row["early_update"]:
            found.setdefault(row["lr"], []).append(row["early_update"])
    return {lr: mean(values) for lr, values in found.items()}


def _solve(points: list[tuple[float, float]], value: float) -> float:
    """The ``x`` at which the line through ``points``, ascending in ``x``, reaches ``value``; slope 1 beyond them."""
    for (x0, y0), (x1, y1) in pairwise(points):
        if y1 > y0 and y0 <= value <= y1:
            return x0 + (x1 - x0) * (value - y0) / (y1 - y0)
    x, y = min(points, key=lambda point: abs(point[1] - value))
    return x + value - y
