"""Drawing primitives of the figures: means with intervals, bands, shared limits, and labels without overlap."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ipca.analysis.figures import INK
from ipca.lab.statistics import FEWEST, Estimate
from ipca.lab.sweep.report.style import Style
from ipca.lab.sweep.report.words import NAMES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

UNTRAINED = NAMES["base"]
WIDTH, HEIGHT = 5.0, 3.7
"""Of a panel, in inches: readable at full width on a phone, two side by side on a desktop."""


@dataclass(frozen=True)
class Panel:
    """One picture of a figure.

    Attributes:
        key: its name among the panels of all figures of a sweep.
        note: on its conditions.
        draw: draws on an axis, and returns the picture in words.
        size: in inches.
        methods: that a legend must name.
        sweep: the label of its sweep, where a report has several.
    """

    key: str
    title: str
    note: str
    draw: Callable[[Axes], str]
    size: tuple[float, float] = (WIDTH, HEIGHT)
    methods: tuple[str, ...] = ()
    sweep: str = ""


def limits(values: Iterable[float]) -> tuple[float, float]:
    """The range of ``values`` with a margin of 6 % on both sides."""
    numbers = list(values)
    if not numbers:
        return 0.0, 1.0
    low, high = min(numbers), max(numbers)
    room = 0.06 * (high - low) or 0.05 * abs(high) or 0.05
    return low - room, high + room


def axis_title(label: str, seeds: int) -> str:
    """``label`` wrapped to the height of a panel, and below it the meaning of the marks, of ``seeds`` at most."""
    note = "mean, 95 % interval over seeds" if seeds >= FEWEST else "mean over seeds"
    return "\n".join([*textwrap.wrap(label, 40), note])


def point(axis: Axes, x: float, found: Estimate, style: Style, *, hollow: bool = False, size: float = 6.5) -> None:
    """Draw a mean with its interval; hollow if some of its runs failed."""
    if found.low is not None and found.high is not None:
        axis.plot([x, x], [found.low, found.high], color=style.color, linewidth=1.6, zorder=3)
    face = "none" if hollow else style.color
    axis.plot(x, found.mean, style.mark, color=style.color, markerfacecolor=face, markersize=size, zorder=4)


def dots(axis: Axes, x: float, values: Mapping[int, float], style: Style, width: float) -> None:
    """Draw a small dot for each seed, spread over ``width`` around ``x``."""
    n = len(values)
    if n > 1:
        places = [x + width * (k / (n - 1) - 0.5) for k in range(n)]
        axis.plot(places, list(values.values()), ".", color=style.color, alpha=0.45, markersize=4, zorder=2)


def band(axis: Axes, found: Estimate | None, style: Style, ends: tuple[float, float], label: str | None = None) -> None:
    """Draw a line between ``ends`` at the mean of ``found``, with its interval shaded; nothing for None."""
    if found is None:
        return
    axis.plot(ends, [found.mean] * 2, color=style.color, linestyle=style.dashes, linewidth=1.5, zorder=1.5, label=label)
    if found.low is not None and found.high is not None:
        axis.fill_between(ends, found.low, found.high, color=style.color, alpha=0.13, linewidth=0, zorder=1)


def near(base: float | None, values: Iterable[float]) -> float | None:
    """``base``, or None if it is so far from all ``values`` that showing it would compress them.

    The target of an untrained model is often at chance level, since its head is new.
    """
    numbers = list(values)
    if base is None or not numbers:
        return base
    room = (max(numbers) - min(numbers)) / 2
    return base if min(numbers) - room <= base <= max(numbers) + room else None


def base_line(axis: Axes, value: float | None, ends: tuple[float, float]) -> None:
    """Draw the value of the untrained model, which is the same for all seeds."""
    if value is not None:
        axis.plot(ends, [value] * 2, color=INK, linestyle=(0, (1, 2)), linewidth=1.3, zorder=1.5, label=UNTRAINED)


def end_labels(axis: Axes, x: float, labels: Sequence[tuple[float, str, str]], span: tuple[float, float]) -> None:
    """Draw texts ``(y, text, color)`` to the right of ``x``, within ``span``, shifted so that none overlap."""
    line = 0.052 * (span[1] - span[0])
    low, high = span[0] + line / 2, span[1] - line / 2
    order = sorted((min(max(y, low), high), text, color) for y, text, color in labels)
    places = spread([y for y, _, _ in order], line)
    for y, (_, text, color) in zip(places, order, strict=True):
        axis.annotate(text, (x, y), (6, 0), textcoords="offset points", va="center", fontsize=8.5, color=color)


def spread(values: Sequence[float], gap: float) -> list[float]:
    """Ascending ``values``, moved at least ``gap`` apart: groups that touch are centered on their mean."""
    groups: list[list[float]] = []
    for value in values:
        groups.append([value])
        while len(groups) > 1 and _first(groups[-1], gap) - _last(groups[-2], gap) < gap:
            group = groups.pop()
            groups[-1] += group
    return [_first(group, gap) + k * gap for group in groups for k in range(len(group))]


def _first(group: list[float], gap: float) -> float:
    return sum(group) / len(group) - gap * (len(group) - 1) / 2


def _last(group: list[float], gap: float) -> float:
    return sum(group) / len(group) + gap * (len(group) - 1) / 2
