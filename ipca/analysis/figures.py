"""Figures: one style for all of them; spectra, drift, sensitivities, the importance of blocks."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ipca._atomic import staged_files
from ipca.analysis.importance import BlockImportance
from ipca.analysis.spectra import LayerSpectrum
from ipca.analysis.weight_change import Drift
from ipca.model.calibration import LayerSensitivity
from ipca.window import Window

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = TypeVar("Row")

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Colors that the color-blind tell apart (Okabe and Ito's)."""
MARKS = ("o", "s", "^", "D", "v")
DASHES = ("-", (0, (6, 2)), (0, (3, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)), (0, (8, 2, 2, 2)))
"""Line styles: a color never is the only difference, so that figures can be read in gray."""
COLORS = "cividis"
"""A colormap whose lightness only rises."""
INK, FAINT = "#1d1d22", "#b9b9c2"
_LOOK: Any = {
    "svg.fonttype": "none",  # keep text as text: readable by screen readers, selectable, searchable
    "svg.hashsalt": "ipca",  # the same figure has the same bytes
    "pdf.fonttype": 42,  # TrueType, which journals ask for
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
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
}


@contextmanager
def house_style(*, parse_math: bool = True) -> Iterator[None]:
    """matplotlib's settings for all figures of ipca, whatever the user's are, within the block.

    Args:
        parse_math: False where labels are a user's, which may hold dollar signs; ticks of powers need it.
    """
    import matplotlib
    from cycler import cycler

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_LOOK)
        matplotlib.rcParams["text.parse_math"] = parse_math
        matplotlib.rcParams["axes.prop_cycle"] = cycler(color=PALETTE)
        yield


def draw_spectra(rows: Iterable[LayerSpectrum], path: str | os.PathLike[str]) -> None:
    """Draw singular values over σ₁ by index, with the window shaded.

    Args:
        rows: of :func:`ipca.analysis.spectrum`.
        path: its file extension is the format: ``.png``, ``.pdf``, ``.svg``.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: there is nothing to draw, or the format is unknown.
        OSError: ``path`` cannot be written; what was there stays.
    """
    named = [(row.name, row.shape, row) for row in rows]
    with panels(named, "Spectra by layer, first (dark) to last (light); the window is shaded", path) as axes:
        for axis, group in axes:
            for color, row in zip(dark_to_light(len(group)), group, strict=True):
                relative = row.spectrum / row.spectrum[0].clamp_min(1e-300)
                axis.semilogy(relative.clamp_min(1e-9), color=color, linewidth=1)
                shade(axis, row.window, len(group))
            axis.set_xlabel("index of the singular value", fontsize=8)
            axis.set_ylabel("σ / σ₁", fontsize=8)


def draw_drift(found: Mapping[str, Drift], path: str | os.PathLike[str]) -> None:
    """Draw rescaling and rotation over ``‖ΔW‖_F`` by component, with the window shaded.

    Args:
        found: of :func:`ipca.analysis.drift`.
        path: as for :func:`draw_spectra`.

    Raises:
        ImportError, ValueError, OSError: as :func:`draw_spectra`.
    """
    named = [(name, row.shape, row) for name, row in found.items()]
    with panels(named, "Rescaling and rotation by component; the window is shaded", path) as axes:
        for axis, group in axes:
            for k, row in enumerate(group):
                for part, color, dashes in (("rotation", PALETTE[1], DASHES[0]), ("rescaling", PALETTE[0], DASHES[2])):
                    relative = getattr(row, part) / max(row.norm, 1e-300)
                    style = {"color": color, "linestyle": dashes, "linewidth": 1, "alpha": max(0.15, 1 / len(group))}
                    axis.semilogy(relative.clamp_min(1e-9), label=part if k == 0 else None, **style)
                if row.window is not None:
                    shade(axis, row.window, len(group))
            axis.set_xlabel("component of the pretrained weight", fontsize=8)
            axis.set_ylabel("share of ‖ΔW‖", fontsize=8)
            axis.legend(fontsize=7)


def draw_sensitivity(
    found: Mapping[str, LayerSensitivity],
    path: str | os.PathLike[str],
    *,
    rank: int = 16,
    window: str = "middle",
) -> None:
    """Draw ``S_i · energy_i`` over its mean by index, log scale.

    The quietest window of ``rank``, which ``window="auto"`` takes, is shaded orange, ``window`` gray and hatched.

    Args:
        found: of :func:`ipca.analysis.sensitivity`.
        path: as for :func:`draw_spectra`.
        rank: of both windows.
        window: where the hatched window starts.

    Raises:
        ImportError, ValueError, OSError: as :func:`ipca.analysis.draw_spectra`; ``rank`` or ``window`` does not fit.
    """
    rows = [(name, row.shape, row) for name, row in found.items()]
    windows = {id(row): (row.quietest(rank), Window(window, rank).resolve(len(row.S), row.S)) for _, _, row in rows}
    title = "Sensitivity by component, first layer (dark) to last (light); plain: quietest window, hatched: " + window
    with panels(rows, title, path) as axes:
        for axis, group in axes:
            for color, row in zip(dark_to_light(len(group)), group, strict=True):
                relative = row.sensitivity / row.sensitivity.mean().clamp_min(1e-300)
                axis.semilogy(relative.clamp_min(1e-9), color=color, linewidth=1)
                quietest, default = windows[id(row)]
                shade(axis, quietest, len(group))
                shade(axis, default, len(group), color="gray", hatch="///")
            axis.set_xlabel("index of the singular value", fontsize=8)
            axis.set_ylabel("S · energy / its mean", fontsize=8)


