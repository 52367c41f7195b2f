"""Learning against forgetting: the Pareto frontier of target and retained, and forgetting at an equal target."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import mean
from typing import TYPE_CHECKING

from ipca.analysis.figures import INK
from ipca.lab.baselines import kind_of
from ipca.lab.compare import Matched, frontier, target_matched
from ipca.lab.statistics import estimate
from ipca.lab.sweep.report.comparisons import middle_rate
from ipca.lab.sweep.report.data import Run, Sweep
from ipca.lab.sweep.report.drawing import Panel, axis_title, base_line, limits
from ipca.lab.sweep.report.style import Style
from ipca.lab.sweep.report.words import name, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIZE = (5.0, 4.4)


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
    """A spot for each method, rate and step that has a value."""
    groups: dict[tuple[str, float, int | None], list[Run]] = {}
    for run in runs:
        if run.lr is not None:
            groups.setdefault((run.method, run.lr, run.step), []).append(run)
    found = []
    for key, group in groups.items():
        ok = [run.metrics for run in group if {"target", "retained"} <= set(run.metrics)]
        if ok:
            means = mean(m["target"] for m in ok), mean(m["retained"] for m in ok)
            found.append(Spot(*key, *means, len(ok), len(group) - len(ok)))
    return found


def best_spots(sweep: Sweep) -> list[Spot]:
    """The Pareto-optimal spots at the end of training at the same rates, by ascending target."""
    found = spots(run for run in sweep.ends if run.comparison == "same")
    optimal = frontier([(spot.target, spot.retained) for spot in found])
    return sorted((found[i] for i in optimal), key=lambda spot: spot.target)


def frontier_panels(sweep: Sweep, styles: Mapping[str, Style]) -> list[Panel]:
    """The ends of training and, if there are checkpoints, the paths of training at the middle rate."""
    if not {"target", "retained"} <= set(sweep.metrics):
        return []
    same = [run for run in sweep.runs if run.comparison == "same"]
    ends = spots(run for run in same if run.step is None)
    if not ends:
        return []
    note = "A mark is a method at a rate, larger for higher rates; no mark is above the black line."
    draw = partial(_draw_frontier, sweep, ends, best_spots(sweep), styles)
    panels = [Panel("frontier", "At the end of training", note, draw, _SIZE, sweep.methods)]
    lr = middle_rate(sweep)
    paths = spots(run for run in same if run.lr == lr)
    if any(spot.step is not None for spot in paths):
        note = f"Every method at {lr:g}; lines follow training, the largest mark is its end."
        draw = partial(_draw_frontier, sweep, paths, [], styles)
        panels.append(Panel("frontier-paths", "During training, at checkpoints", note, draw, _SIZE, sweep.methods))
    return panels


def _draw_frontier(sweep: Sweep, found: list[Spot], best: list[Spot], styles: Mapping[str, Style], axis: Axes) -> str:
    for method in sweep.methods:
        _draw_method(axis, [spot for spot in found if spot.method == method], styles[method])
    if best:
        at = [s.target for s in best], [s.retained for s in best]
        axis.plot(*at, color=INK, drawstyle="steps-pre", linewidth=1)
    across = limits(spot.target for spot in found)
    base = sweep.base.get("retained")
    base_line(axis, base, across)
    axis.set_xlim(across)
    axis.set_ylim(limits([spot.retained for spot in found] + ([] if base is None else [base])))
    axis.set_xlabel(f"{sweep.label('target')}\nmean over seeds")
    axis.set_ylabel(axis_title(sweep.label("retained"), 1))
    _draw_numbers(axis, found, best)
    words = "; ".join(f"{s.method} at {s.lr:g}: {s.target:.3g}, {s.retained:.3g}" for s in best or found)
    return f"retained over target: {words}"


def _draw_method(axis: Axes, found: list[Spot], style: Style) -> None:
    """Draw the spots of one method, joined by ascending rate, or in the order of training."""
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


def _draw_numbers(axis: Axes, found: list[Spot], best: list[Spot]) -> None:
    """Number the optimal spots, each number where it covers neither a mark nor another number."""
    figure = axis.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # lays out the axis, which determines the places of the marks
    point = 72 / figure.dpi
    places_of = [tuple(point * axis.transData.transform((spot.target, spot.retained))) for spot in (*found, *best)]
    taken, ends = places_of[: len(found)], places_of[len(found) :]
    for k, (spot, (x, y)) in enumerate(zip(best, ends, strict=True)):
        places = [(x + dx * r, y + dy * r) for r in (13, 20, 28) for dx, dy in _AROUND]
        place = max(places, key=lambda at: min(min(abs(at[0] - a) + abs(at[1] - b) for a, b in taken), 14.0))
        taken.append(place)
        axis.annotate(
            str(k + 1), (spot.target, spot.retained), (place[0] - x, place[1] - y), textcoords="offset points",
            ha="center", va="center", fontsize=9, fontweight="bold", color=INK, zorder=5, annotation_clip=False,
        )  # fmt: skip


_AROUND = ((0.7, 0.7), (0, 1), (1, 0), (-0.7, 0.7), (0.7, -0.7), (-1, 0), (0, -1), (-0.7, -0.7))


def match_targets(sweep: Sweep) -> Matched | None:
    """Every method at the largest target that all reach with all seeds; None if a metric is missing.

    The points of a method and seed are its checkpoints and ends at all rates of the comparison ``"same"``.
    """
    curves: dict[str, dict[int, list[tuple[float, float]]]] = {}
    for run in sweep.runs:
        if run.comparison == "same" and run.seed is not None and {"target", "retained"} <= set(run.metrics):
            points = curves.setdefault(run.method, {}).setdefault(run.seed, [])
            points.append((run.metrics["target"], run.metrics["retained"]))
    return target_matched({m: curves[m] for m in sweep.methods if m in curves}) if curves else None


def matched_panels(sweep: Sweep, styles: Mapping[str, Style]) -> list[Panel]:
    """A bar for each method; empty without the untrained model's ``retained``, the baseline of forgetting."""
    found = match_targets(sweep)
    base = sweep.base.get("retained")
    if found is None or base is None:
        return []
    lost = {
        method: {seed: base - value for seed, value in seeds.items() if not math.isnan(value)}
        for method, seeds in found.retained.items()
    }
    note = f"At a target of {number(found.target)}, the largest that every method reaches with every seed."
    draw = partial(_draw_bars, sweep, lost, styles)
    return [Panel("equal-target", "Forgetting at an equal target", note, draw, (5.6, 0.9 + 0.3 * len(lost)))]


