"""Spectra of a model's layers, and the windows in them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from ipca.analysis.layer_pairs import check_values
from ipca.model.apply import adapted_layers
from ipca.model.merge import check_not_sharded
from ipca.model.settings import AdapterSettings
from ipca.model.targets import find_targets
from ipca.nn.layer_kinds import read_layer
from ipca.nn.registry import get_layer
from ipca.svd import singular_values
from ipca.window import Window


@dataclass(frozen=True, eq=False)
class LayerSpectrum:
    """One pretrained weight: its singular values and its window.

    Attributes:
        name: the layer's path; of a stack of experts with an index.
        shape: ``(out, in)``.
        dtype: of the weight, such as ``"bfloat16"``.
        spectrum: the singular values ``S (d,)``, float64, descending.
        window: resolved to indices.
        form: of the adapted layer.
    """

    name: str
    shape: tuple[int, int]
    dtype: str
    spectrum: Tensor
    window: Window
    form: str

    @property
    def trainable(self) -> int:
        """The parameters of ``A`` and ``B``."""
        return self.window.rank * sum(self.shape)

    @property
    def energy(self) -> Tensor:
        """``S² / ΣS² (d,)``, the share of each component; 0 of a zero weight."""
        return self.spectrum.square() / self.spectrum.square().sum().clamp_min(1e-300)

    @property
    def effective_rank(self) -> int:
        """``exp(−Σ p log p)``, ``p = S / ΣS``, rounded down, as for the window ``"erank"``."""
        return Window.effective_rank(1).resolve(len(self.spectrum), self.spectrum).index

    def record(self) -> dict[str, Any]:
        """The layer as flat numbers; energies are shares of ``ΣS²``."""
        S, start, end = self.spectrum, self.window.index, self.window.index + self.window.rank
        return {
            "layer": self.name,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "sigma_max": S[0].item(),
            "sigma_min": S[-1].item(),
            "effective_rank": self.effective_rank,
            "window": [start, end],
            "window_sigma": [S[start].item(), S[end - 1].item()],
            "window_energy": self.energy[start:end].sum().item(),
            "energy_before": self.energy[:start].sum().item(),
            "trainable": self.trainable,
        }


@dataclass(frozen=True, eq=False)
class Spectra:
    """The result of :func:`spectrum`; ``str()`` gives the table.

    Attributes:
        layers: one each, in the model's order.
        parameters: those of the plain model.
    """

    layers: tuple[LayerSpectrum, ...]
    parameters: int

    def __iter__(self) -> Iterator[LayerSpectrum]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def records(self) -> list[dict[str, Any]]:
        """Each layer as flat numbers."""
        return [layer.record() for layer in self.layers]

    def totals(self) -> dict[str, Any]:
        """The size of the adapter: parameters, and bytes of the file and in memory (float32 factors)."""
        trainable = sum(layer.trainable for layer in self.layers)
        return {
            "layers": len(self.layers),
            "trainable": trainable,
            "share": trainable / self.parameters,
            "file_bytes": 8 * trainable,  # A, B and A0, B0
            "memory_bytes": 8 * trainable,
            "adamw_bytes": 12 * trainable,  # gradient and two moments
        }

    def __str__(self) -> str:
        width = max(len("layer"), *(len(layer.name) for layer in self.layers))
        lines = [
            f"{'layer':{width}} {'shape':>14} {'σ max':>9} {'σ min':>9} {'erank':>6} "
            f"{'window':>14} {'its σ':>19} {'its energy':>10}"
        ]
        for r in self.records():
            shape, window = "{} × {}".format(*r["shape"]), "[{}, {})".format(*r["window"])
            sigma = "{:.3g} … {:.3g}".format(*r["window_sigma"])
            lines.append(
                f"{r['layer']:{width}} {shape:>14} {r['sigma_max']:9.3g} {r['sigma_min']:9.3g} "
                f"{r['effective_rank']:6} {window:>14} {sigma:>19} {100 * r['window_energy']:9.2f}%"
            )
        return "\n".join(lines)


def spectrum(
    model: nn.Module,
    *,
    rank: int | None = None,
    window: Window | str | float | None = None,
    targets: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    progress: bool = True,
) -> Spectra:
    """The spectra of the pretrained weights of ``model``, which stays as it is.

    >>> (layer,) = ipca.analysis.spectrum(nn.Sequential(nn.Linear(64, 32)), rank=4)  # print() shows a table
    >>> layer.window, tuple(layer.spectrum.shape)
    (Window(start=14, rank=4), (32,))

    Args:
        model: an adapted model, whose own layers and windows are shown (in the residual form the weights up to one
            rounding), or a plain one.
        rank, window, targets, exclude: the layers of a plain model and their windows, as for :func:`ipca.apply_pc`.
        progress: show a progress bar.

    Raises:
        ValueError: one of these beside an adapted model; or as :func:`ipca.apply_pc` for a plain one.
    """
    check_not_sharded(model, "gather it first: save_adapter and load_adapter onto the plain base.")
    parameters = sum(p.numel() for p in model.parameters())
    adapted = adapted_layers(model)
    if not adapted:
        settings = AdapterSettings(
            rank=rank,
            window="middle" if window is None else window,
            targets="all-linear" if targets is None else targets,
            exclude=exclude or (),
        )
        return Spectra(tuple(_chosen(model, settings, progress)), parameters)
    given = {"rank": rank, "window": window, "targets": targets, "exclude": exclude}
    chosen = [name for name, value in given.items() if value is not None]
    if chosen:
        raise ValueError(
            f"this {type(model).__name__} is adapted, its windows are chosen; leave out {', '.join(chosen)}."
        )
    parameters -= sum(layer.lora_A.numel() + layer.lora_B.numel() for layer in adapted.values())
    rows: list[LayerSpectrum] = []
    for name, layer in _shown(list(adapted.items()), progress):
        check_values(name, layer)
        assert layer.window is not None
        rows += _spectra(name, layer.pretrained_weight(), layer.window, layer.form)
    return Spectra(tuple(rows), parameters)


def _chosen(model: nn.Module, settings: AdapterSettings, progress: bool) -> Iterator[LayerSpectrum]:
    """The layers that ``settings`` choose."""
    for target in _shown(find_targets(model, settings), progress):
        weight, _ = read_layer(get_layer(model, target.name))
        yield from _spectra(target.name, weight, target.window, target.form)


def _spectra(name: str, weight: Tensor, window: Window, form: str) -> Iterator[LayerSpectrum]:
    """One of a ``weight (out, in)``, or one of each matrix of a stack."""
    dtype = str(weight.dtype).removeprefix("torch.")
    for i, matrix in enumerate(weight.unsqueeze(0) if weight.ndim == 2 else weight):
        S = singular_values(matrix)
        shape = (matrix.shape[0], matrix.shape[1])
        yield LayerSpectrum(
            name if weight.ndim == 2 else f"{name}[{i}]", shape, dtype, S, window.resolve(len(S), S), form
        )


def _shown(layers: list[Any], progress: bool) -> Any:
    return tqdm(layers, desc="Spectra", unit="layer", disable=not progress)
