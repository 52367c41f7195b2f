"""Selections of layers: linear ones, stacks of experts, and everything that can be adapted."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from ipca.nn.layer_kinds import EXPERTS, layer_kind, matrix_shape, unsupported_reason
from ipca.nn.registry import named_layers


class Selected(NamedTuple):
    """The same layers in the words of ``apply_pc`` and of PCConfig."""

    native: dict[str, Any]
    in_peft: dict[str, Any]


def linear(model: nn.Module, rank: int) -> Selected:
    """What both call "all-linear"."""
    return Selected({}, {"target_modules": "all-linear"})


def experts(model: nn.Module, rank: int) -> Selected | None:
    """Every stack of experts' weights."""
    names = [n for n, layer in named_layers(model).items() if layer_kind(layer) in EXPERTS and "expert" in n]
    leaves = sorted({".".join(name.split(".")[-3:]) for name in names})
    patterns = [re.escape(name) for name in names]
    return Selected({"targets": patterns}, {"target_modules": [], "target_parameters": leaves}) if names else None


def named(model: nn.Module, rank: int) -> Selected | None:
    """Every layer that can be adapted: embeddings, convolutions and the head too, by their paths."""
    modules = dict(model.named_modules())
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    places = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))

    def fits(module: nn.Module) -> bool:
        kind = layer_kind(module)
        if kind is None or unsupported_reason(module, kind) or hasattr(module, "parametrizations"):
            return False
        alone = owners[id(module.weight)] == 1 and places[id(module)] == 1
        return alone and min(matrix_shape(module, kind)) >= rank

    def ends_others(name: str) -> bool:
        return any(other.endswith(f".{name}") for other in modules)

    names = [name for name, module in modules.items() if name and fits(module) and not ends_others(name)]
    if all(layer_kind(modules[name]) == "linear" for name in names):
        return None
    return Selected({"targets": names}, {"target_modules": names})


SELECTIONS: dict[str, Callable[[nn.Module, int], Selected | None]] = {
    "linear": linear,
    "experts": experts,
    "named": named,
}
