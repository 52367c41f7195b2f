"""Figures of the study's page, from the tables in ``results``; ``page.py`` draws them.

Every point is a mean over seeds, every bar through it a 95 % interval. Experiments that have not been run are
not drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipca.lab.sweep.report.drawing import band
from studies.plots import Point, line, logarithmic, marks, sheet, style_of, ticks
from studies.window_position.rows import AUTO, LORA, MIDDLE, MINOR, PRINCIPAL, RATE, curve_of
from studies.window_position.rules import Tables
from studies.window_position.words import method_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLES = {
    "M1": "MiniLM, feed-forward input",
    "M3": "MiniLM, feed-forward input",
    "M2-query-value": "MiniLM, query and value",
    "M2-all": "MiniLM, all linear",
    "V1": "digits ViT, all linear",
}
BY_POSITION = ("M1", "M2-query-value", "M2-all", "V1")
"""The experiments that are drawn over the window's position."""
METRICS = {
    "retained": "retained\n(accuracy, share of 1,000)",
    "target": "target\n(accuracy, share of 1,000)",
    "drift": "drift\n(mean 1 − cos, no unit)",
}
COMPARISONS = {"same": "same rate", "sqrt-sigma": "√σ-matched", "update": "equal early\nupdates"}
POSITION = "window's position f = start / (d − r)"
NOTE = "mean and 95 % interval over seeds"


def positions(tables: Tables) -> Figure | None:
    """Retention and drift over the window's position, at the rate of the tests; LoRA and auto as bands."""
    names = [name for name in BY_POSITION if windows(tables, name, "retained")]
    if not names:
        return None
    with sheet(2, len(names), f"All at learning rate {RATE:g}; {NOTE}") as (figure, axes):
        for row, metric in enumerate(("retained", "drift")):
            for axis, name in zip(axes[row], names, strict=True):
                line(axis, windows(tables, name, metric), style_of(MIDDLE), "windows")
                for method in (LORA, AUTO):
                    band(axis, point(tables, name, method, metric), style_of(method), (0, 1), method_name(method))
                axis.set_xlabel(POSITION)
            axes[row][0].set_ylabel(METRICS[metric])
        _titles(axes[0], tables, names)
        return figure


def comparisons(tables: Tables) -> Figure | None:
    """Principal and minor minus middle, at the same rate and at matched rates."""
    names = [name for name in ("M3", "V1") if (name, PRINCIPAL, "update", f"{RATE:g}", "drift") in tables.summary]
    if not names:
        return None
    with sheet(2, len(names), f"Nominal rate {RATE:g}; {NOTE}, paired", wide=4.2) as (figure, axes):
        for row, metric in enumerate(("retained", "drift")):
            for axis, name in zip(axes[row], names, strict=True):
                for shift, method in ((-0.12, PRINCIPAL), (0.12, MINOR)):
                    found = [
                        point(tables, name, method, metric, comparison=comparison, x=k + shift, of="difference")
                        for k, comparison in enumerate(COMPARISONS)
                    ]
                    marks(axis, [p for p in found if p], style_of(method), method_name(method))
                axis.axhline(0, color="black", linewidth=0.8)
                axis.set_xticks(range(len(COMPARISONS)), list(COMPARISONS.values()))
                axis.set_xlim(-0.5, len(COMPARISONS) - 0.5)
            axes[row][0].set_ylabel(f"difference to the middle window:\n{METRICS[metric]}")
        _titles(axes[0], tables, names)
        return figure


def rates(tables: Tables) -> Figure | None:
    """Target and retention over the learning rate."""
    names = [name for name in ("M1", "V1") if windows(tables, name, "retained")]
    if not names:
        return None
    with sheet(2, len(names), NOTE, wide=4.4) as (figure, axes):
        for row, metric in enumerate(("target", "retained")):
            for axis, name in zip(axes[row], names, strict=True):
                grid = grid_rates(tables, name)
                for k, method in enumerate((PRINCIPAL, MIDDLE, MINOR, LORA, "full", AUTO)):
                    found = [point(tables, name, method, metric, lr, x=float(lr) * 1.018 ** (k - 2.5)) for lr in grid]
                    line(axis, [p for p in found if p], style_of(method), method_name(method))
                ticks(axis, grid)
                axis.set_xlabel("learning rate of the adapter")
            axes[row][0].set_ylabel(METRICS[metric])
        _titles(axes[0], tables, names)
        return figure


