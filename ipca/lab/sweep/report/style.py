"""Colors, marks and line styles of the methods, legends, and matplotlib figures as inline SVG.

Figures are drawn in the light theme's colors; each color is then replaced by a CSS variable with that default, so that
the page's theme can change it. Colors of kinds are Okabe and Ito's; windows run from violet at the principal end to
cyan at the minor one. Kinds and controls also differ in their marks.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from ipca.analysis.figures import DASHES, FAINT, INK, house_style
from ipca.lab.baselines import BASELINES, CONTROLS, kind_of
from ipca.lab.sweep.report.data import Sweep
from ipca.lab.sweep.report.words import name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

SOFT = "#74747f"
_LIGHT_RAMP = ((0x4C, 0x1D, 0x95), (0x2F, 0x6F, 0xED), (0x10, 0xB4, 0xDC))
_DARK_RAMP = ((0xB0, 0x7C, 0xF0), (0x74, 0xA4, 0xFF), (0x7A, 0xEA, 0xFA))
_FIXED = {  # light, dark, mark, dashes
    "lora": ("#d55e00", "#ff8f3f", "s", "--"),
    "full": ("#55555e", "#b8b8c2", "D", ":"),
    "auto": ("#c2478f", "#f090c5", "*", "-."),
}
_PAIRS = (("#d55e00", "#ff8f3f"), ("#00805e", "#3fd0a5"), ("#c2478f", "#f090c5"), ("#a06f00", "#e6b93f"))
_CONTROLS = {  # one color per pair that tests the same
    **dict.fromkeys(("random-window", "haar"), ("#00805e", "#3fd0a5")),
    **dict.fromkeys(("frozen-A", "frozen-B"), ("#a06f00", "#e6b93f")),
    **dict.fromkeys(("matched-principal", "matched-minor"), ("#1d1d23", "#e8e8ef")),
}
_BASELINES = {m: (*_PAIRS[i // 2], "phd8"[i % 4], ("--", ":")[i // 4]) for i, m in enumerate(BASELINES)}
_CONTROL_MARKS = dict(zip(CONTROLS, (">", "P", "^", "v", "<", "X"), strict=True))
_SVG_DASHES = {"-": "", "--": "5 3", ":": "1.5 2.5", "-.": "5 2.5 1.5 2.5"}


@dataclass(frozen=True)
class Style:
    """The appearance of one method; ``color`` in the light theme, ``dark`` in the dark one."""

    color: str
    dark: str
    mark: str
    dashes: Any


def styles(sweep: Sweep) -> dict[str, Style]:
    """The style of every method of the sweep; windows without a position are spread evenly over the colors."""
    windows = [method for method in sweep.methods if kind_of(method) == "window"]
    spread = {method: k / max(len(windows) - 1, 1) for k, method in enumerate(windows)}
    return {method: style_of(method, sweep.positions.get(method, spread.get(method))) for method in sweep.methods}


def style_of(method: str, position: float | None = None) -> Style:
    """The style of ``method``; for a window that of its ``position`` in [0, 1]."""
    if method in _FIXED:
        return Style(*_FIXED[method])
    if method in BASELINES:
        return Style(*_BASELINES[method])
    if method in CONTROLS:
        return Style(*_CONTROLS[method], _CONTROL_MARKS[method], DASHES[CONTROLS.index(method)])
    f = 0.0 if position is None else position
    return Style(_ramp(_LIGHT_RAMP, f), _ramp(_DARK_RAMP, f), "o", "-")


def _ramp(anchors: Sequence[tuple[int, int, int]], f: float) -> str:
    """The color at ``f`` in [0, 1] of the line through three colors."""
    f = min(max(f, 0.0), 1.0)
    (a, b), t = (anchors[:2], 2 * f) if f <= 0.5 else (anchors[1:], 2 * f - 1)
    return "#" + "".join(f"{round(x + (y - x) * t):02x}" for x, y in zip(a, b, strict=True))


def variables(found: Mapping[str, Style], dark: bool) -> str:
    """CSS declarations of every color: ``--c-5b21b6: …;``."""
    pairs = {style.color: style.dark for style in found.values()}
    pairs |= {INK: "#e8e8ee", SOFT: "#9b9ba7", FAINT: "#5b5b66"}
    return " ".join(f"--c-{light[1:]}: {other if dark else light};" for light, other in pairs.items())


@contextmanager
def canvas(width: float, height: float) -> Iterator[tuple[Figure, Axes]]:
    """A figure of ``width × height`` inches with one axis; :func:`ipca.analysis.figures.house_style` holds within."""
    from matplotlib.figure import Figure

    with house_style(parse_math=False):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.subplots()


def inline(figure: Figure, key: str, words: str) -> str:
    """``figure`` as an ``<svg>`` element with unique ids, theme colors, and the accessible description ``words``."""
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{key}-', svg)
    svg = re.sub(r'href="#', f'href="#{key}-', svg)
    svg = re.sub(r"url\(#", f"url(#{key}-", svg)
    svg = re.sub(r"#([0-9a-f]{6})\b(?=[;\"' ])", r"var(--c-\1, #\1)", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(words, quote=True)}"', 1)


def legend(methods: Iterable[str], styles: Mapping[str, Style], *, base: bool) -> list[tuple[str, str]]:
    """``(svg, words)`` for each method, and for the untrained model if ``base``; HTML text flows with the page."""
    entries = [(_swatch(styles[method]), name(method)) for method in methods]
    if base:
        line = '<line x1="1" y1="8" x2="33" y2="8" stroke-width="1.6" stroke-dasharray="1.5 3"/>'
        entries.append((_svg(f'<g stroke="{_variable(INK)}">{line}</g>'), name("base")))
    return entries


def handles(methods: Iterable[str], styles: Mapping[str, Style], *, base: bool) -> list[Line2D]:
    """The same entries for a matplotlib legend."""
    from matplotlib.lines import Line2D

    looks = [(name(m), styles[m].color, styles[m].mark, styles[m].dashes) for m in methods]
    looks += [(name("base"), INK, "", (0, (1, 2)))] if base else []
    return [Line2D([], [], color=c, marker=mark, linestyle=line, label=label) for label, c, mark, line in looks]


def _swatch(style: Style) -> str:
    dashes = style.dashes if isinstance(style.dashes, tuple) else None
    pattern = " ".join(f"{1.6 * d:g}" for d in dashes[1]) if dashes else _SVG_DASHES[style.dashes]
    line = f'<line x1="1" y1="8" x2="33" y2="8" stroke-width="1.8" stroke-dasharray="{pattern}"/>'
    return _svg(f'<g stroke="{_variable(style.color)}" fill="{_variable(style.color)}">{line}{_mark(style)}</g>')


def _mark(style: Style) -> str:
    """matplotlib's marker of ``style``, 8 px wide."""
    from matplotlib.markers import MarkerStyle

    if style.mark == "o":
        return '<circle cx="17" cy="8" r="4"/>'
    mark = MarkerStyle(style.mark)
    corners: Any = mark.get_path().transformed(mark.get_transform()).to_polygons()
    points = (" ".join(f"{17 + 8 * x:.2f},{8 - 8 * y:.2f}" for x, y in part) for part in corners)
    return "".join(f'<polygon points="{part}"/>' for part in points)


def _svg(inside: str) -> str:
    return f'<svg class="swatch" viewBox="0 0 34 16" aria-hidden="true">{inside}</svg>'


def _variable(color: str) -> str:
    return f"var(--c-{color[1:]}, {color})"
