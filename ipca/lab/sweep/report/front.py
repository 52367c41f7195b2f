"""Learning against forgetting: target over retained for all methods and rates, with the Pareto line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING

from ipca.lab.baselines import kind_of
from ipca.lab.compare import frontier
from ipca.lab.sweep.report.comparisons import middle_rate
from ipca.lab.sweep.report.data import Run, Sweep
from ipca.lab.sweep.report.drawing import Panel, axis_title, base_line, limits
from ipca.lab.sweep.report.style import INK, Style, canvas, inline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH, _HEIGHT = 5.0, 4.4


@dataclass(frozen=True)
class Spot:
    """The mean over seeds of one method at one rate, at the end or at a checkpoint."""

    method: str
    lr: float
    step: int | None
    target: float
    retained: float
    n: int
    failed: int


def spots(runs: Iterable[Run]) -> list[Spot]:
    """A spot for each method, rate and step with a value."""
    groups: dict[tuple[str, float, int | None], list[Run]] = {}
    for run in runs:
        if run.lr is not None:
            groups.setdefault((run.method, run.lr, run.step), []).append(run)
    found = []
    for key, group in groups.items():
        well = [run.metrics for run in group if {"target", "retained"} <= set(run.metrics)]
        if well:
            means = mean(m["target"] for m in well), mean(m["retained"] for m in well)
            found.append(Spot(*key, *means, len(well), len(group) - len(well)))
    return found


def best_spots(sweep: Sweep) -> list[Spot]:
    """The Pareto-optimal spots at the end of training at the same rates, by rising target."""
    found = spots(run for run in sweep.ends if run.comparison == "same")
    optimal = frontier([(spot.target, spot.retained) for spot in found])
    return sorted((found[i] for i in optimal), key=lambda spot: spot.target)


def front_panels(sweep: Sweep, styles: Mapping[str, Style]) -> list[Panel]:
    """The ends of training; and, where there are checkpoints, the ways there at the middle rate."""
    if not {"target", "retained"} <= set(sweep.metrics):
        return []
    same = [run for run in sweep.runs if run.comparison == "same"]
    ends = spots(run for run in same if run.step is None)
    if not ends:
        return []
    panels = [_panel(sweep, "ends", ends, best_spots(sweep), styles)]
    lr = middle_rate(sweep)
    ways = spots(run for run in same if run.lr == lr)
    if any(spot.step is not None for spot in ways):
        panels.append(_panel(sweep, "ways", ways, [], styles))
    return panels


_TITLES = {"ends": "At the end of training", "ways": "On the way, at checkpoints"}


def _panel(sweep: Sweep, key: str, found: list[Spot], best: list[Spot], styles: Mapping[str, Style]) -> Panel:
    with canvas(_WIDTH, _HEIGHT) as (figure, axis):
        for method in sweep.methods:
            _method(axis, [spot for spot in found if spot.method == method], styles[method])
        if best:
            axis.plot(
                [s.target for s in best], [s.retained for s in best], color=INK, drawstyle="steps-pre", linewidth=1
            )
        across = limits(spot.target for spot in found)
        base = sweep.base.get("retained")
        base_line(axis, base, across)
        axis.set_xlim(across)
        axis.set_ylim(limits([spot.retained for spot in found] + ([] if base is None else [base])))
        axis.set_xlabel(f"{sweep.label('target')}\nmean over seeds")
        axis.set_ylabel(axis_title(sweep.label("retained"), "mean over seeds"))
        figure.draw_without_rendering()  # lays the axis out, which the places of the numbers depend on
        _numbers(axis, found, best)
        words = "; ".join(f"{s.method} at {s.lr:g}: {s.target:.3g}, {s.retained:.3g}" for s in best or found)
        svg = inline(figure, f"front-{key}", f"retained over target: {words}")
    lr = middle_rate(sweep)
    note = {
        "ends": "A mark is a method at a rate, larger for a higher one; no mark lies above the black line.",
        "ways": f"Every method at {lr:g}; lines follow training, the largest mark is its end.",
    }
    return Panel(_TITLES[key], note[key], svg)


def _method(axis: Axes, found: list[Spot], style: Style) -> None:
    """The spots of one method, joined by rising rate, or in the order of training."""
    order = sorted(found, key=lambda spot: (spot.lr, float("inf") if spot.step is None else spot.step))
    joined = bool(order) and (kind_of(order[0].method) != "control" or any(spot.step is not None for spot in order))
    if joined:
        at = [s.target for s in order], [s.retained for s in order]
        axis.plot(*at, color=style.color, linestyle=style.dashes, linewidth=0.9, alpha=0.6, zorder=2)
    for k, spot in enumerate(order):
        size = 5 + 4 * k / max(len(order) - 1, 1)
        face = "none" if spot.failed else style.color
        axis.plot(
            spot.target, spot.retained, style.mark, color=style.color, markerfacecolor=face, markersize=size, zorder=3
        )


def _numbers(axis: Axes, found: list[Spot], best: list[Spot]) -> None:
    """Number the optimal spots, each where it covers neither a mark nor another number."""
    to_pixels = axis.transData.transform
    taken = [tuple(to_pixels((spot.target, spot.retained))) for spot in found]
    for k, spot in enumerate(best):
        x, y = to_pixels((spot.target, spot.retained))
        places = [(x + dx * r, y + dy * r) for r in (13, 20, 28) for dx, dy in _AROUND]
        place = max(places, key=lambda at: min(min(abs(at[0] - a) + abs(at[1] - b) for a, b in taken), 14.0))
        taken.append(place)
        offset = (place[0] - x, place[1] - y)
        axis.annotate(
            str(k + 1), (spot.target, spot.retained), offset, textcoords="offset pixels", ha="center", va="center",
            fontsize=9, fontweight="bold", color=INK, zorder=5, annotation_clip=False,
        )  # fmt: skip


_AROUND = ((0.7, 0.7), (0, 1), (1, 0), (-0.7, 0.7), (0.7, -0.7), (-1, 0), (0, -1), (-0.7, -0.7))
