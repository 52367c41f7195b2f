"""The weights of a model before and after training, layer by layer, as matrices (out, in)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ipca.analysis.linalg import wide
from ipca.analysis.peft_layers import active_window, other_tuner, peft_factors, peft_layers, trained_matrix
from ipca.analysis.without_adapter import check_other_model
from ipca.model.apply import adapted_layers
from ipca.model.merge import check_not_sharded
from ipca.nn.layer_kinds import LINEAR, layer_kind, read_layer
from ipca.nn.offload import is_offloaded
from ipca.nn.quantization import quantization_kind
from ipca.nn.registry import named_layers
from ipca.nn.window_layer import WindowLayer
from ipca.window import Window

Base = nn.Module | Mapping[str, Tensor]
"""A plain model, or its weights ``(out, in)``, for a stack of experts ``(E, out, in)``, by the layer's path."""
_GIVE = "pass base, the plain model before training, or its weights as {path: (out, in)}"


class Factors(NamedTuple):
    """The factors of an adapted layer, trained and initial: ``A, A0 (rank, in)``, ``B, B0 (out, rank)``."""

    A: Tensor
    B: Tensor
    A0: Tensor
    B0: Tensor


@dataclass(frozen=True, eq=False)
class LayerPair:
    """One weight before and after training.

    Attributes:
        name: the layer's path; of a stack of experts with an index, ``"mlp.experts.down_proj[3]"``.
        base, trained: ``W`` and ``W' (out, in)``, float64, not rounded to the weight's dtype, so that an update
            smaller than that rounding counts.
        window: of an adapted layer, else None.
        layer: the module of the trained model; for the weights of one stack the same.
        factors: of a layer that keeps its initial ones, else None.
    """

    name: str
    base: Tensor
    trained: Tensor
    window: Window | None
    layer: nn.Module
    factors: Factors | None = None

    @property
    def change(self) -> Tensor:
        """``ΔW = W' − W (out, in)``."""
        return self.trained - self.base


def weight_pairs(model: nn.Module, base: Base | None = None) -> Iterator[LayerPair]:
    """Iterate over the weights of ``model`` and their pretrained values, in the model's order; nothing changes.

    ===========================  ==============================================  =====================
    ``model`` has                compared weights                                ``base``
    ===========================  ==============================================  =====================
    adapted layers               theirs, as computed when not disabled           optional
    PEFT's layers                theirs, with the active adapters                required
    neither, ``base`` a model    linear layers (quantized ones too) of equal     required
                                 names, such as after full fine-tuning
    neither, ``base`` a mapping  the layers of any kind that it names            required
    ===========================  ==============================================  =====================

    Without ``base`` an adapted layer is compared with ``W`` as it stores it: the pretrained weight, in the residual
    form up to one rounding, of a quantized layer the dequantized one. A quantized layer counts as its dequantized
    weight. With PEFT the weight that a layer keeps need not be the pretrained one: PiSSA, for one, keeps ``W − B A``.

    Args:
        model: after training.
        base: before it: a plain model, or a mapping from paths to weights ``(out, in)``; see the table.

    Raises:
        TypeError: ``base`` is no model and no mapping of float tensors.
        ValueError: there is nothing to compare; ``base`` is required, lacks a layer or holds an adapted one; shapes
            differ; a layer cannot be read. The message names it.
    """
    if base is not None and not isinstance(base, nn.Module | Mapping):
        raise TypeError(f"base must be a model or a mapping from paths to weights, got {type(base).__name__}.")
    for given in (model, base):
        if isinstance(given, nn.Module):
            check_not_sharded(given, "gather it first: save_adapter and load_adapter onto the plain base.")
    if isinstance(base, nn.Module):
        check_other_model(model, base)
    inner = inside_peft(model)
    before = named_layers(base) if isinstance(base, nn.Module) else base
    layers: dict[str, nn.Module] = {**adapted_layers(inner)} or peft_layers(inner)
    if before is None and any(not isinstance(layer, WindowLayer) for layer in layers.values()):
        raise ValueError(
            "these are PEFT's layers, and the weight they keep need not be the pretrained one (PiSSA keeps the "
            f"residual W − B A); {_GIVE}."
        )
    if not layers:
        layers = _plain_layers(inner, base, before)
    missing = [name for name in layers if before is not None and name not in before]
    if missing:
        raise ValueError(f"base has no {missing[0]!r} ({len(missing)} of {len(layers)} layers are missing); {_GIVE}.")
    return _pairs(model, layers, before)


