"""Detection of PEFT's layers without importing PEFT, and the weights they compute with."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ipca.analysis.linalg import wide
from ipca.nn.layer_kinds import ExpertStack, is_quantized, layer_kind, read_layer, to_matrix
from ipca.window import Window

_INNER = ".base_layer"
_ADDITIVE = (
    *("lora", "adalora", "c3a", "deft", "delora", "fourierft", "frod", "gralora", "loha", "lokr", "osf", "peanut"),
    *("psoft", "pvera", "randlora", "shira", "supertuning", "unilora", "vblora", "vera", "waveft"),
)
"""The tuners of PEFT whose layers compute ``W + get_delta_weight()``, except LoRA with a variant such as DoRA. Others
give that name to a factor of ``W``, as OFT and HRA, or to what needs ``W`` to become a change, as HiRA."""


def peft_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of ``model`` that add a PEFT adapter to a weight, by the path of that weight in the plain model."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if all(hasattr(module, attribute) for attribute in ("base_layer", "get_delta_weight", "active_adapters")):
            while name.endswith(_INNER):  # the layers of several parameters of one module stand in each other
                name = name.removesuffix(_INNER)
            parameter = getattr(module, "parameter_name", None)
            found[name if parameter is None else f"{name}.{parameter}"] = module
    return found


def other_tuner(model: nn.Module) -> str | None:
    """The class of a PEFT layer that does not add to a weight, such as IA³'s; None without one."""
    modules = (module for module in model.modules() if hasattr(module, "base_layer"))
    return next((type(module).__name__ for module in modules if hasattr(module, "active_adapters")), None)


def trained_matrix(name: str, layer: Any) -> Tensor:
    """``W' (out, in)`` or ``(E, out, in)`` in float64: the base layer's weight with the change of every active adapter.

    Adapters that do more than to add to the weight, as OFT's or DoRA's, are merged by PEFT into a copy of the layer in
    float64. Once an adapter is merged, PEFT computes with the base layer's weight only, and so does this.

    Raises:
        ValueError: PEFT cannot merge an adapter, or the weight cannot be read as a matrix.
    """
    base = _base_layer(name, layer)
    adapters = [] if layer.merged else _active(layer)
    if not all(_is_additive(layer, adapter) for adapter in adapters):
        return _merged(name, layer)
    weight = wide(read_layer(base)[0])
    for adapter in adapters:
        change = to_matrix(layer_kind(base) or "linear", layer.get_delta_weight(adapter).detach())
        weight = weight + wide(change).to(weight.device)
    return weight


def peft_factors(layer: Any) -> Sequence[tuple[Tensor, Tensor, Tensor, Tensor]] | None:
    """``A, B, A0, B0`` of each matrix of a layer with one active adapter that has a window; else None."""
    active = _active(layer)
    held = layer.pairs(active[0]) if len(active) == 1 and hasattr(layer, "pairs") else None
    if held is None:
        return None
    E = getattr(layer, "num_experts", 1)
    A, B, A0, B0 = (factor.detach().flatten(1) for factor in held)
    # as PEFT stores a stack: A expert by expert, B rank by rank
    of_A = [each.reshape(E, -1, each.shape[1]) for each in (A, A0)]
    of_B = [each.reshape(len(each), -1, E).permute(2, 0, 1) for each in (B, B0)]
    return [(of_A[0][i], of_B[0][i], of_A[1][i], of_B[1][i]) for i in range(E)]


def active_window(model: nn.Module, name: str, layer: Any) -> Window | None:
    """The window of a PEFT layer whose only active adapter is of a PCConfig; else None."""
    if not hasattr(layer, "active_adapters"):
        return None
    active = _active(layer)
    config = getattr(model, "peft_config", {}).get(active[0]) if len(active) == 1 else None
    records = getattr(config, "records", None)  # of a PCConfig
    saved = None if records is None else records.saved.get(name)
    return None if saved is None else saved.window


def _is_additive(layer: Any, adapter: str) -> bool:
    """Whether the adapter adds ``get_delta_weight()`` to the weight."""
    variant = getattr(layer, "lora_variant", {}).get(adapter)
    modules = [c.__module__.split(".") for c in type(layer).__mro__]
    tuner = next((parts[2] for parts in modules if parts[:2] == ["peft", "tuners"]), None)
    return not type(variant).__module__.startswith("peft.") and (tuner is None or tuner in _ADDITIVE)


@torch.no_grad()
def _merged(name: str, layer: Any) -> Tensor:
    """The weight that PEFT's merging leaves in a copy of the layer in float64."""
    if is_quantized(layer_kind(layer.get_base_layer())):
        raise ValueError(f"{name}: {type(layer).__module__} is not read on a quantized weight; adapt a plain one.")
    copied = copy.deepcopy(layer).double()
    try:
        copied.merge()
    except NotImplementedError as error:
        raise ValueError(f"{name}: PEFT cannot merge this adapter, so its weight is unknown: {error}") from None
    return read_layer(copied.get_base_layer())[0]


def _active(layer: Any) -> list[str]:
    """The active adapters that this layer has."""
    names = [getattr(layer, name) for name in layer.adapter_layer_names]
    return [adapter for adapter in layer.active_adapters if any(adapter in holder for holder in names)]


def _base_layer(name: str, layer: Any) -> nn.Module:
    base = layer.get_base_layer()
    parameter = getattr(layer, "parameter_name", None)
    if parameter is not None and layer.get_param().ndim == 3:
        return ExpertStack(layer.get_param(), bool(getattr(base, "is_transposed", False)))
    if parameter is not None or layer_kind(base) is None:
        what = type(base).__name__ if parameter is None else f"bare parameter {parameter!r}"
        raise ValueError(f"{name}: the adapter's base, a {what}, cannot be read as a matrix.")
    return base
