"""Robustness to the learning rate: each method's means over the grid of rates, failed runs marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ipca.lab.baselines import kind_of
from ipca.lab.sweep.report.data import Sweep
from ipca.lab.sweep.report.drawing import HEIGHT, WIDTH, Panel, axis_title, base_line, end_labels, limits, near, point
from ipca.lab.sweep.report.statistics import Estimate, estimate
from ipca.lab.sweep.report.style import INK, Style, canvas, inline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DODGE = 0.06
"""Of the methods at one rate, as a share of the distance between rates."""


def rate_panels(sweep: Sweep, styles: Mapping[str, Style]) -> list[Panel]:
    """Target and retained over the rate, windows beside LoRA, controls beside the reference; none of one rate."""
    if len(sweep.lrs) < 2:
        return []
    beside = [method for method in sweep.methods if kind_of(method) in ("lora", "full", "auto")]
    windows = [method for method in sweep.methods if kind_of(method) == "window"]
    controls = [method for method in sweep.methods if kind_of(method) == "control"]
    groups = {"Windows": windows + beside}
    if controls:
        groups["Controls"] = [m for m in (sweep.reference, "lora", *controls) if m in sweep.methods]
    metrics = [metric for metric in ("target", "retained") if metric in sweep.metrics]
    return [_panel(sweep, title, group, metric, styles) for title, group in groups.items() for metric in metrics]


def _panel(sweep: Sweep, title: str, methods: Sequence[str], metric: str, styles: Mapping[str, Style]) -> Panel:
    values = [run.metrics[metric] for run in sweep.ends if run.comparison == "same" and metric in run.metrics]
    base = near(sweep.base.get(metric), values)
    span = limits(values if base is None else [*values, base])
    step = min(b / a for a, b in zip(sweep.lrs, sweep.lrs[1:], strict=False)) ** _DODGE
    labels: dict[float, list[tuple[float, str, str]]] = {}
    spoken = []
    with canvas(WIDTH, HEIGHT) as (figure, axis):
        base_line(axis, base, (sweep.lrs[0] / step**2, sweep.lrs[-1] * step**2))
        for k, method in enumerate(methods):
            shift = step ** (2 * k / max(len(methods) - 1, 1) - 1)
            found = _line(axis, sweep, method, metric, styles[method], shift)
            _failures(axis, sweep, method, styles[method], shift)
            if found and kind_of(method) == "window":
                last = max(found)
                labels.setdefault(last, []).append((found[last].mean, method, styles[method].color))
            spoken.append(f"{method} " + ", ".join(f"{value.mean:.3g} at {lr:g}" for lr, value in found.items()))
        axis.set(xscale="log", ylim=span)
        axis.set_xlim(sweep.lrs[0] / step**3, sweep.lrs[-1] * step**8)
        axis.set_xticks(sweep.lrs, [f"{lr:g}" for lr in sweep.lrs], minor=False)
        axis.set_xticks([], minor=True)
        axis.set_xlabel("learning rate (log scale)")
        axis.set_ylabel(axis_title(sweep.label(metric)))
        for lr, texts in labels.items():
            end_labels(axis, lr * step**1.5, texts, span)
        svg = inline(figure, f"rates-{title}-{metric}".lower(), f"{metric} over the learning rate: {'; '.join(spoken)}")
    return Panel(f"{title}: {metric}", "", svg)


def _line(axis: Axes, sweep: Sweep, method: str, metric: str, style: Style, shift: float) -> dict[float, Estimate]:
    found: dict[float, Estimate] = {}
    for lr in sweep.lrs:
        value = estimate(sweep.values(method, metric, "same", lr).values())
        if value is not None:
            found[lr] = value
            point(axis, lr * shift, value, style, hollow=_failed(sweep, method, lr) > 0, size=5)
    at = [lr * shift for lr in found]
    axis.plot(at, [value.mean for value in found.values()], color=style.color, linestyle=style.dashes, linewidth=1.4)
    return found


def _failures(axis: Axes, sweep: Sweep, method: str, style: Style, shift: float) -> None:
    """A cross at the foot of the axis where runs failed, with their number."""
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
