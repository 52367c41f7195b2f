"""import_peft: convert a stock PEFT LoRA that trains a window of singular components into LinearPC layers.

    for the original base    lora_A = [A; A0], lora_B = [B, −B0]: the file holds the initial factors A0, B0
    PiSSA                    A0, B0 are the principal window of W, found from W − W_res if the residual base is given

In both cases ``scaling · B0 A0`` must be the components ``[start, start + rank)`` of ``W``, which is measured.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ipca._atomic import uninterrupted
from ipca._hashing import tensor_sha256
from ipca.io.adapter import check_not_wrapped, modules_to_save_state, warn_of_rounding
from ipca.io.adapter_folder import OtherModelError
from ipca.io.hub import adapter_folder
from ipca.io.peft_format import split_factor
from ipca.io.peft_lora import StockLayer, StockLora, read_stock
from ipca.model.apply import adapted_layers, check_can_train, install, train_only_adapter
from ipca.model.targets import Target, validate_targets
from ipca.nn.initialization import InitialFactors, certify_init, default_adapter_dtype, measure_init
from ipca.nn.layer_kinds import LINEAR, layer_kind, read_layer
from ipca.svd import WindowSVD, window_svd
from ipca.svd.ldlt import count_above_pivoted
from ipca.svd.matrix_batch import MatrixBatch
from ipca.window import Window

ANGLE = 1e-2
"""The largest sine of an angle, and relative error, at which factors count as the window: rounding to bfloat16 or an
SVD in float32 gives up to some 1e-3, an index that is off by one gives 1."""
_SURE = 0.5
"""Below this error the index is right: one that is off by one gives about 1."""
SLACK = 4
"""Roundings of the residual base: PEFT computes ``W − scaling · B0 A0`` in float32, so that its products round too."""


class _Imported(NamedTuple):
    """One layer: its initial factors, and its trained ``A (rank, in)``, ``B (out, rank)``."""

    target: Target
    initial: InitialFactors
    A: Tensor
    B: Tensor


def import_peft(
    model: nn.Module, folder: str | os.PathLike[str], *, original: nn.Module | None = None, progress: bool = True
) -> nn.Module:
    """Load the stock PEFT LoRA in ``folder`` onto ``model`` as LinearPC layers, if that is exact.

    Args:
        model: the base that the adapter is for, with plain layers; changed in place.
        folder: one of these (or its id on the Hub), with factors in safetensors:

            - a LoRA of rank ``2 rank`` for the original base, ``lora_A = [A; A0]`` and ``lora_B = [B, −B0]``: what
              :func:`ipca.export` writes, and PEFT for PiSSA with ``path_initial_model_for_weight_conversion``;
            - a PiSSA adapter with ``init_lora_weights="pissa"``, where ``model`` is the original base that PEFT would
              load it on (a residual base is not recognized as such and gives another function, as with PEFT);
            - a PiSSA adapter of a residual base, which is ``model``, with ``original``.
        original: the base before PiSSA subtracted its components.
        progress: show a progress bar.

    Returns:
        The same model. ``A, B`` are the file's, to the bit; ``A0, B0`` are the file's or the principal window. On an
        original base the form is ``"intact"``; on a residual base ``"residual"``, with its weight unchanged. The model
        computes what PEFT computes with the file, up to the order of sums (a PiSSA adapter on the original base: up to
        PEFT's decomposition in float32). Each layer's ``svd_report`` has the window and its certificate, and as
        ``residual`` the distance of the factors from the window, see :func:`identify_window`.

    Warns:
        RuntimeWarning: a saved module is rounded to fewer bits here.

    Raises:
        FileNotFoundError: ``folder`` lacks a file, or has its factors in a pickle.
        ValueError: the adapter trains something other than a window, by a field of its configuration or as measured;
            or it is damaged or does not fit ``model``, which is unchanged.
    """
    check_not_wrapped(model)
    check_can_train(model)
    lora = read_stock(adapter_folder(folder))
    present = next(iter(adapted_layers(model)), None)
    if present is not None:
        raise ValueError(f"{present} is adapted already; unload the adapter first.")
    modules_to_save = modules_to_save_state(model, lora.modules_to_save)
    found = _find_layers(model, lora, original, progress)
    with uninterrupted(), torch.no_grad():
        kept = [read_layer(model.get_submodule(each.target.name))[0] for each in found]
        install(model, ((each.target, each.initial) for each in found))
        layers = adapted_layers(model)
        for each, weight in zip(found, kept, strict=True):
            layer = layers[each.target.name]
            layer.base_weight.copy_(weight)  # a residual base has it already: W_res, and not W
            layer.lora_A.copy_(each.A)
            layer.lora_B.copy_(each.B)
        for module, state in modules_to_save:
            module.load_state_dict(state)
        train_only_adapter(model, lora.modules_to_save)
    warn_of_rounding(modules_to_save)
    return model


def _find_layers(model: nn.Module, lora: StockLora, original: nn.Module | None, progress: bool) -> list[_Imported]:
    """Every layer of the adapter, with its window found and measured; changes nothing."""
    find = _from_principal if lora.init == "pissa" else _from_halves
    if original is None and isinstance(lora.init, str) and lora.init.startswith("pissa_niter"):
        raise ValueError(
            f"init_lora_weights is {lora.init!r}: PEFT then starts from a random approximation of the window, which "
            "the file does not hold. Give the residual base as the model, and its original too."
        )
    targets = _targets(model, lora, doubled=original is None and find is _from_halves, residual=original is not None)
    found = []
    for target in tqdm(targets, desc="Windows", unit="layer", disable=not progress):
        layer, module = lora.layers[target.name], model.get_submodule(target.name)
        weight = _weight(module, target.name, layer)
        if original is None:
            found.append(find(target, layer, weight))
        else:
            found.append(_from_residual_base(target, layer, weight, _original(original, target.name, layer)))
    return found


def _targets(model: nn.Module, lora: StockLora, *, doubled: bool, residual: bool) -> list[Target]:
    """The layers to adapt, each checked; the starts of their windows are not known yet."""
    modules = dict(model.named_modules())
    targets = []
    for name, layer in lora.layers.items():
        if name not in modules:
            raise OtherModelError(f"the adapter holds {name}, which this {type(model).__name__} does not have")
        if doubled and layer.rank % 2:
            raise ValueError(_no_window(name, f"its rank {layer.rank} is odd"))
        rank = layer.rank // 2 if doubled else layer.rank
        form = "residual" if residual else "intact"
        window, alpha = Window.principal(rank), layer.scaling * rank
        targets.append(Target.of(name, modules[name], window, alpha, form, lora.dropout))
    validate_targets(model, targets)
    for name, layer in lora.layers.items():
        _weight(modules[name], name, layer)
        if residual or not str(lora.init).startswith("pissa"):  # which PEFT loads on the original, and subtracts again
            _check_saved_base(modules[name], name, layer)
    return targets


def _from_halves(target: Target, layer: StockLayer, weight: Tensor) -> _Imported:
    """``lora_A = [A; A0]``, ``lora_B = [B, −B0]``, and ``weight`` is the original."""
    (A, A0), (B, B0) = split_factor("A", layer.A), split_factor("B", layer.B)
    found, off = identify_window(weight, layer.scaling * B0.double(), A0)
    if off > ANGLE:
        raise ValueError(_no_window(target.name, f"its second half is {off:.1e} away from the nearest window"))
    return _imported(target, weight, found, (A, B, A0, B0), off)


def _from_principal(target: Target, layer: StockLayer, weight: Tensor) -> _Imported:
    """A PiSSA adapter, and ``weight`` is the original, of which PEFT itself takes the exact principal window."""
    found = window_svd(weight, target.window, dtype=torch.float64)
    return _imported(target, weight, found, (layer.A, layer.B, *_balanced(found, layer.scaling)), 0.0)


def _from_residual_base(target: Target, layer: StockLayer, kept: Tensor, weight: Tensor) -> _Imported:
    """A PiSSA adapter on ``kept``, ``W_res``; its difference from ``weight``, ``W``, must be the principal window."""
    difference = weight.double() - kept.double()
    A0, B0 = _balanced(window_svd(difference, target.window, dtype=torch.float64), layer.scaling)
    found, off = identify_window(weight, layer.scaling * B0, A0, start=0)
    imported = _imported(target, weight, found, (layer.A, layer.B, A0, B0), off)
    initial = imported.initial
    certificate = measure_init(weight, kept, initial.A0, initial.B0, scaling=layer.scaling)
    if off > ANGLE or certificate.relative > SLACK * certificate.bound:
        raise ValueError(
            f"{target.name}: the original less this base is not the principal window of rank {layer.rank}: it is "
            f"{off:.1e} away from it, and {certificate.relative:.1e} of the weight is neither. Give the residual base "
            "as the model and the one it was made from as the original; use other initializations with PEFT."
        )
    return imported._replace(initial=replace(initial, certificate=certificate))


def _imported(
    target: Target, weight: Tensor, found: WindowSVD, factors: tuple[Tensor, Tensor, Tensor, Tensor], off: float
) -> _Imported:
    """The layer with initial factors ``A0, B0``, ``off`` away from ``found``, and trained factors ``A, B``."""
    dtype = torch.promote_types(default_adapter_dtype(weight.dtype), factors[0].dtype)
    A, B, A0, B0 = (factor.to(weight.device, dtype) for factor in factors)
    words = f"{found.report.certificate}; the factors are within {off:.1e} of it"
    report = replace(found.report, residual=max(found.report.residual, off), certificate=words)
    exact = certify_init(weight, A0, B0, scaling=target.scaling, form="intact")
    initial = InitialFactors(A0, B0, report.window, tensor_sha256(weight), report, exact)
    return _Imported(replace(target, window=report.window), initial, A, B)


def _balanced(found: WindowSVD, scaling: float) -> tuple[Tensor, Tensor]:
    """``A0 = √(S / scaling) Vh``, ``B0 = U √(S / scaling)``."""
    root = (found.S / scaling).sqrt()
    return root[:, None] * found.Vh, found.U * root


def _original(original: nn.Module, name: str, layer: StockLayer) -> Tensor:
    """The weight that the original has for the layer ``name``."""
    try:
        module = original.get_submodule(name)
    except AttributeError:
        raise ValueError(f"the original has no {name}; give the model that the residual base was made from.") from None
    return _weight(module, f"{name} of the original", layer)


def _weight(module: nn.Module, name: str, layer: StockLayer) -> Tensor:
    """``weight (out, in)`` of the layer, or a ValueError where the adapter was made for another shape or type."""
    if layer_kind(module) not in LINEAR:
        raise ValueError(f"{name} is a {type(module).__name__}; only nn.Linear and transformers' Conv1D are imported.")
    weight, _ = read_layer(module)
    wanted = (layer.B.shape[0], layer.A.shape[1])
    if tuple(weight.shape) != wanted:
        raise ValueError(f"{name} has shape {tuple(weight.shape)}, but the adapter was made for {wanted}.")
    return weight


def _check_saved_base(module: nn.Module, name: str, layer: StockLayer) -> None:
    """Raise ValueError where the base weight that PEFT saved with the adapter is not the one of ``module``."""
    here = module.weight.detach()  # type: ignore[operator]
    if layer.base is not None and not torch.equal(here.cpu(), layer.base.to(here.dtype)):
        raise ValueError(
            f"the adapter holds the base weight of {name}, and this model has another; give the base that it was "
            "trained on."
        )


def _no_window(name: str, why: str) -> str:
    """The message for a LoRA that does not hold the initial factors of a window."""
    return (
        f"{name}: this is no LoRA of twice a window's rank for this base ({why}). A plain LoRA starts from 0 and "
        "pissa_niter from an approximation, neither of which is a window: use it with PEFT, or merge it there and "
        "adapt the merged model. For a PiSSA adapter on a residual base give the original too. A window of inputs, or "
        "one with a magnitude, is known by the folder's ipca.json only: with that file it needs no conversion."
    )


def identify_window(W: Tensor, B: Tensor, A: Tensor, start: int | None = None) -> tuple[WindowSVD, float]:
    """The window of ``W (m, n)`` whose components ``B (m, r) A (r, n)`` comes nearest to, and how near.

    Args:
        start: the window's index, where it is known. Else one inertia count between two of the product's Ritz values
            ``svd(QᵀWP)``, ``Q`` and ``P`` bases of its columns and rows, finds it to within one index.

    Returns:
        The window's components, in float64, and the largest of: the sine of the angle between the columns of ``B`` and
        of ``U``; that between the rows of ``A`` and of ``Vh``; ``‖B A − U S Vh‖_F / ‖S‖``. It is about the rounding of
        ``B`` and ``A`` where the product is the window, and about 1 where it is another or none.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`ipca.window_svd`.
    """
    W = W.detach() if W.device.type in ("cpu", "cuda") else W.detach().cpu()
    B, A = B.detach().to(W.device, torch.float64), A.detach().to(W.device, torch.float64)
    Q, left = torch.linalg.qr(B)
    P, right = torch.linalg.qr(A.mT)
    rank, last = A.shape[0], min(W.shape) - A.shape[0]
    middle = _find_start(W, Q, P) if start is None else start
    nearest = None
    for index in [middle] if start is not None else [middle, middle - 1, middle + 1]:
        if 0 <= index <= last:
            found = window_svd(W, Window(index, rank), dtype=torch.float64)
            off = max(_sine(Q, found.U), _sine(P, found.Vh.mT), _difference(Q @ left, right.mT @ P.mT, found))
            if nearest is None or off < nearest[1]:
                nearest = found, off
            if off < _SURE:
                break
    assert nearest is not None
    return nearest


def singular_values_above(W: Tensor, value: float) -> int:
    """``#(σ > value)`` of ``W (m, n)``: the positive pivots of an LDLᵀ factorization of ``WᵀW − value² I`` (Sylvester).

    Right where no singular value is within about ``n eps σ₁² / value`` of ``value``, eps that of float64.
    """
    tall = MatrixBatch((W if W.shape[0] >= W.shape[1] else W.mT).detach()[None])
    return count_above_pivoted(tall.gram[0], (value / tall.scale[0]).square())


def _difference(B: Tensor, A: Tensor, found: WindowSVD) -> float:
    """``‖B A − U S Vh‖_F / ‖S‖``, from the factors, without a product as large as the weight."""
    columns = torch.linalg.qr(torch.cat([B, -found.U * found.S], dim=1), mode="r").R
    rows = torch.linalg.qr(torch.cat([A, found.Vh]).mT, mode="r").R
    size = found.S.norm().clamp_min(torch.finfo(torch.float64).tiny)
    return ((columns @ rows.mT).norm() / size).item()


def _find_start(W: Tensor, Q: Tensor, P: Tensor) -> int:
    """The index of the first of ``r`` components that span ``Q (m, r)`` and ``P (n, r)``.

    Ritz values err by the square of an angle, so the count is taken in the middle of the widest gap between two.
    """
    ritz, r = torch.linalg.svdvals(Q.mT @ W.double() @ P), Q.shape[1]
    if r == 1:
        start = singular_values_above(W, ritz.item())
    else:
        upper = int((ritz[:-1] - ritz[1:]).argmax())
        start = singular_values_above(W, ((ritz[upper] + ritz[upper + 1]) / 2).item()) - upper - 1
    return min(max(start, 0), min(W.shape) - r)


def _sine(X: Tensor, Y: Tensor) -> float:
    """The sine of the largest angle between the column spans of two orthonormal bases of equal size."""
    return torch.linalg.matrix_norm(X - Y @ (Y.mT @ X), 2).item()
