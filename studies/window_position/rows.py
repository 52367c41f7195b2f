"""Rows of the study in ``results``: one sweep per experiment, the streams, and the tables derived from them.

For every sweep ``run.py`` writes ``<name>.csv``, one row per run, and ``<name>.json``, its settings; for the streams it
writes ``V2.csv``. ``findings.py`` and ``mechanism.py`` write all other tables.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from statistics import mean

from ipca._atomic import write_atomic
from ipca.lab.compare import best_rate
from ipca.lab.statistics import Estimate, mean_interval
from ipca.lab.sweep.report.data import Run, Sweep, read_sweep

RESULTS = Path(__file__).resolve().parent / "results"
Row = dict[str, str]
Table = list[Row]
Values = dict[int, float]
"""One number per seed; NaN if the run failed."""

PRINCIPAL, MIDDLE, MINOR, LORA, AUTO, BASE = "0.0", "0.5", "1.0", "lora", "auto", "base"
"""Methods by their names in the rows; ``"base"`` is the untrained model."""
FROZEN = ("frozen-A", "frozen-B")
"""The middle window with one factor frozen."""
NEW_INPUTS, KNOWN_INPUTS = "inputs:principal", "inputs:minor"
"""Windows of the layers' inputs: directions that the new task has most of, and that what is known has least of."""
RATE = 2e-3
"""Learning rate of the confirmatory tests."""
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
"""Titles of the protocol's sweeps by file name."""
EXPLORATORY = ("G1", "G2")
"""Sweeps that need a GPU and that no test uses."""
WIDER = {
    "M1": ("M1-low", "M1-lower", "M1-rates", "M1-frozen", "M1-frozen-rates", "M1-inputs", "M1-null"),
    "V1": ("V1-low", "V1-high", "V1-middle", "V1-minor", "V1-inputs", "V1-null"),
}
"""Exploratory rows with further rates and methods of a sweep, by the sweep."""
EXTENSIONS = {
    "M1-low": "M1: principal at lower rates, exploratory",
    "M1-lower": "M1: principal at still lower rates, exploratory",
    "M1-middle": "M1: middle again, by source, exploratory",
    "M1-others": "M1: minor and plain LoRA again, by source, exploratory",
    "M1-rates": "M1: middle, minor and plain LoRA at lower rates, exploratory",
    "M1-frozen": "M1: frozen factors, and the middle again, by source, exploratory",
    "M1-frozen-rates": "M1: frozen factors, and the middle again, at further rates, exploratory",
    "M1-inputs": "M1: directions of the new task's inputs, by source, exploratory",
    "M1-null": "M1: directions that known sentences have least of, exploratory",
    "V1-low": "V1: principal and full fine-tuning at lower rates, exploratory",
    "V1-high": "V1: windows from .75 on, `auto` and frozen factors at higher rates, exploratory",
    "V1-middle": "V1: middle and plain LoRA at lower and higher rates, exploratory",
    "V1-minor": "V1: minor and frozen factors at a lower rate, exploratory",
    "V1-inputs": "V1: directions of the new task's inputs, exploratory",
    "V1-null": "V1: directions that known images have least of, exploratory",
    "V3-low": "V3: principal and full fine-tuning on a ViT pretrained elsewhere, given up",
}
"""Titles of the rows added after the protocol's."""
BY_SOURCE = tuple(name for name in EXTENSIONS if name.startswith("M"))
"""Those that have retention by source."""


