"""OSF, orthogonal subspace fine-tuning, in a model's own layers: PEFT's tuner put in, and folded into the weights.

    W = U_high S_high V_high + U_low S_low V_low,      U_low, S_low, V_low train

PEFT projects the gradients of ``U_low`` and ``V_low`` to be orthogonal to ``U_high`` and ``V_high``. So plain SGD keeps
``U_highᵀ ΔW = 0`` and ``ΔW V_highᵀ = 0``. Optimizers that scale each entry by itself, such as Adam, or that decay
weights differently, do not keep them exactly: their step is no multiple of the projected gradient.

Source: "Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning", arXiv 2504.07097. Its choice
of a size for every layer by importance is not in PEFT and not here: every layer protects the same share.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from peft import OSFConfig, inject_adapter_in_model
from peft.tuners.osf import Linear as OSFLinear
from torch import nn

from ipca.nn.registry import set_layer

_ADAPTER = "default"


def inject_osf(model: nn.Module, layers: Sequence[str], protected: float) -> None:
    """Put PEFT's OSF layers in place of the ``nn.Linear`` layers at the paths ``layers``; all else is frozen.

    Args:
        model: changed in place; unchanged where this fails.
        layers: paths of plain linear layers.
        protected: share of the ``d = min(out, in)`` components of every layer that stay as they are, above 0 and
            below 1: ``floor(protected · d)`` of them, at least 1.

    Raises:
        ValueError: ``protected`` is out of range, or leaves nothing to train in a layer.
        TypeError: a layer is no ``nn.Linear``.
    """
    if not 0 < protected < 1:
        raise ValueError(f"protected is a share of the components above 0 and below 1, got {protected}.")
    before = {name: model.get_submodule(name) for name in layers}
    sizes = {name: _size(name, module, protected) for name, module in before.items()}
    trains = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    config = OSFConfig(
        target_modules="|".join(re.escape(name) for name in layers),
        rank_pattern={f"^{re.escape(name)}$": size for name, size in sizes.items()},
    )
    try:
        inject_adapter_in_model(config, model, _ADAPTER)
    except BaseException:
        for name, module in before.items():
            set_layer(model, name, module)
        for parameter, trained in trains:
            parameter.requires_grad_(trained)
        _forget(model)
        raise
    for name, module in before.items():
        model.get_submodule(name).train(module.training)


@torch.no_grad()
def fold_osf(model: nn.Module) -> None:
    """Add what every OSF layer has learned to its weight, and put the plain layers back, frozen."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, OSFLinear):
            plain = layer.get_base_layer()
            assert isinstance(plain, nn.Linear)
            plain.weight.add_(layer.get_delta_weight(_ADAPTER))
            set_layer(model, name, plain.train(layer.training).requires_grad_(False))
    _forget(model)


def _size(name: str, module: nn.Module, protected: float) -> int:
    if type(module) is not nn.Linear:
        raise TypeError(f"{name} is a {type(module).__name__}; PEFT's OSF adapts nn.Linear alone, so leave it out.")
    d = min(module.weight.shape)
    size = max(1, int(protected * d))
    if size == d:
        raise ValueError(f"{name} has {d} singular components, and protecting {size} leaves none to train.")
    return size


def _forget(model: nn.Module) -> None:
    """Remove the configuration that PEFT leaves on a model it puts layers into."""
    if hasattr(model, "peft_config"):
        del model.peft_config
