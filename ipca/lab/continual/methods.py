"""Methods of continual learning: those that train windows, the registry of all, and checks of options and model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ipca._atomic import uninterrupted
from ipca.analysis.linalg import check_finite
from ipca.lab.continual import lora
from ipca.lab.continual.method import Method, Setup
from ipca.lab.continual.osf import osf_method
from ipca.model.apply import adapt, adapted_layers, install, train_only_adapter
from ipca.model.decompose import SourceMatrix, source_matrix, split_window, window_of
from ipca.model.settings import AdapterSettings
from ipca.model.targets import Target, find_modules_to_save, find_targets
from ipca.nn.initialization import InitialFactors
from ipca.nn.layer_kinds import LINEAR
from ipca.nn.registry import get_layer
from ipca.svd import WindowSVD
from ipca.window import Window


def fresh(setup: Setup) -> Method:
    """For every task the window of the current weights."""
    return Method(begin=lambda model, index: _adapt_current(model, setup))


def principal(setup: Setup) -> Method:
    """:func:`fresh` with the largest components, as in PiSSA (arXiv 2404.02948)."""
    return fresh(replace(setup, settings=replace(setup.settings, window="principal", window_pattern={})))


def minor(setup: Setup) -> Method:
    """:func:`fresh` with the smallest components, as in MiLoRA (arXiv 2406.09044)."""
    return fresh(replace(setup, settings=replace(setup.settings, window="minor", window_pattern={})))


def fixed(setup: Setup) -> Method:
    """The same window of the original weights for every task."""
    return _windows_of_basis(setup, 1)


def disjoint(setup: Setup) -> Method:
    """For every task another window of the original weights.

    The block of ``tasks · rank`` components at the position that ``settings.window`` gives a window of that size is
    split into windows of ``rank``; the first task gets the one with the largest singular values.

    Raises:
        ValueError: ``tasks`` is None, or a layer has fewer components than that; the message names it.
    """
    if setup.tasks is None:
        raise ValueError("method 'disjoint' divides the components among all tasks; pass their number as tasks=….")
    return _windows_of_basis(setup, setup.tasks)


def _windows_of_basis(setup: Setup, windows: int) -> Method:
    basis = _Basis(setup, windows)
    return Method(begin=basis.begin, state=basis.tensors)


def _adapt_current(model: nn.Module, setup: Setup) -> None:
    adapt(model, setup.settings, cache=setup.cache, progress=False)


class _Basis:
    """``windows`` adjacent windows of the weights at the first task; task ``i`` trains window ``i % windows``.

    The initial factors are ``U_w √(S_w / scaling)`` and ``√(S_w / scaling) Vh_w`` of those weights, whatever has been
    folded into the weights since; the layer keeps the remainder, so its function is that of the current weights.
    """

    def __init__(self, setup: Setup, windows: int) -> None:
        self.setup, self.windows = setup, windows
        self.blocks: dict[str, WindowSVD] = {}

    def tensors(self) -> Iterable[Tensor]:
        return [tensor for block in self.blocks.values() for tensor in (block.U, block.S, block.Vh)]

    def begin(self, model: nn.Module, index: int) -> None:
        blocks = self.blocks or {target.name: self._block(model, target) for target in self.setup.targets}
        factors = [self._initial_factors(model, target, blocks[target.name], index) for target in self.setup.targets]
        self.blocks = blocks
        with uninterrupted():
            install(model, zip(self.setup.targets, factors, strict=True))
            train_only_adapter(model, self.setup.modules_to_save)

    def _block(self, model: nn.Module, target: Target) -> WindowSVD:
        weight = source_matrix(get_layer(model, target.name), target.name).weight
        check_finite(target.name, weight)
        window = replace(target.window, rank=self.windows * target.window.rank)
        return window_of(target, self.setup.settings, weight, window=window, cache=self.setup.cache)

    def _initial_factors(self, model: nn.Module, target: Target, block: WindowSVD, index: int) -> InitialFactors:
        weight = source_matrix(get_layer(model, target.name), target.name).weight
        part = part_of(block, index % self.windows, target.window.rank, weight.device)
        target = replace(target, window=part.report.window)
        return split_window(target, self.setup.settings, SourceMatrix(weight, "weight", None), part)


def part_of(block: WindowSVD, place: int, rank: int, device: torch.device) -> WindowSVD:
    """Components ``[place · rank, (place + 1) · rank)`` of ``block`` on ``device``; of a stack, of every matrix."""
    part = slice(place * rank, (place + 1) * rank)
    reports = tuple(replace(r, window=Window(r.window.index + part.start, rank)) for r in block.reports)
    U, S, Vh = (factor.to(device) for factor in (block.U[..., part], block.S[..., part], block.Vh[..., part, :]))
    return WindowSVD(U, S, Vh, reports)


@dataclass(frozen=True)
class Kind:
    """Constructor and capabilities of a method.

    Attributes:
        make: builds the method for one model.
        folds: whether a task's factors are folded into the weights when it ends, so that they can be kept separately.
        factors: whether the layers are :class:`ipca.nn.WindowLayer`, whose factors can be frozen one at a time and
            which :func:`ipca.save_adapter` can write while a task runs.
        layers: the kinds of layers it adapts, see :mod:`ipca.nn.layer_kinds`; None for all.
        frozen: the factors that may be frozen. Plain LoRA starts at ``B = 0`` and would learn nothing with ``B``
            frozen; O-LoRA's penalty acts on ``A``.
    """

    make: Callable[[Setup], Method]
    folds: bool = True
    factors: bool = True
    layers: tuple[str, ...] | None = None
    frozen: tuple[str, ...] = ("A", "B")


METHODS = {
    "fresh": Kind(fresh),
    "fixed": Kind(fixed),
    "disjoint": Kind(disjoint),
    "pissa": Kind(principal),
    "milora": Kind(minor),
    "lora": Kind(lora.one_lora, folds=False, frozen=("A",)),
    "lora-fresh": Kind(lora.fresh_lora, frozen=("A",)),
    "o-lora": Kind(lora.o_lora, frozen=()),
    "sd-lora": Kind(lora.sd_lora, folds=False, factors=False, layers=LINEAR, frozen=()),
    "osf": Kind(osf_method, folds=False, factors=False, layers=("linear",), frozen=()),
}
"""All methods of :class:`ipca.lab.continual.ContinualLearner`; described in docs/continual.md."""


def find_kind(method: str) -> Kind:
    """The registered entry of ``method``.

    Raises:
        ValueError: it is not one of :data:`METHODS`.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; choose one of {', '.join(METHODS)}.")
    return METHODS[method]


