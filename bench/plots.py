"""Figures of the benchmarks' CSV files.

For pc_linear: time over that of a bare ``nn.Linear`` against tokens, one panel per shape. For window_svd: time over
that of a full float32 SVD against d, one panel per rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.result_tables import Row, latest
from bench.svd_grid import OURS, SMALL_RANKS, WINDOWS
from ipca.analysis.figures import DASHES, MARKS, PALETTE, picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LINES = {
    ("ipca-auto", "residual"): ("ipca residual", PALETTE[0], "o-"),
    ("ipca-auto", "intact"): ("ipca intact", PALETTE[5], "s-"),
    ("peft-bf16", ""): ("PEFT, bf16 factors", PALETTE[1], "^--"),
    ("peft-autocast", ""): ("PEFT, autocast", PALETTE[3], "D--"),
    ("peft-default", ""): ("PEFT, default", PALETTE[6], "v--"),
}
"""Label, color, mark and line style by provider and form."""


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
            axis.plot(*zip(*points, strict=True), style, color=color, markersize=4, label=label)
    tokens = sorted({int(row["M"]) for row in rows})
    axis.set_xscale("log", base=2)
    axis.set_xticks(tokens, [str(M) for M in tokens])
    axis.set_xlabel("tokens M")
    axis.axhline(1, color="black", linewidth=0.8, linestyle=":")


def draw_windows(rows: Sequence[Row], path: Path) -> None:
    """Draw time over that of the full SVD against d, a panel for each rank, a line for each window of either shape."""
    rows = [row for row in latest(rows) if _window_shown(row)]
    if not rows:
        return
    panels = {f"rank {rank}": [row for row in rows if int(row["rank"]) == rank] for rank in SMALL_RANKS}
    panels["rank d / 4"] = [row for row in rows if 4 * int(row["rank"]) == int(row["n"])]
    panels = {title: shown for title, shown in panels.items() if shown}
    about = f"{rows[0]['device']}, {rows[0]['dtype']}, noise with 32 large components; lower is better"
    with picture(path, (3.4 * len(panels), 3.6)) as figure:
        axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for axis, (title, shown) in zip(axes, panels.items(), strict=True):
            _window_panel(axis, shown)
            axis.set_title(title, fontsize=10)
        axes[0].set_ylabel("one window, one matrix:\ntime / torch.linalg.svd")
        axes[0].set_yscale("log")
        axes[0].set_yticks([0.05, 0.1, 0.2, 0.5, 1, 2], ["0.05", "0.1", "0.2", "0.5", "1", "2"])
        axes[0].legend(fontsize=7)
        figure.suptitle(about, fontsize=10)


def _window_shown(row: Row) -> bool:
    single = row["op"] == "window_svd" and row["batch"] == "1"
    return single and row["provider"] == OURS and row["spectrum"] == "outliers" and bool(row["ratio"])


def _window_panel(axis: Axes, rows: Sequence[Row]) -> None:
    for number, window in enumerate(WINDOWS):
        look: dict[str, Any] = {"color": PALETTE[number], "marker": MARKS[number], "markersize": 4, "linewidth": 1}
        for tall in (False, True):
            points = sorted(
                (int(row["n"]), float(row["ratio"]))
                for row in rows
                if row["window"] == window and (row["m"] != row["n"]) is tall
            )
            label = f"{window}{', 4 : 1' * tall}" if number == 0 or not tall else None
            shape: dict[str, Any] = {"linestyle": DASHES[2], "markerfacecolor": "none"} if tall else {}
            axis.plot(*zip(*points, strict=True), label=label, **look, **shape)
    sizes = sorted({int(row["n"]) for row in rows})
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, [str(d) for d in sizes], fontsize=7, rotation=45)
    axis.set_xlabel("d, the shorter side")
    axis.axhline(1, color="black", linewidth=0.8, linestyle=":")