def frontier(tables: Tables) -> Figure | None:
    """Target against retention: a point for each method and rate, joined by ascending rate."""
    names = [name for name in ("M1", "V1") if windows(tables, name, "retained")]
    if not names:
        return None
    note = f"A line joins a method's rates, the largest mark is the highest rate; {NOTE}"
    with sheet(1, len(names), note, wide=5) as (figure, axes):
        for axis, name in zip(axes[0], names, strict=True):
            for method in methods(tables, name):
                _rate_path(axis, tables, name, method)
            axis.set_xlabel(METRICS["target"].replace("\n", " "))
        _titles(axes[0], tables, names)
        axes[0][0].set_ylabel(METRICS["retained"])
        return figure


def _rate_path(axis: Axes, tables: Tables, name: str, method: str) -> None:
    """Draw the points of one method by ascending rate, with the intervals of both metrics."""
    style, at = style_of(method), []
    for size, lr in enumerate(grid_rates(tables, name)):
        target, kept = (point(tables, name, method, metric, lr) for metric in ("target", "retained"))
        if target and kept:
            at.append((target.mean, kept.mean))
            _interval(axis, [target.low, target.high], [kept.mean] * 2, color=style.color, linewidth=0.7)
            _interval(axis, [target.mean] * 2, [kept.low, kept.high], color=style.color, linewidth=0.7)
            axis.plot(target.mean, kept.mean, style.mark, color=style.color, markersize=4 + 1.5 * size)
    axis.plot([x for x, _ in at], [y for _, y in at], color=style.color, linewidth=1, alpha=0.7)
    axis.plot([], [], style.mark, color=style.color, label=method_name(method))


def _interval(axis: Axes, x: Sequence[float | None], y: Sequence[float | None], **look: Any) -> None:
    """Draw a line between two points; nothing if one is missing."""
    axis.plot(*([math.nan if value is None else value for value in values] for values in (x, y)), **look)


def lengths(tables: Tables) -> Figure | None:
    """Middle window and plain LoRA after 80 and 320 steps."""
    if not (windows(tables, "M1", "retained") and windows(tables, "M4", "retained")):
        return None
    with sheet(1, 3, f"MiniLM, feed-forward input (n = {runs(tables, 'M4')}); {NOTE}") as (figure, axes):
        for axis, metric in zip(axes[0], ("retained", "drift", "target"), strict=True):
            for k, (method, lr) in enumerate((m, lr) for m in (MIDDLE, LORA) for lr in grid_rates(tables, "M4")):
                found = [
                    point(tables, name, method, metric, lr, x=steps * 1.03 ** (k - 1.5))
                    for name, steps in (("M1", 80), ("M4", 320))
                ]
                dashed = float(lr) < RATE
                label = f"{method_name(method)}, rate {lr}"
                line(axis, [p for p in found if p], style_of(method), label, dashed=dashed)
            ticks(axis, ["80", "320"])
            axis.set_xlim(60, 430)
            axis.set_xlabel("optimizer steps")
            axis.set_ylabel(METRICS[metric])
        return figure


def mechanism(tables: Tables) -> Figure | None:
    """Σ S_i · energy_i over the window's position, and below it the measured drift."""
    names = [name for name in BY_POSITION if curve_of(tables.mechanism, name)]
    if not names:
        return None
    note = f"Above: no seeds, hence no interval. Below: drift at learning rate {RATE:g}, {NOTE}"
    with sheet(2, len(names), note) as (figure, axes):
        for k, name in enumerate(names):
            curve = sorted((float(window), value) for window, value in curve_of(tables.mechanism, name).items())
            middle = dict(curve)[0.5]
            line(axes[0][k], [Point(value / middle, None, None, 1, f) for f, value in curve], style_of("full"))
            axes[0][k].axhline(1, color="black", linewidth=0.8, linestyle=":")
            logarithmic(axes[0][k])
            axes[0][k].set_title(TITLES[name])
            drift = windows(tables, name, "drift")
            line(axes[1][k], drift, style_of(MIDDLE))
            for axis in axes[: 2 if drift else 1, k]:
                axis.set_xlabel(POSITION)
            if not drift:
                axes[1][k].set_axis_off()
        axes[0][0].set_ylabel("Σ S_i · energy_i, all layers\n(that of the middle = 1)")
        axes[1][0].set_ylabel(METRICS["drift"])
        return figure