OTHER_FACTOR = {"A": "B", "B": "A"}


def frozen_factor(settings: AdapterSettings, frozen: str | None) -> str | None:
    """The factor that does not train, ``"A"`` or ``"B"``, by a learner's argument or by its settings; None for none.

    Raises:
        TypeError: ``settings`` are something else.
        ValueError: they freeze one factor and ``frozen`` names the other.
    """
    if not isinstance(settings, AdapterSettings):
        raise TypeError(f"settings must be an ipca.model.AdapterSettings, got {settings!r}.")
    given = OTHER_FACTOR.get(settings.train)
    if frozen and given and frozen != given:
        raise ValueError(f"train={settings.train!r} in the settings and frozen={frozen!r} leave no factor; omit one.")
    return frozen or given


def check_options(
    method: str,
    kind: Kind,
    tasks: int | None,
    keep: bool,
    frozen: str | None,
    orthogonality: float | None,
    protected: float | None,
) -> None:
    """Raise ValueError if a learner's argument is out of range or does not apply to its method."""
    if tasks is not None and (isinstance(tasks, bool) or not isinstance(tasks, int) or tasks < 1):
        raise ValueError(f"tasks must be an int of at least 1, got {tasks!r}.")
    if keep and not kind.folds:
        raise ValueError(f"method {method!r} folds nothing after a task, so there is nothing to keep; omit keep=True.")
    if frozen not in (None, "A", "B"):
        raise ValueError(f"frozen must be 'A', 'B' or None, got {frozen!r}.")
    if frozen and not kind.factors:
        raise ValueError(f"method {method!r} does not train a single pair of factors; omit frozen, or train.")
    if frozen and frozen not in kind.frozen:
        why = "it starts at B = 0 and would learn nothing" if frozen == "B" else "its penalty acts on A only"
        raise ValueError(f"method {method!r} cannot freeze {frozen}: {why}; omit frozen, or train.")
    if orthogonality is not None and method != "o-lora":
        raise ValueError(f"orthogonality applies to method 'o-lora' only, not to {method!r}; omit it.")
    if orthogonality is not None and not orthogonality >= 0:
        raise ValueError(f"orthogonality must be at least 0, got {orthogonality}.")
    if protected is not None and method != "osf":
        raise ValueError(f"protected applies to method 'osf' only, not to {method!r}; omit it.")
    if protected is not None and not 0 < protected < 1:
        raise ValueError(f"protected must be a share of the components above 0 and below 1, got {protected}.")


def find_layers(model: nn.Module, method: str, kind: Kind, settings: AdapterSettings) -> tuple[list[Target], list[str]]:
    """Find the layers to adapt and the modules to train fully; every check runs before the first task begins.

    Raises:
        TypeError, ValueError: as :func:`ipca.apply_pc`, or the method does not support a layer; the message names it.
    """
    present = adapted_layers(model)
    if present:
        raise ValueError(f"{next(iter(present))} is already adapted; call ipca.unload(model) first.")
    modules_to_save = find_modules_to_save(model, settings)
    targets = find_targets(model, settings, modules_to_save=modules_to_save)
    for target in targets:
        if target.quantized:
            raise ValueError(f"{target.name} is quantized, and a task cannot be folded into it; exclude it.")
        if kind.layers is not None and target.kind not in kind.layers:
            layer = get_layer(model, target.name)
            raise ValueError(f"method {method!r} adapts linear layers only; {target.name} is a {type(layer).__name__}.")
    if not kind.factors and settings.dropout:
        raise ValueError(f"method {method!r} does not support dropout, got {settings.dropout}; set it to 0.")
    return targets, modules_to_save


def check_room(targets: Iterable[Target], tasks: int) -> None:
    """Raise ValueError if the disjoint windows of all ``tasks`` do not fit into a layer's singular components."""
    for target in targets:
        d = min(target.shape[-2:])
        wanted = tasks * target.window.rank
        if wanted > d:
            raise ValueError(
                f"{tasks} tasks of rank {target.window.rank} need {wanted} disjoint components, but {target.name} "
                f"has {d}; use fewer tasks, a lower rank, or the method 'fixed' or 'fresh'."
            )
        window = replace(target.window, rank=wanted)
        try:
            if not window.needs_spectrum:
                window.resolve(d)
        except ValueError as error:
            raise ValueError(f"{target.name}: {tasks} windows of rank {target.window.rank}: {error}") from None
