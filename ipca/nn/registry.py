"""Registry of adapted layers: the class for each kind, and layers of a model by their path."""

from __future__ import annotations

from torch import nn

from ipca.nn.conv import ConvPC
from ipca.nn.embedding import EmbeddingPC
from ipca.nn.experts import ExpertsPC, StackPC
from ipca.nn.layer_kinds import EXPERTS, LINEAR, ExpertStack, stack_names
from ipca.nn.linear import LinearPC
from ipca.nn.quantized_linear import QuantizedLinearPC
from ipca.nn.window_layer import WindowLayer

_CLASSES: dict[str, type[WindowLayer]] = {
    **dict.fromkeys(LINEAR, LinearPC),
    **dict.fromkeys(EXPERTS, StackPC),
    "embedding": EmbeddingPC,
    "conv": ConvPC,
}


def layer_class(kind: str) -> type[WindowLayer]:
    """The class that adapts a plain layer of ``kind``, see :mod:`ipca.nn.layer_kinds`."""
    return _CLASSES.get(kind, QuantizedLinearPC)


def get_layer(model: nn.Module, name: str) -> nn.Module:
    """The module at the path ``name``, or the stack of experts' weights that is a parameter there."""
    parent, _, leaf = name.rpartition(".")
    owner = model.get_submodule(parent)
    experts = owner.base if isinstance(owner, ExpertsPC) else owner
    if leaf not in experts._parameters or leaf not in stack_names(experts):
        return model.get_submodule(name)
    transposed = bool(getattr(experts, "is_transposed", False))
    return ExpertStack(experts.get_parameter(leaf), transposed).train(experts.training)


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every module of ``model`` by its path, and after a module of experts each of its plain stacks of weights."""
    found: dict[str, nn.Module] = {}
    inside = {id(module.base) for module in model.modules() if isinstance(module, ExpertsPC)}
    for name, module in model.named_modules():
        found[name] = module
        if id(module) in inside or isinstance(module, WindowLayer):
            continue
        experts = module.base if isinstance(module, ExpertsPC) else module
        if all(parameter is None or parameter.ndim != 3 for parameter in experts._parameters.values()):
            continue
        for leaf in stack_names(experts):
            path = f"{name}.{leaf}" if name else leaf
            found[path] = get_layer(model, path)
    return found


def set_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put ``layer``, adapted or plain, at the path ``name``; a stack into its module of experts, adapted as needed."""
    parent, _, leaf = name.rpartition(".")
    owner = model.get_submodule(parent)
    if not isinstance(layer, StackPC | ExpertStack):
        setattr(owner, leaf, layer)
        return
    experts = owner if isinstance(owner, ExpertsPC) else ExpertsPC(owner)
    experts.put(leaf, layer)
    for path in [path for path, module in model.named_modules(remove_duplicate=False) if module is owner]:
        above, _, place = path.rpartition(".")
        setattr(model.get_submodule(above), place, experts if experts.stacks() else experts.base)
