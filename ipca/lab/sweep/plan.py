"""The trials of a sweep: the grid, rates of equal early updates, and rates tuned by Optuna."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ipca.lab.baselines import CONTROLS, check_method, kind_of
from ipca.lab.names import COMPARISONS as COMPARISONS
from ipca.lab.sweep.trial import Row, Trial
from ipca.window import Window, as_window

if TYPE_CHECKING:
    from optuna import Study

MATCHED = {"sqrt-sigma": ("window", "auto"), "update": ("window", "auto", "lora")}
"""The kinds of methods whose rates a comparison changes; with ``"update"`` the reference keeps the grid's rates."""
WINDOWS = ("0.0", "0.125", "0.25", "0.5", "0.75", "0.875", "1.0")
DEFAULT_METHODS = ("lora", *CONTROLS)
"""Methods run by default in addition to the windows."""
TUNING_SEEDS = (1_000_000, 1_000_001)
"""Seeds of the runs that tuning uses, and nothing else does."""
TUNING_RANGE = 4.0
"""Tuning extends the grid's range of rates by this factor on both sides."""


@dataclass(frozen=True)
class Grid:
    """Methods × rates × seeds, compared in several ways.

    Attributes:
        windows: each a text form of :class:`ipca.Window`.
        lrs: learning rates, ascending.
        seeds: the same for every method, so that differences are paired.
        methods: in addition to the windows, see :func:`ipca.lab.baselines.apply`.
        comparisons: of :data:`COMPARISONS`. ``"sqrt-sigma"`` applies to windows and ``"auto"``, ``"update"`` to these
            and plain LoRA; ``"same"`` to all methods, and is always included.
        reference: the window that the controls and the equal updates refer to.
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
        """A grid from user input; ``rank`` is the one that a :class:`ipca.Window` must have.

        Raises:
            TypeError, ValueError: an unknown method or comparison, a rate that is not positive, an empty list, or a
                duplicate.
        """
        if not isinstance(seeds, Iterable):
            seeds = _whole("seeds", seeds, "a whole number, or a list of seeds")
            if seeds < 1:
                raise ValueError(f"seeds must be a number of at least 1, or a list of seeds; got {seeds}.")
        listed = range(seeds) if isinstance(seeds, int) else _list("seeds", seeds)
        grid = cls(
            tuple(_window(window, rank) for window in _list("windows", windows)),
            tuple(sorted(_rate(lr) for lr in _list("lrs", lrs))),
            tuple(_whole("seeds", seed, "whole numbers") for seed in listed),
            tuple(check_method(method) for method in _list("methods", methods)),
            _list("comparisons", comparisons),
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
                raise ValueError(f"{name} contains a value twice: {', '.join(map(str, values))}.")
        if not all(0 <= seed < 2**32 for seed in self.seeds):
            raise ValueError(f"seeds must be from 0 to 2**32 - 1, got {', '.join(map(str, self.seeds))}.")
        wrong = [window for window in self.windows if kind_of(window) != "window"]
        wrong += [method for method in self.methods if kind_of(method) == "window"]
        if wrong:
            raise ValueError(
                f"{wrong[0]!r} is in the wrong list: pass windows as `windows`, other methods as `methods`."
            )
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
        """The trials whose rates do not depend on results: same and √σ."""
        return [
            Trial(method, comparison, lr, lr, seed)
            for comparison in ("same", "sqrt-sigma")
            for method in self.compared(comparison)
            for lr in self.lrs
            for seed in self.seeds
        ]

    def update_trials(self, rows: Sequence[Row]) -> list[Trial]:
        """The trials at equal early updates, from the ``rows`` of :meth:`direct_trials`."""
        if "update" not in self.comparisons:
            return []
        rates = {m: matched_rates(rows, m, self.reference, self.lrs) for m in self.compared("update")}
        return [
            Trial(method, "update", lr, rates[method][lr], seed)
            for method in rates
            for lr in self.lrs
            if lr in rates[method]
            for seed in self.seeds
        ]

    def compared(self, comparison: str) -> list[str]:
        """The methods with trials of their own in ``comparison``; none if it is not among the comparisons."""
        if comparison not in self.comparisons:
            return []
        left_out = self.reference if comparison == "update" else None
        kinds = MATCHED.get(comparison)
        return [m for m in self.all_methods() if m != left_out and (kinds is None or kind_of(m) in kinds)]

    def counts(self, rounds: int = 0) -> dict[str, dict[str, int]]:
        """Numbers of trials by stage and method: each comparison, then ``"tuning"`` in ``rounds``, then ``"tuned"``.

        Those of ``"update"`` and ``"tuned"`` are upper bounds: methods or rates that failed are left out.
        """
        each = len(self.lrs) * len(self.seeds)
        found = {name: dict.fromkeys(self.compared(name), each) for name in COMPARISONS if name in self.comparisons}
        if rounds:
            found["tuning"] = dict.fromkeys(self.all_methods(), rounds * len(TUNING_SEEDS))
            found["tuned"] = dict.fromkeys(self.all_methods(), len(self.seeds))
        return found

    def record(self) -> dict[str, Any]:
        return {name: list(getattr(self, name)) for name in ("windows", "lrs", "seeds", "methods", "comparisons")} | {
            "reference": self.reference
        }


def steps_of(checkpoints: Sequence[int]) -> tuple[int, ...]:
    """Checkpoints from user input, ascending.

    Raises:
        TypeError, ValueError: not a list of integers of at least 1.
    """
    steps = tuple(sorted({_whole("checkpoints", step, "whole numbers") for step in _list("checkpoints", checkpoints)}))
    if steps and steps[0] < 1:
        raise ValueError(f"checkpoints must be optimizer steps, counted from 1; got {steps[0]}.")
    return steps


def count_of(name: str, value: Any, least: int = 1) -> int:
    """A count from user input.

    Raises:
        TypeError, ValueError: not a whole number of at least ``least``.
    """
    count = _whole(name, value, "a whole number")
    if count < least:
        raise ValueError(f"{name} must be at least {least}, got {count}.")
    return count


def _list(name: str, values: Any) -> tuple[Any, ...]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a list, got {values!r}; pass [{values!r}] for a single one.")
    return tuple(values)


def _whole(name: str, value: Any, what: str) -> int:
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise TypeError(f"{name} must be {what}, got {value!r}.")


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
    """For each rate of the reference, the rate at which ``method`` has the same ``early_update``.

    ``log early_update`` of the method, averaged over seeds, is interpolated linearly in ``log lr`` between its own runs
    at the grid's rates, and extrapolated with slope 1, that of Adam for small rates. Three significant digits. Rates at
    which the reference or all of the method's runs diverged are left out.
    """
    own = _early_updates(rows, method)
    target = _early_updates(rows, reference)
    points = sorted((math.log(lr), math.log(own[lr])) for lr in own)
    if not points:
        return {}
    return {lr: float(f"{math.exp(_solve(points, math.log(target[lr]))):.3g}") for lr in lrs if lr in target}


def _early_updates(rows: Sequence[Row], method: str) -> dict[float, float]:
    """``{lr: mean early_update}`` of a method's runs in the comparison ``"same"``."""
    found: dict[float, list[float]] = {}
    for row in rows:
        if (row["method"], row["comparison"], row["step"]) == (method, "same", None) and row["early_update"]:
            found.setdefault(row["lr"], []).append(row["early_update"])
    return {lr: mean(values) for lr, values in found.items()}


