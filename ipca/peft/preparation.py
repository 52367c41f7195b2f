"""Decomposition of the base weights of a whole model at once, by hand or as PEFT adapts it: in parallel, cached."""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

from peft import PeftModel, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ipca.model.apply import check_can_train
from ipca.model.calibration import decompose_calibrated
from ipca.model.decompose import UnquantizedWeights
from ipca.model.settings import AdapterSettings
from ipca.model.targets import Target, check_unmerged
from ipca.nn.initialization import InitialFactors
from ipca.nn.layer_kinds import matrix_shape, stack_names
from ipca.nn.offload import weights_maps
from ipca.nn.registry import get_layer
from ipca.peft.config import PCConfig
from ipca.peft.dispatch import admit_windows
from ipca.peft.layers import WindowLora, check_rank, in_peft_terms
from ipca.peft.parameter import ParamWrapper
from ipca.svd import SpectralCache

_ADAPTER, _INSIDE = "ipca_prepare", ".base_layer"


def prepare(
    model: nn.Module,
    config: PCConfig,
    *,
    cache: SpectralCache | str | os.PathLike[str] | None = None,
    unquantized_weights: UnquantizedWeights | None = None,
    calibration: Iterable[Any] | None = None,
    progress: bool = True,
) -> PCConfig:
    """Find the initial factors of every layer that ``config`` targets, so that PEFT can adapt ``model`` at once.

    ``peft.get_peft_model(model, prepare(model, config))``.

    Required where stock LoRA adapters are on the layers already: PEFT's own layers refuse a window, and here they are
    turned into layers that take one. Optional otherwise: PEFT's own functions decompose the layers as this does, in
    batches on a GPU, in parallel on a CPU. This function also takes the weights of quantized layers from before, shares
    the work among the ranks of a process group, all of which must call it, refuses tied weights, and changes nothing
    before every decomposition is done.

    Args:
        model: the base, or a PeftModel that is to get another adapter; unchanged but for the class of stock LoRA
            layers that ``config`` targets.
        config: the layers and their windows; it keeps the initial factors until PEFT creates the layers.
        cache: a folder, or a :class:`ipca.SpectralCache`, of windows decomposed before; what is missing is added.
            Default: that of ``config``.
        unquantized_weights: for quantized layers the weights they had before, see :func:`ipca.apply_pc`.
        calibration: for windows that are found from inputs, such as ``"inputs:minor"``: batches of unlabeled inputs of
            the base, see :func:`ipca.apply_pc`. Adapters that are there already are off while it runs over them.
        progress: show a progress bar, where that of ``config`` is True too.

    Returns:
        ``config`` itself.

    Raises:
        TypeError: ``config`` is not a PCConfig.
        ValueError: an adapter is merged into the weights.
        TypeError, ValueError, RuntimeError: as PEFT, or as :func:`ipca.apply_pc`; the message begins with the layer's
            path.
    """
    if not isinstance(config, PCConfig):
        raise TypeError(f"config must be an ipca.peft.PCConfig, got {type(config).__name__}.")
    check_can_train(model)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    check_unmerged(base)
    trial = _trial(base, config)
    layers = [layer for layer in trial.modules() if isinstance(layer, WindowLora) and layer.holds(_ADAPTER)]
    _check_untied(trial, layers)
    targets = _targets(trial, _ADAPTER, config, layers)
    initial = _decompose(
        trial,
        targets.values(),
        config,
        cache=config.cache if cache is None else cache,
        progress=progress and config.progress,
        unquantized_weights=_by_path(unquantized_weights),
        calibration=calibration,
    )
    admit_windows(base, set(targets))
    config.records.initial = dict(zip(targets, initial, strict=True))
    config.records.saved.clear()
    config.records.loaded = False
    return config


