"""``ipca inspect``: what each linear layer's spectrum looks like, and where the window would sit."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn
from tqdm import tqdm

from ipca.cli.table import mib, short
from ipca.config import PCConfig
from ipca.model.targets import find_targets
from ipca.nn.kinds import read_layer
from ipca.nn.place import find_layer
from ipca.svd import singular_values
from ipca.window import Window


@dataclass(frozen=True)
class LayerSpectrum:
    """One layer: its singular values and the window it would get.

    ``trainable`` counts the parameters of ``A`` and ``B``.
    """

    name: str
    shape: tuple[int, int]
    dtype: str
    spectrum: Tensor
    window: Window
    form: str

    @property
    def trainable(self) -> int:
        return self.window.rank * sum(self.shape)

    def record(self) -> dict[str, object]:
        """The row as flat numbers; energies are shares of ``sum(S ** 2)``."""
        S, start, end = self.spectrum, self.window.index, self.window.index + self.window.rank
        energy = S.square() / S.square().sum().clamp_min(1e-300)
        return {
            "layer": self.name,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "sigma_max": S[0].item(),
            "sigma_min": S[-1].item(),
            "effective_rank": Window.effective_rank(1).resolve(len(S), S).index,
            "window": [start, end],
            "window_sigma": [S[start].item(), S[end - 1].item()],
            "window_energy": energy[start:end].sum().item(),
            "energy_before": energy[:start].sum().item(),
            "trainable": self.trainable,
        }


def inspect_model(model: nn.Module, config: PCConfig, *, progress: bool = True) -> list[LayerSpectrum]:
    """The spectra of the layers that ``config`` would adapt; the model stays as it is."""
    rows = []
    for target in tqdm(find_targets(model, config), desc="Spectra", unit="layer", disable=not progress):
        weight, _ = read_layer(find_layer(model, target.name))
        dtype = str(weight.dtype).removeprefix("torch.")
        for i, matrix in enumerate(weight.unsqueeze(0) if weight.ndim == 2 else weight):
            name = target.name if weight.ndim == 2 else f"{target.name}[{i}]"
            S = singular_values(matrix)
            window = target.window.resolve(len(S), S)
            rows.append(LayerSpectrum(name, (matrix.shape[0], matrix.shape[1]), dtype, S, window, target.form))
    return rows


def totals(rows: list[LayerSpectrum], model: nn.Module) -> dict[str, object]:
    """What the adapter would take: parameters, and bytes of the file and in memory (float32 factors)."""
    trainable = sum(row.trainable for row in rows)
    total = sum(p.numel() for p in model.parameters())
    return {
        "layers": len(rows),
        "trainable": trainable,
        "share": trainable / total,
        "file_bytes": 8 * trainable,  # A, B and A0, B0
        "memory_bytes": 8 * trainable,
        "adamw_bytes": 12 * trainable,  # gradient and two moments
    }


def render(rows: list[LayerSpectrum], sums: dict[str, object]) -> str:
    """The table that people read."""
    lines = [
        f"{'layer':40} {'shape':>14} {'σ max':>9} {'σ min':>9} {'erank':>6} "
        f"{'window':>14} {'its σ':>19} {'its energy':>10}"
    ]
    for row in rows:
        r = row.record()
        window, sigma = r["window"], r["window_sigma"]
        lines.append(
            f"{short(row.name, 40):40} {f'{row.shape[0]} × {row.shape[1]}':>14} {r['sigma_max']:9.3g} "
            f"{r['sigma_min']:9.3g} {r['effective_rank']:6} {f'[{window[0]}, {window[1]})':>14} "  # type: ignore[index]
            f"{f'{sigma[0]:.3g} … {sigma[1]:.3g}':>19} {100 * r['window_energy']:9.2f}%"  # type: ignore[index, operator]
        )
    lines.append(
        f"{sums['layers']} layers, {sums['trainable']:,} parameters train ({100 * sums['share']:.2f} %); "  # type: ignore[operator]
        f"adapter file {mib(sums['file_bytes'])}, factors in memory {mib(sums['memory_bytes'])}, "
        f"AdamW {mib(sums['adamw_bytes'])} more (float32)"
    )
    return "\n".join(lines)


def draw(rows: list[LayerSpectrum], path: Path) -> None:
    """Singular values over σ₁ by index, a panel for each kind of layer, the window shaded."""
    try:
        import matplotlib
    except ImportError:
        raise ImportError("--plot needs matplotlib; run: pip install 'ipca-lora[plot]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds: dict[tuple[str, tuple[int, int]], list[LayerSpectrum]] = defaultdict(list)
    for row in rows:
        kinds[".".join(p for p in row.name.split(".")[-3:] if not p.isdigit()), row.shape].append(row)
    columns = min(3, len(kinds))
    lines = -(-len(kinds) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(4 * columns, 2.8 * lines), squeeze=False, layout="constrained", sharey=True
    )
    for axis in axes.flat[len(kinds) :]:
        axis.remove()
    for axis, ((kind, shape), group) in zip(axes.flat, kinds.items(), strict=False):
        for k, row in enumerate(group):
            colour = plt.get_cmap("viridis")(k / max(len(group) - 1, 1))
            axis.semilogy((row.spectrum / row.spectrum[0].clamp_min(1e-300)).clamp_min(1e-9), color=colour, linewidth=1)
            axis.axvspan(row.window.index, row.window.index + row.window.rank, color="tab:red", alpha=0.3 / len(group))
        axis.set_title(f"{kind}  {shape[0]} × {shape[1]}  ({len(group)})", fontsize=8)
        axis.set_xlabel("index of the singular value", fontsize=8)
        axis.set_ylabel("σ / σ₁", fontsize=8)
        axis.tick_params(labelsize=7)
    figure.suptitle("Spectra by layer, first (dark) to last (light); the window is shaded", fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)
