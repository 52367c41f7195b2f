"""apply_pc: replace layers of a model by adapted ones. All that can fail happens before the model is touched."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from ipca.config import PCConfig
from ipca.model.auto import auto_windows, check_calibration, without_auto
from ipca.model.decompose import decompose_targets
from ipca.model.targets import Target, find_modules_to_save, find_targets
from ipca.model.unquantized_weights import UnquantizedWeights, check_unquantized_weights
from ipca.nn import InitialFactors, WindowLayer
from ipca.nn.registry import get_layer, layer_class, set_layer
from ipca.svd import SpectralCache

Model = TypeVar("Model", bound=nn.Module)
FULLY_TRAINED = "_ipca_fully_trained"


def apply_pc(
    model: Model,
    config: PCConfig | None = None,
    *,
    cache: SpectralCache | str | os.PathLike[str] | None = None,
    unquantized_weights: UnquantizedWeights | None = None,
    calibration: Iterable[Any] | None = None,
    progress: bool = True,
    **options: Any,
) -> Model:
    """Adapt a window of singular components of the model's layers, and freeze everything else.

    Args:
        model: any ``nn.Module``, its weights loaded; changed in place.
        config: what to adapt; or give its fields as options, ``apply_pc(model, rank=16, window="middle",
            targets=["query", "value"])``; ``window`` may also be a :class:`ipca.Window`.
        cache: a folder, or a :class:`ipca.SpectralCache`, of windows decomposed before; what is missing is added.
        unquantized_weights: for quantized layers, the weights ``(out, in)`` from before they were quantized, by the
            layer's path: a mapping, a function, or :func:`ipca.load_unquantized_weights` of a checkpoint folder.
            Windows are then taken from those, else from the dequantized weights; :func:`ipca.summary` says which.
        calibration: for the window ``"auto"``, which is experimental: batches of unlabeled inputs, each a tensor, a
            tuple of the model's arguments or a mapping of them by name; consumed once. The model runs over them, and
            every layer with such a window costs a full SVD more, see :func:`ipca.analysis.suggest_windows`. The
            adapter keeps the starts that were found, so that nothing needs the batches again.
        progress: show progress bars.

    Returns:
        The same model. ``print(ipca.summary(model))`` shows layers, windows, trainable share, time and certificates.

    The model computes what it computed before, and every layer's initialization certificate is checked. On a GPU
    weights of one shape are decomposed together. Under an initialized ``torch.distributed`` process group each rank
    decomposes a share of the layers, and all end with the same bits; every rank must call this with the same model.

    Memory: the factors of all layers, and for one layer at a time up to three ``(d, d)`` float64 matrices beside the
    layer itself, or 256 MiB for small layers side by side (about eight layers in float64 where a full SVD is needed:
    d < 256, rank > d / 4, a window that cuts a tie, or one that looks at the spectrum). On a GPU a batch takes up to
    60 % of the free memory.

    Raises:
        TypeError, ValueError: a bad option, nothing matches, or a layer cannot be adapted; the message names every such
            layer. The model is unchanged.
        RuntimeError: a layer misses its certificate, or memory ran out during its decomposition; the model is
            unchanged. (Only where memory runs out later, while layers are exchanged, are some of them adapted.)
    """
    if not isinstance(config, PCConfig | None):
        given = f"{type(config).__module__}.{type(config).__qualname__}"
        raise TypeError(f"config must be an ipca.PCConfig, got a {given}; give fields by name, such as rank=16.")
    if config is not None and options:
        raise TypeError(f"give a PCConfig or options, not both; got {', '.join(options)} beside a config.")
    check_inference_mode()
    config = config or PCConfig.create(**options)
    check_calibration(config, calibration)
    saved = find_modules_to_save(model, config)
    targets = find_targets(model, without_auto(config), modules_to_save=saved)
    check_unquantized_weights(model, targets, unquantized_weights)
    if calibration is not None:
        targets = auto_windows(
            model, targets, config, calibration, unquantized_weights=unquantized_weights, progress=progress
        )
    store = cache if isinstance(cache, SpectralCache | None) else SpectralCache(cache)
    starts = decompose_targets(
        model, targets, config, cache=store, progress=progress, unquantized_weights=unquantized_weights
    )
    with uninterrupted():
        install(model, zip(targets, starts, strict=True))
        train_only_adapter(model, saved)
    return model


def install(model: nn.Module, layers: Iterable[tuple[Target, InitialFactors]]) -> None:
    """Put an adapted layer in each target's place."""
    for target, start in layers:
        plain = get_layer(model, target.name)
        options = {"alpha": target.alpha, "form": target.form, "dropout": target.dropout}
        set_layer(model, target.name, layer_class(plain).from_factors(plain, start, **options))


def train_only_adapter(model: nn.Module, fully_trained: Iterable[str] = (), *, trainable: bool = True) -> None:
    """Freeze all of ``model`` but the factors of its adapted layers and the modules ``fully_trained``.

    Those modules are marked, so that freezing them later does not drop them from the adapter.
    """
    model.requires_grad_(False)
    for layer in adapted_layers(model).values():
        layer.lora_A.requires_grad_(trainable)
        layer.lora_B.requires_grad_(trainable)
    for name in fully_trained:
        setattr(model.get_submodule(name), FULLY_TRAINED, True)
    for module in model.modules():
        if getattr(module, FULLY_TRAINED, False):
            module.requires_grad_(trainable)


def adapted_layers(model: nn.Module) -> dict[str, WindowLayer]:
    """The adapted layers of ``model`` by path, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, WindowLayer)}


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C back until the block is done; elsewhere than in the main thread there is nothing to hold."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pending: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: pending.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)  # None: set outside Python
        if pending:
            signal.raise_signal(signal.SIGINT)


def check_inference_mode() -> None:
    """Raise within ``torch.inference_mode()``, where new factors could never train."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError("within torch.inference_mode() new factors could never train; leave it first.")