def start(model: nn.Module, adapter: str, config: PCConfig) -> None:
    """Decompose the weights of all layers of ``model`` that wait for the initial factors of ``adapter``, and set these.

    Every rank of a process group decomposes all of them: PEFT's functions may be called on one rank only. Under
    DeepSpeed ZeRO-3, where the weights are gathered one by one, they are decomposed one by one.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`ipca.window_svd`, before the first factor is set; the message
            begins with the layer's path.
    """
    waiting, config.records.waiting = config.records.waiting, []
    whole = [layer for layer in waiting if not hasattr(layer.base_parameter(), "ds_id")]
    targets = _targets(model, adapter, config, whole)
    found: dict[str, InitialFactors] = {}
    if targets:
        options: Any = {"cache": config.cache, "progress": config.progress, "share": False, "calibration": None}
        found = dict(zip(targets, _decompose(model, targets.values(), config, **options), strict=True))
    for layer in waiting:
        layer.set_initial(adapter, config, found.get(layer.path))


def _decompose(
    model: nn.Module,
    targets: Iterable[Target],
    config: PCConfig,
    *,
    cache: SpectralCache | str | os.PathLike[str] | None,
    **options: Any,
) -> list[InitialFactors]:
    """:func:`decompose_targets` with errors in the words of a PCConfig."""
    store = cache if isinstance(cache, SpectralCache | None) else SpectralCache(cache)
    try:
        return decompose_calibrated(model, list(targets), AdapterSettings(tol=config.tol), cache=store, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise type(error)(in_peft_terms(error).replace(_INSIDE, "")) from None


def _by_path(unquantized_weights: UnquantizedWeights | None) -> UnquantizedWeights | None:
    """The same weights by the path that a base layer has inside PEFT's."""
    if unquantized_weights is None:
        return None
    find = unquantized_weights.__getitem__ if isinstance(unquantized_weights, Mapping) else unquantized_weights
    return lambda name: find(name.replace(_INSIDE, ""))


def _trial(base: nn.Module, config: PCConfig) -> nn.Module:
    """A copy of ``base`` that shares every tensor with it, adapted by PEFT; its factors are on the meta device."""
    tensors: dict[int, Any] = {id(tensor): tensor for tensor in chain(base.parameters(), base.buffers())}
    tensors |= {id(weights): weights for module in base.modules() for weights in weights_maps(module)}
    trial, before = copy.deepcopy(base, tensors), [(p, p.requires_grad) for p in base.parameters()]
    admit_windows(trial)
    try:
        trial = inject_adapter_in_model(copy.deepcopy(config), trial, _ADAPTER, low_cpu_mem_usage=True)
        for layer in trial.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.enable_adapters(False)
        return trial
    finally:
        for parameter, trains in before:
            parameter.requires_grad_(trains)


def _check_untied(model: nn.Module, layers: Iterable[WindowLora]) -> None:
    """Raise ValueError where the weight of one of ``layers`` is tied to another module's."""
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for layer in layers:
        if owners[id(layer.base_parameter())] > 1:
            raise ValueError(
                f"{layer.path}: its weight is tied to another module's, which merging would change too; exclude it, or "
                "untie them."
            )


def _targets(model: nn.Module, adapter: str, config: PCConfig, layers: Iterable[WindowLora]) -> dict[str, Target]:
    """The base layers to decompose for an adapter of ``layers``, by the paths that these have in the base.

    Single parameters are left out; they have no module of their own.

    Raises:
        ValueError: a weight has too few singular values, or a single parameter a window that is found from inputs.
    """
    targets, names = {}, {module: name for name, module in model.named_modules()}
    for layer in layers:
        name, base, rank = names[layer], layer.get_base_layer(), layer.r[adapter]
        while model.get_submodule(name) is not base:
            name += _INSIDE
        if isinstance(layer, ParamWrapper) and layer.kind != "linear":
            if layer.parameter_name not in stack_names(base):
                check_rank(layer.path, rank, layer.base_matrix().shape)
                if (window := config.window_of(layer.path, rank)).needs_calibration:
                    raise ValueError(
                        f"{layer.path}: window {window.text!r} is found from inputs, and this is a bare parameter; "
                        "name another window in window_pattern, or leave it out of target_parameters."
                    )
                continue
            name += f".{layer.parameter_name}"
        shape = matrix_shape(get_layer(model, name), layer.kind)
        check_rank(layer.path, rank, shape)
        window, alpha = config.window_of(layer.path, rank), layer.scaling[adapter] * rank
        options = ("intact", config.lora_dropout, config.train, config.magnitude)
        targets[layer.path] = Target(name, layer.kind, shape, window, alpha, *options)
    return targets
