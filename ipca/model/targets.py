"""Which layers of a model to adapt: patterns are matched and every reason against is found before anything changes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor, nn

from ipca.config import PCConfig
from ipca.nn import WindowLayer
from ipca.nn.kinds import LINEAR, ExpertStack, layer_kind, read_layer, refusal
from ipca.nn.place import layers_of
from ipca.nn.quantised import quantised_kind
from ipca.nn.quantised_linear import RESIDUAL
from ipca.ops.sharded import is_sharded
from ipca.svd import check_matrix
from ipca.window import Window

T = TypeVar("T")
TIED = (
    "its weight is tied to another module's: adapted they would differ, and saving the merged model ties them again; "
    "untie them (a copy for one, in transformers tie_word_embeddings=False too), or exclude it"
)
"""Why a tied weight is refused in both forms."""
_HOOKS = ("forward", "forward_pre", "backward", "backward_pre")


@dataclass(frozen=True)
class Target:
    """One layer to adapt and its own settings.

    It names the layer and does not hold it: a list of targets must not keep the old weights alive.
    """

    name: str
    window: Window
    alpha: float
    form: str
    dropout: float


def find_targets(model: nn.Module, config: PCConfig, *, values: bool = True) -> list[Target]:
    """The layers of ``model`` that ``config`` names, in the model's order, each checked.

    Args:
        values: check the weights' values too; False for a model on the meta device, which has none.

    Raises:
        ValueError: no module matches, a pattern matches nothing, or a layer cannot be adapted; the message lists every
            such layer with its reason.
    """
    names = _matching(model, layers_of(model), config)
    targets = []
    for name in names:
        rank = lookup(config.rank_pattern, name, config.rank)
        window = Window(lookup(config.window_pattern, name, config.window), rank)
        alpha = lookup(config.alpha_pattern, name, config.alpha)
        alpha = float(rank if alpha is None else alpha)
        targets.append(Target(name, window, alpha, config.form, config.dropout))
    for field in ("rank_pattern", "window_pattern", "alpha_pattern"):
        for pattern in getattr(config, field):
            if not any(matches(pattern, name) for name in names):
                raise ValueError(f"{field} {pattern!r} matches none of the layers to adapt.")
    refuse(model, targets, values=values)
    return targets


def matches(pattern: str, name: str) -> bool:
    """Whether ``pattern`` is the path ``name``, its end, or a regular expression for the whole of it."""
    if name == pattern or name.endswith("." + pattern):
        return True
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise ValueError(f"{pattern!r} is neither a module name nor a regular expression: {error}.") from None


def matches_any(patterns: Iterable[str], name: str) -> bool:
    """Whether one of ``patterns`` matches the module ``name`` or a module that contains it."""
    parts = name.split(".")
    parents = [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
    return any(matches(pattern, parent) for pattern in patterns for parent in parents)


def lookup(patterns: Mapping[str, T], name: str, default: T) -> T:
    """The value of the first pattern that matches ``name``."""
    return next((value for pattern, value in patterns.items() if matches(pattern, name)), default)


def saved_modules(model: nn.Module, config: PCConfig) -> list[str]:
    """The outermost modules that ``modules_to_save`` names.

    Raises:
        ValueError: a pattern matches nothing, or a module's parameters are tied to another's or cannot train.
    """
    names = [name for name, _ in model.named_modules() if name]
    for pattern in config.modules_to_save:
        if not any(matches(pattern, name) for name in names):
            raise ValueError(f"modules_to_save {pattern!r} matches no module.")
    found = [name for name in names if any(matches(p, name) for p in config.modules_to_save)]
    outermost = [name for name in found if not any(name.startswith(outer + ".") for outer in found)]
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for name in outermost:
        refuse_suffix(name, names)
        own = Counter(id(p) for _, p in model.get_submodule(name).named_parameters(remove_duplicate=False))
        if any(owners[key] != count for key, count in own.items()):
            raise ValueError(f"modules_to_save {name!r} shares parameters with another module; untie them first.")
        if not all(p.is_floating_point() for p in model.get_submodule(name).parameters()):
            raise ValueError(f"modules_to_save {name!r} has parameters that are no floats and cannot train.")
    return outermost


def refuse_suffix(name: str, names: Iterable[str]) -> None:
    """Raise where PEFT, which matches ``modules_to_save`` by bare endings, would take other modules for ``name``."""
    others = [other for other in names if other.endswith(name) and other != name]
    if others:
        raise ValueError(f"modules_to_save {name!r} would make PEFT save {others[0]!r} too; rename one of them.")


def _matching(model: nn.Module, modules: dict[str, nn.Module], config: PCConfig) -> list[str]:
    left_alone = (*config.exclude, *config.modules_to_save)
    for pattern in config.exclude:
        if not any(matches(pattern, name) for name in modules):
            raise ValueError(f"exclude {pattern!r} matches no module.")
    free = [name for name in modules if not matches_any(left_alone, name)]
    if config.targets == "all-linear":
        get_head = getattr(model, "get_output_embeddings", None)
        head = get_head() if callable(get_head) else None
        names = [name for name in free if _is_linear(modules[name]) and modules[name] is not head]
        if not names:
            raise ValueError(f"{type(model).__name__} has no linear layer to adapt.")
        return names
    patterns = (config.targets,) if isinstance(config.targets, str) else config.targets
    if not patterns:
        raise ValueError("targets is empty; name layers to adapt, or say 'all-linear'.")
    for pattern in patterns:
        if not any(matches(pattern, name) for name in free if name):
            leaves = sorted({n.rpartition(".")[2] for n in free if n and _is_linear(modules[n])})
            called = ", ".join(leaves) or "(none)"
            raise ValueError(f"no module matches the target {pattern!r}; linear layers here are called {called}.")
    return [name for name in free if name and any(matches(pattern, name) for pattern in patterns)]


def _is_linear(module: nn.Module) -> bool:
    """Whether "all-linear" means the module; embeddings, convolutions and experts are named."""
    return layer_kind(module) in LINEAR or quantised_kind(module) is not None or isinstance(module, WindowLayer)


def _in_attention(modules: dict[str, nn.Module], name: str) -> bool:
    return isinstance(modules.get(name.rpartition(".")[0]), nn.MultiheadAttention)


def _in_peft(modules: dict[str, nn.Module], name: str) -> bool:
    """Whether a tuner layer of PEFT holds the module; known by its base class's name, as PEFT need not be there."""
    parts = name.split(".")
    holders = [modules.get(".".join(parts[:i])) for i in range(len(parts))]
    return any(base.__name__ == "BaseTunerLayer" for holder in holders for base in type(holder).__mro__)


