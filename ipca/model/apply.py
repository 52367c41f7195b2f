"""apply_pc: replace layers of a model by adapted ones; all checks and decompositions come before any change."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ipca._atomic import uninterrupted
from ipca.model.calibration import decompose_calibrated
from ipca.model.decompose import UnquantizedWeights, check_unquantized_weights
from ipca.model.running_statistics import watch_statistics
from ipca.model.settings import AdapterSettings
from ipca.model.targets import Target, check_not_in_peft, few, find_modules_to_save, find_targets
from ipca.model.trained_modules import is_named, name_fully_trained, watch_steps
from ipca.model.transformers_models import INSTALLED, mark
from ipca.model.vocabulary import warn_of_vocabulary
from ipca.nn.attributes import take_attributes
from ipca.nn.initialization import InitialFactors, one_of, warn_null
from ipca.nn.offload import move_device_hook
from ipca.nn.registry import get_layer, layer_class, set_layer
from ipca.nn.window_layer import WindowLayer
from ipca.svd.cache import SpectralCache
from ipca.window import Window

Model = TypeVar("Model", bound=nn.Module)


def apply_pc(
    model: Model,
    *,
    rank: int | None = None,
    window: Window | str | float = "middle",
    alpha: float | None = None,
    form: str = "intact",
    dropout: float | None = None,
    targets: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] = (),
    modules_to_save: str | Iterable[str] | None = (),
    rank_pattern: Mapping[str, int] | None = None,
    window_pattern: Mapping[str, Window | str | float] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    adapter_dtype: torch.dtype | str | None = None,
    tol: float | str = "default",
    train: str = "both",
    magnitude: float | str = "sigma",
    cache: SpectralCache | str | os.PathLike[str] | None = None,
    unquantized_weights: UnquantizedWeights | None = None,
    calibration: Iterable[Any] | None = None,
    progress: bool = True,
    r: int | None = None,
    lora_alpha: float | None = None,
    lora_dropout: float | None = None,
    target_modules: str | Iterable[str] | None = None,
) -> Model:
    """Adapt a window of singular components of the model's layers, and freeze everything else.

    >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
    >>> model = ipca.apply_pc(model, rank=4, window="middle", targets=["0"], progress=False)
    >>> type(model[0]).__name__, model[0].window, tuple(model[0].lora_A.shape)
    ('LinearPC', Window(start=14, rank=4), (4, 64))

    Args:
        model: any ``nn.Module``, its weights loaded; changed in place.
        rank, window, alpha, form, dropout: see :class:`ipca.model.AdapterSettings`. The defaults adapt the 16 middle
            components in the intact form.
        targets, exclude, modules_to_save: likewise. The defaults adapt every linear layer but heads; heads of
            transformers models that are for a task, or new, are trained whole.
        rank_pattern, window_pattern, alpha_pattern, adapter_dtype, tol: likewise.
        train: ``"both"`` factors, or only ``"A"``, or only ``"B"``: half of the parameters, the other factor frozen.
        magnitude: ``"sigma"``, or a number ``m``: every component starts at the size ``m ‖W‖_F / √d`` in place of its
            singular value, so that one learning rate means the same for every window.
        cache: a folder, or a :class:`ipca.SpectralCache`, of windows decomposed before; what is missing is added.
        unquantized_weights: for quantized layers, the weights ``(out, in)`` from before they were quantized, by the
            layer's path: a mapping, a function, or :func:`ipca.load_unquantized_weights` of a checkpoint folder.
            Windows are then taken from those, else from the dequantized weights; :func:`ipca.summary` shows which.
        calibration: for windows of the inputs, such as ``"inputs:minor"``, and for ``"auto"``: batches of unlabeled
            inputs, each a tensor, a tuple of the model's arguments or a mapping of them by name; consumed once. The
            model runs over them. ``"auto"`` is experimental and costs a full SVD of every such layer more, see
            :func:`ipca.analysis.suggest_windows`. The adapter stores what was found: nothing needs the batches again.
        progress: show progress bars.
        r, lora_alpha, lora_dropout, target_modules: PEFT's names of ``rank``, ``alpha``, ``dropout`` and ``targets``.

    Returns:
        The same model. ``print(ipca.summary(model))`` shows layers, windows, trainable share, time and certificates.

    The model computes what it computed before, and every layer's initialization certificate is checked. On a GPU
    weights of one shape are decomposed together. Under an initialized ``torch.distributed`` process group each rank
    decomposes a share of the layers, and all end with the same bits; every rank must call this with the same model.

    Memory: the factors of all layers, and for one layer at a time up to three ``(d, d)`` float64 matrices beside the
    layer itself, or 512 MiB for small layers side by side (about six layers in float64 for half of all components,
    eight where a full SVD is needed: a window that cuts a tie, on a GPU also d < 256, rank > d / 4, or a window that
    looks at the spectrum). On a GPU a batch takes up to 60 % of the free memory.

    Raises:
        TypeError, ValueError: a bad argument, one that is given by both of its names with different values, nothing
            matches, or a layer cannot be adapted; the message names every such layer. Or the model has an adapter of
            PEFT. The model is unchanged.
        RuntimeError: a layer misses its certificate, or memory ran out during its decomposition; a lazy module has no
            parameters yet; or the call or a weight is of ``torch.inference_mode()``. The model is unchanged. (Only
            where memory runs out later, while layers are exchanged, are some of them adapted.)
    """
    chosen = one_of("targets", targets, "target_modules", target_modules)
    settings = AdapterSettings(
        rank=one_of("rank", rank, "r", r),
        window=window,
        alpha=one_of("alpha", alpha, "lora_alpha", lora_alpha),
        form=form,
        dropout=one_of("dropout", dropout, "lora_dropout", lora_dropout) or 0.0,
        targets="all-linear" if chosen is None else chosen,
        exclude=exclude,
        modules_to_save=() if modules_to_save is None else modules_to_save,
        rank_pattern=rank_pattern or {},
        window_pattern=window_pattern or {},
        alpha_pattern=alpha_pattern or {},
        adapter_dtype=adapter_dtype,
        tol=tol,
        train=train,
        magnitude=magnitude,
    )
    return adapt(
        model,
        settings,
        cache=cache,
        unquantized_weights=unquantized_weights,
        calibration=calibration,
        progress=progress,
    )


def adapt(
    model: Model,
    settings: AdapterSettings,
    *,
    cache: SpectralCache | str | os.PathLike[str] | None = None,
    unquantized_weights: UnquantizedWeights | None = None,
    calibration: Iterable[Any] | None = None,
    progress: bool = True,
) -> Model:
    """:func:`apply_pc` with its choices as one record."""
    check_can_train(model)
    check_not_in_peft(model)
    saved = find_modules_to_save(model, settings)
    targets = find_targets(model, settings, modules_to_save=saved)
    check_unquantized_weights(targets, unquantized_weights)
    warn_of_vocabulary(model, saved)
    store = cache if isinstance(cache, SpectralCache | None) else SpectralCache(cache)
    found = decompose_calibrated(
        model, targets, settings, calibration, cache=store, progress=progress, unquantized_weights=unquantized_weights
    )
    warn_null({target.name: factors.null for target, factors in zip(targets, found, strict=True)}, settings.train)
    with uninterrupted():
        install(model, zip(targets, found, strict=True))
        train_only_adapter(model, saved)
    return model


def install(model: nn.Module, layers: Iterable[tuple[Target, InitialFactors]]) -> None:
    """Put an adapted layer in each target's place.

    Raises:
        ValueError: the model has an adapter of PEFT.
    """
    check_not_in_peft(model)
    for target, factors in layers:
        assert target.kind is not None
        plain, cls = get_layer(model, target.name), layer_class(target.kind)
        names = ("alpha", "form", "dropout", "train", "magnitude")
        layer = cls.from_factors(plain, factors, **{name: getattr(target, name) for name in names})
        setattr(layer, INSTALLED, mark())
        set_layer(model, target.name, layer)
        if not target.quantized:  # which is called, hook and all
            move_device_hook(plain, layer)
            take_attributes(layer, plain)
    watch_statistics(model)
    watch_steps(model)


def train_only_adapter(model: nn.Module, fully_trained: Iterable[str] = (), *, trainable: bool = True) -> None:
    """Freeze all parameters of ``model`` but the factors of its adapted layers and the modules ``fully_trained``.

    Those modules are marked, so that freezing them later does not drop them from the adapter.
    """
    model.requires_grad_(False)
    for layer in adapted_layers(model).values():
        layer.train_factors(trainable)
    for name in fully_trained:
        name_fully_trained(model.get_submodule(name))
    for module in model.modules():
        if is_named(module):
            module.requires_grad_(trainable)


def adapted_layers(model: nn.Module) -> dict[str, WindowLayer]:
    """The adapted layers of ``model`` by path, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, WindowLayer)}


def check_can_train(model: nn.Module, *, trainable: bool = True) -> None:
    """Raise RuntimeError where new factors of ``model`` could never train, or a layer of it has no parameters yet.

    That is within ``torch.inference_mode()``, or with weights that were made there; without ``trainable`` those do.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError("within torch.inference_mode() new factors could never train; leave it first.")
    named = dict(chain(model.named_parameters(), model.named_buffers()))
    lazy = [name for name, tensor in named.items() if is_lazy(tensor)]
    if lazy:
        raise RuntimeError(
            f"{few(lazy)}: a lazy module of this {type(model).__name__} has not seen an input, by which it takes its "
            "shape; run one batch through the model, or load its weights, then adapt it."
        )
    made_there = [name for name, parameter in model.named_parameters() if parameter.is_inference()]
    if trainable and made_there:
        raise RuntimeError(
            f"{few(made_there)}: made within torch.inference_mode(), so that new factors could never train; build or "
            "load the model outside of it, or adapt copy.deepcopy(model), made outside."
        )
