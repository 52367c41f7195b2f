"""PEFT models that accelerate offloads: their windows, their state dicts, their files.

Neither library has a hook for this, so :func:`install_offloading` wraps one function of each.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import wraps
from typing import Any

from accelerate import hooks
from peft import LoraConfig, LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ipca.nn.offload import is_offloaded, loaded, stored_value
from ipca.peft.config import PCConfig
from ipca.peft.factors import TrainedFactors, has_initial


def with_stored_factors(model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of PEFT's ``save_pretrained`` for ``model``, with what an adapter holds read where it is offloaded."""
    if kwargs.get("state_dict") is not None or not any(is_offloaded(module) for module in model.modules()):
        return kwargs
    state, getters = model.state_dict(), ("get_input_embeddings", "get_output_embeddings")
    embeddings = [getattr(model, get)() for get in getters if hasattr(model, get)]  # which PEFT may save whole
    paths = tuple(f"{name}." for name, module in model.named_modules() if any(module is layer for layer in embeddings))
    own = {key for key in state if "lora_" in key or ".modules_to_save." in key or key.startswith(paths)}
    return {**kwargs, "state_dict": {k: stored_value(model, k, v) if k in own else v for k, v in state.items()}}


def install_offloading() -> None:
    """Wrap a function of PEFT and one of accelerate, for the whole process.

    ``LoraModel._create_and_replace`` has an offloaded base weight loaded, so that the window is its own.
    ``accelerate.hooks.add_hook_to_module`` gets the trained one of two factors, which state dicts hold under one key.
    """
    create, add_hook = LoraModel._create_and_replace, hooks.add_hook_to_module

    @wraps(create)
    def loaded_create(
        self: LoraModel, config: LoraConfig, adapter_name: str, target: nn.Module, *args: Any, **kwargs: Any
    ) -> None:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        with loaded(base) if isinstance(config, PCConfig) else nullcontext():
            create(self, config, adapter_name, target, *args, **kwargs)

    @wraps(add_hook)
    def add_hook_to_module(module: nn.Module, hook: hooks.ModelHook, *args: Any, **kwargs: Any) -> nn.Module:
        weights = getattr(hook, "weights_map", None)
        if weights is not None and any(has_initial(module, name) for name in module._parameters):
            hook.weights_map = TrainedFactors(weights, module)
        return add_hook(module, hook, *args, **kwargs)

    LoraModel._create_and_replace = loaded_create  # type: ignore[assignment,method-assign]
    hooks.add_hook_to_module = add_hook_to_module