def refuse(model: nn.Module, targets: list[Target], *, values: bool = True) -> None:
    """Raise with every reason why a target cannot be adapted; ``values`` as for :func:`find_targets`."""
    paths = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    modules = layers_of(model)
    reasons: dict[str, list[str]] = {}
    for target in targets:
        why = _reason(target, modules, paths, owners, values)
        if why:
            reasons.setdefault(why, []).append(target.name or type(model).__name__)
    if reasons:
        raise ValueError("cannot adapt " + "; ".join(f"{_few(names)}: {why}" for why, names in reasons.items()))


def _stack_reason(target: Target, owner: nn.Module) -> str | None:
    """Why a stack of weights that ``owner`` has as a parameter cannot be adapted."""
    if "." not in target.name:
        return "it is a parameter of the model itself, which would have to be replaced; put the model into a module"
    if type(owner).forward is nn.Module.forward:
        return f"the {type(owner).__name__} that holds it is never called"
    if target.window.needs_spectrum:
        return f"window {target.window.text!r} may differ between its weights; name an index or a fraction"
    return None


def _few(names: list[str], shown: int = 3) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _reason(
    target: Target, modules: dict[str, nn.Module], paths: Counter[int], owners: Counter[int], values: bool
) -> str | None:
    module = modules[target.name]
    if isinstance(module, WindowLayer):
        return "it is adapted already; merge or unload the adapter first, or exclude it"
    if not target.name:
        return "it is the model itself; use LinearPC.from_linear"
    if _in_peft(modules, target.name):
        return "it belongs to a PEFT adapter; merge_and_unload() that first"
    if _in_attention(modules, target.name):
        return "nn.MultiheadAttention reads its weight without calling it"
    if hasattr(module, "parametrizations"):
        return "its weight is parametrised; remove the parametrisation first"
    if any(is_sharded(parameter) for parameter in module.parameters(recurse=False)):
        return "its weight is sharded already; adapt the model first, then call fully_shard or parallelise the rest"
    if layer_kind(module) is None:
        return (
            f"it is a {type(module).__name__}, not an nn.Linear, nn.Embedding, nn.Conv1d, Conv2d or Conv3d, a "
            "transformers Conv1D, or a stack of experts' weights"
        )
    quantised = quantised_kind(module) is not None  # such a layer is called, and so keeps its hooks
    if not quantised and ("forward" in vars(module) or any(getattr(module, f"_{hooks}_hooks") for hooks in _HOOKS)):
        return "it has hooks or a replaced forward, which would be lost; adapt the model before attaching them"
    owner = modules[target.name.rpartition(".")[0]]
    if isinstance(module, ExpertStack):
        why = _stack_reason(target, owner)
        if why:
            return why
    if paths[id(owner if isinstance(module, ExpertStack) else module)] > 1:
        return "the same module stands in several places of the model"
    return _weight_reason(target, module, owners, values)


def _weight_reason(target: Target, module: nn.Module, owners: Counter[int], values: bool) -> str | None:
    """Why the weight of a layer with a kind, or a setting of the layer, cannot be adapted."""
    weight, quantised = module.weight, quantised_kind(module) is not None
    assert isinstance(weight, Tensor)
    if quantised and target.form == "residual":
        return RESIDUAL
    if not quantised and type(weight.data) is not Tensor:
        return f"its weight is a {type(weight.data).__name__}, not a plain tensor"
    if owners[id(weight)] > 1:
        return TIED
    why = refusal(module, dropout=target.dropout)
    if why:
        return why
    try:
        weight, _ = read_layer(module)
        d = min(weight.shape[-2:])
        if values:
            check_matrix(weight, dims=(2, 3))
        if not target.window.needs_spectrum:
            target.window.resolve(d)
        elif target.window.rank > d:
            raise ValueError(f"rank {target.window.rank} is above its {d} singular values.")
    except (TypeError, ValueError) as error:
        return str(error).rstrip(".") + " (or exclude the layer, or name it in modules_to_save)"
    return None
