"""Pictures: the spectra of layers, and what training did to their components; a panel for each kind of layer."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from typing import Any, TypeVar

from ipca.analysis.picture import picture
from ipca.analysis.spectra import LayerSpectrum
from ipca.analysis.weight_drift import Drift
from ipca.window import Window

Row = TypeVar("Row")


def draw_spectra(rows: Iterable[LayerSpectrum], path: str | os.PathLike[str]) -> None:
    """Singular values over σ₁ by index, the window shaded; ``path`` names the format: ``.png``, ``.pdf``, ``.svg``.

    Args:
        rows: of :func:`ipca.analysis.spectrum`.

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
    """Rescaling and rotation over ``‖ΔW‖_F`` by component, the window shaded; ``path`` as for :func:`draw_spectra`.

    Args:
        found: of :func:`ipca.analysis.drift`.

    Raises:
        ImportError, ValueError, OSError: as :func:`draw_spectra`.
    """
    named = [(name, row.shape, row) for name, row in found.items()]
    with panels(named, "What training did to each component; the window is shaded", path) as axes:
        for axis, group in axes:
            for k, row in enumerate(group):
                for part, color in (("rotation", "tab:orange"), ("rescaling", "tab:blue")):
                    relative = getattr(row, part) / max(row.norm, 1e-300)
                    style = {"color": color, "linewidth": 1, "alpha": max(0.15, 1 / len(group))}
                    axis.semilogy(relative.clamp_min(1e-9), label=part if k == 0 else None, **style)
                if row.window is not None:
                    shade(axis, row.window, len(group))
            axis.set_xlabel("component of the pretrained weight", fontsize=8)
            axis.set_ylabel("share of ‖ΔW‖", fontsize=8)
            axis.legend(fontsize=7)


@contextmanager
def panels(
    named: list[tuple[str, tuple[int, int], Row]], title: str, path: str | os.PathLike[str]
) -> Iterator[list[tuple[Any, list[Row]]]]:
    """An axis for each kind of layer and the layers of that kind; the picture is written when the block succeeds."""
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

    return [colormaps["viridis"](k / max(count - 1, 1)) for k in range(count)]


def shade(axis: Any, window: Window, layers: int, color: str = "tab:red") -> None:
    """Shade a resolved window, more lightly where one axis has many layers."""
    axis.axvspan(window.index - 0.5, window.index + window.rank - 0.5, color=color, alpha=0.3 / layers)
