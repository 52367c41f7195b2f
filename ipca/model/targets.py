"""Target layers: pattern matching, and validation of every layer before the model is changed."""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from ipca._dtensor import is_replicated, is_sharded
from ipca.model.heads import find_heads, warn_of_loose_parameters
from ipca.model.patterns import hint, lookup, matches, matches_any
from ipca.model.settings import AdapterSettings
from ipca.nn.attributes import held_beside
from ipca.nn.experts import ExpertsPC, StackPC
from ipca.nn.layer_kinds import (
    LINEAR,
    ExpertStack,
    is_quantized,
    layer_kind,
    matrix_shape,
    read_layer,
    stack_names,
    unsupported_reason,
)
from ipca.nn.offload import has_other_hooks, is_offloaded
from ipca.nn.quantized_linear import RESIDUAL
from ipca.nn.registry import named_layers
from ipca.nn.window_layer import WindowLayer
from ipca.svd.decompose import check_matrix
from ipca.svd.parallel import thread_map
from ipca.window import Window

TIED = (
    "its weight is tied to another module's: adapted they would differ, and saving the merged model ties them again; "
    "untie them (a copy for one, and tie_word_embeddings off in a transformers config), or exclude it"
)
"""Why a tied weight is not adapted in either form."""
MULTIHEAD = "nn.MultiheadAttention reads its weight without calling it"
PARAMETRIZED = "its weight is parametrized; remove the parametrization first"
SHARED = "the same module stands in several places of the model"
BESIDE_STACK = (
    "it stands in a module that holds a stack of weights which is adapted too, and everything in such a module moves "
    "to another path; leave one of them out, or put the stack into a module of its own"
)
"""Why nothing else inside a module of experts can train."""
OFFLOADED = (
    "accelerate keeps its weight on the CPU or the disk; load the model without offloading, exclude the layer, or "
    "adapt it inside PEFT with ipca.peft.PCConfig"
)


@dataclass(frozen=True)
class Target:
    """One layer to adapt: its path, its kind and shape in the model, and its own settings.

    It names the layer and does not hold it: a list of targets must not keep the old weights alive.

    Attributes:
        name: path of the layer.
        kind: see :mod:`ipca.nn.layer_kinds`; None for a module that cannot be adapted.
        shape: of the weight as ``(…, out, in)``; empty where there is no kind.
        window, alpha, form, dropout, train, magnitude: as for :class:`ipca.nn.WindowLayer`.
    """

    name: str
    kind: str | None
    shape: tuple[int, ...]
    window: Window
    alpha: float
    form: str
    dropout: float
    train: str = "both"
    magnitude: float | str = "sigma"

    @classmethod
    def of(
        cls,
        name: str,
        module: nn.Module,
        window: Window,
        alpha: float,
        form: str = "intact",
        dropout: float = 0.0,
        train: str = "both",
        magnitude: float | str = "sigma",
    ) -> Target:
        """The layer ``module`` at the path ``name``."""
        kind = layer_kind(module)
        shape = () if kind is None else matrix_shape(module, kind)
        return cls(name, kind, shape, window, float(alpha), form, dropout, train, magnitude)

    @property
    def scaling(self) -> float:
        """``alpha / rank``."""
        return self.alpha / self.window.rank

    @property
    def quantized(self) -> bool:
        """Whether the weight is quantized."""
        return is_quantized(self.kind)


# -- patterns


def _require_match(pattern: str, names: Iterable[str], otherwise: str) -> None:
    """Raise ValueError where ``pattern`` matches none of ``names``; ``otherwise`` is the message for a valid one."""
    names = list(names)
    if any(matches(pattern, name) for name in names):
        return
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is neither a module name nor a regular expression: {error}.") from None
    raise ValueError(otherwise + hint(pattern, names))


# -- choice


