"""Curves of a metric over the window's position, and over the learning rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import mean
from typing import TYPE_CHECKING, Any

from ipca.analysis.figures import INK
from ipca.lab.baselines import CONTROLS, kind_of
from ipca.lab.statistics import Estimate, estimate
from ipca.lab.sweep.report.comparisons import View
from ipca.lab.sweep.report.data import Sweep
from ipca.lab.sweep.report.drawing import (
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
from ipca.lab.sweep.report.style import SOFT, Style
from ipca.lab.sweep.report.words import name, seeds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LEVELS = ("full", "lora", "auto")
_ACROSS = (-0.04, 1.04)
"""Range of the positions; labels are to the right of it."""
_DODGE = 0.06
"""Horizontal offset of methods at one rate, as a share of the distance between rates."""


def position_panels(views: Sequence[View], metric: str, styles: Mapping[str, Style]) -> list[Panel]:
    """A metric over the window's position, one panel per view, and the controls; all with the same value axis."""
    values = [v for view in views for method in view.sweep.methods for v in view.values(method, metric).values()]
    base = near(views[0].sweep.base.get(metric), values) if views else None
    span = limits(values if base is None else [*values, base])
    lines = tuple(method for method in _LEVELS if method in styles)
    panels = []
    for view in views:
        if any(view.values(method, metric) for method in view.sweep.positions):
            title, note = f"At {view.title}", f"{view.note[0].upper()}{view.note[1:]}; {_count(view, metric)}."
            draw = partial(_draw_windows, view, metric, styles, span, base)
            panels.append(Panel(f"{metric}-{view.key}", title, note, draw, methods=lines))
        controls = view.sweep.reference is not None and any(view.values(method, metric) for method in CONTROLS)
        if controls and view.key in ("same", "best", "tuned"):
            note = f"At {view.title}; each differs from the reference window in one respect."
            draw = partial(_draw_controls, view, metric, styles, span, base)
            panels.append(Panel(f"{metric}-{view.key}-controls", "Controls", note, draw, methods=lines))
    return panels


def _draw_windows(
    view: View, metric: str, styles: Mapping[str, Style], span: tuple[float, float], base: float | None, axis: Axes
) -> str:
    sweep = view.sweep
    means = {}
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
    axis.set_ylabel(axis_title(sweep.label(metric), len(sweep.seeds)))
    return f"{metric} over the window's position, {view.title}: {_spoken(means)}"


def _draw_controls(
    view: View, metric: str, styles: Mapping[str, Style], span: tuple[float, float], base: float | None, axis: Axes
) -> str:
    reference = view.sweep.reference
    shown = [m for m in (reference, *CONTROLS) if m is not None and view.values(m, metric)]
    means = {}
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
    axis.set_ylabel(axis_title(view.sweep.label(metric), len(view.sweep.seeds)))
    return f"{metric} of the controls: {_spoken(means)}"


def _levels(axis: Axes, view: View, metric: str, styles: Mapping[str, Style], ends: tuple[float, float]) -> None:
    """Draw the methods without a position across the panel."""
    for method in _LEVELS:
        if method in styles:
            band(axis, estimate(view.values(method, metric).values()), styles[method], ends)


def _other_rates(view: View, metric: str) -> list[tuple[float, dict[float, float]]]:
    """``(rate, {position: mean})`` at every rate of the grid; empty if each method has its own rate."""
    found = []
    for lr in view.sweep.lrs if view.lr is not None else ():
        here = replace(view, lr=lr)
        values = {f: here.values(method, metric).values() for method, f in view.sweep.positions.items()}
        found.append((lr, {f: mean(numbers) for f, numbers in values.items() if numbers}))
    return [(lr, means) for lr, means in found if means]


def _draw_other_rates(axis: Axes, view: View, metric: str, span: tuple[float, float]) -> None:
    """Draw the means at the grid's other rates, and a label for every rate."""
    found = _other_rates(view, metric)
    for lr, means in found:
        if lr != view.lr:
            axis.plot(list(means), list(means.values()), color=SOFT, linewidth=0.9, zorder=1.8)
    if len(found) > 1:
        labels = [(means[max(means)], f"{lr:g}", INK if lr == view.lr else SOFT) for lr, means in found]
        end_labels(axis, _ACROSS[1], labels, span)


def _ticks(positions: Sequence[float]) -> tuple[list[float], list[str]]:
    """The positions that are far enough apart for their labels."""
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


