"""Which layers of a model to adapt: patterns are matched and every reason against is found before anything changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from ipca._dtensor import is_sharded
from ipca.config import PCConfig
from ipca.model.patterns import lookup, matches, matches_any, require_match
from ipca.nn import WindowLayer
from ipca.nn.experts import ExpertsPC, StackPC
from ipca.nn.layer_kinds import LINEAR, ExpertStack, layer_kind, read_layer, stack_names, unsupported_reason
from ipca.nn.quantization import quantization_kind
from ipca.nn.quantized_linear import RESIDUAL
from ipca.nn.registry import named_layers
from ipca.svd.decompose import check_matrix
from ipca.window import Window

TIED = (
    "its weight is tied to another module's: adapted they would differ, and saving the merged model ties them again; "
    "untie them (a copy for one, in transformers tie_word_embeddings=False too), or exclude it"
)
"""Why a tied weight is refused in both forms."""
BESIDE_STACK = (
    "it stands in a module that holds a stack of weights which is adapted too, and everything in such a module moves "
    "to another path; leave one of them out, or put the stack into a module of its own"
)
"""Why nothing else inside a module of experts can train."""
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


def find_targets(
    model: nn.Module, config: PCConfig, *, modules_to_save: Iterable[str] = (), values: bool = True
) -> list[Target]:
    """The layers of ``model`` that ``config`` names, in the model's order, each checked.

    Args:
        modules_to_save: those of :func:`find_modules_to_save`.
        values: check the weights' values too; False for a model on the meta device, which has none.

    Raises:
        ValueError: no module matches, a pattern matches nothing, or a layer cannot be adapted; the message lists every
            such layer with its reason.
    """
    names = _matching(model, named_layers(model), config)
    targets = []
    for name in names:
        rank = lookup(config.rank_pattern, name, config.rank)
        window = Window(lookup(config.window_pattern, name, config.window), rank)
        alpha = lookup(config.alpha_pattern, name, config.alpha)
        alpha = float(rank if alpha is None else alpha)
        targets.append(Target(name, window, alpha, config.form, config.dropout))
    for field in ("rank_pattern", "window_pattern", "alpha_pattern"):
        for pattern in getattr(config, field):
            require_match(pattern, names, f"{field} {pattern!r} matches none of the layers to adapt.")
    validate_targets(model, targets, modules_to_save=modules_to_save, values=values)
    return targets


def find_modules_to_save(model: nn.Module, config: PCConfig) -> list[str]:
    """The outermost modules that ``modules_to_save`` names.

    Raises:
        ValueError: a pattern matches nothing, or a module's parameters are tied to another's or cannot train, it holds
            adapted layers, or state that is no tensor.
    """
    names = [name for name, _ in model.named_modules() if name]
    for pattern in config.modules_to_save:
        require_match(pattern, names, f"modules_to_save {pattern!r} matches no module.")
    found = [name for name in names if any(matches(p, name) for p in config.modules_to_save)]
    outermost = [name for name in found if not any(name.startswith(outer + ".") for outer in found)]
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for name in outermost:
        check_ambiguous_suffix(name, names)
        module = model.get_submodule(name)
        own = Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))
        if any(isinstance(inner, WindowLayer) for inner in module.modules()):
            raise ValueError(f"modules_to_save {name!r} holds layers that are adapted; unload them first.")
        if any(owners[key] != count for key, count in own.items()):
            raise ValueError(f"modules_to_save {name!r} shares parameters with another module; untie them first.")
        if not all(p.is_floating_point() for p in module.parameters()):
            raise ValueError(f"modules_to_save {name!r} has parameters that are no floats and cannot train.")
        if not all(isinstance(value, Tensor) for value in module.state_dict().values()):
            raise ValueError(f"modules_to_save {name!r} has extra state that is no tensor and cannot be saved.")
    return outermost


def check_ambiguous_suffix(name: str, names: Iterable[str]) -> None:
    """Raise where PEFT, which matches ``modules_to_save`` by bare endings, would take other modules for ``name``."""
    others = [other for other in names if other.endswith(name) and other != name]
    if others:
        raise ValueError(f"modules_to_save {name!r} would make PEFT save {others[0]!r} too; rename one of them.")


def _matching(model: nn.Module, modules: dict[str, nn.Module], config: PCConfig) -> list[str]:
    left_alone = (*config.exclude, *config.modules_to_save)
    for pattern in config.exclude:
        require_match(pattern, modules, f"exclude {pattern!r} matches no module.")
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
    linear = _leaves(name for name in free if _is_linear(modules[name])) or "(none)"
    more = _leaves(name for name in free if layer_kind(modules[name]) and not _is_linear(modules[name]))
    here = f"linear layers here are called {linear}" + (f", other layers that can be adapted {more}." if more else ".")
    named = [name for name in free if name]
    for pattern in patterns:
        require_match(pattern, named, f"no module matches the target {pattern!r}; {here}")
    return [name for name in named if any(matches(pattern, name) for pattern in patterns)]


def _leaves(names: Iterable[str]) -> str:
    return ", ".join(sorted({name.rpartition(".")[2] for name in names if name}))


def _is_linear(module: nn.Module) -> bool:
    """Whether "all-linear" means the module; embeddings, convolutions and experts are named."""
    return layer_kind(module) in LINEAR or quantization_kind(module) is not None or isinstance(module, WindowLayer)


def _in_attention(modules: dict[str, nn.Module], name: str) -> bool:
    return isinstance(modules.get(name.rpartition(".")[0]), nn.MultiheadAttention)


def has_peft_layers(model: nn.Module) -> bool:
    """Whether a tuner layer of PEFT is in the model."""
    return any(_of_peft(module) for module in model.modules())


def _of_peft(module: nn.Module | None) -> bool:
    """Known by the name of its base class, as PEFT need not be there."""
    return any(base.__name__ == "BaseTunerLayer" for base in type(module).__mro__)


def _in_peft(modules: dict[str, nn.Module], name: str) -> bool:
    """Whether a tuner layer of PEFT holds the module."""
    parts = name.split(".")
    return any(_of_peft(modules.get(".".join(parts[:i]))) for i in range(len(parts)))


def validate_targets(
    model: nn.Module, targets: list[Target], *, modules_to_save: Iterable[str] = (), values: bool = True
) -> None:
    """Raise with every reason why a target cannot be adapted.

    Args:
        modules_to_save: paths of modules to train fully.
        values: as for :func:`find_targets`.
    """
    paths = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    modules = named_layers(model)
    reasons: dict[str, list[str]] = {}
    for target in targets:
        why = _unsupported_reason(target, modules, paths, owners, values)
        if why:
            reasons.setdefault(why, []).append(target.name or type(model).__name__)
    beside = _beside_stacks(modules, [target.name for target in targets], modules_to_save)
    if beside:
        reasons[BESIDE_STACK] = beside
    if reasons:
        raise ValueError("cannot adapt " + "; ".join(f"{_few(names)}: {why}" for why, names in reasons.items()))


def _beside_stacks(modules: dict[str, nn.Module], targets: Iterable[str], modules_to_save: Iterable[str]) -> list[str]:
    """What of ``targets`` and ``whole``, or adapted before, lies in a module of experts without being its stack."""
    adapted = [name for name, module in modules.items() if isinstance(module, WindowLayer)]
    layers = dict.fromkeys([*adapted, *targets])
    owner = {name: name.rpartition(".")[0] for name in layers if isinstance(modules[name], ExpertStack | StackPC)}
    inside = tuple(f"{experts}." for experts in owner.values() if experts)
    return [
        name
        for name in (*layers, *modules_to_save)
        if name.startswith(tuple(path for path in inside if path != f"{owner.get(name)}."))
    ]


def _unsupported_stack(target: Target, owner: nn.Module) -> str | None:
    """Why a stack of weights that ``owner`` has as a parameter cannot be adapted."""
    if "." not in target.name:
        return "it is a parameter of the model itself, which would have to be replaced; put the model into a module"
    leaf = target.name.rpartition(".")[2]
    if leaf == "base" or hasattr(ExpertsPC, leaf):
        return f"ExpertsPC has an attribute {leaf!r} of its own; rename the parameter"
    if type(owner).forward is nn.Module.forward:
        return f"the {type(owner).__name__} that holds it is never called"
    if target.window.needs_spectrum:
        return f"window {target.window.text!r} may differ between its weights; name an index or a fraction"
    return None


def _few(names: list[str], shown: int = 3) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _unsupported_reason(
    target: Target, modules: dict[str, nn.Module], paths: Counter[int], owners: Counter[int], values: bool
) -> str | None:
    module = modules[target.name]
    if isinstance(module, WindowLayer):
        return "it is adapted already; unload the adapter first (ipca.unload folds it into the weight), or exclude it"
    if not target.name:
        return "it is the model itself; use LinearPC.from_linear"
    if _in_peft(modules, target.name):
        return "it belongs to a PEFT adapter; merge_and_unload() that first"
    if _in_attention(modules, target.name):
        return "nn.MultiheadAttention reads its weight without calling it"
    if hasattr(module, "parametrizations"):
        return "its weight is parametrized; remove the parametrization first"
    if any(is_sharded(parameter) for parameter in module.parameters(recurse=False)):
        return "its weight is sharded already; adapt the model first, then call fully_shard or parallelize the rest"
    if layer_kind(module) is None:
        stacks = [f"{target.name}.{leaf}" for leaf in stack_names(module)]
        if stacks:
            return f"it is a module of experts; name its stacks of weights, {' and '.join(stacks)}"
        return (
            f"it is a {type(module).__name__}, not an nn.Linear, nn.Embedding, nn.Conv1d, Conv2d or Conv3d, a "
            "transformers Conv1D, or a stack of experts' weights"
        )
    quantized = quantization_kind(module) is not None  # such a layer is called, and so keeps its hooks
    if not quantized and ("forward" in vars(module) or any(getattr(module, f"_{hooks}_hooks") for hooks in _HOOKS)):
        return "it has hooks or a replaced forward, which would be lost; adapt the model before attaching them"
    owner = modules[target.name.rpartition(".")[0]]
    if isinstance(module, ExpertStack):
        why = _unsupported_stack(target, owner)
        if why:
            return why
    if paths[id(owner if isinstance(module, ExpertStack) else module)] > 1:
        return "the same module stands in several places of the model"
    return _unsupported_weight(target, module, owners, values)


def _unsupported_weight(target: Target, module: nn.Module, owners: Counter[int], values: bool) -> str | None:
    """Why the weight of a layer with a kind, or a setting of the layer, cannot be adapted."""
    weight, quantized = module.weight, quantization_kind(module) is not None
    assert isinstance(weight, Tensor)
    if quantized and target.form == "residual":
        return RESIDUAL
    if not quantized and type(weight.data) is not Tensor:
        return f"its weight is a {type(weight.data).__name__}, not a plain tensor"
    if owners[id(weight)] > 1:
        return TIED
    why = unsupported_reason(module, dropout=target.dropout)
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