def find_targets(
    model: nn.Module, settings: AdapterSettings, *, modules_to_save: Iterable[str] = (), values: bool = True
) -> list[Target]:
    """The layers of ``model`` that ``settings`` name, in the model's order, each checked.

    Args:
        modules_to_save: those of :func:`find_modules_to_save`.
        values: check the weights' values too; False for a model on the meta device, which has none.

    Raises:
        ValueError: no module matches, a pattern matches nothing, or a layer cannot be adapted; the message lists every
            such layer with its reason.
    """
    layers = named_layers(model)
    names = _matching(model, layers, settings)
    targets = []
    for name in names:
        rank = lookup(settings.rank_pattern, name, settings.rank)
        window = Window(lookup(settings.window_pattern, name, settings.window), rank)
        alpha = lookup(settings.alpha_pattern, name, settings.alpha)
        alpha = rank if alpha is None else alpha
        options = (settings.form, settings.dropout, settings.train, settings.magnitude)
        targets.append(Target.of(name, layers[name], window, alpha, *options))
    for field in ("rank_pattern", "window_pattern", "alpha_pattern"):
        for pattern in getattr(settings, field):
            _require_match(pattern, names, f"{field} {pattern!r} matches none of the layers to adapt.")
    if settings.targets == "all-linear":
        targets = _without_unfit(model, targets, layers, settings.rank_pattern)
    validate_targets(model, targets, modules_to_save=modules_to_save, values=values, layers=layers)
    return targets


def find_modules_to_save(model: nn.Module, settings: AdapterSettings) -> list[str]:
    """The outermost modules that train whole: those that ``modules_to_save`` names, and the model's task head.

    Where PEFT, which matches by endings, would save modules with a head that are no part of it, they train too.

    Raises:
        ValueError: a pattern matches nothing, or a module's parameters are tied to another's or cannot train, it holds
            adapted layers, or state that is no tensor.
    """
    names = [name for name, _ in model.named_modules() if name]
    for pattern in settings.modules_to_save:
        _require_match(pattern, names, f"modules_to_save {pattern!r} matches no module.")
    asked = [name for name in names if any(matches(p, name) for p in settings.modules_to_save)]
    heads = find_heads(model, settings.targets, settings.exclude)
    heads += _with_endings(heads, names)
    found = [name for name in names if name in asked or name in heads]
    outermost = [name for name in found if not any(name.startswith(outer + ".") for outer in found)]
    check_endings(outermost, names)
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for name in outermost:
        why = _untrainable_reason(model.get_submodule(name), owners)
        if why:
            way = "" if name in asked else " It is the model's head, which trains whole unless it is excluded."
            raise ValueError(f"modules_to_save {name!r} {why}.{way}")
    warn_of_loose_parameters(model)
    return outermost


def _untrainable_reason(module: nn.Module, owners: Counter[int]) -> str | None:
    """The reason why a module cannot train whole, or None; ``owners`` counts the paths of each parameter."""
    if any(is_offloaded(inner) for inner in module.modules()):
        return "cannot train: accelerate keeps its weights on the CPU or the disk; load it without offloading"
    own = Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))
    if any(isinstance(inner, WindowLayer) for inner in module.modules()):
        return "holds layers that are adapted; unload them first"
    if any(owners[key] != count for key, count in own.items()):
        return "shares parameters with another module; untie them first"
    if not all(p.is_floating_point() for p in module.parameters()):
        return "has parameters that are no floats and cannot train"
    if not all(isinstance(value, Tensor) for value in module.state_dict().values()):
        return "has extra state that is no tensor and cannot be saved"
    return None


def check_endings(modules_to_save: list[str], names: Iterable[str]) -> None:
    """Raise ValueError where PEFT, which matches ``modules_to_save`` by endings, would save others of ``names`` too."""
    others = _with_endings(modules_to_save, names)
    if others:
        name = next(name for name in modules_to_save if others[0].endswith(name))
        raise ValueError(
            f"modules_to_save {name!r} would make PEFT save {others[0]!r} too; name both, or rename one of them."
        )


def _with_endings(modules_to_save: list[str], names: Iterable[str]) -> list[str]:
    """The ``names`` that end in one of ``modules_to_save`` and are none of them."""
    return [name for name in names if name.endswith(tuple(modules_to_save)) and name not in modules_to_save]


def has_peft_layers(model: nn.Module) -> bool:
    """Whether the model has a tuner layer of PEFT."""
    return any(of_peft(module) for module in model.modules())


def check_not_in_peft(model: nn.Module) -> None:
    """Raise ValueError where ``model`` has an adapter of PEFT: ours would freeze it, and no file would hold both."""
    layers = (name for name, module in model.named_modules() if of_peft(module))
    prompts = (type(m).__name__ for m in model.modules() if any(c.__name__ == "PeftModel" for c in type(m).__mro__))
    name = next(layers, None) or next(prompts, None)
    if name is not None:
        raise ValueError(
            f"{name}: it belongs to a PEFT adapter; merge and unload that first, or adapt inside PEFT with "
            "ipca.peft.PCConfig: ipca would freeze it, and each library saves only its own adapter."
        )


