"""Adapt a model for a method given by name: a window, plain LoRA, full fine-tuning, a baseline, or a control."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor, nn

from ipca._atomic import uninterrupted
from ipca.lab.baselines.initialization import (
    haar,
    layer_generator,
    matched,
    plain_lora_factors,
    random_window,
)
from ipca.lab.baselines.methods import kind_of, needs_inputs
from ipca.lab.baselines.oplora import project_factors
from ipca.lab.baselines.peft_methods import PEFT_METHODS, apply_peft, check_kinds
from ipca.model.apply import adapt, adapted_layers, check_can_train, install, train_only_adapter
from ipca.model.decompose import decompose_targets, source_matrix, split_window, window_of
from ipca.model.settings import AdapterSettings
from ipca.model.targets import Target, find_modules_to_save, find_targets
from ipca.nn.initialization import InitialFactors
from ipca.nn.registry import get_layer
from ipca.svd import SpectralCache, WindowSVD
from ipca.window import Window

Model = TypeVar("Model", bound=nn.Module)
_OF_WINDOWS: dict[str, Any] = {
    "frozen-A": {"train": "B"},
    "frozen-B": {"train": "A"},
    "lora-null": {"window": "inputs:minor"},
}
"""Methods that are :func:`ipca.apply_pc` with other settings."""
_DIRECTIONS = {"matched-principal": "principal", "matched-middle": "middle", "matched-minor": "minor"}


def apply(
    model: Model,
    method: str,
    settings: AdapterSettings,
    *,
    seed: int = 0,
    cache: SpectralCache | None = None,
    calibration: Iterable[Any] | None = None,
) -> Model:
    """Adapt ``model`` in place for ``method``, with the layers, rank, alpha and form of ``settings``.

    =====================================  =========================================================================
    a window, such as ``"0.25"``           :func:`ipca.apply_pc` with that window; ``"inputs:…"`` of ``calibration``
    ``"auto"``                             the same with the window that ``calibration`` suggests (experimental)
    ``"lora"``                             plain LoRA: random ``A0``, ``B0 = 0``
    ``"full"``                             no adapter: the weights of the layers are fully trained
    ``"random-window"``                    a window at a random position in each layer
    ``"haar"``                             the reference's singular values on random directions
    ``"frozen-A"``, ``"frozen-B"``         the reference window with one factor frozen
    ``"matched-principal"``, ``"-minor"``  the directions of that end with the reference's singular values
    ``"matched-middle"``                   the middle's directions with the singular values of the reference, an end
    ``"mica"``                             PEFT's MiCA (arXiv 2604.01694): ``B`` is the minor left singular vectors and
                                           frozen, ``A = 0`` trains
    ``"kasa"``                             PEFT's KaSA (2412.06071): the minor components are cut off, and
                                           ``B diag(ΔΣ) A`` trains; see :func:`ipca.lab.baselines.penalty`
    ``"osf"``                              PEFT's OSF (2504.07097): the lower half of the components trains, by
                                           gradients projected off the upper half; ``rank`` has no effect
    ``"oft"``                              PEFT's OFT (2306.07280) by the exact Cayley transform: ``W R``, ``R``
                                           orthogonal in blocks of 4 · rank, about as many parameters as LoRA's
    ``"corda-ipm"``, ``"corda-kpm"``       PEFT's CorDA (2406.05223): the principal or minor components of
                                           ``W cov(x)``, in the inputs of ``calibration``
    ``"oplora"``                           LoRA projected off the ``rank`` leading components on both sides (2510.13003)
    ``"lora-null"``                        LoRA-Null (2503.02659): the part of ``W`` that acts on the ``rank``
                                           directions that the inputs of ``calibration`` use least
    =====================================  =========================================================================

    The *reference* is ``settings.window``. No method changes the model's function before training, but KaSA, which cuts
    off the ``rank`` smallest components of each weight; CorDA rounds a residual weight. Those of PEFT take linear
    layers only, MiCA and CorDA ``Conv1D`` too; they train in float32 beside a 16-bit weight, OSF in the weight's dtype,
    and leave ``form``, ``tol``, ``adapter_dtype``, ``train`` and ``magnitude`` out; OSF, OFT and ``"full"`` also
    ``alpha`` and ``dropout``.

    Args:
        seed: of random factors, directions and positions; together with the layer's path it determines them.
        cache: of decompositions, for all methods that need one, but those of PEFT.
        calibration: batches of unlabeled inputs, for ``"auto"``, windows of inputs, CorDA and LoRA-Null.

    Returns:
        The same model.

    Raises:
        ImportError: a method of PEFT without PEFT.
        TypeError, ValueError, RuntimeError: as :func:`ipca.apply_pc`, or an unknown method; the model is unchanged.
    """
    kind = kind_of(method)
    batches = calibration if needs_inputs(method) else None
    if needs_inputs(method) and batches is None:
        raise ValueError(f"method {method!r} needs calibration: batches of unlabeled inputs.")
    check_settings(method, settings)
    if kind in ("window", "auto") or method in _OF_WINDOWS:
        chosen = replace(settings, **_OF_WINDOWS.get(method, {"window": method}))
        return adapt(model, chosen, calibration=batches, cache=cache, progress=False)
    check_can_train(model)
    modules_to_save = find_modules_to_save(model, settings)
    targets = find_targets(model, settings, modules_to_save=modules_to_save)
    _check_targets(method, targets)
    if kind == "full":
        _train_full_weights(model, targets, modules_to_save)
        return model
    if method in PEFT_METHODS:
        apply_peft(model, method, targets, settings, modules_to_save, seed=seed, batches=batches)
        return model
    factors = _all_initial_factors(model, method, targets, settings, seed, cache)
    tops = [_leading(model, target, settings, cache) for target in targets] if method == "oplora" else []
    with uninterrupted():
        install(model, zip(targets, factors, strict=True))
        train_only_adapter(model, modules_to_save)
        for target, top in zip(targets, tops, strict=False):
            project_factors(adapted_layers(model)[target.name], top.U, top.Vh)
    return model


def check_settings(method: str, settings: AdapterSettings) -> None:
    """Raise ValueError where ``method`` cannot work with ``settings``, whatever the model."""
    if method in ("lora", "oplora") and settings.train == "A":
        raise ValueError(
            f"method {method!r} starts from B = 0, and with train='A' that never trains; use 'B' or 'both', or leave "
            "the method out."
        )
    if method == "oft" and settings.rank_pattern:
        raise ValueError("'oft' has one block size, 4 · rank, for all layers; leave rank_pattern out.")
    if kind_of(method) != "control" or method == "random-window":
        return
    for text in (settings.window, *settings.window_pattern.values()):
        if Window(text, settings.rank).needs_calibration:
            raise ValueError(
                f"the control {method!r} differs from the window of the settings, which must be one of the weight, not "
                f"{text!r}; choose another window there, or leave the control out."
            )


def check_layers(model: nn.Module, methods: Iterable[str], settings: AdapterSettings) -> None:
    """Raise TypeError or ValueError, as :func:`apply`, where one of ``methods`` is not for a layer of ``model``."""
    modules_to_save = find_modules_to_save(model, settings)
    targets = find_targets(model, settings, modules_to_save=modules_to_save, values=False)
    for method in methods:
        _check_targets(method, targets)


def _check_targets(method: str, targets: list[Target]) -> None:
    if method in PEFT_METHODS:
        check_kinds(method, targets)
    quantized = [target.name for target in targets if target.quantized]
    if quantized and kind_of(method) == "full":
        raise ValueError(f"{quantized[0]} is quantized and cannot be fully trained; leave the method 'full' out.")


def layer_weights(model: nn.Module, settings: AdapterSettings) -> dict[str, Tensor]:
    """By path, the weights ``(out, in)`` of the layers that ``settings`` name in a plain model; they share its memory.

    Raises:
        ValueError: as :func:`ipca.apply_pc` for the choice of layers.
    """
    modules_to_save = find_modules_to_save(model, settings)
    targets = find_targets(model, settings, modules_to_save=modules_to_save, values=False)
    return {t.name: source_matrix(get_layer(model, t.name), t.name).weight for t in targets}


def needed_windows(method: str, target: Target, seed: int) -> list[Window]:
    """All windows of a layer that :func:`apply` decomposes for ``method``.

    Empty for windows that are found from inputs, and for methods without a window.
    """
    rank = target.window.rank
    if kind_of(method) == "window":
        return [] if needs_inputs(method) else [Window(method, rank)]
    if method == "random-window":
        return [_random_window(target, seed)]
    if method == "oplora":
        return [Window("principal", rank)]
    if method in _DIRECTIONS:
        return [target.window, Window(_DIRECTIONS[method], rank)]
    return [target.window] if kind_of(method) == "control" else []


def _all_initial_factors(
    model: nn.Module,
    method: str,
    targets: list[Target],
    settings: AdapterSettings,
    seed: int,
    cache: SpectralCache | None,
) -> list[InitialFactors]:
    if method == "random-window":
        targets = [replace(target, window=_random_window(target, seed)) for target in targets]
        return decompose_targets(model, targets, settings, cache=cache, progress=False)
    return [_initial_factors(model, method, target, settings, seed, cache) for target in targets]


def _initial_factors(
    model: nn.Module, method: str, target: Target, settings: AdapterSettings, seed: int, cache: SpectralCache | None
) -> InitialFactors:
    matrix = source_matrix(get_layer(model, target.name), target.name)
    generator = layer_generator(seed, target.name)
    if method in ("lora", "oplora"):
        dtype = settings.factor_dtype(matrix.weight.dtype)
        factors = plain_lora_factors(matrix.weight, target.window.rank, generator, adapter_dtype=dtype)
        return factors if matrix.digest is None else replace(factors, base_sha256=matrix.digest)

    def components(window: Window) -> WindowSVD:
        return window_of(target, settings, matrix.weight, window=window, cache=cache)

    reference = components(target.window)
    if method == "haar":
        found = haar(reference, generator)
    else:
        found = matched(components(Window(_DIRECTIONS[method], target.window.rank)), reference)
    return split_window(target, settings, matrix, found)


def _leading(model: nn.Module, target: Target, settings: AdapterSettings, cache: SpectralCache | None) -> WindowSVD:
    """The components that OPLoRA protects."""
    weight = source_matrix(get_layer(model, target.name), target.name).weight
    return window_of(target, settings, weight, window=Window("principal", target.window.rank), cache=cache)


def _random_window(target: Target, seed: int) -> Window:
    return random_window(target.window.rank, min(target.shape[-2:]), layer_generator(seed, target.name))


def _train_full_weights(model: nn.Module, targets: list[Target], modules_to_save: list[str]) -> None:
    train_only_adapter(model, modules_to_save)
    for target in targets:
        get_layer(model, target.name).get_parameter("weight").requires_grad_(True)
