"""Colors, marks and line styles of the methods, the same in every figure, and matplotlib figures as inline SVG.

Figures are drawn in the light theme's colors, and each color is then replaced by a CSS variable of that default, so
that a page's theme can change it. Colors are Okabe and Ito's where they name a kind; windows run from violet at
the principal end to cyan at the minor one. Kinds and controls have marks of their own, and windows stand in
order or carry their position, but for the frontier, where the best are numbered.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ipca.lab.baselines import CONTROLS, kind_of
from ipca.lab.sweep.report.data import Sweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, SOFT, FAINT = "#1d1d22", "#74747f", "#b9b9c2"
_LIGHT_RAMP = ((0x4C, 0x1D, 0x95), (0x2F, 0x6F, 0xED), (0x10, 0xB4, 0xDC))
_DARK_RAMP = ((0xB0, 0x7C, 0xF0), (0x74, 0xA4, 0xFF), (0x7A, 0xEA, 0xFA))
_FIXED = {  # light, dark, mark, dashes
    "lora": ("#d55e00", "#ff8f3f", "s", "--"),
    "full": ("#55555e", "#b8b8c2", "D", ":"),
    "auto": ("#c2478f", "#f090c5", "*", "-."),
}
_CONTROLS = {  # one color for each pair that asks the same
    **dict.fromkeys(("random-window", "haar"), ("#00805e", "#3fd0a5")),
    **dict.fromkeys(("frozen-A", "frozen-B"), ("#a06f00", "#e6b93f")),
    **dict.fromkeys(("matched-principal", "matched-minor"), ("#1d1d23", "#e8e8ef")),
}
_CONTROL_MARKS = dict(zip(CONTROLS, (">", "P", "^", "v", "<", "X"), strict=True))
_CONTROL_DASHES = ("-", (0, (6, 2)), (0, (3, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)), (0, (8, 2, 2, 2)))


@dataclass(frozen=True)
class Style:
    """How one method looks; ``color`` in the light theme, ``dark`` in the dark one."""

    color: str
    dark: str
    mark: str
    dashes: Any


def styles(sweep: Sweep) -> dict[str, Style]:
    """A style for every method of the sweep."""
    windows = [method for method in sweep.methods if kind_of(method) == "window"]
    found = {}
    for k, method in enumerate(windows):
        f = sweep.positions.get(method, k / max(len(windows) - 1, 1))
        found[method] = Style(_ramp(_LIGHT_RAMP, f), _ramp(_DARK_RAMP, f), "o", "-")
    for method in sweep.methods:
        if method in _FIXED:
            found[method] = Style(*_FIXED[method])
        elif method in CONTROLS:
            k = CONTROLS.index(method)
            found[method] = Style(*_CONTROLS[method], _CONTROL_MARKS[method], _CONTROL_DASHES[k])
    return found


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
    """A figure of ``width × height`` inches with one axis, drawn with the report's settings within the block."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's own style would change the bytes
        matplotlib.rcParams.update(_LOOK)
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        yield figure, figure.subplots()


_LOOK: Any = {
    "svg.fonttype": "none",  # text stays text: it can be read out, selected and found
    "text.parse_math": False,  # a label may hold a dollar sign
    "svg.hashsalt": "ipca",  # the same figure, the same bytes
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "grid.alpha": 0.45,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
}


def inline(figure: Figure, key: str, words: str) -> str:
    """``figure`` as an ``<svg>`` element for a page: ids of its own, theme colors, ``words`` for who cannot see it."""
    from html import escape

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
