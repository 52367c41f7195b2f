"""OSF, orthogonal subspace fine-tuning, with PEFT's tuner: injected into a model's layers, folded into their weights.

    W = U_high S_high V_high + U_low S_low V_low,      U_low, S_low, V_low train

PEFT projects the gradients of ``U_low`` and ``V_low`` to be orthogonal to ``U_high`` and ``V_high``. So plain SGD
keeps ``U_highᵀ ΔW = 0`` and ``ΔW V_highᵀ = 0``. Optimizers that scale entries individually, such as Adam, or that decay
weights differently, do not keep them exactly: their step is not a multiple of the projected gradient.

Source: "Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning", arXiv 2504.07097. Its
importance-based size per layer is not in PEFT and not here: every layer protects the same share.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import nn

from ipca._atomic import uninterrupted
from ipca.analysis.linalg import check_finite
from ipca.lab.baselines.peft_methods import ADAPTER, inject, remove_peft_config, require_peft
from ipca.lab.continual.method import Adapter, Method, Setup
from ipca.nn.registry import set_layer


def osf_method(setup: Setup) -> Method:
    """For every task the SVD of the current weights: the largest components are protected, the rest train.

    ``rank``, ``alpha`` and ``window`` of the settings have no effect.

    Raises:
        ImportError: PEFT is missing.
    """
    require_peft("osf")
    names = [target.name for target in setup.targets]

    def begin(model: nn.Module, index: int) -> None:
        for name in names:
            check_finite(name, model.get_submodule(name).get_parameter("weight"))
        with uninterrupted():
            inject_osf(model, names, setup.protected)
            for name in setup.modules_to_save:
                model.get_submodule(name).requires_grad_(True)

    def end(model: nn.Module) -> Adapter:
        fold_osf(model)
        return {}

    return Method(begin=begin, end=end)


def inject_osf(model: nn.Module, layers: Sequence[str], protected: float) -> None:
    """Replace the ``nn.Linear`` layers at the paths ``layers`` with PEFT's OSF layers; everything else is frozen.

    Args:
        model: changed in place; unchanged if this fails.
        layers: paths of plain linear layers.
        protected: share of the ``d = min(out, in)`` components of every layer that stay frozen, above 0 and below 1:
            ``floor(protected · d)`` of them, at least 1.

    Raises:
        ValueError: ``protected`` is out of range, or leaves nothing to train in a layer.
        TypeError: a layer is not an ``nn.Linear``.
    """
    from peft import OSFConfig

    if not 0 < protected < 1:
        raise ValueError(f"protected must be a share of the components above 0 and below 1, got {protected}.")
    sizes = {name: _protected_size(name, model.get_submodule(name), protected) for name in layers}
    config = OSFConfig(
        target_modules="|".join(re.escape(name) for name in layers),
        rank_pattern={f"^{re.escape(name)}$": size for name, size in sizes.items()},
    )
    inject(model, config, layers)


@torch.no_grad()
def fold_osf(model: nn.Module) -> None:
    """Add the learned change of every OSF layer to its weight, and restore the plain layers, frozen."""
    from peft.tuners.osf import Linear as OSFLinear

    for name, layer in list(model.named_modules()):
        if isinstance(layer, OSFLinear):
            plain = layer.get_base_layer()
            assert isinstance(plain, nn.Linear)
            plain.weight.add_(layer.get_delta_weight(ADAPTER))
            set_layer(model, name, plain.train(layer.training).requires_grad_(False))
    remove_peft_config(model)


def _protected_size(name: str, module: nn.Module, protected: float) -> int:
    if type(module) is not nn.Linear:
        raise TypeError(f"{name} is a {type(module).__name__}; PEFT's OSF adapts nn.Linear only, so exclude it.")
    d = min(module.weight.shape)
    size = max(1, int(protected * d))
    if size == d:
        raise ValueError(f"{name} has {d} singular components, and protecting {size} leaves none to train.")
    return size
