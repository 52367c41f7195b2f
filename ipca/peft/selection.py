"""Layers that "all-linear" leaves out in PEFT, and an injection of an adapter that is complete or undone."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _ExcludedModule,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.other import get_pattern_key
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn

from ipca.model.targets import MULTIHEAD, SHARED, TIED, narrow_reason, warn_left_out
from ipca.nn.layer_kinds import layer_kind, matrix_shape
from ipca.peft.config import PCConfig
from ipca.peft.dispatch import unsupported_reason
from ipca.peft.layers import WindowLora


def leave_out(model: nn.Module, config: PCConfig) -> None:
    """Where the configuration asks for "all-linear", exclude layers that cannot have a window, and warn of them.

    PEFT turns "all-linear" of a mixture into its experts and router too, which are parameters.
    """
    if str(config.target_modules).lower() != INCLUDE_LINEAR_LAYERS_SHORTHAND:
        return
    named, left = set(config.target_parameters or ()), dict[str, list[str]]()
    convert_peft_config_for_transformers(config, model, None)
    for name, why in _unfit_modules(model, config).items():
        left.setdefault(why, []).append(name)
    unfit = [name for names in left.values() for name in names]
    if unfit and not config.target_parameters and not set(_taken(model, config)) - set(unfit):
        raise ValueError(f"no layer of 'all-linear' can have a window: {'; '.join(sorted(left))}.")
    _exclude(config, unfit)
    for short in sorted(set(config.target_parameters or ()) - named):
        for name, parameter in model.named_parameters():
            narrow = _narrow_reason(config, name, parameter.shape) if f".{name}".endswith(f".{short}") else None
            if narrow:
                config.target_parameters = [each for each in config.target_parameters or () if each != short]
                left.setdefault(narrow, []).append(name)
    if not config.records.initial:  # `prepare` has warned already
        warn_left_out(left)


def _taken(model: nn.Module, config: PCConfig) -> list[str]:
    """The paths of the modules that the configuration takes."""
    resolved = _maybe_include_all_linear_layers(copy.copy(config), model)
    found = {name: check_target_module_exists(resolved, name) for name, _ in model.named_modules()}
    return [name for name, taken in found.items() if taken and not isinstance(taken, _ExcludedModule)]


def _unfit_modules(model: nn.Module, config: PCConfig) -> dict[str, str]:
    """The reason against each linear layer that the configuration would take and that cannot have a window."""
    paths = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    modules = dict(model.named_modules())
    found = {}
    for name in _taken(model, config):
        module = modules[name]
        base: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        why: str | None = unsupported_reason(base)
        if isinstance(modules.get(name.rpartition(".")[0]), nn.MultiheadAttention):
            why = MULTIHEAD
        elif not why and paths[id(module)] > 1:
            why = SHARED
        elif not why and owners[id(base.weight)] > 1:
            why = TIED
        elif not why:
            kind = layer_kind(base)
            shape = tuple(base.weight.shape) if kind is None else matrix_shape(base, kind)
            why = _narrow_reason(config, name, shape)
        if why:
            found[name] = why
    return found


def _narrow_reason(config: PCConfig, name: str, shape: Sequence[int]) -> str | None:
    """The reason why a weight is too narrow for ``r``, or None; one that ``rank_pattern`` names is not left out."""
    ranks = config.rank_pattern or {}
    return None if get_pattern_key(list(ranks), name) in ranks else narrow_reason(config.r, shape)


def _exclude(config: PCConfig, names: list[str]) -> None:
    """Add the modules at ``names`` to those that the configuration excludes."""
    if names and isinstance(config.exclude_modules, str):
        config.exclude_modules = "|".join([f"(?:{config.exclude_modules})", *map(re.escape, names)])
    elif names:
        config.exclude_modules = [*(config.exclude_modules or ()), *names]


@contextmanager
def all_or_nothing(model: nn.Module, adapter: str, config: PCConfig) -> Iterator[None]:
    """Undo what PEFT did to ``model`` for a new adapter, and to the records of ``config``, where it raises within."""
    children = {module: dict(module._modules) for module in model.modules()}
    trains = {parameter: parameter.requires_grad for parameter in model.parameters()}
    before = config.records.initial.copy(), config.records.saved.copy()
    try:
        yield
    except BaseException:
        for module, held in children.items():
            module._modules.clear()
            module._modules.update(held)
        for layer in children:
            if isinstance(layer, WindowLora) and adapter in layer.r:
                layer.delete_adapter(adapter)
        for parameter, required in trains.items():
            parameter.requires_grad_(required)
        config.records.initial, config.records.saved = before
        config.records.waiting.clear()
        raise
