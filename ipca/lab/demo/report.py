"""The demo's table and picture, both made from its CSV rows."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from ipca.analysis.figures import picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, str]
MEASURES = {
    "accuracy": "movie sentiment,\naccuracy (higher is better)",
    "probe_drop": "source probe,\naccuracy lost (lower is better)",
    "drift": "embedding drift,\nmean 1 − cos (lower is better)",
}


def read_rows(path: Path) -> list[Row]:
    """The rows of a demo CSV: one for each method and seed."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(rows: Iterable[Row], path: Path) -> None:
    """Write ``rows``, which share their columns."""
    rows = list(rows)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def table(rows: list[Row]) -> str:
    """A Markdown table: for each method the mean over seeds, in brackets the smallest and largest."""
    lines = ["| trained | accuracy | probe drop | drift |", "|---|---|---|---|"]
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = [_cell(values(rows, method, measure)) for measure in MEASURES]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def values(rows: list[Row], method: str, measure: str) -> list[float]:
    """One measure of one method, by seed."""
    return [float(row[measure]) for row in rows if row["method"] == method]


def draw(rows: list[Row], path: Path) -> None:
    """A panel for each measure: a dot for each seed, a line at their mean."""
    first = rows[0]
    seeds = len({row["seed"] for row in rows})
    with picture(path, (10, 3.4)) as figure:
        for axis, (measure, title) in zip(figure.subplots(1, len(MEASURES)), MEASURES.items(), strict=True):
            _panel(axis, rows, measure, title)
        figure.suptitle(
            f"all-MiniLM-L6-v2, feed-forward input layers, rank {first['rank']}, {first['steps']} steps, "
            f"AdamW {float(first['lr']):g}; a dot is a seed ({seeds})",
            fontsize=10,
        )


def _panel(axis: Axes, rows: list[Row], measure: str, title: str) -> None:
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for k, method in enumerate(methods):
        points = values(rows, method, measure)
        color = "tab:gray" if method == "LoRA" else "tab:blue"
        axis.hlines(mean(points), k - 0.3, k + 0.3, color=color, linewidth=3)
        axis.plot([k] * len(points), points, "o", color="black", markersize=4)
    axis.set_xticks(range(len(methods)), methods)
    axis.set_xlim(-0.5, len(methods) - 0.5)
    axis.set_title(title, fontsize=10)
    axis.grid(axis="y", alpha=0.3)
    axis.axhline(0.5 if measure == "accuracy" else 0, color="black", linewidth=0.8, linestyle=":")


def _cell(points: list[float]) -> str:
    spread = f" ({min(points):.2f} … {max(points):.2f})" if len(points) > 1 else ""
    return f"{mean(points):.2f}{spread}"
