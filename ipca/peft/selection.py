"""Layers that "all-linear" leaves out in PEFT, and an injection of an adapter that is complete or undone."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from peft import PeftConfig
from peft.tuners.lora import LoraLayer
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

from ipca.model.targets import MULTIHEAD, SHARED, TIED, check_unmerged, few, narrow_reason, warn_left_out
from ipca.nn.layer_kinds import layer_kind, matrix_shape
from ipca.peft.config import PCConfig
from ipca.peft.dispatch import unsupported_reason
from ipca.peft.layers import WindowLora
from ipca.peft.parameter import ParamWrapper
from ipca.peft.records import LayerRecords

_UNLOAD = "call unload() on the earlier PeftModel first, or pass another adapter_name"


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


def check_places(model: nn.Module, adapter: str) -> None:
    """Raise ValueError where the base of a layer that has the adapter stands in several places of ``model``.

    PEFT has replaced it in one of them, or, in a block that stands in several, saves its factors under a name for each.
    """
    paths = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    layers = [layer for layer in model.modules() if isinstance(layer, WindowLora) and layer.holds(adapter)]
    shared = [layer.path for layer in layers if paths[layer.get_base_layer()] > 1]
    if shared:
        raise ValueError(f"{few(shared)}: {SHARED}; exclude it, or put a module of its own in each place.")


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
def all_or_nothing(model: nn.Module, adapter: str, config: PeftConfig) -> Iterator[None]:
    """Undo what PEFT did to ``model`` for a new adapter, and to the records of ``config``, where it raises within.

    An earlier adapter of that name is then there again, as PEFT replaces it layer by layer.

    Raises:
        ValueError: PEFT would not replace an earlier adapter of that name in all layers; or an adapter is merged into
            the base weights, which a window would be taken from, or which the replaced one could not be taken from.
    """
    earlier = _factors(model, adapter)
    _check_bare(model, adapter)
    if earlier or isinstance(config, PCConfig):
        check_unmerged(model)
    modules = [vars(module) for module in model.modules()]
    inside = [held for own in modules for held in own.values() if isinstance(held, dict | set)]
    before = [(held, copy.copy(held)) for held in (*modules, *inside)]  # put back in place: hooks' handles refer to it
    trains = {parameter: parameter.requires_grad for parameter in model.parameters()}
    records = config.records if isinstance(config, PCConfig) else LayerRecords()
    initial, saved = records.initial.copy(), records.saved.copy()
    try:
        yield
        _check_replaced(earlier, _factors(model, adapter), adapter)
    except BaseException:
        for held, entries in before:
            held.clear()
            held.update(entries)
        for parameter, required in trains.items():
            parameter.requires_grad_(required)
        records.initial, records.saved = initial, saved
        records.waiting.clear()
        raise


def _factors(model: nn.Module, adapter: str) -> dict[str, Any]:
    """What holds the factor ``A`` in each LoRA layer that has an adapter of that name, by the layer's path."""
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    parts = [(path, part) for path, layer in layers.items() for part in (layer.lora_A, layer.lora_embedding_A)]
    return {path: part[adapter] for path, part in parts if adapter in part}


def _check_bare(model: nn.Module, adapter: str) -> None:
    """Raise ValueError where a parameter has an adapter of that name, which PEFT would keep beside the new one."""
    for path, layer in model.named_modules():
        if isinstance(layer, ParamWrapper) and layer.holds(adapter):
            raise ValueError(
                f"{path}: the parameter {layer.parameter_name!r} has an adapter {adapter!r}, and PEFT replaces none "
                f"there; {_UNLOAD}."
            )


def _check_replaced(earlier: Mapping[str, Any], now: Mapping[str, Any], adapter: str) -> None:
    """Raise ValueError where a layer still has the ``earlier`` adapter that had the name of the new one."""
    left = [path for path, factor in earlier.items() if now.get(path) is factor]
    if left:
        raise ValueError(
            f"{few(left)}: an earlier adapter {adapter!r} would stay there, which the new configuration of that name "
            f"does not target; {_UNLOAD}."
        )
