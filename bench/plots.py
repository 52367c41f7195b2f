"""Figures of the benchmarks' CSV files.

For pc_linear: time over that of a bare ``nn.Linear`` against tokens, one panel per shape. For window_svd: time over
that of a full float32 SVD against the position of the window, one panel per rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.result_tables import Row, latest
from ipca.analysis.figures import picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LINES = {
    ("ipca-auto", "residual"): ("ipca residual", "tab:blue", "-"),
    ("ipca-auto", "intact"): ("ipca intact", "tab:cyan", "-"),
    ("peft-bf16", ""): ("PEFT, bf16 factors", "tab:orange", "--"),
    ("peft-autocast", ""): ("PEFT, autocast", "tab:red", "--"),
    ("peft-default", ""): ("PEFT, default", "tab:brown", "--"),
}
"""Label, color and line style by provider and form."""
PATHS = {"top": "^", "interior": "o", "bottom": "v", "range": "s", "tridiagonal": "D", "gram_eigh": "p", "full": "x"}
"""Marker by path of the window SVD."""


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw the full steps at rank 16 without dropout or torch.compile; nothing if there are none."""
    rows = [row for row in latest(rows) if _shown(row)]
    if not rows:
        return
    shapes = list(dict.fromkeys((row["N"], row["K"]) for row in rows))
    with picture(path, (3.4 * len(shapes), 3.4)) as figure:
        axes = figure.subplots(1, len(shapes), squeeze=False, sharey=True)[0]
        for axis, (N, K) in zip(axes, shapes, strict=True):
            _panel(axis, [row for row in rows if (row["N"], row["K"]) == (N, K)])
            axis.set_title(f"{N} × {K}", fontsize=10)
        axes[0].set_ylabel("forward + backward,\ntime / bare nn.Linear")
        axes[0].legend(fontsize=8)
        figure.suptitle(f"{rows[0]['device']}, {rows[0]['dtype']}, rank 16; lower is better", fontsize=10)


def _shown(row: Row) -> bool:
    plain = row["mode"] == "full" and row["rank"] == "16" and row["compiled"] == "0" and not float(row["dropout"])
    return plain and row["status"] == "ok" and (row["provider"], row["form"]) in LINES


def _panel(axis: Axes, rows: Sequence[Row]) -> None:
    for key, (label, color, style) in LINES.items():
        points = sorted(
            (int(row["M"]), float(row["ratio_linear"])) for row in rows if (row["provider"], row["form"]) == key
        )
        if points:
            axis.plot(*zip(*points, strict=True), style, color=color, marker="o", markersize=4, label=label)
    tokens = sorted({int(row["M"]) for row in rows})
    axis.set_xscale("log", base=2)
    axis.set_xticks(tokens, [str(M) for M in tokens])
    axis.set_xlabel("tokens M")
    axis.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axis.grid(alpha=0.3)


def draw_windows(rows: Sequence[Row], path: Path) -> None:
    """Draw the chosen path on square matrices with outliers, a line per d; nothing if there are none."""
    rows = [row for row in latest(rows) if _window_shown(row)]
    if not rows:
        return
    ranks = sorted({int(row["rank"]) for row in rows})
    about = f"{rows[0]['device']}, {rows[0]['dtype']}, square, noise with 32 large components; lower is better"
    with picture(path, (3.4 * len(ranks), 3.4)) as figure:
        axes = figure.subplots(1, len(ranks), squeeze=False, sharey=True)[0]
        for axis, rank in zip(axes, ranks, strict=True):
            _window_panel(axis, [row for row in rows if int(row["rank"]) == rank])
            axis.set_title(f"rank {rank}", fontsize=10)
        axes[0].set_ylabel("one window,\ntime / torch.linalg.svd")
        axes[0].set_ylim(bottom=0)
        for name, marker in PATHS.items():
            if any(row["path"] == name for row in rows):
                axes[-1].plot([], [], marker, color="black", label=f"path {name}")
        for axis in axes:
            axis.legend(fontsize=7)
        figure.suptitle(about, fontsize=10)


def _window_shown(row: Row) -> bool:
    single = row["op"] == "window_svd" and row["batch"] == "1" and row["m"] == row["n"]
    return single and row["provider"] == "ipca" and row["spectrum"] == "outliers" and bool(row["ratio"])


def _window_panel(axis: Axes, rows: Sequence[Row]) -> None:
    for number, d in enumerate(sorted({int(row["n"]) for row in rows})):
        points = sorted(
            (int(row["start"]) / (d - int(row["rank"])), float(row["ratio"]), row["path"])
            for row in rows
            if int(row["n"]) == d
        )
        color = f"C{number}"
        axis.plot([x for x, _, _ in points], [y for _, y, _ in points], color=color, label=f"d = {d}")
        for x, y, name in points:
            axis.plot(x, y, PATHS.get(name, "*"), color=color, markersize=5)
    axis.set_xticks([0, 0.5, 1], ["principal", "middle", "minor"])
    axis.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axis.grid(alpha=0.3)