def _draw_bars(sweep: Sweep, lost: Mapping[str, Mapping[int, float]], styles: Mapping[str, Style], axis: Axes) -> str:
    low, high = limits([0.0, *(value for seeds in lost.values() for value in seeds.values())])
    for y, method in enumerate(lost):
        _draw_bar(axis, y, lost[method], styles[method])
    axis.axvline(0, color=INK, linewidth=0.8)
    axis.set_yticks(range(len(lost)), [name(method) for method in lost])
    axis.set(ylim=(len(lost) - 0.4, -0.6), xlim=(low, high))
    axis.grid(visible=False, axis="y")
    axis.set_xlabel(axis_title(f"lost of {sweep.label('retained')}", len(sweep.seeds)))
    means = ", ".join(f"{m}: {sum(v.values()) / len(v):.3g}" for m, v in lost.items() if v)
    return f"forgetting at an equal target: {means}"


def _draw_bar(axis: Axes, y: int, lost: Mapping[int, float], style: Style) -> None:
    found = estimate(lost.values())
    assert found is not None  # every method reaches the target
    axis.barh(y, found.mean, 0.66, color=style.color, alpha=0.5, linewidth=0, zorder=2)
    if found.low is not None and found.high is not None:
        axis.plot([found.low, found.high], [y - 0.12, y - 0.12], color=INK, linewidth=1.8, zorder=4)
    axis.plot(list(lost.values()), [y + 0.16] * len(lost), ".", color=INK, markersize=4, alpha=0.5, zorder=3)
