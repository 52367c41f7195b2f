"""The trainings of a sweep before it starts: how many, how many are finished, and the time of the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from ipca.lab.baselines import CONTROLS
from ipca.lab.sweep.plan import Grid, tuned_trials
from ipca.lab.sweep.store import Store
from ipca.lab.sweep.trial import Row, Trial


@dataclass(frozen=True)
class Plan:
    """The trainings of a sweep; ``str()`` is a table of them by method and stage.

    Attributes:
        grid: the windows, rates, seeds, methods and comparisons.
        counts: ``{stage: {method: number}}``; the stages are the comparisons, then ``"tuning"`` and ``"tuned"``.
        exact: whether the rates of ``"update"`` and ``"tuned"`` are known; until then their numbers are upper bounds.
        seconds: of each finished training.
        workers: number of processes.
    """

    grid: Grid
    counts: dict[str, dict[str, int]]
    exact: bool
    seconds: tuple[float, ...]
    workers: int

    @property
    def total(self) -> int:
        """The number of all trainings."""
        return sum(sum(methods.values()) for methods in self.counts.values())

    @property
    def left(self) -> int:
        """The number of trainings that are not finished."""
        return self.total - len(self.seconds)

    @property
    def seconds_left(self) -> float | None:
        """At the mean time of a finished training; None if none is finished."""
        return self.left * mean(self.seconds) / min(self.workers, max(self.left, 1)) if self.seconds else None

    def line(self) -> str:
        """One sentence: the grid, the trainings by stage, and the time."""
        stages = ", ".join(f"{sum(methods.values()):,} {stage}" for stage, methods in self.counts.items())
        most = "" if self.exact else "at most "
        return f"{self._grid()}: {most}{_count(self.total, 'training')} ({stages}). {self._time()}"

    def __str__(self) -> str:
        methods = {method: None for counts in self.counts.values() for method in counts}
        rows = [["method", *self.counts, "sum"]]
        for method in methods:
            numbers = [counts.get(method, 0) for counts in self.counts.values()]
            rows.append([method, *(str(n or "") for n in (*numbers, sum(numbers)))])
        rows.append(["all", *(str(sum(counts.values())) for counts in self.counts.values()), str(self.total)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        ]
        return "\n".join([self.line(), "", *lines])

    def record(self) -> dict[str, Any]:
        """The numbers, for JSON."""
        return {
            "trainings": self.total,
            "exact": self.exact,
            "counts": self.counts,
            "finished": len(self.seconds),
            "seconds_each": mean(self.seconds) if self.seconds else None,
            "seconds_left": self.seconds_left,
        }

    def _grid(self) -> str:
        grid = self.grid
        controls = [method for method in grid.methods if method in CONTROLS]
        parts = [_count(len(grid.windows), "window"), *(m for m in grid.methods if m not in CONTROLS)]
        parts += [_count(len(controls), "control")] if controls else []
        return f"{' + '.join(parts)} × {_count(len(grid.lrs), 'rate')} × {_count(len(grid.seeds), 'seed')}"

    def _time(self) -> str:
        if self.seconds_left is None:
            return "None is finished, so the time is not known before the first."
        done = f"{len(self.seconds):,} finished in {mean(self.seconds):.1f} s each"
        if not self.left:
            return f"{done}, none left."
        return f"{done}; {self.left:,} left, about {duration(self.seconds_left)} with {_count(self.workers, 'worker')}."


def make_plan(grid: Grid, rounds: int, workers: int, store: Store) -> Plan:
    """The plan of ``grid`` with ``rounds`` of tuning, and what ``store`` holds of it.

    Rates of equal updates and of tuning follow from the results before them, so they are known as far as these are.

    Raises:
        ImportError: ``rounds`` is not 0, and Optuna is not installed.
    """
    seconds: list[float] = []

    def look_up(trials: Sequence[Trial]) -> list[Row]:
        """The rows of ``trials``; raises _UnfinishedError after all were looked up, if one is missing."""
        found = [store.read(trial.key) for trial in trials]
        seconds.extend(each["seconds"] for each in found if each is not None)
        if None in found:
            raise _UnfinishedError
        return [row for each in found if each is not None for row in each["rows"]]

    counts, known = grid.counts(rounds), {"same", "sqrt-sigma", "tuning"}
    try:
        trials = grid.update_trials(look_up(grid.direct_trials()))
        counts, known = _with(counts, "update", trials), known | {"update"}
        look_up(trials)
    except _UnfinishedError:
        pass
    try:
        trials = tuned_trials(grid, rounds, look_up) if rounds else []
        counts, known = _with(counts, "tuned", trials), known | {"tuned"}
        look_up(trials)
    except _UnfinishedError:
        pass
    return Plan(grid, counts, {*counts} <= known, tuple(seconds), workers)


class _UnfinishedError(Exception):
    """A training whose rows are needed is not finished."""


def _with(counts: dict[str, dict[str, int]], stage: str, trials: Sequence[Trial]) -> dict[str, dict[str, int]]:
    """``counts`` with those of ``trials`` as a stage that it has."""
    return {**counts, stage: dict(Counter(trial.method for trial in trials))} if stage in counts else counts


def duration(seconds: float) -> str:
    """``"40 s"``, ``"12 min"``, ``"3 h 20 min"``."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"
