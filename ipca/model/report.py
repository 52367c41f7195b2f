"""Summary of an adapted model: layers, trainable share, windows, time, certificates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ipca.model.apply import adapted_layers
from ipca.model.targets import has_peft_layers
from ipca.model.trained_modules import fully_trained_modules, trained_parameters
from ipca.nn.initialization import InitCertificate, count_null, describe_null
from ipca.nn.quantization import quantization_kind
from ipca.svd import SVDReport

WindowKind = tuple[tuple[int, ...], int, int, float, str, str, str]
"""``((…, out, in), start, rank, alpha, form, basis, train)`` of a layer."""


@dataclass(frozen=True)
class Summary:
    """The result of :func:`summary`; ``str()`` gives the table.

    Attributes:
        layers: number of adapted layers.
        trainable, total: parameters, as counts; ``total`` is that of the plain model plus the factors.
        windows: ``(how many, shape (…, out, in), start, rank, alpha, form, basis, train)`` for each distinct kind of
            layer; ``basis`` is that of the :class:`ipca.Window`, ``train`` names the factors that train.
        svd_seconds: time of the decompositions; 0 where the factors came from a file.
        uncertified: ``(layer, why)`` where the window's indices are not proven.
        worst_residual: the largest relative residual of a decomposition.
        worst_start: ``(layer, relative, max_abs, dtype)`` of the largest initialization error, None if none is known.
        sources: ``(how many, of what)`` windows of quantized layers: ``"unquantized"`` or ``"dequantized"`` weights.
        modules_to_save: ``(path, parameters)`` of each module that trains whole, such as a new head.
        null: ``(path, how many, of how many)`` components of a window are 0, which start as those of plain LoRA do.
    """

    layers: int
    trainable: int
    total: int
    windows: tuple[tuple[int, tuple[int, ...], int, int, float, str, str, str], ...]
    svd_seconds: float
    uncertified: tuple[tuple[str, str], ...]
    worst_residual: float
    worst_start: tuple[str, float, float, str] | None
    sources: tuple[tuple[int, str], ...] = ()
    modules_to_save: tuple[tuple[str, int], ...] = ()
    null: tuple[tuple[str, int, int], ...] = ()

    def __str__(self) -> str:
        share = 100 * self.trainable / max(self.total, 1)
        lines = [f"{self.layers} layers adapted, {self.trainable:,} of {self.total:,} parameters train ({share:.2f} %)"]
        for count, shape, start, rank, alpha, form, basis, train in self.windows:
            places = f"{shape[-1]} inputs" if basis == "inputs" else str(min(shape[-2:]))
            only = "" if train == "both" else f"  only {train} trains"
            text = f"  {count:4d} × {shape}  window [{start}, {start + rank}) of {places}  alpha {alpha:g}  {form}"
            lines.append(text + only)
        if self.null:
            held = {name: (zeros, count) for name, zeros, count in self.null}
            lines.append(f"{describe_null(held)}; they start as plain LoRA's do")
        if self.modules_to_save:
            lines.append("fully trained: " + ", ".join(f"{name} ({count:,})" for name, count in self.modules_to_save))
        proven = self.layers - len(self.uncertified)
        lines.append(
            f"window SVD: {self.svd_seconds:.2f} s, worst residual {self.worst_residual:.1e}, {proven} of "
            f"{self.layers} windows certified"
        )
        lines += [f"  not certified: {name}: {why}" for name, why in self.uncertified[:5]]
        if self.sources:
            lines.append("quantized layers: " + ", ".join(f"{n} windows of {what} weights" for n, what in self.sources))
        if self.worst_start is not None:
            name, relative, largest, dtype = self.worst_start
            lines.append(
                f"before training: worst ‖W_eff − W‖/‖W‖ = {relative:.1e}, "
                f"max|W_eff − W| = {largest:.1e} ({dtype}, layer {name})"
            )
        return "\n".join(lines)


def summary(model: nn.Module) -> Summary:
    """Summarize the adapted layers of ``model``, at any time after they are in place.

    >>> model = ipca.apply_pc(nn.Sequential(nn.Linear(64, 32)), rank=4, progress=False)
    >>> found = ipca.summary(model)  # print(found) shows a table
    >>> found.layers, found.trainable, found.total
    (1, 384, 2464)

    Args:
        model: has adapted layers, or none.

    Raises:
        ValueError: the layers are PEFT's.
    """
    layers = adapted_layers(model)
    if not layers and has_peft_layers(model):
        raise ValueError("these are PEFT's layers; for those of a PCConfig call ipca.peft.summary(model).")
    windows = [
        (m.matrix_shape, m.window.index, m.rank, m.alpha, m.form, m.window.basis, m.trained)
        for m in layers.values()
        if m.window
    ]
    reports = {name: m.svd_report for name, m in layers.items() if m.svd_report is not None}
    starts = {name: m.certificate for name, m in layers.items() if m.certificate is not None}
    null = {name: count_null(layers[name].lora_B0) for name in reports if not layers[name].lora_B0.is_meta}
    return account(model, windows, reports, starts, fully_trained_modules(model), null)


def account(
    model: nn.Module,
    windows: Sequence[WindowKind],
    reports: Mapping[str, SVDReport],
    starts: Mapping[str, InitCertificate],
    modules_to_save: Mapping[str, nn.Module],
    null: Mapping[str, tuple[int, int]],
) -> Summary:
    """The summary of ``model`` from every layer's window, and the reports and certificates there are, by path.

    ``null`` is :func:`ipca.nn.initialization.count_null` of each layer.
    """
    sources = Counter(r.source for r in reports.values() if r.source != "weight")
    packed = [m for m in model.modules() if quantization_kind(m) is not None]  # of 4 bits, two in an element
    worst = max(starts.items(), key=lambda item: item[1].relative, default=None)
    return Summary(
        layers=len(windows),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        total=sum(p.numel() for p in model.parameters()) + sum(_hidden_entries(m) for m in packed),
        windows=tuple((count, *kind) for kind, count in Counter(windows).items()),
        svd_seconds=sum(r.seconds for r in reports.values()),
        uncertified=tuple((name, r.certificate) for name, r in reports.items() if not r.certified),
        worst_residual=max((r.residual for r in reports.values()), default=0.0),
        worst_start=None if worst is None else (worst[0], worst[1].relative, worst[1].max_abs, worst[1].dtype),
        sources=tuple((count, source) for source, count in sources.items()),
        null=tuple((name, zeros, count) for name, (zeros, count) in null.items() if zeros),
        modules_to_save=tuple(
            (name or type(m).__name__, sum(p.numel() for p in trained_parameters(m)))
            for name, m in modules_to_save.items()
        ),
    )


def _hidden_entries(quantized: Any) -> int:
    """The number of entries of the weight ``(out, in)`` that the stored tensor's size does not count."""
    return quantized.out_features * quantized.in_features - quantized.weight.numel()
