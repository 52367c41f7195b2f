"""A window for the stock LoRA layers of a model that somebody else has wrapped."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import layer as lora
from torch import Tensor, nn

from ipca._atomic import uninterrupted
from ipca.nn.initialization import InitialFactors, frozen_weight, initial_factors
from ipca.nn.quantization import quantization_kind
from ipca.peft.dispatch import unsupported_reason
from ipca.window import Window, as_window


def init_(
    model: nn.Module,
    window: Window | str | float = "middle",
    *,
    adapter_name: str = "default",
    tol: float | str = "default",
) -> dict[str, InitialFactors]:
    """Let the stock LoRA layers of ``model`` start from a window, in place, as PEFT's ``pissa`` does.

    ``lora_A = √(S_w / scaling) Vh_w``, ``lora_B = U_w √(S_w / scaling)``, and the base weight becomes
    ``W − scaling · B A``: the residual form, as a stock layer has no room for ``A0, B0``. Therefore

    * the base is **changed**: ``disable_adapter()``, another adapter or a deleted one no longer meet the pretrained
      weights, and before training the model computes the same up to one rounding of each weight;
    * the saved adapter is right **on this residual base alone**. For the original base save the adapter twice,
      ``model.save_pretrained("start")`` now and
      ``model.save_pretrained("adapter", path_initial_model_for_weight_conversion="start")`` after training;
    * linear layers of one adapter only, with plain float weights.

    Where the model is yours to wrap, :class:`PCConfig` has none of these limits.

    Args:
        model: a PeftModel, or a model with PEFT's LoRA layers in it.
        window: where the components start; their number is each layer's ``r``.
        adapter_name: whose factors.
        tol: of the decomposition, see :func:`ipca.window_svd`.

    Returns:
        Each layer's start by path: window, report, certificate.

    Raises:
        ValueError: a layer or the model does not fit; the message names it. Nothing has changed.
        RuntimeError: the effective weight is further from ``W`` than one rounding explains. Nothing has changed.
    """
    layers = _stock_layers(model, adapter_name)
    starts = {path: _start(path, layer, window, adapter_name, tol) for path, layer in layers.items()}
    with uninterrupted(), torch.no_grad():
        for path, start in starts.items():
            layer, weight = layers[path], _matrix(layers[path])
            options = {"scaling": layer.scaling[adapter_name], "form": "residual"}
            weight.copy_(frozen_weight(weight, start.A0, start.B0, **options))
            layer.lora_A[adapter_name].weight.copy_(start.A0)
            layer.lora_B[adapter_name].weight.copy_(start.B0)
    return starts


def _stock_layers(model: nn.Module, adapter: str) -> dict[str, Any]:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    layers: dict[str, Any] = {path: m for path, m in base.named_modules() if isinstance(m, lora.LoraLayer)}
    if not layers:
        raise ValueError(f"this {type(base).__name__} has no LoRA layer; wrap it with peft.get_peft_model first.")
    owners: dict[int, str] = {}
    for path, layer in layers.items():
        why = _unsupported_reason(layer, adapter)
        if why:
            raise ValueError(f"{path}: {why}.")
        if (first := owners.setdefault(id(layer.get_base_layer().weight), path)) != path:
            raise ValueError(f"{path}: its weight is tied to that of {first}, which would lose two windows.")
    shared = [name for name, p in base.named_parameters(remove_duplicate=False) if id(p) in owners]
    if len(shared) > len(owners):
        raise ValueError(f"the weight of an adapted layer is tied to another module's: {', '.join(sorted(shared))}.")
    return layers


def _unsupported_reason(layer: Any, adapter: str) -> str:
    if type(layer) is not lora.Linear:
        return f"it is a {type(layer).__module__}.{type(layer).__qualname__}, not PEFT's stock linear layer"
    if set(layer.lora_A) != {adapter}:
        return f"it holds the adapters {', '.join(layer.lora_A)}, and the base can be changed for {adapter!r} alone"
    if layer.merged:
        return "it is merged; call unmerge_adapter() first"
    if layer.lora_variant or layer.lora_bias[adapter]:
        return "its adapter is a variant of LoRA (DoRA, lora_bias, …)"
    if quantization_kind(layer.get_base_layer()) is not None:
        return "its weight is quantized, so that nothing can be taken out of it; use a PCConfig"
    return unsupported_reason(layer.get_base_layer())


def _matrix(layer: Any) -> Tensor:
    weight = layer.get_base_layer().weight.detach()
    return weight.mT if layer.fan_in_fan_out else weight


def _start(path: str, layer: Any, window: Window | str | float, adapter: str, tol: float | str) -> InitialFactors:
    dtype, scaling = layer.lora_A[adapter].weight.dtype, layer.scaling[adapter]
    try:
        chosen = as_window(window, layer.r[adapter])
        options = {"scaling": scaling, "form": "residual", "adapter_dtype": dtype, "tol": tol}
        return initial_factors(_matrix(layer), chosen, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise type(error)(f"{path}: {error}") from None
