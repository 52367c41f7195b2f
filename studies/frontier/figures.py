"""Figures of a study: frontiers of cross-entropy on the new task against divergence, and divergence over rates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

import numpy as np

from ipca.lab.sweep.report.style import Style
from studies.frontier.analysis import Analysis
from studies.frontier.positions import MIDDLE, profile
from studies.plots import logarithmic, sheet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STYLES = (
    Style("#0072b2", "#0072b2", "o", "-"),
    Style("#d55e00", "#d55e00", "s", "--"),
    Style("#000000", "#000000", "^", "-."),
    Style("#009e73", "#009e73", "v", ":"),
)
"""Of the main arms, in their order."""
_POINTS = 60
_SMALLEST = 0.05
"""Share of the cross-entropy's improvement from which on a frontier is drawn: at λ = 0 the divergence is 0."""


def draw(analysis: Analysis, folder: Path) -> dict[Path, Figure]:
    """``frontier.png`` and ``rates.png`` of ``folder``; none without a run of the main arms."""
    cells = [cell for cell in analysis.design.targets if any(analysis.of(*cell, arm) for arm in analysis.design.main)]
    if not cells:
        return {}
    along = "along the scale λ of the final change\nbands: lowest to highest seed; dotted: the protocol's targets"
    over = "at the middle target; rates at which a seed misses it are left out\nbars: lowest to highest seed"
    return {
        folder / "frontier.png": _sheet(analysis, cells, _frontiers, along),
        folder / "rates.png": _sheet(analysis, cells, _rates, over),
    }


def draw_positions(analysis: Analysis, folder: Path) -> dict[Path, Figure]:
    """``positions.png`` of ``folder``; none without a pair of positions."""
    cells = [cell for cell in analysis.design.targets if profile(analysis, *cell, 1)]
    if not cells:
        return {}
    note = "divergence at the middle target over that of the window at 0.5, paired over seeds, with 95 % intervals"
    return {folder / "positions.png": _sheet(analysis, cells, _positions, note)}


def _sheet(
    analysis: Analysis,
    cells: list[tuple[str, int]],
    panel: Callable[[Axes, Analysis, str, int], None],
    note: str,
) -> Figure:
    with sheet(-(-len(cells) // 2), min(2, len(cells)), note, wide=4.4, high=3.2) as (figure, axes):
        flat = list(axes.flat)
        for axis, (task, steps) in zip(flat, cells, strict=False):
            panel(axis, analysis, task, steps)
            axis.set_title(f"{analysis.design.title(task)}, {steps} steps")
        for axis in flat[len(cells) :]:
            axis.remove()
    return figure


def _frontiers(axis: Axes, analysis: Analysis, task: str, steps: int) -> None:
    title = analysis.design.title
    for place, arm in enumerate(analysis.design.main):
        chosen = analysis.rates(task, steps, arm)
        curves = [
            curve
            for run in analysis.of(task, steps, arm)
            if run.rate == chosen.get(run.seed) and (curve := analysis.curve(run)) is not None
        ]
        if not curves:
            continue
        style, start = _STYLES[place], max(curve.new[0] for curve in curves)
        end = max(curve.lowest for curve in curves)
        levels = np.linspace(start - _SMALLEST * (start - end), end, _POINTS)
        values = np.array([[curve.when(level) for curve in curves] for level in levels], dtype=np.float64)
        axis.plot(levels, values.mean(1), color=style.color, linestyle=style.dashes, label=title(arm))
        axis.fill_between(levels, values.min(1), values.max(1), color=style.color, alpha=0.15, linewidth=0)
        seeds = f"{title(arm)}, n = {len(curves)}"
        axis.annotate(
            seeds, (0.97, 0.03 + 0.06 * place), xycoords="axes fraction", ha="right", fontsize=7, color=style.color
        )
    for target in analysis.design.targets[task, steps]:
        axis.axvline(target, color="gray", linestyle=":", linewidth=0.8)
    axis.invert_xaxis()
    logarithmic(axis)
    axis.set_xlabel(f"cross-entropy on the new task, nats {analysis.design.unit}")
    axis.set_ylabel(_metric(analysis))


def _positions(axis: Axes, analysis: Analysis, task: str, steps: int) -> None:
    positions, style = analysis.design.positions, _STYLES[0]
    found = profile(analysis, task, steps, 1)
    at = [positions[arm] for arm in found]
    axis.plot(at, [ratio.value for ratio in found.values()], marker=style.mark, color=style.color, label="windows")
    untuned = [(positions[arm], ratio.value) for arm, ratio in found.items() if analysis.untuned(task, steps, arm)]
    if untuned:
        axis.plot(
            *zip(*untuned, strict=True), style.mark, color=style.color, markerfacecolor="white", label="not tuned"
        )
    for x, ratio in zip(at, found.values(), strict=True):
        if ratio.low is not None and ratio.high is not None:
            axis.vlines(x, ratio.low, ratio.high, color=style.color, linewidth=1.3)
    middle = next(arm for arm, place in positions.items() if place == MIDDLE)
    lora, style = analysis.compare(task, steps, 1, "lora", middle).ratio, _STYLES[1]
    if lora is not None:
        axis.axhline(lora.value, color=style.color, linestyle=style.dashes, label=analysis.design.title("lora"))
        if lora.low is not None and lora.high is not None:
            axis.axhspan(lora.low, lora.high, color=style.color, alpha=0.15, linewidth=0)
    axis.axhline(1.0, color="gray", linestyle=":", linewidth=0.8)
    logarithmic(axis)
    axis.set_xlabel("position of the window: 0 principal, 1 minor")
    axis.set_ylabel("KL / KL of the window at 0.5")


def _rates(axis: Axes, analysis: Analysis, task: str, steps: int) -> None:
    rates, title = set(), analysis.design.title
    for style, arm in zip(_STYLES, analysis.design.main, strict=True):
        points = []
        for rate, by_seed in sorted(analysis.scores(task, steps, arm, 1).items()):
            reached = [score for score in by_seed.values() if score is not None]
            if len(reached) == len(by_seed):
                points.append((rate, mean(reached), min(reached), max(reached)))
        if points:
            x, y, low, high = np.array(points).T
            rates.update(x.tolist())
            axis.vlines(x, low, high, color=style.color, linewidth=1.0)
            axis.plot(x, y, marker=style.mark, color=style.color, linestyle=style.dashes, label=title(arm))
    axis.set_xscale("log")
    axis.set_xticks(sorted(rates), [f"{rate:g}" for rate in sorted(rates)], minor=False)
    axis.minorticks_off()
    logarithmic(axis)
    axis.set_xlabel("learning rate")
    axis.set_ylabel(_metric(analysis))


def _metric(analysis: Analysis) -> str:
    metric = analysis.design.metric
    return analysis.design.titles.get(metric, "KL(base ‖ tuned) on the base's samples")
