"""A made-up study: rows with known effects, as written by the study's `run.py`, `stream.py` and `mechanism.py`."""

import csv
import json
import random
import shutil
from dataclasses import dataclass

from ipca.lab.baselines import CONTROLS
from studies.window_position.mechanism import COLUMNS as MECHANISM_COLUMNS
from studies.window_position.rows import write_table
from tests.helpers.sweep_rows import Made

WINDOWS = ("0.0", "0.125", "0.25", "0.5", "0.75", "1.0")
BESIDE = ("lora", "full", "auto")
STREAMS = {"fresh": 0.9, "fixed": 0.85, "disjoint": 0.86, "pissa": 0.7, "milora": 0.88, "lora": 0.8, "lora-fresh": 0.9}
STREAMS |= {"o-lora": 0.95, "osf": 0.94}
STREAM_COLUMNS = (
    *("method", "seed", "acc", "bwt", "fm", "retained_before", "retained_after", "trained", "parameters", "bytes"),
)


class Grid(Made):
    """With the reference window's runs at √σ-matched rates."""

    def rows(self):
        if "sqrt-sigma" not in self.comparisons:
            return super().rows()
        runs = [(lr, seed) for lr in self.lrs for seed in range(self.seeds)]
        return super().rows() + [row for run in runs for row in self.trial("0.5", "sqrt-sigma", *run)]


@dataclass(frozen=True)
class Truth:
    """Keyword arguments of :class:`sweep_rows.Made` that hold for every sweep, and the curve of the mechanism.

    Attributes:
        sweeps: ``{name: what else holds there}``; only these are written.
        curves: ``{experiment: (sum at the principal end, at the minor end)}``, that of the middle being 1.
    """

    shared: dict
    sweeps: dict
    curves: dict
    streams: dict

    def write(self, folder):
        """All files; returns the folder."""
        for name, own in self.sweeps.items():
            made = Grid(**{**self.shared, **own}).write(folder / "made")
            shutil.copy(made / "rows.csv", folder / f"{name}.csv")
            settings = json.loads((made / "settings.json").read_text())
            (folder / f"{name}.json").write_text(json.dumps(settings))
            shutil.rmtree(made)
        if self.streams:
            write_table(folder / "V2.csv", STREAM_COLUMNS, self.stream_rows())
        if self.curves:
            write_table(folder / "mechanism.csv", MECHANISM_COLUMNS, self.mechanism_rows())
        return folder

    def stream_rows(self):
        for method, acc in self.streams.items():
            for seed in range(10):
                shared, own = random.Random(seed).gauss(0, 0.01), random.Random(f"{method} {seed}").gauss(0, 0.01)
                numbers = (acc + shared + own, -0.1 + own, 0.1 - own, 0.97, 0.8 + shared, 1000, 32768, 131072)
                yield dict(zip(STREAM_COLUMNS, (method, seed, *numbers), strict=True))

    def mechanism_rows(self):
        for experiment, (left, right) in self.curves.items():
            for layer in ("layer.0", "layer.1"):
                for f in map(float, GRIDS[experiment].get("windows", WINDOWS)):
                    rise = (left - 1) * (1 - 2 * f) ** 2 if f < 0.5 else (right - 1) * (2 * f - 1) ** 2
                    start = int(f * 368)
                    numbers = (experiment, layer, 384, str(f), start, 16, 1 + rise)
                    yield dict(zip(MECHANISM_COLUMNS, numbers, strict=True))


GRIDS = {
    "M1": {"methods": BESIDE, "lrs": (5e-4, 1e-3, 2e-3, 4e-3)},
    "M2-query-value": {"methods": BESIDE, "lrs": (5e-4, 1e-3, 2e-3, 4e-3), "seeds": 5, "right": 0.0},
    "M2-all": {"methods": BESIDE, "lrs": (5e-4, 1e-3, 2e-3, 4e-3), "seeds": 5},
    "M3": {"methods": ("lora", *CONTROLS), "lrs": (1e-3, 2e-3), "seeds": 5}
    | {"comparisons": ("same", "sqrt-sigma", "update")},
    "M4": {"windows": ("0.5",), "methods": ("lora",), "lrs": (1e-3, 2e-3), "lora": -0.04},
    "M5": {"windows": ("0.0", "0.5", "1.0"), "methods": ("lora", "auto"), "lrs": (2e-3,)},
    "V1": {
        "windows": ("0.0", "0.125", "0.25", "0.5", "0.75", "0.875", "1.0"),
        "methods": (*BESIDE, *CONTROLS),
        "lrs": (1e-3, 2e-3, 4e-3),
        "comparisons": ("same", "sqrt-sigma", "update"),
        "fails": {"full": 4e-3},
    },
}
"""As run.py's, each with its own truth."""


def study(folder, *, sweeps=tuple(GRIDS), curves=None, streams=STREAMS, **shared):
    """Write a study in which what ``shared`` says of :class:`sweep_rows.Made` holds everywhere; returns its folder."""
    everywhere = {"windows": WINDOWS, "comparisons": ("same",), **shared}
    own = {name: {k: v for k, v in GRIDS[name].items() if k not in shared or k in ("lrs", "seeds")} for name in sweeps}
    shapes = {"M1": (50.0, 1.5), "M2-query-value": (9.0, 0.5), "M2-all": (20.0, 1.2), "V1": (8.0, 0.7)}
    folder.mkdir(parents=True, exist_ok=True)
    return Truth(everywhere, own, shapes if curves is None else curves, streams).write(folder)


def rows_of(folder, name):
    with (folder / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def change(folder, name, changed):
    """Write the rows of a file again after ``changed(row)`` has edited each of them; rows for which it is False go."""
    rows = [row for row in rows_of(folder, name) if changed(row) is not False]
    write_table(folder / f"{name}.csv", list(rows[0]), rows)


def by_seed(folder, name, method, metric, lr, comparison="same"):
    return {
        row["seed"]: float(row[metric])
        for row in rows_of(folder, name)
        if (row["method"], row["comparison"]) == (method, comparison) and float(row["lr"]) == lr
    }
