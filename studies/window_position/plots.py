"""What the study's pictures are made of: sheets of panels, lines and marks with intervals, a style for each method."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Point(NamedTuple):
    """A mean with its interval; NaN where there is no interval."""

    x: float
    y: float
    low: float = math.nan
    high: float = math.nan


class Style(NamedTuple):
    """Color and mark of a method."""

    color: str
    mark: str


_FIXED = {"lora": Style("#d55e00", "s"), "full": Style("#555555", "D"), "auto": Style("#c2478f", "*")}
_WINDOWS = {0.0: "#5b21b6", 0.125: "#5a4fd0", 0.25: "#3f6fe0", 0.5: "#0b84d8", 0.75: "#0ea5a0", 0.875: "#2fa36b"}
_MINOR = "#5f9e1f"


def style_of(method: str) -> Style:
    """Windows run from violet at the principal end to green at the minor one."""
    if method[:1].isdigit():
        mark = {"0.0": "^", "1.0": "v"}.get(method, "o")
        return Style(_WINDOWS.get(float(method), _MINOR), mark)
    return _FIXED.get(method, Style("#333333", "o"))


@contextmanager
def sheet(rows: int, columns: int, note: str, *, wide: float = 3.5, high: float = 2.9) -> Iterator[tuple[Figure, Any]]:
    """A figure and its axes ``[rows][columns]``; afterward a legend under it of all that has a label.

    Args:
        note: what holds for all panels, above them.
        wide, high: of a panel, in inches.
    """
    import matplotlib
    from matplotlib.figure import Figure

    look: dict[Any, Any] = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 9.5}
    look |= {"axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True}
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **look}):
        figure = Figure(figsize=(wide * columns, high * rows + 0.9), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
        yield figure, axes
        figure.suptitle(note, fontsize=9.5)
        labels: dict[str, Any] = {}
        for axis in axes.flat:
            handles, names = axis.get_legend_handles_labels()
            labels |= dict(zip(names, handles, strict=True))
        if labels:
            lines = -(-len(labels) // max(2, int(wide * columns / 1.6)))
            layout: dict[str, Any] = {"ncols": -(-len(labels) // lines), "frameon": False}
            figure.legend(list(labels.values()), list(labels), loc="outside lower center", **layout)


def line(axis: Axes, points: Sequence[Point], style: Style, label: str | None = None, *, dashed: bool = False) -> None:
    """A line through means, with their intervals."""
    whiskers(axis, points, style)
    at = [p.x for p in points], [p.y for p in points]
    look: dict[str, Any] = {
        "color": style.color,
        "linestyle": "--" if dashed else "-",
        "linewidth": 1.3,
        "markersize": 5,
    }
    axis.plot(*at, marker=style.mark, label=label, **look)


def marks(axis: Axes, points: Sequence[Point], style: Style, label: str) -> None:
    """Means with their intervals, each by itself."""
    whiskers(axis, points, style)
    axis.plot([p.x for p in points], [p.y for p in points], style.mark, color=style.color, markersize=5, label=label)


def whiskers(axis: Axes, points: Sequence[Point], style: Style) -> None:
    """The intervals alone."""
    for p in points:
        axis.plot([p.x, p.x], [p.low, p.high], color=style.color, linewidth=1.3)


def band(axis: Axes, found: Point | None, style: Style, label: str) -> None:
    """A mean across the panel, its interval shaded."""
    if found is None:
        return
    axis.axhline(found.y, color=style.color, linewidth=1.1, linestyle="--", label=label)
    if math.isfinite(found.low):
        axis.axhspan(found.low, found.high, color=style.color, alpha=0.13, linewidth=0)


def ticks(axis: Axes, values: Sequence[str]) -> None:
    """A logarithmic x axis with ticks at ``values`` alone."""
    axis.set_xscale("log", base=2)
    axis.set_xticks([float(value) for value in values], values)
    axis.minorticks_off()


def logarithmic(axis: Axes) -> None:
    """A logarithmic y axis with plain numbers, also between powers of ten where it spans few of them."""
    from matplotlib.ticker import LogFormatter, StrMethodFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
