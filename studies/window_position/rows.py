"""The study's files in `results`: rows of sweeps and of streams, and the tables that are made of them.

Of a sweep `run.py` leaves `<name>.csv`, a row for each run, and `<name>.json`, its settings; of the streams there is
`V2.csv`. `findings.py` and `mechanism.py` make `tests.csv`, `summary.csv`, `ranks.csv` and `mechanism.csv`.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ipca._atomic import write_atomic
from ipca.lab.compare import best_rate

RESULTS = Path(__file__).resolve().parent / "results"
Row = dict[str, str]
Table = list[Row]
Values = dict[int, float]
"""A number for each seed; NaN where the run failed."""

PRINCIPAL, MIDDLE, MINOR, LORA, AUTO = "0.0", "0.5", "1.0", "lora", "auto"
"""Methods, as the rows call them."""
RATE = 2e-3
"""Of the confirmatory tests."""
SWEEPS = {
    "M1": "M1: MiniLM, feed-forward input layers, 80 steps",
    "M2-query-value": "M2: MiniLM, query and value layers, 80 steps",
    "M2-all": "M2: MiniLM, all linear layers, 80 steps",
    "M3": "M3: MiniLM, feed-forward input layers, controls and matched rates",
    "M4": "M4: MiniLM, feed-forward input layers, 320 steps",
    "M5": "M5: MiniLM, feed-forward input layers, sentiment of tweets",
    "V1": "V1: digits ViT, all linear layers, 80 steps",
    "G1": "G1: digits ViT of ViT-B's shape, all linear layers, exploratory",
    "G2": "G2: language model of 26 M parameters, all linear layers, exploratory",
}
"""Sweeps of the protocol by the name of their file."""
EXPLORATORY = ("G1", "G2")
"""Those that need a GPU, and that no test uses."""


@dataclass(frozen=True)
class Sweep:
    """The rows of one sweep.

    Attributes:
        runs: at the end of training, without the untrained model.
        base: the untrained model's metrics.
        settings: of the sweep's JSON file.
    """

    name: str
    runs: tuple[Row, ...]
    base: dict[str, float]
    settings: Mapping[str, Any]

    @cached_property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(run["method"] for run in self.runs))

    @cached_property
    def comparisons(self) -> list[str]:
        return list(dict.fromkeys(run["comparison"] for run in self.runs))

    @cached_property
    def rates(self) -> list[float]:
        return sorted({float(run["lr"]) for run in self.runs})

    @cached_property
    def metrics(self) -> list[str]:
        return list(self.base)

    def values(self, method: str, metric: str, lr: float, comparison: str = "same") -> Values:
        """``{seed: metric}``; empty where there is no such run."""
        found = self._index.get((method, comparison, lr), {})
        return {seed: number(run[metric]) for seed, run in found.items()}

    def tuned(self, method: str, metric: str) -> Values:
        """``{seed: metric}`` at the rate with the best mean target over the *other* seeds.

        Raises:
            ValueError: fewer than two seeds, or a run is missing.
        """
        rates = best_rate([run for run in self.runs if (run["method"], run["comparison"]) == (method, "same")])
        return {int(seed): self.values(method, metric, lr).get(int(seed), math.nan) for seed, lr in rates.items()}

    def complete(self, method: str) -> bool:
        """Whether every rate of ``method`` was run with the same seeds."""
        seeds = {frozenset(self.values(method, "target", lr)) for lr in self.rates}
        return len(seeds) == 1 and len(min(seeds)) > 1

    def reference(self, comparison: str) -> str:
        """The comparison in which the middle window's runs are: equal updates are equal to those at its own rate."""
        return "same" if comparison == "update" else comparison

    @cached_property
    def _index(self) -> dict[tuple[str, str, float], dict[int, Row]]:
        index: dict[tuple[str, str, float], dict[int, Row]] = {}
        for run in self.runs:
            key = run["method"], run["comparison"], float(run["lr"])
            index.setdefault(key, {})[int(run["seed"])] = run
        return index


@dataclass(frozen=True)
class Study:
    """What has been run so far; a file is read when it is asked for."""

    folder: Path = RESULTS
    _read: dict[str, Sweep | None] = field(default_factory=dict, compare=False)

    def sweep(self, name: str) -> Sweep | None:
        """One of :data:`SWEEPS`; None if it was not run.

        Raises:
            FileNotFoundError: its settings are missing.
        """
        if name not in self._read:
            path = self.folder / f"{name}.csv"
            self._read[name] = read_sweep(path) if path.exists() else None
        return self._read[name]

    @property
    def sweeps(self) -> list[Sweep]:
        """Those that were run."""
        return [sweep for sweep in map(self.sweep, SWEEPS) if sweep is not None]

    def table(self, name: str) -> Table:
        """The rows of another CSV file; none where there is no file."""
        path = self.folder / f"{name}.csv"
        return read_table(path) if path.exists() else []


def read_sweep(path: Path) -> Sweep:
    """The sweep in ``path`` and the JSON file beside it."""
    rows = [row for row in read_table(path) if not row["step"]]
    settings = json.loads(path.with_suffix(".json").read_text())
    untrained = next(row for row in rows if row["method"] == "base")
    columns = list(untrained)[list(untrained).index("target") :]
    base = {name: number(untrained[name]) for name in columns}
    return Sweep(path.stem, tuple(row for row in rows if row["method"] != "base"), base, settings)


def curve_of(mechanism: Table, experiment: str) -> dict[str, float]:
    """``{window: Σ S_i · energy_i}``, summed over the layers of an experiment."""
    curve: dict[str, float] = {}
    for row in mechanism:
        if row["experiment"] == experiment:
            curve[row["window"]] = curve.get(row["window"], 0.0) + float(row["sensitivity"])
    return curve


def number(text: str) -> float:
    """A cell; NaN where it is empty."""
    return float(text) if text else math.nan


def read_table(path: Path) -> Table:
    """The rows of a CSV file."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> None:
    """Write ``rows`` in one go; whole numbers as they are, other floats with six digits, NaN and None as nothing."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _cell(row[name]) for name in columns} for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text.getvalue().encode())


def _cell(value: object) -> object:
    if isinstance(value, float):
        if value.is_integer():
            return int(value)
        return "" if math.isnan(value) else f"{value:.6g}"
    return value
