"""Figures of a run and of a trade-off: loss on the new data against what is forgotten."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from ipca.analysis.figures import PALETTE, picture

_NEW, _OLD, _KEPT = PALETTE[0], PALETTE[1], PALETTE[-1]


def draw_run(
    rows: Sequence[Mapping[str, float]],
    path: str | os.PathLike[str],
    kept: Mapping[str, float],
    metric: str | None,
    description: str | None,
    budget: float | None,
) -> None:
    """Draw the held-out loss and what is forgotten by step, and one against the other.

    Args:
        rows: of a run, see :class:`ipca.train.outcome.Outcome`.
        path: its file extension is the format: ``.png``, ``.pdf``, ``.svg``.
        kept: the row that is marked; with a ``scale``, of the last step's change, it is none of ``rows``.
        metric: the number that is forgotten, ``eval_`` before it; None draws the loss only.
        description: of that number.
        budget: a line at it.

    Raises:
        ImportError, ValueError, OSError: as :func:`ipca.analysis.draw_spectra`.
    """
    steps = [row["step"] for row in rows]
    mark = None if "scale" in kept else steps.index(kept["step"])
    loss = [row["eval_loss"] for row in rows]
    lost = [row[f"eval_{metric}"] for row in rows] if metric else None
    with picture(path, (9.6 if lost else 5.2, 3.6)) as figure:
        axes = figure.subplots(1, 3 if lost else 1, squeeze=False)[0]
        _by_step(axes[0], steps, loss, mark, _NEW, "o", "held-out loss of the new data, nats")
        if lost is not None:
            _by_step(axes[1], steps, lost, mark, _OLD, "s", str(description))
            _against(axes[2], lost, loss, [f"{step:.0f}" for step in steps], mark, str(description))
            if mark is None:
                x, y = kept[f"eval_{metric}"], kept["eval_loss"]
                axes[2].plot([lost[-1], x], [loss[-1], y], "--", color=_KEPT, linewidth=1)
                axes[2].plot([x], [y], "o", markersize=10, markerfacecolor="none", color=_KEPT)
            for axis, line in ((axes[1], "axhline"), (axes[2], "axvline")):
                if budget is not None:
                    getattr(axis, line)(budget, color=_OLD, linestyle=":", linewidth=1.2, label=f"budget {budget:g}")
                    axis.legend(fontsize=7)
        scale = f", its change scaled by {kept['scale']:.3g}" if "scale" in kept else ""
        figure.suptitle(f"Kept: step {kept['step']:.0f}{scale} (ring)", fontsize=9)


def draw_tradeoff(
    rows: Sequence[Mapping[str, float]], path: str | os.PathLike[str], description: str, chosen: float | None = None
) -> None:
    """Draw loss against what is forgotten along the scale λ of the trained change.

    Args:
        rows: with ``scale``, ``loss`` and ``forgotten``.
        path: its file extension is the format.
        description: what is forgotten.
        chosen: the scale that is marked.

    Raises:
        ImportError, ValueError, OSError: as :func:`ipca.analysis.draw_spectra`.
    """
    rows = sorted(rows, key=lambda row: row["scale"])
    mark = next((k for k, row in enumerate(rows) if row["scale"] == chosen), None)
    with picture(path, (5.2, 3.8)) as figure:
        axis = figure.subplots()
        names = [f"λ = {row['scale']:.3g}" for row in rows]
        _against(axis, [row["forgotten"] for row in rows], [row["loss"] for row in rows], names, mark, description)
        axis.set_title("The trained change, scaled by λ", fontsize=9)


def _by_step(
    axis: Any, steps: Sequence[float], values: Sequence[float], mark: int | None, color: str, marker: str, label: str
) -> None:
    axis.plot(steps, values, color=color, marker=marker, markersize=3.5, linewidth=1.4)
    if mark is not None:
        axis.plot([steps[mark]], [values[mark]], "o", markersize=10, markerfacecolor="none", color=_KEPT)
    axis.set_xlabel("step", fontsize=8)
    axis.locator_params(nbins=6)
    axis.set_title(label, fontsize=8)
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.3)


def _against(
    axis: Any, lost: Sequence[float], loss: Sequence[float], names: Sequence[str], mark: int | None, description: str
) -> None:
    axis.plot(lost, loss, color="0.6", marker="o", markersize=3.5, linewidth=1, markerfacecolor=_NEW)
    for x, y, name in zip(lost, loss, names, strict=True):
        axis.annotate(name, (x, y), fontsize=6, xytext=(4, 3), textcoords="offset points")
    if mark is not None:
        axis.plot([lost[mark]], [loss[mark]], "o", markersize=10, markerfacecolor="none", color=_KEPT)
    axis.set_xlabel(f"forgotten: {description}", fontsize=8)
    axis.locator_params(nbins=5)
    axis.margins(x=0.12)  # for the names of the last points
    axis.set_ylabel("held-out loss, nats", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.3)