def check_unmerged(model: nn.Module) -> None:
    """Raise ValueError where PEFT has merged an adapter: the weights are not the base's, and PEFT unmerges at will."""
    for name, module in model.named_modules():
        if of_peft(module) and getattr(module, "merged", False):
            adapters = ", ".join(module.merged_adapters)
            raise ValueError(
                f"{name}: the adapter {adapters!r} is merged into its weight, which is not the base's then; call "
                "unmerge_adapter() first."
            )


def _matching(model: nn.Module, modules: dict[str, nn.Module], settings: AdapterSettings) -> list[str]:
    heads = find_heads(model, settings.targets, settings.exclude)
    excluded = (*settings.exclude, *settings.modules_to_save, *map(re.escape, heads))
    for pattern in settings.exclude:
        _require_match(pattern, modules, f"exclude {pattern!r} matches no module.")
    free = {name: module for name, module in modules.items() if not excluded or not matches_any(excluded, name)}
    if settings.targets == "all-linear":
        get_head = getattr(model, "get_output_embeddings", None)
        head = get_head() if callable(get_head) else None
        names = [
            name
            for name, module in free.items()
            if (_is_linear(module) or isinstance(module, nn.Linear)) and module is not head
        ]
        if not names:
            beside = f" beside its head, {few(heads)}, which trains whole" if heads else ""
            others = [name for name, module in free.items() if layer_kind(module) and not _is_linear(module)]
            instead = f"; name layers of other kinds in targets, such as {few(others)}" if others else ""
            raise ValueError(f"{type(model).__name__} has no linear layer to adapt{beside}{instead}.")
        return names
    patterns = (settings.targets,) if isinstance(settings.targets, str) else tuple(settings.targets)
    if not patterns:
        raise ValueError("targets is empty; name layers to adapt, or pass 'all-linear'.")
    named = [name for name in free if name]
    for pattern in patterns:
        if not any(matches(pattern, name) for name in named):
            _require_match(pattern, named, f"no module matches the target {pattern!r}; {_layers_here(free)}")
    return [name for name in named if any(matches(pattern, name) for pattern in patterns)]


def _layers_here(free: dict[str, nn.Module]) -> str:
    """The names of layers that can be adapted, for a message."""

    def leaves(names: Iterable[str]) -> str:
        return ", ".join(sorted({name.rpartition(".")[2] for name in names if name}))

    linear = leaves(name for name, module in free.items() if _is_linear(module)) or "(none)"
    more = leaves(name for name, module in free.items() if layer_kind(module) and not _is_linear(module))
    return f"linear layers here are called {linear}" + (f", other layers that can be adapted {more}." if more else ".")


def _is_linear(module: nn.Module) -> bool:
    """Whether "all-linear" includes the module; embeddings, convolutions and experts are chosen by name."""
    kind = layer_kind(module)
    return isinstance(module, WindowLayer) or kind in LINEAR or is_quantized(kind)


# -- reasons against a layer


def _without_unfit(
    model: nn.Module, targets: list[Target], layers: dict[str, nn.Module], ranks: Iterable[str]
) -> list[Target]:
    """The ``targets`` that nobody named without those that cannot have a window, which a warning names.

    A layer that ``ranks``, the patterns of ranks, name is not left out for its rank. Where none would be left all are
    returned, for their refusal.
    """
    paths = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    left: dict[str, list[str]] = {}
    fit = []
    for target in targets:
        why = _unfit_reason(target, layers, paths, owners)
        named = _in_peft(layers, target.name) or any(matches(pattern, target.name) for pattern in ranks)
        if why is None and not named:  # a layer of PEFT is refused below
            why = narrow_reason(target.window.rank, target.shape)
        if why is None:
            fit.append(target)
        else:
            left.setdefault(why, []).append(target.name)
    if not fit:
        return targets
    warn_left_out(left)
    return fit