def _pairs(model: nn.Module, layers: dict[str, nn.Module], before: Mapping[str, Any] | None) -> Iterator[LayerPair]:
    for name, layer in layers.items():
        check_values(name, layer)
        window = layer.window if isinstance(layer, WindowLayer) else active_window(model, name, layer)
        start = None if before is None else _base_matrix(name, before[name])
        shape, read = _read(name, layer)
        if start is not None and start.shape != shape:
            raise ValueError(
                f"{name}: a weight of shape {tuple(shape)} cannot be compared with a base of shape "
                f"{tuple(start.shape)}; pass the model it was trained from."
            )
        for i, (own, trained, factors) in enumerate(read):
            if start is not None:
                own = wide(start if start.ndim == 2 else start[i]).to(trained.device)
            assert own is not None
            yield LayerPair(name if len(shape) == 2 else f"{name}[{i}]", own, trained, window, layer, factors)


def _read(name: str, layer: nn.Module) -> tuple[torch.Size, Iterable[tuple[Tensor | None, Tensor, Factors | None]]]:
    """The shape of a layer's matrix or stack, and ``W``, ``W'`` and the factors of each matrix, None where unknown."""
    if isinstance(layer, WindowLayer):
        return torch.Size(layer.matrix_shape), _adapted(layer)
    if layer_kind(layer) is not None:
        weight = read_layer(layer)[0]
        return weight.shape, ((None, wide(matrix), None) for matrix in _each(weight))
    weight, held = trained_matrix(name, layer), peft_factors(layer)
    factors = None if held is None else [Factors(*map(wide, each)) for each in held]
    return weight.shape, ((None, m, factors[i] if factors else None) for i, m in enumerate(_each(weight)))


def _adapted(layer: WindowLayer) -> Iterator[tuple[Tensor, Tensor, Factors]]:
    """``W``, ``W_eff`` and factors of each matrix, added up in float64 with no rounding in between."""
    held = (layer.base_matrix(), layer.lora_A, layer.lora_B, layer.lora_A0, layer.lora_B0)
    for each in zip(*map(_each, held), strict=True):
        kept, *rest = map(wide, each)
        A, B, A0, B0 = factors = Factors(*rest)
        start, trained = layer.scaling * (B0 @ A0), layer.scaling * (B @ A)
        if layer.form == "residual":
            yield kept + start, kept + trained, factors
        else:
            yield kept, kept + (trained - start), factors


def _each(stack: Tensor) -> Iterable[Tensor]:
    """The matrices of a stack, or the matrix itself."""
    return stack if stack.ndim == 3 else [stack]


def _plain_layers(model: nn.Module, base: Base | None, before: Mapping[str, Any] | None) -> dict[str, nn.Module]:
    """The layers that a model without adapted layers has in common with its base."""
    if before is None:
        raise ValueError(f"this {type(model).__name__} has no adapted layer that knows its pretrained weight; {_GIVE}.")
    tuner = other_tuner(model)
    if tuner is not None:
        raise ValueError(
            f"this {type(model).__name__} holds a {tuner} of PEFT, which adds nothing to a weight; "
            "merge_and_unload() a copy of the model and compare that."
        )
    here = named_layers(model)
    if isinstance(base, nn.Module):
        found = {name: m for name, m in here.items() if name in before and _is_linear(m) and _is_linear(before[name])}
    else:
        found = {name: here[name] for name in before if name in here and layer_kind(here[name]) is not None}
        strange = sorted(set(before) - set(found))
        if strange:
            raise ValueError(f"base names {strange[0]!r}, which is not a layer of this {type(model).__name__}.")
    if not found:
        raise ValueError(
            f"there is nothing to compare: this {type(model).__name__} and base have no linear layer of equal name."
        )
    return found


def _is_linear(module: nn.Module) -> bool:
    return layer_kind(module) in LINEAR or quantization_kind(module) is not None


def _base_matrix(name: str, given: Any) -> Tensor:
    """The base's weight of one layer as ``(out, in)`` or ``(E, out, in)``."""
    if isinstance(given, nn.Module):
        if layer_kind(given) is None:
            raise ValueError(
                f"base: {name} is a {type(given).__module__}.{type(given).__name__}, not a plain layer; {_GIVE}."
            )
        check_values(f"base: {name}", given)
        return read_layer(given)[0]
    if not isinstance(given, Tensor) or not given.is_floating_point():
        what = given.dtype if isinstance(given, Tensor) else type(given).__name__
        raise TypeError(f"base: {name} must be a float tensor (out, in), got {what}.")
    return given


def check_values(name: str, layer: nn.Module) -> None:
    """Raise ValueError where the weight of ``layer`` is elsewhere, or it has no window yet."""
    if is_offloaded(layer):
        raise ValueError(f"{name}: accelerate keeps its weight off the device; measure before it is offloaded.")
    if any(parameter.is_meta for parameter in layer.parameters()):
        raise ValueError(f"{name}: its weight is on the meta device and holds no values; load the weights first.")
    if isinstance(layer, WindowLayer) and layer.window is None:
        raise ValueError(f"{name}: it has no window yet: load a state dict with load_state_dict().")


def inside_peft(model: Any) -> nn.Module:
    """The model inside a PeftModel, whose paths are those of the plain model."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model
