"""Reading of a sweep: its settings, and one :class:`Run` per row of its table."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ipca.lab.baselines import BASELINES, CONTROLS, position_of
from ipca.lab.sweep.store import ROWS, SETTINGS
from ipca.lab.sweep.trial import COLUMNS

METRICS = ("target", "retained")
"""Larger is better for both. Of the other metrics only ``drift``, smaller is better, is tested."""
_REQUIRED = ("method", "kind", "position", "comparison", "lr", "seed", "step", "status")
_OTHERS = ("lora", "full", "auto", *BASELINES, *CONTROLS)


@dataclass(frozen=True)
class Run:
    """One row.

    Attributes:
        position: fraction ``f`` of a window, else None.
        step: of a checkpoint; None at the end of training.
        metrics: the finite ones; empty if the run failed.
    """

    method: str
    kind: str
    position: float | None
    comparison: str
    lr: float | None
    lr_used: float | None
    seed: int | None
    step: int | None
    status: str
    trainable: int | None
    update: float | None
    metrics: dict[str, float]

    @property
    def ok(self) -> bool:
        return self.status == "ok"


@dataclass(frozen=True)
class Sweep:
    """A finished or unfinished sweep.

    Attributes:
        folder: contains the files.
        runs: in the order of the table, without the untrained model.
        base: the untrained model's metrics; empty if the table has no such row.
        settings: of ``settings.json``, with its part ``fixed`` merged in.
    """

    folder: Path
    runs: tuple[Run, ...]
    base: dict[str, float]
    settings: dict[str, Any]

    @cached_property
    def ends(self) -> tuple[Run, ...]:
        """The runs at the end of training."""
        return tuple(run for run in self.runs if run.step is None)

    @cached_property
    def metrics(self) -> tuple[str, ...]:
        """The metrics with at least one value: target, retained, then the others by name."""
        found = {name for run in self.runs for name in run.metrics}
        return tuple(m for m in METRICS if m in found) + tuple(sorted(found - set(METRICS)))

    @cached_property
    def methods(self) -> tuple[str, ...]:
        """Windows by position, windows without a position, then plain LoRA, full, auto and the controls."""
        place = {run.method: run.position for run in self.runs}
        windows = [method for method in place if method not in _OTHERS]
        windows.sort(key=lambda method: math.inf if (f := place[method]) is None else f)
        return (*windows, *(method for method in _OTHERS if method in place))

    @cached_property
    def positions(self) -> dict[str, float]:
        """The windows that have a position, and their positions, ascending."""
        place = {run.method: run.position for run in self.runs}
        return {m: position for m in self.methods if (position := place[m]) is not None}

    @cached_property
    def lrs(self) -> tuple[float, ...]:
        """The grid's rates, ascending."""
        return tuple(sorted({run.lr for run in self.runs if run.lr is not None and run.comparison != "tuned"}))

    @cached_property
    def seeds(self) -> tuple[int, ...]:
        return tuple(sorted({run.seed for run in self.runs if run.seed is not None}))

    @cached_property
    def comparisons(self) -> tuple[str, ...]:
        """In the order of the table."""
        return tuple(dict.fromkeys(run.comparison for run in self.ends))

    @cached_property
    def reference(self) -> str | None:
        """The window that the controls refer to, by its name in the rows; None if no row has it."""
        named = self.settings.get("reference") or self.settings.get("settings", {}).get("window")
        if named is None or named in self.methods:
            return named
        same = [method for method, f in self.positions.items() if f == position_of(named)]
        return same[0] if same else None

    def values(self, method: str, metric: str, comparison: str, lr: float | None) -> dict[int, float]:
        """``{seed: metric}`` of the successful runs; ``lr=None`` for methods with a single rate."""
        return {
            run.seed: run.metrics[metric]
            for run in self.ends
            if (run.method, run.comparison) == (method, comparison)
            and (lr is None or run.lr == lr)
            and run.seed is not None
            and metric in run.metrics
        }

    def label(self, metric: str) -> str:
        """The axis label of ``metric``: the task's label, else the metric's name."""
        return str(self.settings.get("labels", {}).get(metric, metric))


def read_sweep(folder: str | Path, *, rows: str = ROWS, settings: str = SETTINGS) -> Sweep:
    """Read the sweep in ``folder``.

    Args:
        rows, settings: names of its two files.

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: a column is missing, a cell is not a number, or there is no run.
    """
    folder = Path(folder)
    for name in (rows, settings):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} contains no {name}; pass the folder that a sweep wrote.")
    with (folder / rows).open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        missing = [name for name in _REQUIRED if name not in columns]
        if missing:
            raise ValueError(f"{folder / rows} lacks the columns {', '.join(missing)}; it has {', '.join(columns)}.")
        extra = [*METRICS, *(name for name in columns if name not in COLUMNS)]
        runs = [_run(row, extra, f"{folder / rows}, line {reader.line_num}") for row in reader]
    trained = tuple(run for run in runs if run.method != "base")
    if not trained:
        raise ValueError(
            f"{folder / rows} contains no trained run, so there is nothing to report; run the sweep first."
        )
    base = next((run.metrics for run in runs if run.method == "base"), {})
    found = json.loads((folder / settings).read_text(encoding="utf-8"))
    return Sweep(folder, trained, base, {**found.pop("fixed", {}), **found})


def _run(row: dict[str, str], metrics: Iterable[str], where: str) -> Run:
    def number(name: str) -> float | None:
        text = row.get(name) or ""
        try:
            return float(text) if text else None
        except ValueError:
            raise ValueError(f"{where}: {name} is {text!r}, not a number.") from None

    def whole(name: str) -> int | None:
        value = number(name)
        return None if value is None else int(value)

    found = {name: number(name) for name in metrics}
    ok = row["status"] == "ok"
    return Run(
        row["method"],
        row["kind"],
        number("position"),
        row["comparison"],
        number("lr"),
        number("lr_used"),
        whole("seed"),
        whole("step"),
        row["status"],
        whole("trainable"),
        number("update"),
        {name: value for name, value in found.items() if ok and value is not None and math.isfinite(value)},
    )