def draw_importance(found: Mapping[str, BlockImportance], path: str | os.PathLike[str]) -> None:
    """Draw the change of the loss without each block, layers × blocks.

    Lighter is a higher loss without the block. The colors are linear near 0 and logarithmic beyond a thousandth of the
    largest change; NaN and Inf are left blank.

    Args:
        found: of :func:`ipca.analysis.component_importance`.
        path: as for :func:`draw_spectra`.

    Raises:
        ImportError, ValueError, OSError: as :func:`ipca.analysis.draw_spectra`.
    """
    check_not_empty(found)
    with picture(path, (6, 1.5 + 0.16 * len(found))) as figure:
        from matplotlib.colors import SymLogNorm

        axis = figure.subplots()
        changes = [row.change.masked_fill(~row.change.isfinite(), float("nan")).tolist() for row in found.values()]
        largest = max((abs(x) for row in changes for x in row if x == x), default=0.0) or 1.0
        norm = SymLogNorm(largest / 1e3, vmin=-largest, vmax=largest)
        image = axis.imshow(changes, cmap=COLORS, norm=norm, aspect="auto", interpolation="nearest")
        axis.grid(visible=False)
        axis.set_yticks(range(len(found)), list(found), fontsize=6)
        axis.set_xticks(range(len(changes[0])))
        axis.set_xlabel("block of singular components, largest first", fontsize=8)
        axis.set_title("Change of the loss without a block", fontsize=10)
        figure.colorbar(image, ax=axis, ticks=[-largest, 0, largest], format="{x:.2g}")


@contextmanager
def picture(path: str | os.PathLike[str], size: tuple[float, float] = (6.4, 4.8)) -> Iterator[Figure]:
    """A matplotlib figure in the one style, written to ``path`` when the block succeeds; pyplot is not touched.

    Args:
        path: its file extension is the format: ``.png``, ``.pdf``, ``.svg``.
        size: width and height in inches.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: ``path`` has no file extension, or an unknown one.
        OSError: ``path`` cannot be written; what was there stays.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("a picture needs matplotlib; run: pip install 'ipca-lora[plot]'") from None
    target = Path(path).absolute()
    if not target.suffix:  # matplotlib would choose a format, and write to another path
        raise ValueError(f"{os.fspath(path)!r} has no file extension; use .png, .pdf or .svg.")
    with house_style():
        figure = Figure(figsize=size, layout="constrained")
        yield figure
        with staged_files(target.parent) as stage:
            save_figure(figure, stage / target.name)


def save_figure(figure: Figure, path: Path, dpi: int = 150) -> None:
    """Write ``figure`` without a date, so that the same figure has the same bytes; call it in :func:`house_style`.

    Raises:
        ValueError: the file extension is that of no format.
    """
    dated = {".svg": "Date", ".pdf": "CreationDate"}.get(path.suffix)
    figure.savefig(path, dpi=dpi, metadata=None if dated is None else {dated: None})


@contextmanager
def panels(
    named: list[tuple[str, tuple[int, int], Row]], title: str, path: str | os.PathLike[str]
) -> Iterator[list[tuple[Any, list[Row]]]]:
    """An axis for each kind of layer and the layers of that kind; the figure is written when the block succeeds."""
    kinds: dict[tuple[str, tuple[int, int]], list[Row]] = defaultdict(list)
    for name, shape, row in named:
        kinds[_kind(name), shape].append(row)
    check_not_empty(named)
    columns = min(3, len(kinds))
    lines = -(-len(kinds) // columns)
    with picture(path, (4 * columns, 2.8 * lines)) as figure:
        axes = list(figure.subplots(lines, columns, squeeze=False, sharey=True).flat)
        for axis in axes[len(kinds) :]:
            axis.remove()
        yield list(zip(axes, kinds.values(), strict=False))
        for axis, ((kind, shape), group) in zip(axes, kinds.items(), strict=False):
            axis.set_title(f"{kind}  {shape[0]} × {shape[1]}  ({len(group)})", fontsize=8)
            axis.tick_params(which="both", labelsize=7)
        figure.suptitle(title, fontsize=10)


def check_not_empty(layers: Sized) -> None:
    """Raise ValueError where there are no ``layers`` to draw."""
    if not layers:
        raise ValueError("there is nothing to draw: no layers were given.")


def _kind(name: str) -> str:
    """The last parts of a path without the indices of layers and experts."""
    return ".".join(part for part in name.partition("[")[0].split(".")[-3:] if not part.isdigit())


def dark_to_light(count: int) -> list[tuple[float, float, float, float]]:
    """A color for each of ``count`` layers, first to last."""
    from matplotlib import colormaps

    return [colormaps[COLORS](0.85 * k / max(count - 1, 1)) for k in range(count)]  # the end is too light for a line


def shade(axis: Any, window: Window, layers: int, *, color: str = PALETTE[1], hatch: str | None = None) -> None:
    """Shade a resolved window, more lightly where one axis has many layers."""
    ends = window.index - 0.5, window.index + window.rank - 0.5
    axis.axvspan(*ends, facecolor=color, edgecolor=color, hatch=hatch, linewidth=0, alpha=0.3 / layers)
