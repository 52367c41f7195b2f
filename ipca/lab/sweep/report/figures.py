"""The figures of a report: headings over panels, of one sweep or of several side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ipca.analysis.figures import house_style, save_figure
from ipca.lab.statistics import FEWEST
from ipca.lab.sweep.report.comparisons import views
from ipca.lab.sweep.report.curves import position_panels, rate_panels
from ipca.lab.sweep.report.data import Sweep
from ipca.lab.sweep.report.drawing import UNTRAINED, Panel
from ipca.lab.sweep.report.frontier import frontier_panels, matched_panels
from ipca.lab.sweep.report.style import handles, styles
from ipca.lab.sweep.report.tables import Table, frontier_table, side_by_side

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LEGEND_LINE = 0.24
"""Height of a line of a legend, in inches."""


@dataclass(frozen=True)
class Figure:
    """Panels under one heading, with an explanation.

    Attributes:
        methods: of the legend.
        base: whether the legend has the untrained model.
    """

    title: str
    text: str
    methods: tuple[str, ...]
    base: bool
    panels: tuple[Panel, ...]
    table: Table | None = None


def figures_of(sweeps: Mapping[str, Sweep]) -> list[Figure]:
    """The figures that the sweeps have something for; panels of the same kind follow each other, by label."""
    each = {label: {figure.title: figure for figure in _figures(sweep)} for label, sweep in sweeps.items()}
    titles = {title: None for found in each.values() for title in found}
    return [_joined({label: found[title] for label, found in each.items() if title in found}) for title in titles]


def _joined(found: Mapping[str, Figure]) -> Figure:
    """The figures of one title, by label, as one."""
    panels = [replace(panel, sweep=label) for label, figure in found.items() for panel in figure.panels]
    order = {panel.key: k for k, panel in reversed([*enumerate(panels)])}
    tables = {label: figure.table for label, figure in found.items() if figure.table is not None}
    first = next(iter(found.values()))
    table = first.table if len(found) == 1 else side_by_side(tables) if tables else None
    return replace(
        first,
        base=any(figure.base for figure in found.values()),
        panels=tuple(sorted(panels, key=lambda panel: order[panel.key])),
        table=table,
    )


def _figures(sweep: Sweep) -> list[Figure]:
    look, here = styles(sweep), views(sweep)
    bars = f"bars 95 % bootstrap intervals from {FEWEST} seeds, too narrow for few; small dots are seeds"
    dots = f"Marks are means, {bars}."
    lines = tuple(m for m in ("lora", "full", "auto") if m in sweep.methods)
    shown = [
        Figure(
            f"{title} over the window's position",
            f"{dots} Bands: methods without a position. Thin lines: means at the grid's other rates, which may leave "
            "the panel. The untrained model is omitted if it is far from all others.",
            (*sweep.positions, *lines),
            metric in sweep.base,
            tuple(position_panels(here, metric, look)),
        )
        for metric, title in (("retained", "Retention"), ("target", "Target"), ("drift", "Drift"))
        if metric in sweep.metrics
    ]
    crosses = f"{dots} A cross counts failed runs; a hollow mark is the mean of the others."
    shown += [
        Figure(
            "Robustness to the learning rate",
            f"At the same rate for every method; marks are offset sideways for visibility. {crosses}",
            sweep.methods,
            bool(sweep.base),
            tuple(rate_panels(sweep, look)),
        ),
        Figure(
            "Learning and forgetting",
            "Up is less forgetting, right is more learning; a hollow mark is a mean without its failed runs.",
            sweep.methods,
            "retained" in sweep.base,
            tuple(frontier_panels(sweep, look)),
            frontier_table(sweep),
        ),
        Figure(
            "Forgetting at equal learning",
            "Interpolated along each seed's best points over rates and checkpoints. Dots are seeds.",
            (),
            False,
            tuple(matched_panels(sweep, look)),
        ),
    ]
    return [figure for figure in shown if figure.panels]


def save_panels(sweeps: Mapping[str, Sweep], folder: Path, formats: tuple[str, ...]) -> list[str]:
    """Write every kind of panel to ``folder``, the sweeps beside each other with one legend; return the names.

    Args:
        formats: ``"png"``, ``"svg"``, ``"pdf"``.
    """
    look = styles(next(iter(sweeps.values())))
    kinds: dict[str, list[Panel]] = {}
    for figure in figures_of(sweeps):
        for panel in figure.panels:
            kinds.setdefault(panel.key, []).append(panel)
    for key, panels in kinds.items():
        _save(panels, look, [folder / f"{key}.{ending}" for ending in formats])
    return [*kinds]


def _save(panels: list[Panel], look: Mapping, paths: list[Path]) -> None:
    from matplotlib.figure import Figure as Canvas

    width, height = sum(panel.size[0] for panel in panels), max(panel.size[1] for panel in panels)
    with house_style(parse_math=False):
        canvas = Canvas(figsize=(width, height), layout="constrained")
        axes: list[Axes] = list(canvas.subplots(1, len(panels), squeeze=False)[0])
        for axis, panel in zip(axes, panels, strict=True):
            panel.draw(axis)
            axis.set_title(panel.sweep)
        base = any(line.get_label() == UNTRAINED for axis in axes for line in axis.lines)
        entries = handles(panels[0].methods, look, base=base)
        if entries:
            columns = max(1, int(width / 1.6))
            canvas.set_figheight(height + _LEGEND_LINE * -(-len(entries) // columns))
            canvas.legend(handles=entries, loc="outside lower center", ncols=columns, fontsize=8.5, handlelength=3)
        for path in paths:
            save_figure(canvas, path, dpi=300)
