"""The function of an adapted model without its adapter, so that no second copy of the base is needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from ipca.model.apply import adapted_layers
from ipca.model.merge import disabled
from ipca.model.targets import check_unmerged, has_peft_layers, of_peft
from ipca.nn.window_layer import WindowLayer

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
        ValueError: the model has no adapter, one that has changed the base weights, as PEFT's PiSSA does, or one that
            PEFT has merged.
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
    """Raise ValueError where ``model`` has no adapter, or would not compute the base's function without it.

    PEFT's PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA subtract the adapter's start from the base weights, and KaSA cuts off
    their smallest components: a model without such an adapter is not the base.
    """
    if not adapted_layers(model) and not has_peft_layers(model):
        raise ValueError(f"this {type(model).__name__} has no adapter; pass the pretrained model as base.")
    check_unmerged(model)
    for module in model.modules():
        configs = getattr(module, "peft_config", None)
        for name, config in configs.items() if isinstance(configs, Mapping) else ():
            why = change_of_the_base(vars(config))
            if why:
                raise ValueError(f"the adapter {name!r} {why}.")


def check_other_model(model: nn.Module, base: nn.Module) -> None:
    """Raise ValueError where an adapted layer of ``model`` is in ``base`` too: a comparison would find no change."""
    own = set(model.modules())
    for name, module in base.named_modules():
        if module in own and (isinstance(module, WindowLayer) or of_peft(module)):
            raise ValueError(
                f"base: {name or type(module).__name__} is an adapted layer of the model itself, as adapting changes a "
                "model in place. Pass the plain model, loaded again or copied before it was adapted; or None, where "
                "base is optional, for the model without its adapter."
            )


def change_of_the_base(config: Mapping[str, Any]) -> str:
    """Why a model without the adapter of a PEFT ``config`` is not its base; empty where it is."""
    if config.get("bias") not in (None, "none"):
        return (
            f"has bias={config['bias']!r}, which trains biases of the base: without it the model is not the base. Pass "
            "the pretrained model as base, or train with bias='none'"
        )
    if config.get("kasa_config") is not None:
        return (
            "is KaSA's, which cuts off the smallest components of the base weights: without it the model is not the "
            "base. Pass the pretrained model as base"
        )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGE_THE_BASE):
        return (
            f"has init_lora_weights={start!r}, which changes the base weights: without it the model is not the base. "
            "Pass the pretrained model as base, or train a window with ipca.peft.PCConfig, which leaves the base as it "
            "is; window='principal' trains PiSSA's components"
        )
    return ""


@contextmanager
def _disabled(model: Any) -> Iterator[None]:
    """All layers of ipca and of PEFT off, wherever in ``model`` they are."""
    with ExitStack() as stack:
        if adapted_layers(model):
            stack.enter_context(disabled(model))
        whole = [module for module in model.modules() if hasattr(module, "disable_adapter")]  # peft.PeftModel
        for module in whole:
            stack.enter_context(module.disable_adapter())
        inside = {id(part) for module in whole for part in module.modules()}
        for layer in model.modules():
            if _is_switched(layer) and id(layer) not in inside:
                stack.callback(layer.enable_adapters, not layer.disable_adapters)
                layer.enable_adapters(False)
        yield


def _is_switched(module: Any) -> bool:
    """Whether ``module`` is one of PEFT's that has an adapter to switch off; models of transformers have methods of
    the same names."""
    return isinstance(getattr(module, "disable_adapters", None), bool)
