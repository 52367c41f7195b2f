"""Forgetting at an equal target: how much each method loses where it has learned as much as the others."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ipca.lab.compare import Matched, target_matched
from ipca.lab.sweep.report.data import Sweep
from ipca.lab.sweep.report.drawing import Panel, limits
from ipca.lab.sweep.report.statistics import estimate
from ipca.lab.sweep.report.style import INK, Style, canvas, inline
from ipca.lab.sweep.report.words import name, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def match_targets(sweep: Sweep) -> Matched | None:
    """Every method at the largest target that all reach with all seeds; None where a metric is missing.

    The points of a method and seed are its checkpoints and ends at all rates of the comparison "same".
    """
    curves: dict[str, dict[int, list[tuple[float, float]]]] = {}
    for run in sweep.runs:
        if run.comparison == "same" and run.seed is not None and {"target", "retained"} <= set(run.metrics):
            points = curves.setdefault(run.method, {}).setdefault(run.seed, [])
            points.append((run.metrics["target"], run.metrics["retained"]))
    return target_matched({m: curves[m] for m in sweep.methods if m in curves}) if curves else None


def matched_panels(sweep: Sweep, styles: Mapping[str, Style]) -> list[Panel]:
    """A bar for each method; nothing without the untrained model's ``retained``, which forgetting is counted from."""
    found = match_targets(sweep)
    base = sweep.base.get("retained")
    if found is None or base is None:
        return []
    lost = {
        method: {seed: base - value for seed, value in seeds.items() if not math.isnan(value)}
        for method, seeds in found.retained.items()
    }
    methods = list(lost)
    low, high = limits([0.0, *(value for seeds in lost.values() for value in seeds.values())])
    with canvas(5.6, 0.9 + 0.3 * len(methods)) as (figure, axis):
        for y, method in enumerate(methods):
            _bar(axis, y, lost[method], styles[method])
        axis.axvline(0, color=INK, linewidth=0.8)
        axis.set_yticks(range(len(methods)), [name(method) for method in methods])
        axis.set(ylim=(len(methods) - 0.4, -0.6), xlim=(low, high))
        axis.grid(visible=False, axis="y")
        axis.set_xlabel(f"lost of {sweep.label('retained')}\nmean, 95 % interval over seeds")
        means = ", ".join(f"{m}: {sum(v.values()) / len(v):.3g}" for m, v in lost.items() if v)
        svg = inline(figure, "matched", f"forgetting at an equal target: {means}")
    note = f"At a target of {number(found.target)}, the largest that every method reaches with every seed."
    return [Panel("Forgetting at an equal target", note, svg)]


def _bar(axis: Axes, y: int, lost: Mapping[int, float], style: Style) -> None:
    found = estimate(lost.values())
    assert found is not None  # the target is one that every method reaches
    axis.barh(y, found.mean, 0.66, color=style.color, alpha=0.5, linewidth=0, zorder=2)
    if found.low is not None and found.high is not None:
        axis.plot([found.low, found.high], [y - 0.12, y - 0.12], color=INK, linewidth=1.8, zorder=4)
    axis.plot(list(lost.values()), [y + 0.16] * len(lost), ".", color=INK, markersize=4, alpha=0.5, zorder=3)