@dataclass(frozen=True)
class Study:
    """The experiments run so far; files are read on first use."""

    folder: Path = RESULTS
    _read: dict[str, Sweep | None] = field(default_factory=dict, compare=False)

    def sweep(self, name: str) -> Sweep | None:
        """One of :data:`SWEEPS` or :data:`EXTENSIONS`; None if it was not run.

        Raises:
            FileNotFoundError: its settings are missing.
        """
        if name not in self._read:
            rows, settings = f"{name}.csv", f"{name}.json"
            exists = (self.folder / rows).exists()
            self._read[name] = read_sweep(self.folder, rows=rows, settings=settings) if exists else None
        return self._read[name]

    @property
    def sweeps(self) -> dict[str, Sweep]:
        """The protocol's sweeps that were run, by name."""
        return {name: sweep for name in SWEEPS if (sweep := self.sweep(name)) is not None}

    def wider(self, name: str, *, partly: bool = False) -> Sweep | None:
        """:meth:`sweep` with what :data:`WIDER` has beyond it: further rates of its methods, and other methods.

        Of a method of the sweep, those rates that it was run at with all of the sweep's seeds; of another one all, if
        every rate has the same seeds. A run that several files have counts once. ``partly``: of the methods of the
        sweep all further rates, but only the seeds that have them all; None if that is no other sweep.

        Raises:
            ValueError: rows of another base model.
        """
        found = self.sweep(name)
        if found is None:
            return None
        runs = [run for each in WIDER.get(name, ()) for run in self._beside(found, name, each)]
        more = list({(run.method, run.lr, run.seed): run for run in runs}.values())
        seeds: dict[tuple[str, float | None], set[int | None]] = {}
        for run in more:
            seeds.setdefault((run.method, run.lr), set()).add(run.seed)
        new = {method for method, _ in seeds} - set(found.methods)
        if not partly:
            uneven = {m for m in new if len({frozenset(s) for (each, _), s in seeds.items() if each == m}) > 1}
            whole = {key for key, some in seeds.items() if key[0] in new - uneven or some == set(found.seeds)}
            return replace(found, runs=(*found.runs, *(run for run in more if (run.method, run.lr) in whole)))
        known = [run for run in more if run.method not in new]
        common = set(found.seeds).intersection(*(some for (method, _), some in seeds.items() if method not in new))
        if len(common) in (0, len(found.seeds)):
            return None
        return replace(found, runs=tuple(run for run in (*found.runs, *known) if run.seed in common))

    def _beside(self, sweep: Sweep, name: str, other: str) -> list[Run]:
        """The runs of ``other`` with the seeds of ``sweep``, without those that repeat one of it."""
        added = self.sweep(other)
        if added is None:
            return []
        if added.settings.get("model_sha256") != sweep.settings.get("model_sha256"):
            raise ValueError(
                f"{other}.json and {name}.json are of different base models; their rows cannot be combined"
            )
        there = {(run.method, run.lr, run.seed) for run in sweep.ends}
        return [run for run in added.ends if run.seed in sweep.seeds and (run.method, run.lr, run.seed) not in there]

    def table(self, name: str) -> Table:
        """The rows of another CSV file; empty if there is no file."""
        path = self.folder / f"{name}.csv"
        return read_table(path) if path.exists() else []


def values_of(sweep: Sweep, method: str, metric: str, lr: float, comparison: str = "same") -> Values:
    """``{seed: metric}`` of the runs of ``method``, NaN for failed ones; empty if there are none."""
    return {
        run.seed: run.metrics.get(metric, math.nan)
        for run in sweep.ends
        if (run.method, run.comparison, run.lr) == (method, comparison, lr) and run.seed is not None
    }


def tuned_values(sweep: Sweep, method: str, metric: str) -> Values:
    """``{seed: metric}`` at the rate with the best mean target over the *other* seeds.

    Raises:
        ValueError: fewer than two seeds, or a run is missing.
    """
    runs = [run for run in sweep.ends if (run.method, run.comparison) == (method, "same")]
    rates = best_rate({"lr": run.lr, "seed": run.seed, "target": run.metrics.get("target")} for run in runs)
    return {seed: values_of(sweep, method, metric, lr).get(seed, math.nan) for seed, lr in rates.items()}


def rates_of(sweep: Sweep, method: str) -> list[float]:
    """The rates at which ``method`` was run, ascending."""
    return sorted({run.lr for run in sweep.ends if (run.method, run.comparison) == (method, "same") and run.lr})


def estimate(values: Iterable[float]) -> Estimate | None:
    """The mean with the interval of :func:`ipca.lab.statistics.mean_interval`; None without values."""
    numbers = tuple(values)
    return _estimate(numbers) if numbers else None


@cache
def _estimate(numbers: tuple[float, ...]) -> Estimate:
    found = mean_interval(numbers)
    low, high = found if math.isfinite(found.low) else (None, None)
    return Estimate(mean(numbers), low, high, len(numbers))


def is_complete(sweep: Sweep, method: str) -> bool:
    """Whether ``method`` was run at every rate with the same seeds, at least two."""
    seeds = {frozenset(values_of(sweep, method, "target", lr)) for lr in sweep.lrs}
    return len(seeds) == 1 and len(min(seeds)) > 1


def differences(first: Values, second: Values) -> list[float]:
    """``first − second`` over the seeds that succeeded in both."""
    found = [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]
    return [value for value in found if math.isfinite(value)]


def curve_of(mechanism: Table, experiment: str) -> dict[str, float]:
    """``{window: Σ S_i · energy_i}``, summed over the layers of an experiment."""
    curve: dict[str, float] = {}
    for row in mechanism:
        if row["experiment"] == experiment:
            curve[row["window"]] = curve.get(row["window"], 0.0) + float(row["sensitivity"])
    return curve


def read_table(path: Path) -> Table:
    """The rows of a CSV file."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> None:
    """Write ``rows`` atomically; floats with six digits, whole ones as integers, NaN and None as empty cells."""
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
