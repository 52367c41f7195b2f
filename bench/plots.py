"""The picture of a pc_linear CSV: time over that of a bare ``nn.Linear`` against tokens, a panel for each shape."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from result_tables import Row, latest

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LINES = {
    ("ipca-auto", "residual"): ("ipca residual", "tab:blue", "-"),
    ("ipca-auto", "intact"): ("ipca intact", "tab:cyan", "-"),
    ("peft-bf16", ""): ("PEFT, bf16 factors", "tab:orange", "--"),
    ("peft-autocast", ""): ("PEFT, autocast", "tab:red", "--"),
    ("peft-default", ""): ("PEFT, default", "tab:brown", "--"),
}
"""Label, colour and line style by provider and form."""


def draw(rows: Sequence[Row], path: Path) -> None:
    """Full steps at rank 16 without dropout or torch.compile; no picture where there are none."""
    rows = [row for row in latest(rows) if _shown(row)]
    if not rows:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shapes = list(dict.fromkeys((row["N"], row["K"]) for row in rows))
    size = (3.4 * len(shapes), 3.4)
    figure, axes = plt.subplots(1, len(shapes), figsize=size, layout="constrained", squeeze=False, sharey=True)
    for axis, (N, K) in zip(axes[0], shapes, strict=True):
        _panel(axis, [row for row in rows if (row["N"], row["K"]) == (N, K)])
        axis.set_title(f"{N} × {K}", fontsize=10)
    axes[0][0].set_ylabel("forward + backward,\ntime / bare nn.Linear")
    axes[0][0].legend(fontsize=8)
    figure.suptitle(f"{rows[0]['device']}, {rows[0]['dtype']}, rank 16; lower is better", fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _shown(row: Row) -> bool:
    plain = row["mode"] == "full" and row["rank"] == "16" and row["compiled"] == "0" and not float(row["dropout"])
    return plain and row["status"] == "ok" and (row["provider"], row["form"]) in LINES


def _panel(axis: Axes, rows: Sequence[Row]) -> None:
    for key, (label, colour, style) in LINES.items():
        points = sorted(
            (int(row["M"]), float(row["ratio_linear"])) for row in rows if (row["provider"], row["form"]) == key
        )
        if points:
            axis.plot(*zip(*points, strict=True), style, color=colour, marker="o", markersize=4, label=label)
    tokens = sorted({int(row["M"]) for row in rows})
    axis.set_xscale("log", base=2)
    axis.set_xticks(tokens, [str(M) for M in tokens])
    axis.set_xlabel("tokens M")
    axis.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axis.grid(alpha=0.3)
