"""A picture of streams: the matrix of scores of each method, and how the mean over the tasks so far goes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from ipca.analysis.figures import picture
from ipca.lab.continual.stream import StreamResult

_COLUMNS = 4


def draw_stream(results: StreamResult | Sequence[StreamResult], path: str | os.PathLike[str]) -> None:
    """Draw ``R`` of each stream as a heat map with its numbers, and one panel with the mean score after each task.

    Args:
        results: one stream, or several over the same tasks.
        path: its ending names the format: ``.png``, ``.pdf``, ``.svg``.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: there is nothing to draw, streams have other tasks, or the format is unknown.
        OSError: ``path`` cannot be written; what was there stays.
    """
    shown = [results] if isinstance(results, StreamResult) else list(results)
    if not shown or any(result.names != shown[0].names for result in shown):
        raise ValueError("draw_stream needs at least one stream, and the same tasks in all; draw others by themselves.")
    across = min(_COLUMNS, len(shown) + 1)
    down = -(-(len(shown) + 1) // across)
    with picture(path, (3.4 * across, 3.2 * down)) as figure:
        _fill(figure.subplots(down, across, squeeze=False).flatten(), shown)


def _fill(axes: Any, shown: Sequence[StreamResult]) -> None:
    """A heat map for each stream, on one scale of colors, then the curves; further axes stay empty."""
    low, high = min(result.matrix.R.min() for result in shown), max(result.matrix.R.max() for result in shown)
    for axis, result in zip(axes, shown, strict=False):
        _heat_map(axis, result, low, high)
    _curves(axes[len(shown)], shown)
    for axis in axes[len(shown) + 1 :]:
        axis.set_visible(False)


def _heat_map(axis: Any, result: StreamResult, low: float, high: float) -> None:
    ticks = range(len(result.names))
    axis.imshow(result.matrix.R, vmin=low, vmax=high, cmap="viridis")
    for i in ticks:
        for j in ticks:
            score = result.matrix.R[i, j]
            color = "white" if score < (low + high) / 2 else "black"
            axis.text(j, i, f"{score:.2f}", ha="center", va="center", fontsize=7, color=color)
    axis.set_xticks(ticks, result.names, fontsize=7)
    axis.set_yticks(ticks, result.names, fontsize=7)
    axis.set_xlabel("score on", fontsize=8)
    axis.set_ylabel("after training", fontsize=8)
    axis.set_title(f"{result.method}, seed {result.seed}", fontsize=9)


def _curves(axis: Any, shown: Sequence[StreamResult]) -> None:
    for k, result in enumerate(shown):
        label = result.method if len({r.seed for r in shown}) == 1 else f"{result.method}, seed {result.seed}"
        style = ("-", "--", ":", "-.")[k // 10 % 4]
        axis.plot(range(len(result.names)), result.mean_scores, style, marker="o", markersize=3, label=label)
    axis.set_xticks(range(len(shown[0].names)), shown[0].names, fontsize=7)
    axis.set_xlabel("after training", fontsize=8)
    axis.set_title("mean score over the tasks so far", fontsize=9)
    axis.tick_params(axis="y", labelsize=7)
    axis.grid(alpha=0.3)
    if len(shown) > 1:
        axis.legend(fontsize=6)
