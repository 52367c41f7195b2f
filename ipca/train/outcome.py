"""The outcome of a run: its measurements by step, and those of the adapter that was kept."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ipca.train.settings import TrainSettings

Row = dict[str, float]


@dataclass(frozen=True)
class Outcome:
    """A finished run.

    Attributes:
        out: its folder.
        settings: what was asked for.
        rows: the measurements by step: ``step``, ``loss``, ``eval_loss``, ``eval_accuracy``, ``eval_keep_kl``, …, as
            far as they were taken. Step 0 is the base.
        best: the measurements of the adapter that was kept; its ``step``, and its ``scale`` where that is not 1.
        scale: of its change, below 1 where the change of the last step was scaled down to the budget.
        metric: the name of the number that the budget limits, None where nothing was measured.
        description: of that number, with its unit.
    """

    out: Path
    settings: TrainSettings
    rows: list[Row]
    best: Row
    scale: float
    metric: str | None
    description: str | None

    @property
    def kept(self) -> int:
        """The step whose adapter was kept."""
        return int(self.best["step"])

    @property
    def kept_step_text(self) -> str:
        """The step, and the scale of its change where that is not 1."""
        return f"step {self.kept}" + (f", its change scaled by {self.scale:g}" if self.scale != 1 else "")

    def record(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {"out": str(self.out), "kept": self.best, "scale": self.scale, "curve": self.rows}


def read_curve(path: Path) -> list[Row]:
    """The measurements in a run's ``curve.csv``."""
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def curve_of(history: Iterable[Mapping[str, float]]) -> list[Row]:
    """A row for each step of a Trainer's log history at which something was evaluated."""
    rows: dict[int, Row] = {}
    for entry in history:
        names = [name for name in entry if name == "loss" or (name.startswith("eval_") and not _is_speed(name))]
        if names:
            rows.setdefault(int(entry["step"]), {"step": int(entry["step"])}).update(
                {name: entry[name] for name in names}
            )
    return [row for _, row in sorted(rows.items()) if "eval_loss" in row]


def _is_speed(name: str) -> bool:
    return name.endswith(
        ("_runtime", "_per_second", "_within_budget", "_num_tokens", "_mean_token_accuracy", "_entropy")
    )
