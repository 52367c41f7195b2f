"""The function of an adapted model without its adapter, so that no second copy of the base is needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ipca.model.apply import adapted_layers
from ipca.model.merge import disabled
from ipca.model.targets import has_peft_layers

_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values of ``init_lora_weights`` with which PEFT writes into the base weight, and whether one begins so."""


@contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """Let ``model`` compute its base's function within the block; which parameters train is restored afterward.

    Layers of ipca compute the pretrained function, in the residual form up to rounding, while fully trained modules
    stay as trained. Layers of PEFT are disabled, and modules in ``modules_to_save`` are the original ones.

    Args:
        model: with an adapter of ipca or of PEFT.

    Raises:
        ValueError: the model has no adapter, or one that has changed the base weights, as PEFT's PiSSA does.
    """
    check_base(model)
    trains = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with _disabled(model):
            yield
    finally:
        for parameter, value in trains:
            parameter.requires_grad_(value)


def check_base(model: nn.Module) -> None:
    """Raise ValueError where ``model`` has no adapter, or does not compute the base's function without it.

    PEFT's PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA subtract the adapter's start from the base weights, and KaSA cuts off
    their smallest components: a model without such an adapter is not the base.
    """
    if adapted_layers(model):
        return
    if not has_peft_layers(model):
        raise ValueError(f"this {type(model).__name__} has no adapter; pass the pretrained model as base.")
    for name, config in getattr(model, "peft_config", {}).items():
        if getattr(config, "bias", None) not in (None, "none"):
            raise ValueError(
                f"the adapter {name!r} has bias={config.bias!r}, which trains biases of the base: without it the model "
                "is not the base. Pass the pretrained model as base, or train with bias='none'."
            )
        if getattr(config, "kasa_config", None) is not None:
            raise ValueError(
                f"the adapter {name!r} is KaSA's, which cuts off the smallest components of the base weights: without "
                "it the model is not the base. Pass the pretrained model as base."
            )
        start = getattr(config, "init_lora_weights", None)
        if isinstance(start, str) and start.lower().startswith(_CHANGE_THE_BASE):
            raise ValueError(
                f"the adapter {name!r} has init_lora_weights={start!r}, which changes the base weights: without it the "
                "model is not the base. Pass the pretrained model as base, or train a window with ipca.peft.PCConfig, "
                "which leaves the base as it is; window='principal' trains PiSSA's components."
            )


@contextmanager
def _disabled(model: Any) -> Iterator[None]:
    if adapted_layers(model):
        with disabled(model):
            yield
    elif hasattr(model, "disable_adapter"):  # peft.PeftModel
        with model.disable_adapter():
            yield
    else:  # PEFT's layers in another model
        layers = [module for module in model.modules() if hasattr(module, "enable_adapters") and module is not model]
        states = [layer.disable_adapters for layer in layers]
        try:
            for layer in layers:
                layer.enable_adapters(False)
            yield
        finally:
            for layer, was_disabled in zip(layers, states, strict=True):
                layer.enable_adapters(not was_disabled)
