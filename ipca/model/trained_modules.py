"""Modules that train beside the factors: those that are named to, and those whose own parameters a step has changed.

``requires_grad`` says what trains now. What trained and was frozen afterward is told by marks, which steps of
optimizers leave on modules of adapted models.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from ipca.nn.window_layer import WindowLayer

_NAMED, _STEPPED = "_ipca_fully_trained", "_ipca_stepped"
_FACTORS = ("lora_A", "lora_B")
_watched: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_known: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
"""What each optimizer had gradients for when modules were marked last."""


def name_fully_trained(module: nn.Module) -> None:
    """Mark ``module`` as one that trains whole, so that freezing it later does not drop it from the adapter."""
    setattr(module, _NAMED, True)


def is_named(module: nn.Module) -> bool:
    """Whether ``module`` was named to train whole."""
    return getattr(module, _NAMED, False)


def has_stepped(module: nn.Module) -> bool:
    """Whether a step has changed parameters of ``module`` itself, other than the factors of an adapted layer."""
    return getattr(module, _STEPPED, False)


def watch_steps(model: nn.Module) -> None:
    """From now on have every step of an optimizer mark the modules of ``model`` whose own parameters it changes."""
    _watched.add(model)
    _known.clear()


def end_training(model: nn.Module, *, merged: bool) -> None:
    """No module of ``model``, which is adapted no more, is named any longer.

    Where it is ``merged`` it is a base of its own. Otherwise modules that trained stay marked: the weights beside them
    are those of the base, and an adapter of these would lack them.
    """
    _watched.discard(model)
    named = [module for module in model.modules() if vars(module).pop(_NAMED, False)]
    if merged:
        for module in model.modules():
            vars(module).pop(_STEPPED, None)
        return
    for module in (inner for outer in named for inner in outer.modules()):
        if any(True for _ in module.parameters(recurse=False)):
            setattr(module, _STEPPED, True)


def fully_trained_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules beside the factors: those named to train whole, and those with own parameters that train or trained.

    A module inside one that is named stands for itself only where that one holds adapted layers.
    """
    found: dict[str, nn.Module] = {}
    complete: tuple[str, ...] = ()
    for name, module in model.named_modules():
        own = any(p.requires_grad for p in module.parameters(recurse=False)) or has_stepped(module)
        if (own or is_named(module)) and not isinstance(module, WindowLayer) and not name.startswith(complete):
            found[name] = module
            if not _holds_adapted(module):
                complete += (f"{name}.",)
    return found


def trained_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of one of :func:`fully_trained_modules`; beside adapted layers those of its own that train."""
    if _holds_adapted(module):
        yield from (p for p in module.parameters(recurse=False) if p.requires_grad)
    else:
        yield from module.parameters()


def _holds_adapted(module: nn.Module) -> bool:
    return any(isinstance(each, WindowLayer) for each in module.modules())


def _after_step(optimizer: Optimizer, *_: object) -> None:
    if not _watched or torch.compiler.is_compiling():
        return
    stepped = [id(p) for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    key = hash(tuple(stepped))
    if _known.get(optimizer) == key:
        return
    _known[optimizer] = key
    ids = set(stepped)
    for model in list(_watched):
        for module in model.modules():
            spared = _FACTORS if isinstance(module, WindowLayer) else ()
            if any(id(p) in ids for name, p in module._parameters.items() if name not in spared):
                setattr(module, _STEPPED, True)


register_optimizer_step_post_hook(_after_step)
