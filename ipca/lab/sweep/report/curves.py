"""A metric over the window's position, a panel for each comparison; controls in a panel beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import mean
from typing import TYPE_CHECKING, Any

from ipca.lab.baselines import CONTROLS
from ipca.lab.sweep.report.comparisons import View
from ipca.lab.sweep.report.drawing import (
    HEIGHT,
    WIDTH,
    Panel,
    axis_title,
    band,
    base_line,
    dots,
    end_labels,
    limits,
    near,
    point,
)
from ipca.lab.sweep.report.statistics import estimate
from ipca.lab.sweep.report.style import INK, SOFT, Style, canvas, inline
from ipca.lab.sweep.report.words import name, seeds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LEVELS = ("full", "lora", "auto")
_ACROSS = (-0.04, 1.04)
"""Of the positions; labels stand right of it."""


def curves(views: Sequence[View], metric: str, styles: Mapping[str, Style]) -> list[Panel]:
    """The panels of one metric, all with the same axis of values."""
    values = [v for view in views for method in view.sweep.methods for v in view.values(method, metric).values()]
    base = near(views[0].sweep.base.get(metric), values) if views else None
    span = limits(values if base is None else [*values, base])
    panels = []
    for view in views:
        if any(view.values(method, metric) for method in view.sweep.positions):
            panels.append(_windows(view, metric, styles, span, base))
        controls = view.sweep.reference is not None and any(view.values(method, metric) for method in CONTROLS)
        if controls and view.key in ("same", "best", "tuned"):
            panels.append(_controls(view, metric, styles, span, base))
    return panels


def _windows(
    view: View, metric: str, styles: Mapping[str, Style], span: tuple[float, float], base: float | None
) -> Panel:
    sweep = view.sweep
    means, key = {}, f"curve-{metric}-{view.key}"
    with canvas(WIDTH, HEIGHT) as (figure, axis):
        base_line(axis, base, _ACROSS)
        _levels(axis, view, metric, styles, _ACROSS)
        _draw_other_rates(axis, view, metric, span)
        for method, f in sweep.positions.items():
            values = view.values(method, metric)
            found = estimate(values.values())
            if found is not None:
                means[f] = found.mean
                point(axis, f, found, styles[method], hollow=_some_failed(view, method, values))
                dots(axis, f, values, styles[method], 0.03)
        axis.plot(list(means), list(means.values()), color=INK, linewidth=1.3, zorder=2)
        axis.set(xlim=(_ACROSS[0], 1.17 if view.lr is not None and len(sweep.lrs) > 1 else _ACROSS[1]), ylim=span)
        axis.set_xticks(*_ticks(sorted(sweep.positions.values())))
        axis.set_xlabel("window position f = start / (d − rank)\n0 principal end · 1 minor end")
        axis.set_ylabel(axis_title(sweep.label(metric)))
        svg = inline(figure, key, f"{metric} over the window's position, {view.title}: {_spoken(means)}")
    return Panel(f"At {view.title}", f"{view.note[0].upper()}{view.note[1:]}; {_count(view, metric)}.", svg)


def _controls(
    view: View, metric: str, styles: Mapping[str, Style], span: tuple[float, float], base: float | None
) -> Panel:
    reference = view.sweep.reference
    shown = [m for m in (reference, *CONTROLS) if m is not None and view.values(m, metric)]
    means = {}
    with canvas(WIDTH, HEIGHT) as (figure, axis):
        base_line(axis, base, (-0.6, len(shown) - 0.4))
        _levels(axis, view, metric, styles, (-0.6, len(shown) - 0.4))
        for x, method in enumerate(shown):
            values = view.values(method, metric)
            found = estimate(values.values())
            assert found is not None
            means[method] = found.mean
            point(axis, x, found, styles[method], hollow=_some_failed(view, method, values))
            dots(axis, x, values, styles[method], 0.3)
        axis.set(xlim=(-0.6, len(shown) - 0.4), ylim=span)
        axis.set_xticks(range(len(shown)), [name(m) for m in shown], rotation=35, ha="right", rotation_mode="anchor")
        axis.set_ylabel(axis_title(view.sweep.label(metric)))
        svg = inline(figure, f"controls-{metric}-{view.key}", f"{metric} of the controls: {_spoken(means)}")
    return Panel("Controls", f"At {view.title}; each differs from the reference window in one thing.", svg)


def _levels(axis: Axes, view: View, metric: str, styles: Mapping[str, Style], ends: tuple[float, float]) -> None:
    """Across the panel: the methods without a position."""
    for method in _LEVELS:
        if method in styles:
            band(axis, view.values(method, metric), styles[method], ends)


def _other_rates(view: View, metric: str) -> list[tuple[float, dict[float, float]]]:
    """``(rate, {position: mean})`` at every rate of the grid; nothing where each method has its own rate."""
    found = []
    for lr in view.sweep.lrs if view.lr is not None else ():
        here = replace(view, lr=lr)
        values = {f: here.values(method, metric).values() for method, f in view.sweep.positions.items()}
        found.append((lr, {f: mean(numbers) for f, numbers in values.items() if numbers}))
    return [(lr, means) for lr, means in found if means]


def _draw_other_rates(axis: Axes, view: View, metric: str, span: tuple[float, float]) -> None:
    """The same curve at the grid's other rates, means alone, and every rate's label."""
    found = _other_rates(view, metric)
    for lr, means in found:
        if lr != view.lr:
            axis.plot(list(means), list(means.values()), color=SOFT, linewidth=0.9, zorder=1.8)
    if len(found) > 1:
        labels = [(means[max(means)], f"{lr:g}", INK if lr == view.lr else SOFT) for lr, means in found]
        end_labels(axis, _ACROSS[1], labels, span)


def _ticks(positions: Sequence[float]) -> tuple[list[float], list[str]]:
    """Positions far enough apart for their numbers."""
    kept: list[float] = []
    for f in positions:
        if not kept or f - kept[-1] >= 0.1:
            kept.append(f)
    return kept, [f"{f:g}" for f in kept]


def _some_failed(view: View, method: str, values: Mapping[int, float]) -> bool:
    comparison = view.comparison(method)
    tried = {run.seed for run in view.sweep.ends if (run.method, run.comparison) == (method, comparison)}
    return len(values) < len(tried)


def _count(view: View, metric: str) -> str:
    counts = {len(view.values(method, metric)) for method in view.sweep.positions} - {0}
    return seeds(max(counts)) if len(counts) == 1 else f"{min(counts)} to {seeds(max(counts))}"


def _spoken(means: Mapping[Any, float]) -> str:
    return ", ".join(f"{at}: {value:.3g}" for at, value in means.items())
