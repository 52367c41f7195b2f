"""The legend of a figure as small inline pictures, so that its words flow with the page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from markupsafe import Markup

from ipca.lab.sweep.report.style import INK, Style
from ipca.lab.sweep.report.words import name

_DOTS = {"-": "", "--": "5 3", ":": "1.5 2.5", "-.": "5 2.5 1.5 2.5"}


def legend(methods: Iterable[str], styles: Mapping[str, Style], *, base: bool) -> list[tuple[Markup, str]]:
    """``(picture, words)`` of each method, and of the untrained model if ``base``."""
    entries = [(_swatch(styles[method]), name(method)) for method in methods]
    if base:
        line = '<line x1="1" y1="8" x2="33" y2="8" stroke-width="1.6" stroke-dasharray="1.5 3"/>'
        entries.append((_picture(f'<g stroke="{_variable(INK)}">{line}</g>'), name("base")))
    return entries


def _swatch(style: Style) -> Markup:
    dashes = style.dashes if isinstance(style.dashes, tuple) else None
    pattern = " ".join(f"{1.6 * d:g}" for d in dashes[1]) if dashes else _DOTS[style.dashes]
    line = f'<line x1="1" y1="8" x2="33" y2="8" stroke-width="1.8" stroke-dasharray="{pattern}"/>'
    return _picture(f'<g stroke="{_variable(style.color)}" fill="{_variable(style.color)}">{line}{_mark(style)}</g>')


def _mark(style: Style) -> str:
    """The mark that matplotlib draws, 8 px wide."""
    from matplotlib.markers import MarkerStyle

    if style.mark == "o":
        return '<circle cx="17" cy="8" r="4"/>'
    mark = MarkerStyle(style.mark)
    corners: Any = mark.get_path().transformed(mark.get_transform()).to_polygons()
    points = (" ".join(f"{17 + 8 * x:.2f},{8 - 8 * y:.2f}" for x, y in part) for part in corners)
    return "".join(f'<polygon points="{part}"/>' for part in points)


def _picture(inside: str) -> Markup:
    return Markup('<svg class="swatch" viewBox="0 0 34 16" aria-hidden="true">' + inside + "</svg>")


def _variable(color: str) -> str:
    return f"var(--c-{color[1:]}, {color})"