def _solve(points: list[tuple[float, float]], value: float) -> float:
    """The ``x`` at which the line through ``points``, ascending in ``x``, reaches ``value``; slope 1 outside them."""
    for (x0, y0), (x1, y1) in pairwise(points):
        if y1 > y0 and y0 <= value <= y1:
            return x0 + (x1 - x0) * (value - y0) / (y1 - y0)
    x, y = min(points, key=lambda point: abs(point[1] - value))
    return x + value - y


def tuned_trials(grid: Grid, rounds: int, run: Callable[[Sequence[Trial]], Sequence[Row]]) -> list[Trial]:
    """The trials of every method at its best rate, with the grid's seeds.

    In each round Optuna's TPE sampler proposes one rate per method, between a quarter of the grid's lowest rate and
    four times its highest. Its objective is the mean ``target`` over :data:`TUNING_SEEDS`; rates at which a run failed
    are reported as pruned. The same rows give the same proposals, so interrupted tuning resumes. A method that failed
    at every rate has no trials.

    Args:
        rounds: number of rates to try for each method.
        run: runs trials, each at most once, and returns their rows.

    Raises:
        ImportError: Optuna is not installed.
    """
    states = require_optuna().trial.TrialState
    studies = {method: _new_study() for method in grid.all_methods()}
    low, high = grid.lrs[0] / TUNING_RANGE, grid.lrs[-1] * TUNING_RANGE
    for _ in range(rounds):
        proposed = {method: study.ask() for method, study in studies.items()}
        rates = {m: float(f"{trial.suggest_float('lr', low, high, log=True):.3g}") for m, trial in proposed.items()}
        rows = run([Trial(method, "tuning", lr, lr, seed) for method, lr in rates.items() for seed in TUNING_SEEDS])
        for method, trial in proposed.items():
            key = (method, rates[method], None)
            targets = [row["target"] for row in rows if (row["method"], row["lr"], row["step"]) == key]
            if None in targets:
                studies[method].tell(trial, state=states.PRUNED)  # ranked below every completed rate
            else:
                studies[method].tell(trial, mean(targets))
    known = {method: study for method, study in studies.items() if study.get_trials(states=[states.COMPLETE])}
    best = {method: float(f"{study.best_params['lr']:.3g}") for method, study in known.items()}
    return [Trial(method, "tuned", lr, lr, seed) for method, lr in best.items() for seed in grid.seeds]


def require_optuna() -> ModuleType:
    """Import Optuna; the ImportError says how to install it."""
    try:
        import optuna
    except ImportError:
        raise ImportError("tuning needs Optuna; run: pip install 'ipca-lora[sweep]', or leave tuning out") from None
    return optuna


def _new_study() -> Study:
    optuna = require_optuna()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=0))