def rate_panels(sweep: Sweep, styles: Mapping[str, Style]) -> list[Panel]:
    """Target and retained over the rate, for windows and for controls; empty for a single rate."""
    if len(sweep.lrs) < 2:
        return []
    beside = [method for method in sweep.methods if kind_of(method) in ("lora", "full", "auto", "baseline")]
    windows = [method for method in sweep.methods if kind_of(method) == "window"]
    controls = [method for method in sweep.methods if kind_of(method) == "control"]
    groups = {"Windows": windows + beside}
    if controls:
        groups["Controls"] = [m for m in (sweep.reference, "lora", *controls) if m in sweep.methods]
    metrics = [metric for metric in ("target", "retained") if metric in sweep.metrics]
    return [
        Panel(
            f"rates-{title}-{metric}".lower(),
            f"{title}: {metric}",
            "",
            partial(_draw_rates, sweep, group, metric, styles),
            methods=tuple(group),
        )
        for title, group in groups.items()
        for metric in metrics
    ]


def _draw_rates(sweep: Sweep, methods: Sequence[str], metric: str, styles: Mapping[str, Style], axis: Axes) -> str:
    values = [run.metrics[metric] for run in sweep.ends if run.comparison == "same" and metric in run.metrics]
    base = near(sweep.base.get(metric), values)
    span = limits(values if base is None else [*values, base])
    step = min(b / a for a, b in zip(sweep.lrs, sweep.lrs[1:], strict=False)) ** _DODGE
    labels: dict[float, list[tuple[float, str, str]]] = {}
    spoken = []
    base_line(axis, base, (sweep.lrs[0] / step**2, sweep.lrs[-1] * step**2))
    for k, method in enumerate(methods):
        shift = step ** (2 * k / max(len(methods) - 1, 1) - 1)
        found = _rate_line(axis, sweep, method, metric, styles[method], shift)
        _draw_failures(axis, sweep, method, styles[method], shift)
        if found and kind_of(method) == "window":
            last = max(found)
            labels.setdefault(last, []).append((found[last].mean, method, INK))
        spoken.append(f"{method} " + ", ".join(f"{value.mean:.3g} at {lr:g}" for lr, value in found.items()))
    axis.set(xscale="log", ylim=span)
    axis.set_xlim(sweep.lrs[0] / step**3, sweep.lrs[-1] * step**8)
    axis.set_xticks(sweep.lrs, [f"{lr:g}" for lr in sweep.lrs], minor=False)
    axis.set_xticks([], minor=True)
    axis.set_xlabel("learning rate (log scale)")
    axis.set_ylabel(axis_title(sweep.label(metric), len(sweep.seeds)))
    for lr, texts in labels.items():
        end_labels(axis, lr * step**1.5, texts, span)
    return f"{metric} over the learning rate: {'; '.join(spoken)}"


def _rate_line(axis: Axes, sweep: Sweep, method: str, metric: str, style: Style, shift: float) -> dict[float, Estimate]:
    """Draw one method's means over the rates, and return them."""
    found: dict[float, Estimate] = {}
    for lr in sweep.lrs:
        value = estimate(sweep.values(method, metric, "same", lr).values())
        if value is not None:
            found[lr] = value
            point(axis, lr * shift, value, style, hollow=_failed(sweep, method, lr) > 0, size=5)
    at = [lr * shift for lr in found]
    axis.plot(at, [value.mean for value in found.values()], color=style.color, linestyle=style.dashes, linewidth=1.4)
    return found


def _draw_failures(axis: Axes, sweep: Sweep, method: str, style: Style, shift: float) -> None:
    """Draw a cross at the foot of the axis with the number of failed runs."""
    for lr in sweep.lrs:
        failed = _failed(sweep, method, lr)
        if failed:
            foot = axis.get_xaxis_transform()
            axis.plot(lr * shift, 0.03, "x", color=style.color, transform=foot, markersize=7, markeredgewidth=2)
            axis.annotate(
                str(failed), (lr * shift, 0.03), (0, 6), xycoords=foot, textcoords="offset points", ha="center",
                fontsize=8, color=INK,
            )  # fmt: skip


def _failed(sweep: Sweep, method: str, lr: float) -> int:
    return sum((run.method, run.comparison, run.lr, run.ok) == (method, "same", lr, False) for run in sweep.ends)
