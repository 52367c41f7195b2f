"""Parameter groups for any torch optimizer: factors A and B, fully trained modules, a learning rate for each."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ipca._dtensor import full
from ipca.nn.window_layer import WindowLayer
from ipca.svd.matrix_batch import frobenius_norm

_FACTORS = {"lora_A": "lora_A", "lora_B": "lora_B", "lora_embedding_A": "lora_A", "lora_embedding_B": "lora_B"}
"""Factors by a part of a parameter's path, in our layers and in PEFT's."""


LARGE = 2.0
"""A matched rate more than this many times ``lr`` is warned of. In studies/window_position, V1, minor windows, whose
rates are raised 3.3-fold, moved 1.2 to 1.9 times as far as the middle ones in ten steps, and up to 4.5 times in 80."""


class _Factor(NamedTuple):
    """A parameter that is a factor: its layer's path, PEFT's name of the adapter or "", ``lora_A`` or ``lora_B``."""

    layer: str
    adapter: str
    name: str


def param_groups(
    model: nn.Module, lr: float, *, match: str | None = None, lora_plus: float | None = None
) -> list[dict[str, Any]]:
    """Parameter groups for a torch optimizer: ``torch.optim.AdamW(ipca.param_groups(model, 1e-3), weight_decay=0)``.

    Every parameter that requires a gradient is in exactly one group ``{"params": […], "lr": float, "name": str}``:
    ``"lora_A"``, ``"lora_B"`` (with ``match`` one each for every layer, ``"<layer path>.lora_A"``), and
    ``"modules_to_save"`` for all others, such as a new head, at ``lr``. PEFT's layers count too.

    ``match="sqrt-sigma"`` makes one ``lr`` mean the same for every window. A step of Adam changes each entry of ``A``
    and ``B`` by about ``lr``. With ``s = scaling``, ``A0 = √(S_w / s) Vh_w``, ``B0 = U_w √(S_w / s)``, and as the rows
    of ``Vh_w`` and the columns of ``U_w`` are orthonormal::

        ΔW = s (ΔB A0 + B0 ΔA),    ‖ΔW‖²_F ≈ s² (Σ_i σ_i / s · out · lr² + Σ_i σ_i / s · in · lr²)
                                           = lr² s rank (out + in) σ_w,    σ_w = the mean of σ_i over the window

    up to the inner product of the two terms, and to ``s ΔB ΔA``. So ``‖ΔW‖_F`` grows with ``lr √σ_w``, and a principal
    window moves further than a minor one at the same rate. Each layer's rate becomes::

        lr · √(σ_ref / σ_w),    σ_ref = ‖W‖_F / √d,    d = min(out, in)

    where ``σ_ref``, the root mean square of all d singular values, is what each of them would be in a flat spectrum: of
    two windows of a layer both now move ``W`` as far as a window at ``σ_ref`` does at ``lr``. ``σ_i`` is
    ``s ‖B0_i‖ ‖A0_i‖``, from the factors at the start, whatever was trained since; no SVD is run. For a stack of
    experts, which has one rate, ``σ_w`` and ``σ_ref`` are means over its weights.

    >>> model = ipca.apply_pc(nn.Sequential(nn.Linear(64, 32)), rank=4, progress=False)
    >>> [(group["name"], group["lr"]) for group in ipca.param_groups(model, 1e-3, lora_plus=4)]
    [('lora_A', 0.001), ('lora_B', 0.004)]

    Args:
        model: has adapted layers, of ipca or of PEFT.
        lr: the rate of ``A`` (before matching) and of fully trained modules.
        match: ``"sqrt-sigma"``, or None for one rate for all layers.
        lora_plus: ``λ`` of LoRA+ (arXiv 2402.12354): ``B`` trains at ``λ`` times the rate of ``A``.

    Warns:
        UserWarning: ``match`` raises the rate of a layer more than twofold; its window moves further than others.

    Raises:
        TypeError, ValueError: an argument out of range, no factor trains, or, with ``match``, a layer whose start has
            no singular values to match: plain LoRA, a window of zeros or of rounding, another method of PEFT.
    """
    _check(lr, match, lora_plus)
    lr, lora_plus = float(lr), float(lora_plus or 1.0)
    trained = [(_factor(name), p) for name, p in model.named_parameters() if p.requires_grad]
    places = dict.fromkeys((factor.layer, factor.adapter) for factor, _ in trained if factor is not None)
    if not places:
        raise ValueError(
            f"no low-rank factor of this {type(model).__name__} trains: call apply_pc first, or load_adapter(…, "
            "trainable=True); to train plain weights give them to the optimizer."
        )
    raised = {place: _sqrt_sigma(model, *place) if match else 1.0 for place in places}
    _warn_of_large(raised)
    rates = {place: lr * factor for place, factor in raised.items()}
    groups: dict[tuple[str, float], dict[str, Any]] = {}
    for factor, parameter in trained:
        name, rate = "modules_to_save", lr
        if factor is not None:
            name = f"{factor.layer}.{factor.name}".lstrip(".") if match else factor.name
            rate = rates[factor.layer, factor.adapter]
            rate *= lora_plus if factor.name == "lora_B" else 1.0
        group = groups.setdefault((name, rate), {"params": [], "lr": rate, "name": name})
        group["params"].append(parameter)
    return sorted(groups.values(), key=lambda group: group["name"] == "modules_to_save")


def _check(lr: Any, match: Any, lora_plus: Any) -> None:
    for name, value in (("lr", lr), ("lora_plus", 1.0 if lora_plus is None else lora_plus)):
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name} must be a number, got {value!r}.")
        if not (math.isfinite(value) and float(value) > 0):
            raise ValueError(f"{name} must be positive, got {value}.")
    if match not in (None, "sqrt-sigma"):
        raise ValueError(f'match must be "sqrt-sigma" or None, got {match!r}.')


def _warn_of_large(factors: Mapping[tuple[str, str], float]) -> None:
    large = sorted(((factor, layer) for (layer, _), factor in factors.items() if factor > LARGE), reverse=True)
    if large:
        named = ", ".join(f"{layer} × {factor:.1f}" for factor, layer in large[:3]) + (", …" if len(large) > 3 else "")
        warnings.warn(
            f'match="sqrt-sigma" raises the rate of {len(large)} of {len(factors)} layers more than {LARGE:g}-fold '
            f"({named}): these windows move further than others after the first steps. Lower lr, or take a window of "
            "larger singular values.",
            stacklevel=3,
        )


def _factor(name: str) -> _Factor | None:
    """The factor that the parameter at the path ``name`` is, or None."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part in _FACTORS:
            return _Factor(".".join(parts[:i]), "".join(parts[i + 1 : i + 2]), _FACTORS[part])
    return None


