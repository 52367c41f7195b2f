"""Reading of a sweep: its settings, and one :class:`Run` per row of its table."""

from __future__ import annotations

import csv
import io
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
_AGAIN = "run the sweep again, which writes the file from its finished trials"
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
        ValueError: one of them is damaged, a column is missing, a cell is not a number, or there is no run.
    """
    folder = Path(folder)
    for name in (rows, settings):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} contains no {name}; pass the folder that a sweep wrote.")
    columns, table = read_table(folder / rows)
    missing = [name for name in _REQUIRED if name not in columns]
    if missing:
        raise ValueError(f"{folder / rows} lacks the columns {', '.join(missing)}; it has {', '.join(columns)}.")
    extra = [*METRICS, *(name for name in columns if name not in COLUMNS)]
    runs = [_run(row, extra, f"{folder / rows}, line {line}") for line, row in table.items()]
    trained = tuple(run for run in runs if run.method != "base")
    if not trained:
        raise ValueError(
            f"{folder / rows} contains no trained run, so there is nothing to report; run the sweep first."
        )
    base = next((run.metrics for run in runs if run.method == "base"), {})
    return Sweep(folder, trained, base, _read_settings(folder / settings))


def read_table(path: Path) -> tuple[list[str], dict[int, dict[str, str]]]:
    """The columns of a CSV file and its rows, by the number of their last line in the file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no text in UTF-8, or a row has more or fewer cells than there are columns; the message names
            the line.
    """
    data = path.read_bytes()
    columns: list[str] = []
    rows: dict[int, dict[str, str]] = {}
    try:
        reader = csv.reader(io.StringIO(data.decode(), newline=""), strict=True)
        for cells in reader:
            if columns and cells and len(cells) != len(columns):
                raise ValueError(f"it has {len(cells)} of {len(columns)} cells")
            if columns and cells:
                rows[reader.line_num] = dict(zip(columns, cells, strict=True))
            columns = columns or cells
        if not data:
            raise ValueError("the file is empty")
        if not data.endswith((b"\n", b"\r")):
            raise ValueError("the file ends within it")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: it is not in UTF-8; {_AGAIN}.") from None
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}; {_AGAIN}.") from None
    return columns, rows


def _read_settings(path: Path) -> dict[str, Any]:
    """The settings, with their part ``fixed`` merged in."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        parts = [found, *(found.get(name, {}) for name in ("fixed", "labels"))]
        if all(isinstance(part, dict) for part in parts):
            return {**found.pop("fixed", {}), **found}
        raise ValueError("it does not hold the settings of a sweep")
    except (ValueError, AttributeError) as error:
        why = "it does not hold the settings of a sweep" if isinstance(error, AttributeError) else error
        raise ValueError(f"{path} is damaged: {why}; {_AGAIN}.") from None


def _run(row: dict[str, str], metrics: Iterable[str], where: str) -> Run:
    def number(name: str) -> float | None:
        text = row.get(name) or ""
        try:
            return float(text) if text else None
        except ValueError:
            raise ValueError(f"{where}: {name} is {text!r}, not a number.") from None

    def whole(name: str) -> int | None:
        value = number(name)
        if value is not None and not value.is_integer():
            raise ValueError(f"{where}: {name} is {row[name]!r}, not a whole number.")
        return None if value is None else int(value)

    if not row["method"]:
        raise ValueError(f"{where}: method is empty.")
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
