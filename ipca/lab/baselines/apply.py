"""Adapt a model for a method by name: a window, plain LoRA, whole weights, or a control."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, TypeVar

from torch import nn

from ipca._atomic import uninterrupted
from ipca.lab.baselines.initialization import haar, layer_generator, matched, plain_lora_start, random_window
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
_ENDS = {"matched-principal": "principal", "matched-minor": "minor"}


def apply(
    model: Model,
    method: str,
    config: AdapterSettings,
    *,
    seed: int = 0,
    cache: SpectralCache | None = None,
    calibration: Iterable[Any] | None = None,
) -> Model:
    """Adapt ``model`` in place for ``method``; ``config`` says which layers, rank, alpha, form and
    modules_to_save.

    ===================================  ======================================================================
    a window, such as ``"0.25"``         :func:`ipca.apply_pc` with that window
    ``"auto"``                           the same with the window that ``calibration`` suggests (experimental)
    ``"lora"``                           plain LoRA: random ``A0``, ``B0 = 0``
    ``"full"``                           no adapter: the weights of the layers are fully trained
    ``"random-window"``                  a window at a random place in each layer
    ``"haar"``                           the reference's singular values on random directions
    ``"frozen-A"``, ``"frozen-B"``       the reference window with one factor frozen
    ``"matched-principal"``, ``"-minor"``  the directions of that end with the reference's singular values
    ===================================  ======================================================================

    The *reference* is ``config.window``. Every method leaves the model's function as it was.

    Args:
        seed: of random factors, directions and places; with the layer's path it decides them alone.
        cache: of decompositions, for all methods that need one.
        calibration: batches of unlabeled inputs, for ``"auto"``.

    Returns:
        The same model.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`ipca.apply_pc`, or an unknown method; the model is unchanged.
    """
    kind = kind_of(method)
    if kind == "window":
        return adapt(model, replace(config, window=method), cache=cache, progress=False)
    if kind == "auto":
        return adapt(model, replace(config, window="auto"), calibration=calibration, cache=cache, progress=False)
    if method in ("frozen-A", "frozen-B"):
        adapt(model, config, cache=cache, progress=False)
        for layer in adapted_layers(model).values():
            (layer.lora_A if method == "frozen-A" else layer.lora_B).requires_grad_(False)
        return model
    modules_to_save = find_modules_to_save(model, config)
    targets = find_targets(model, config, modules_to_save=modules_to_save)
    if kind == "full":
        _train_whole_weights(model, targets, modules_to_save)
        return model
    starts = _starts(model, method, targets, config, seed, cache)
    with uninterrupted():
        install(model, zip(targets, starts, strict=True))
        train_only_adapter(model, modules_to_save)
    return model


def needed_windows(method: str, target: Target, seed: int, d: int) -> list[Window]:
    """Every window of a layer with ``d`` singular values that :func:`apply` decomposes for ``method``.

    None for ``"auto"``, which looks at the whole spectrum, and for methods without a window.
    """
    rank = target.window.rank
    if kind_of(method) == "window":
        return [Window(method, rank)]
    if method == "random-window":
        return [_random_window(target, seed, d)]
    if method in _ENDS:
        return [target.window, Window(_ENDS[method], rank)]
    return [target.window] if kind_of(method) == "control" else []


def _starts(
    model: nn.Module,
    method: str,
    targets: list[Target],
    config: AdapterSettings,
    seed: int,
    cache: SpectralCache | None,
) -> list[InitialFactors]:
    if method == "random-window":
        targets = [replace(t, window=_random_window(t, seed, min(t.shape[-2:]))) for t in targets]
        return decompose_targets(model, targets, config, cache=cache, progress=False)
    return [_start(model, method, target, config, seed, cache) for target in targets]


def _start(
    model: nn.Module, method: str, target: Target, config: AdapterSettings, seed: int, cache: SpectralCache | None
) -> InitialFactors:
    matrix = source_matrix(get_layer(model, target.name), target.name)
    generator = layer_generator(seed, target.name)
    if method == "lora":
        dtype = config.factor_dtype(matrix.weight.dtype)
        start = plain_lora_start(matrix.weight, target.window.rank, generator, adapter_dtype=dtype)
        return start if matrix.digest is None else replace(start, base_sha256=matrix.digest)

    def components(window: Window) -> WindowSVD:
        return window_of(target, config, matrix.weight, window=window, cache=cache)

    reference = components(target.window)
    if method == "haar":
        found = haar(reference, generator)
    else:
        found = matched(components(Window(_ENDS[method], target.window.rank)), reference)
    return split_window(target, config, matrix, found)


def _random_window(target: Target, seed: int, d: int) -> Window:
    return random_window(target.window.rank, d, layer_generator(seed, target.name))


def _train_whole_weights(model: nn.Module, targets: list[Target], modules_to_save: list[str]) -> None:
    quantized = [target.name for target in targets if target.quantized]
    if quantized:
        raise ValueError(f"{quantized[0]} is quantized and cannot be fully trained; leave the method 'full' out.")
    train_only_adapter(model, modules_to_save)
    for target in targets:
        get_layer(model, target.name).get_parameter("weight").requires_grad_(True)