def warn_left_out(left: Mapping[str, Sequence[str]]) -> None:
    """Warn in one line of layers that "all-linear" leaves out; ``left`` holds their paths by the reason."""
    if left:
        told = "; ".join(f"{', '.join(_alike(names))}: {why}" for why, names in left.items())
        warnings.warn(f"'all-linear' leaves out {told}. Excluding these layers silences this.", stacklevel=3)


def _alike(names: Sequence[str]) -> list[str]:
    """The paths, with those that differ in numbers of layers written as one: ``layers.*.mlp.gate (32)``."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", name), []).append(name)
    return [f"{group} ({len(same)})" if len(same) > 1 else same[0] for group, same in groups.items()]


def narrow_reason(rank: int, shape: Sequence[int]) -> str | None:
    """The reason why a weight ``(…, out, in)`` is too narrow for the rank, or None; ``shape`` may be empty."""
    d = min(shape[-2:], default=rank)
    many = f"{d} singular value{'s' * (d > 1)}"
    return f"rank {rank} is above the {many}, and rank_pattern can give another" if rank > d else None


def _unfit_reason(
    target: Target, modules: dict[str, nn.Module], paths: Counter[int], owners: Counter[int]
) -> str | None:
    """The reason why a linear layer as such cannot have a window, or None."""
    module = modules[target.name]
    if isinstance(module, WindowLayer) or _in_peft(modules, target.name):
        return None  # a refusal says what to do first
    if isinstance(modules.get(target.name.rpartition(".")[0]), nn.MultiheadAttention):
        return MULTIHEAD
    if hasattr(module, "parametrizations"):
        return PARAMETRIZED
    if why := _holds_more(target, module):
        return why
    if target.kind is None:
        return f"a {type(module).__name__} may compute something else than an nn.Linear"
    if paths[id(module)] > 1:
        return SHARED
    if owners[id(module.weight)] > 1:
        return TIED
    return unsupported_reason(module, target.kind)


def check_not_replicated(model: nn.Module) -> None:
    """Raise ValueError where new factors of ``model`` would drift apart between processes."""
    if is_replicated(model):
        raise ValueError(
            "the model is wrapped by DistributedDataParallel already, as accelerate's prepare does, and that would not "
            "average the gradients of new factors over the processes; adapt the model first, then wrap it."
        )


def validate_targets(
    model: nn.Module,
    targets: list[Target],
    *,
    modules_to_save: Iterable[str] = (),
    values: bool = True,
    layers: dict[str, nn.Module] | None = None,
) -> None:
    """Raise ValueError with every reason why a target cannot be adapted.

    Args:
        modules_to_save: paths of modules to train fully.
        values: as for :func:`find_targets`.
        layers: those of :func:`ipca.nn.registry.named_layers`, where they are known.
    """
    check_not_replicated(model)
    layers = named_layers(model) if layers is None else layers
    paths = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    reasons: dict[str, list[str]] = {}
    whole = tuple(f"{name}." for name in modules_to_save)
    check = partial(_unsupported_reason, modules=layers, paths=paths, owners=owners, values=values)
    rooms = [4.0 * math.prod(target.shape) if target.quantized else 1.0 for target in targets]
    for target, why in zip(targets, thread_map(check, targets, rooms), strict=True):
        if f"{target.name}.".startswith(whole):
            why = "PEFT would save it whole, with a module in whose name its own ends; exclude one of them"
        if why:
            reasons.setdefault(why, []).append(target.name or type(model).__name__)
    beside = _beside_stacks(layers, [target.name for target in targets], modules_to_save)
    if beside:
        reasons[BESIDE_STACK] = beside
    if reasons:
        raise ValueError("cannot adapt " + "; ".join(f"{few(names)}: {why}" for why, names in reasons.items()))


def _unsupported_reason(
    target: Target, modules: dict[str, nn.Module], paths: Counter[int], owners: Counter[int], values: bool
) -> str | None:
    module = modules[target.name]
    if isinstance(module, WindowLayer):
        return "it is adapted already; unload the adapter first, or exclude it"
    if not target.name:
        return "it is the model itself; use LinearPC.from_linear"
    if _in_peft(modules, target.name):
        return "it belongs to a PEFT adapter; merge and unload that first"
    if isinstance(modules.get(target.name.rpartition(".")[0]), nn.MultiheadAttention):
        return MULTIHEAD
    if hasattr(module, "parametrizations"):
        return PARAMETRIZED
    if any(is_sharded(parameter) for parameter in module.parameters(recurse=False)):
        return "its weight is sharded already; adapt the model first, then call fully_shard or parallelize the rest"
    if target.kind is None:
        return _unsupported_module(target.name, module)
    if why := _holds_more(target, module):
        return why
    if not target.quantized and has_other_hooks(module):  # a quantized layer is called, and so keeps its hooks
        return "it has hooks or a replaced forward, which would be lost; adapt the model before attaching them"
    owner = modules[target.name.rpartition(".")[0]]
    if is_offloaded(owner if isinstance(module, ExpertStack) else module):
        return OFFLOADED
    if isinstance(module, ExpertStack):
        why = _unsupported_stack(target, owner)
        if why:
            return why
    if paths[id(owner if isinstance(module, ExpertStack) else module)] > 1:
        return SHARED
    return _unsupported_weight(target, module, owners, values)


def _holds_more(target: Target, module: nn.Module) -> str | None:
    """The reason why a layer that holds more than its weight and bias cannot be replaced by another, or None."""
    held = [] if target.kind is None or target.quantized else held_beside(module)
    if not held:
        return None
    return (
        f"it holds {few(held)} beside its weight and bias, which would be lost; remove what added it, such as "
        "torch.nn.utils.prune.remove, remove_weight_norm and remove_spectral_norm do, or exclude the layer"
    )


def _unsupported_module(name: str, module: nn.Module) -> str:
    stacks = [f"{name}.{leaf}" for leaf in stack_names(module)]
    if stacks and not type(module).__module__.startswith("torch."):  # whose 3-D parameters are no experts
        return f"it is a module of experts; name its stacks of weights, {' and '.join(stacks)}"
    return (
        f"it is a {type(module).__name__}, not an nn.Linear, nn.Embedding, nn.Conv1d, Conv2d or Conv3d, a "
        "transformers Conv1D, or a stack of experts' weights"
    )


def _unsupported_stack(target: Target, owner: nn.Module) -> str | None:
    """The reason why a stack of weights that ``owner`` has as a parameter cannot be adapted, or None."""
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


def _unsupported_weight(target: Target, module: nn.Module, owners: Counter[int], values: bool) -> str | None:
    """The reason why the weight of a layer with a kind, or one of its settings, cannot be adapted, or None."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    quantized = target.quantized
    if quantized and target.form == "residual":
        return RESIDUAL
    if not quantized and type(weight.data) is not Tensor:
        return f"its weight is a {type(weight.data).__name__}, not a plain tensor"
    if owners[id(weight)] > 1:
        return TIED
    why = unsupported_reason(module, target.kind, dropout=target.dropout)
    if why:
        return why
    try:
        if values:
            check_matrix(read_layer(module, target.kind)[0], dims=(2, 3))
        target.window.check_fits(target.shape)
    except (TypeError, ValueError) as error:
        return str(error).rstrip(".") + " (or exclude the layer, or train it fully)"
    return None


