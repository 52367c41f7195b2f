"""Adapt a model for a method given by name: a window, plain LoRA, full fine-tuning, or a control."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, TypeVar

from torch import nn

from ipca._atomic import uninterrupted
from ipca.lab.baselines.initialization import haar, layer_generator, matched, plain_lora_factors, random_window
from ipca.lab.baselines.methods import kind_of
from ipca.model.apply import adapt, adapted_layers, install, train_only_adapter
from ipca.model.decompose import decompose_targets, source_matrix, split_window, window_of
from ipca.model.settings import AdapterSettings
from ipca.model.targets import Target, find_modules_to_save, find_targets
from ipca.nn.initialization import InitialFactors
from ipca.nn.registry import get_layer
from ipca.svd import SpectralCache, WindowSVD
from ipca.window import Window

Model = TypeVar("Model", bound=nn.Module)
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
    a window, such as ``"0.25"``           :func:`ipca.apply_pc` with that window
    ``"auto"``                             the same with the window that ``calibration`` suggests (experimental)
    ``"lora"``                             plain LoRA: random ``A0``, ``B0 = 0``
    ``"full"``                             no adapter: the weights of the layers are fully trained
    ``"random-window"``                    a window at a random position in each layer
    ``"haar"``                             the reference's singular values on random directions
    ``"frozen-A"``, ``"frozen-B"``         the reference window with one factor frozen
    ``"matched-principal"``, ``"-minor"``  the directions of that end with the reference's singular values
    ``"matched-middle"``                   the middle's directions with the singular values of the reference, an end
    =====================================  =========================================================================

    The *reference* is ``settings.window``. No method changes the model's function before training.

    Args:
        seed: of random factors, directions and positions; together with the layer's path it determines them.
        cache: of decompositions, for all methods that need one.
        calibration: batches of unlabeled inputs, for ``"auto"``.

    Returns:
        The same model.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`ipca.apply_pc`, or an unknown method; the model is unchanged.
    """
    kind = kind_of(method)
    if kind == "window":
        return adapt(model, replace(settings, window=method), cache=cache, progress=False)
    if kind == "auto":
        return adapt(model, replace(settings, window="auto"), calibration=calibration, cache=cache, progress=False)
    if method in ("frozen-A", "frozen-B"):
        adapt(model, settings, cache=cache, progress=False)
        for layer in adapted_layers(model).values():
            (layer.lora_A if method == "frozen-A" else layer.lora_B).requires_grad_(False)
        return model
    modules_to_save = find_modules_to_save(model, settings)
    targets = find_targets(model, settings, modules_to_save=modules_to_save)
    if kind == "full":
        _train_full_weights(model, targets, modules_to_save)
        return model
    factors = _all_initial_factors(model, method, targets, settings, seed, cache)
    with uninterrupted():
        install(model, zip(targets, factors, strict=True))
        train_only_adapter(model, modules_to_save)
    return model


def needed_windows(method: str, target: Target, seed: int) -> list[Window]:
    """All windows of a layer that :func:`apply` decomposes for ``method``.

    Empty for ``"auto"``, which needs the whole spectrum, and for methods without a window.
    """
    rank = target.window.rank
    if kind_of(method) == "window":
        return [Window(method, rank)]
    if method == "random-window":
        return [_random_window(target, seed)]
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
    if method == "lora":
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


def _random_window(target: Target, seed: int) -> Window:
    return random_window(target.window.rank, min(target.shape[-2:]), layer_generator(seed, target.name))


def _train_full_weights(model: nn.Module, targets: list[Target], modules_to_save: list[str]) -> None:
    quantized = [target.name for target in targets if target.quantized]
    if quantized:
        raise ValueError(f"{quantized[0]} is quantized and cannot be fully trained; leave the method 'full' out.")
    train_only_adapter(model, modules_to_save)
    for target in targets:
        get_layer(model, target.name).get_parameter("weight").requires_grad_(True)
