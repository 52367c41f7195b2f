"""accelerate's hooks on layers: carried over to another layer, and the weights that they keep off the device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_HOOKS = ("forward", "forward_pre", "backward", "backward_pre")


def has_other_hooks(module: nn.Module) -> bool:
    """Whether ``module`` has hooks, or a ``forward`` of its own, beside accelerate's hook."""
    forward = vars(module).get("_old_forward" if has_device_hook(module) else "forward")
    replaced = forward is not None and getattr(forward, "__func__", None) is not type(module).forward
    return replaced or any(getattr(module, f"_{hooks}_hooks") for hooks in _HOOKS)


def has_device_hook(module: nn.Module) -> bool:
    """Whether accelerate has put a hook on ``module``, as ``device_map`` does."""
    return "_hf_hook" in vars(module)


def move_device_hook(source: nn.Module, target: nn.Module) -> None:
    """Put accelerate's hook of ``source``, where it has one, on ``target``, which takes its place."""
    if has_device_hook(source):
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(target, source._hf_hook)


def stored_tensor(module: nn.Module, name: str) -> Any:
    """``module.name`` or None; a tensor that accelerate keeps off the device is read from where it is kept.

    The tensor is on the meta device where nobody keeps it.
    """
    tensor = module._parameters[name] if name in module._parameters else getattr(module, name, None)
    if isinstance(tensor, Tensor) and tensor.is_meta:
        return next((weights[name] for weights in weights_maps(module) if name in weights), tensor)
    return tensor


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate keeps a tensor of ``module`` itself off the device."""
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return any(tensor.is_meta for tensor in own) and keeps_weights(module)


def keeps_weights(module: nn.Module) -> bool:
    """Whether accelerate's hook of ``module`` puts its weights in place for each ``forward``."""
    return bool(weights_maps(module))


@contextmanager
def loaded(module: nn.Module) -> Iterator[None]:
    """Have the tensors of ``module`` itself on its device within the block, as in its ``forward``."""
    hook = vars(module)["_hf_hook"] if is_offloaded(module) else None
    if hook is not None:
        hook.pre_forward(module)
    try:
        yield
    finally:
        if hook is not None:
            hook.post_forward(module, torch.empty(0, device="cpu"))


def execution_device(module: nn.Module) -> torch.device | None:
    """The device on which accelerate lets ``module`` compute; None without its hook."""
    devices = [getattr(hook, "execution_device", None) for hook in _device_hooks(module)]
    return next((torch.device(device) for device in devices if device is not None), None)


def weights_maps(module: nn.Module) -> list[Mapping[str, Tensor]]:
    """The weights that accelerate's hooks keep for ``module``, by name, each read when it is asked for."""
    maps = [getattr(hook, "weights_map", None) for hook in _device_hooks(module)]
    return [weights for weights in maps if weights is not None]


def _device_hooks(module: nn.Module) -> list[Any]:
    hook = vars(module).get("_hf_hook")
    return list(getattr(hook, "hooks", [hook]))


def stored_state_dict(module: nn.Module) -> dict[str, Any]:
    """The state dict of ``module``, with tensors that accelerate keeps off the device read from where they are kept."""
    return {key: stored_value(module, key, value) for key, value in module.state_dict().items()}


def stored_value(module: nn.Module, key: str, value: Any) -> Any:
    """``value``, that of ``key`` in the state dict of ``module``, read as :func:`stored_tensor`."""
    if not isinstance(value, Tensor) or not value.is_meta:
        return value
    owner, _, name = key.rpartition(".")
    return stored_tensor(module.get_submodule(owner), name)