def _beside_stacks(modules: dict[str, nn.Module], targets: Iterable[str], modules_to_save: Iterable[str]) -> list[str]:
    """Targets, adapted layers and ``modules_to_save`` in a module of experts that are not its stacks."""
    adapted = [name for name, module in modules.items() if isinstance(module, WindowLayer)]
    layers = dict.fromkeys([*adapted, *targets])
    owner = {name: name.rpartition(".")[0] for name in layers if isinstance(modules[name], ExpertStack | StackPC)}
    inside = tuple(f"{experts}." for experts in owner.values() if experts)
    return [
        name
        for name in (*layers, *modules_to_save)
        if name.startswith(tuple(path for path in inside if path != f"{owner.get(name)}."))
    ]


def _in_peft(modules: dict[str, nn.Module], name: str) -> bool:
    """Whether the module is a tuner layer of PEFT, or in one."""
    parts = name.split(".")
    return any(of_peft(modules.get(".".join(parts[:i]))) for i in range(len(parts) + 1))


def of_peft(module: nn.Module | None) -> bool:
    """Whether the module is a tuner layer of PEFT, by the name of its base class: PEFT need not be installed."""
    return any(base.__name__ == "BaseTunerLayer" for base in type(module).__mro__)


def few(names: list[str], shown: int = 3) -> str:
    """The first of ``names`` for a message, and how many there are more."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
