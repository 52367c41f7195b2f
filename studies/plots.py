"""Drawing primitives of the studies' figures: sheets of panels, lines and marks with intervals, styles of methods.

A picture's file carries a digest of what it shows, so that an outdated one is found without comparing pixels, which
differ between versions of matplotlib.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipca._atomic import write_atomic
from ipca.analysis.figures import INK, house_style
from ipca.lab.baselines import CONTROLS
from ipca.lab.statistics import Estimate
from ipca.lab.sweep.report.style import Style
from ipca.lab.sweep.report.style import style_of as report_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SHOWS = "Shows"
"""Key of the digest among the texts of a PNG file."""
_WITH_STYLE = ("lora", "full", "auto", *CONTROLS)


@dataclass(frozen=True)
class Point(Estimate):
    """A mean with its interval at the position ``x``."""

    x: float = 0.0


def style_of(method: str) -> Style:
    """The report's style of a method; the two ends of the spectrum have marks of their own."""
    if method[:1].isdigit():
        mark = {"0.0": "^", "1.0": "v"}.get(method, "o")
        return replace(report_style(method, float(method)), mark=mark)
    return report_style(method) if method in _WITH_STYLE else Style(INK, INK, "o", "-")


@contextmanager
def sheet(rows: int, columns: int, note: str, *, wide: float = 3.5, high: float = 2.9) -> Iterator[tuple[Figure, Any]]:
    """A figure and its axes ``[rows][columns]``; on exit a legend of all labels is added below it.

    Args:
        note: the title, on what holds for all panels.
        wide, high: size of a panel, in inches.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with house_style(), matplotlib.rc_context({"font.size": 9, "axes.titlesize": 9.5}):
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
    """Draw a line through means, with their intervals."""
    whiskers(axis, points, style)
    at = [p.x for p in points], [p.mean for p in points]
    look: dict[str, Any] = {
        "color": style.color,
        "linestyle": "--" if dashed else "-",
        "linewidth": 1.3,
        "markersize": 5,
    }
    axis.plot(*at, marker=style.mark, label=label, **look)


def marks(axis: Axes, points: Sequence[Point], style: Style, label: str) -> None:
    """Draw unconnected means with their intervals."""
    whiskers(axis, points, style)
    axis.plot([p.x for p in points], [p.mean for p in points], style.mark, color=style.color, markersize=5, label=label)


def whiskers(axis: Axes, points: Sequence[Point], style: Style) -> None:
    """Draw the intervals."""
    for p in points:
        if p.low is not None and p.high is not None:
            axis.plot([p.x, p.x], [p.low, p.high], color=style.color, linewidth=1.3)


def ticks(axis: Axes, values: Sequence[str]) -> None:
    """Make the x axis logarithmic, with ticks only at ``values``."""
    axis.set_xscale("log", base=2)
    axis.set_xticks([float(value) for value in values], values)
    axis.minorticks_off()


def logarithmic(axis: Axes) -> None:
    """Make the y axis logarithmic, with plain numbers, also between powers of ten if it spans few of them."""
    from matplotlib.ticker import LogFormatter, StrMethodFormatter

    class Plain(LogFormatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_formatter(Plain(minor_thresholds=(1.5, 0.5)))


def write_pictures(figures: Mapping[Path, Figure]) -> None:
    """Write each figure as a PNG file with the digest of what it shows."""
    for path, figure in figures.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None, _SHOWS: digest(figure)})
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, buffer.getvalue())


def outdated(figures: Mapping[Path, Figure]) -> list[Path]:
    """The files that do not show what their figures do, or are not there."""
    return [path for path, figure in figures.items() if _shown(path) != digest(figure)]


def _shown(path: Path) -> str | None:
    from PIL import Image

    if not path.exists():
        return None
    with Image.open(path) as picture:
        return picture.info.get(_SHOWS)


def digest(figure: Figure) -> str:
    """SHA-256 of a figure's words and of its points to six digits, whatever its size, colors and fonts."""
    return hashlib.sha256("\n".join(_content(figure)).encode()).hexdigest()


def _content(figure: Figure) -> Iterator[str]:
    from matplotlib.ticker import FixedLocator

    yield figure.get_suptitle()
    for axis in figure.axes:
        yield from (axis.get_title(), axis.get_xlabel(), axis.get_ylabel(), *(text.get_text() for text in axis.texts))
        for scale in (axis.xaxis, axis.yaxis):
            places = scale.get_major_locator()
            if isinstance(places, FixedLocator):
                yield from scale.get_major_formatter().format_ticks([*places()])
        for line in axis.lines:
            yield f"{line.get_label()}: {_numbers(line.get_xydata())}"
        for collection in axis.collections:
            yield _numbers(collection.get_offsets())
            yield from (_numbers(path.vertices) for path in collection.get_paths())
        for patch in axis.patches:
            yield _numbers(patch.get_patch_transform().transform_path(patch.get_path()).vertices)


def _numbers(points: Any) -> str:
    return " ".join(f"{value:.6g}" for point in points for value in point)
