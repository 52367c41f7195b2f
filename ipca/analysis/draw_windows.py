"""Pictures for choosing a window: sensitivities by component, and what blocks of components are worth."""

from __future__ import annotations

import os
from collections.abc import Mapping

from ipca.analysis.figures import check_not_empty, dark_to_light, panels, shade
from ipca.analysis.importance import BlockImportance
from ipca.analysis.picture import picture
from ipca.model.calibration import LayerSensitivity
from ipca.window import Window


def draw_sensitivity(
    found: Mapping[str, LayerSensitivity],
    path: str | os.PathLike[str],
    *,
    rank: int = 16,
    window: str = "middle",
) -> None:
    """``S_i · energy_i`` over its mean by index, log scale, a panel for each kind of layer; ``path`` names the format.

    The quietest window of ``rank``, which ``window="auto"`` takes, is shaded red, ``window`` gray.

    Args:
        found: of :func:`ipca.analysis.sensitivity`.

    Raises:
        ImportError, ValueError, OSError: as :func:`ipca.analysis.draw_spectra`; ``rank`` or ``window`` does not fit.
    """
    rows = [(name, row.shape, row) for name, row in found.items()]
    windows = {id(row): (row.quietest(rank), Window(window, rank).resolve(len(row.S), row.S)) for _, _, row in rows}
    title = "Sensitivity by component, first layer (dark) to last (light); red: quietest window, gray: " + window
    with panels(rows, title, path) as axes:
        for axis, group in axes:
            for color, row in zip(dark_to_light(len(group)), group, strict=True):
                relative = row.sensitivity / row.sensitivity.mean().clamp_min(1e-300)
                axis.semilogy(relative.clamp_min(1e-9), color=color, linewidth=1)
                quietest, default = windows[id(row)]
                shade(axis, quietest, len(group))
                shade(axis, default, len(group), "gray")
            axis.set_xlabel("index of the singular value", fontsize=8)
            axis.set_ylabel("S · energy / its mean", fontsize=8)


def draw_importance(found: Mapping[str, BlockImportance], path: str | os.PathLike[str]) -> None:
    """The change of the loss without each block, layers × blocks; ``path`` names the format.

    The colors are linear near 0 and logarithmic beyond a thousandth of the largest change; what is no finite number is
    left blank.

    Args:
        found: of :func:`ipca.analysis.component_importance`.

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
        image = axis.imshow(changes, cmap="RdBu_r", norm=norm, aspect="auto", interpolation="nearest")
        axis.set_yticks(range(len(found)), list(found), fontsize=6)
        axis.set_xticks(range(len(changes[0])))
        axis.set_xlabel("block of singular components, largest first", fontsize=8)
        axis.set_title("Change of the loss without a block", fontsize=10)
        figure.colorbar(image, ax=axis)
