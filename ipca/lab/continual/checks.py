"""What ContinualLearner refuses before it touches the model."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ipca.lab.continual.methods import Kind
from ipca.model.apply import adapted_layers
from ipca.model.decompose import source_matrix
from ipca.model.settings import AdapterSettings
from ipca.model.targets import Target, find_modules_to_save, find_targets
from ipca.nn.layer_kinds import layer_kind
from ipca.nn.quantization import quantization_kind
from ipca.nn.registry import get_layer
from ipca.window import Window


def check_options(
    method: str,
    kind: Kind,
    tasks: int | None,
    keep: bool,
    frozen: str | None,
    orthogonality: float | None,
    protected: float | None,
) -> None:
    """Raise ValueError for an argument of the learner that is out of range or not its method's."""
    if tasks is not None and (isinstance(tasks, bool) or not isinstance(tasks, int) or tasks < 1):
        raise ValueError(f"tasks must be an int of at least 1, got {tasks!r}.")
    if keep and not kind.folds:
        raise ValueError(
            f"method {method!r} folds nothing after a task, so keep=True has nothing to keep; leave it out."
        )
    if frozen not in (None, "A", "B"):
        raise ValueError(f"frozen must be 'A', 'B' or None, got {frozen!r}.")
    if frozen and not kind.factors:
        raise ValueError(f"method {method!r} has no one pair of factors of which one could be frozen; leave it out.")
    if frozen and frozen not in kind.frozen:
        why = "it starts at B = 0 and would learn nothing" if frozen == "B" else "its penalty moves A alone"
        raise ValueError(f"method {method!r} cannot have {frozen} frozen: {why}; leave it out.")
    if orthogonality is not None and method != "o-lora":
        raise ValueError(f"orthogonality is of method 'o-lora' alone, not of {method!r}; leave it out.")
    if orthogonality is not None and not orthogonality >= 0:
        raise ValueError(f"orthogonality must be at least 0, got {orthogonality}.")
    if protected is not None and method != "osf":
        raise ValueError(f"protected is of method 'osf' alone, not of {method!r}; leave it out.")
    if protected is not None and not 0 < protected < 1:
        raise ValueError(f"protected is a share of the components above 0 and below 1, got {protected}.")


def find_layers(model: nn.Module, method: str, kind: Kind, config: AdapterSettings) -> tuple[list[Target], list[str]]:
    """The layers to adapt and the modules to train fully, with every reason against found before a task begins.

    Raises:
        TypeError, ValueError: as :func:`ipca.apply_pc`, or the method cannot have a layer; the message names it.
    """
    if not isinstance(config, AdapterSettings):
        raise TypeError(f"config must be an ipca.PCConfig, got {config!r}.")
    present = adapted_layers(model)
    if present:
        raise ValueError(f"{next(iter(present))} is adapted already; ipca.unload(model) first.")
    modules_to_save = find_modules_to_save(model, config)
    targets = find_targets(model, config, modules_to_save=modules_to_save)
    for target in targets:
        layer = get_layer(model, target.name)
        if quantization_kind(layer) is not None:
            raise ValueError(
                f"{target.name} is quantized, and what a task learned cannot be folded into it; exclude it."
            )
        if kind.layers is not None and layer_kind(layer) not in kind.layers:
            raise ValueError(
                f"method {method!r} adapts linear layers alone; {target.name} is a {type(layer).__name__}."
            )
    if not kind.factors and config.dropout:
        raise ValueError(f"method {method!r} has no dropout of its own, got {config.dropout}; set it to 0.")
    return targets, modules_to_save


def check_room(model: nn.Module, targets: Iterable[Target], tasks: int) -> None:
    """Raise ValueError where the disjoint windows of all ``tasks`` do not fit into a layer's singular components."""
    for target in targets:
        d = min(source_matrix(get_layer(model, target.name), target.name, None).weight.shape[-2:])
        wanted = tasks * target.window.rank
        if wanted > d:
            raise ValueError(
                f"{tasks} tasks of rank {target.window.rank} need {wanted} components of their own, but {target.name} "
                f"has {d}; use fewer tasks, a lower rank, or the method 'fixed' or 'fresh'."
            )
        window = Window(target.window.start, wanted)
        try:
            if not window.needs_spectrum:
                window.resolve(d)
        except ValueError as error:
            raise ValueError(f"{target.name}: {tasks} windows of rank {target.window.rank}: {error}") from None