def streams(tables: Tables) -> Figure | None:
    """ACC, FM and retention of every method of the streams."""
    names = methods(tables, "V2")
    if not names:
        return None
    titles = {
        "acc": "ACC: mean accuracy\nafter the last task (share)",
        "fm": "FM: mean forgetting of a task\n(accuracy, share)",
        "retained_after": "retained: upright digits\n(accuracy, share of 1,000)",
    }
    with sheet(1, 3, f"V2, n = {runs(tables, 'V2')}; {NOTE}", high=0.36 * len(names) + 1.2) as (figure, axes):
        for axis, (metric, title) in zip(axes[0], titles.items(), strict=True):
            for y, name in enumerate(names):
                found = point(tables, "V2", name, metric, "", comparison="")
                assert found is not None  # every stream has every metric
                color = style_of({"fresh": MIDDLE, "pissa": PRINCIPAL, "milora": MINOR}.get(name, name)).color
                _interval(axis, [found.low, found.high], [y, y], color=color, linewidth=2)
                axis.plot(found.mean, y, "o", color=color)
            axis.set_yticks(range(len(names)), names)
            axis.set_ylim(len(names) - 0.5, -0.5)
            axis.set_xlabel(title)
        before = point(tables, "V2", names[0], "retained_before", "", comparison="")
        assert before is not None
        axes[0][2].axvline(before.mean, color="black", linestyle=":", label="before the stream")
        return figure


FIGURES = (positions, comparisons, rates, frontier, lengths, mechanism, streams)


def _titles(axes: Sequence[Axes], tables: Tables, names: Sequence[str]) -> None:
    for axis, name in zip(axes, names, strict=True):
        axis.set_title(f"{TITLES[name]} (n = {runs(tables, name)})")


def point(
    tables: Tables,
    name: str,
    method: str,
    metric: str,
    lr: str = f"{RATE:g}",
    *,
    comparison: str = "same",
    x: float = 0.0,
    of: str = "mean",
) -> Point | None:
    """A mean, or its ``difference`` to the middle window, with its interval; None if there is no value."""
    row = tables.summary.get((name, method, comparison, lr, metric))
    if row is None or not row[of]:
        return None
    low, high = (row[f"{'' if of == 'mean' else 'difference_'}{end}"] for end in ("low", "high"))
    n = int(row["n" if of == "mean" else "pairs"])
    return Point(float(row[of]), float(low) if low else None, float(high) if high else None, n, x)


def windows(tables: Tables, name: str, metric: str) -> list[Point]:
    """The windows of an experiment by position, at the rate of the tests."""
    found = [point(tables, name, m, metric, x=float(m)) for m in methods(tables, name) if m[:1].isdigit()]
    return sorted((p for p in found if p), key=lambda p: p.x)


def methods(tables: Tables, name: str) -> list[str]:
    """The methods of an experiment, without controls."""
    found = dict.fromkeys(method for experiment, method, *_ in tables.summary if experiment == name)
    return [m for m in found if name == "V2" or m[:1].isdigit() or m in (LORA, "full", AUTO)]


def grid_rates(tables: Tables, name: str) -> Sequence[str]:
    """The rates of an experiment, ascending, as in the tables."""
    return sorted({lr for experiment, _, _, lr, _ in tables.summary if experiment == name and lr != "best"}, key=float)


def runs(tables: Tables, name: str) -> str:
    """The number of seeds of an experiment: the largest of any mean."""
    return str(max(int(row["n"]) for key, row in tables.summary.items() if key[0] == name))


def draw(tables: Tables, folder: Path) -> dict[Path, Figure]:
    """The figures that have data, by their files in ``folder``."""
    drawn = {folder / f"{figure.__name__}.png": figure(tables) for figure in FIGURES}
    return {path: figure for path, figure in drawn.items() if figure is not None}