@torch.no_grad()
def _sqrt_sigma(model: nn.Module, path: str, adapter: str) -> float:
    """``√(σ_ref / σ_w)`` of a layer; ``adapter`` is PEFT's name of it."""
    A0, B0, scaling, weight = _start(model, path, adapter)
    d = min(weight.shape[-2:])
    sigma_w = scaling * float((_norms(A0, -1) * _norms(B0, -2)).mean())
    sigma_ref = float(frobenius_norm(weight).mean()) / math.sqrt(d)
    if sigma_w <= torch.finfo(A0.dtype).eps * sigma_ref:
        raise ValueError(
            f"{path}: the singular values it starts from are {sigma_w:.1e} on average, beside {sigma_ref:.1e} "
            "of its weight, so there is no rate to match. Plain LoRA starts from B0 = 0 and has no window: leave match "
            "out; for a window in the null space of a weight choose an earlier one, or exclude the layer."
        )
    return math.sqrt(sigma_ref / sigma_w)


def _start(model: nn.Module, path: str, adapter: str) -> tuple[Tensor, Tensor, float, Tensor]:
    """``A0 (…, rank, in)``, ``B0 (…, out, rank)``, ``scaling`` and the pretrained ``W (…, out, in)`` of a layer."""
    layer: Any = model.get_submodule(path)
    if isinstance(layer, WindowLayer):
        return full(layer.lora_A0), full(layer.lora_B0), layer.scaling, layer.pretrained_weight()
    pair = layer.pairs(adapter) if hasattr(layer, "pairs") and hasattr(layer, "base_matrix") else None
    if pair is None:
        raise ValueError(
            f"{path}: match needs the factors a layer started from, which those of ipca.apply_pc and of "
            "ipca.peft.PCConfig keep; this adapter has none. Leave match out."
        )
    weight = layer.base_matrix()
    A0, B0 = (full(tensor.detach()).flatten(1) for tensor in pair[2:])
    if weight.ndim == 3:  # as PEFT stores a stack: A expert by expert, B rank by rank
        E = len(weight)
        A0, B0 = A0.reshape(E, -1, A0.shape[1]), B0.reshape(len(B0), -1, E).permute(2, 0, 1)
    return A0, B0, float(layer.scaling[adapter]), weight


def _norms(factor: Tensor, dim: int) -> Tensor:
    return torch.linalg.vector_norm(_wide(factor), dim=dim)


def _wide(tensor: Tensor) -> Tensor:
    """In float32 or wider: 16-bit floats overflow in a sum of squares."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
