"""Adapted models: their parameters, the base function, merging, and plain layers again."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import torch
from torch import nn

from ipca._dtensor import is_sharded_model
from ipca.model.apply import adapted_layers
from ipca.model.decompose import naming
from ipca.model.running_statistics import forget_statistics
from ipca.model.targets import few, has_peft_layers
from ipca.model.trained_modules import end_training, fully_trained_modules, trained_parameters
from ipca.nn.attributes import return_attributes
from ipca.nn.experts import StackPC
from ipca.nn.offload import has_other_hooks, is_offloaded, move_device_hook
from ipca.nn.quantization import quantization_kind
from ipca.nn.quantized_linear import QuantizedLinearPC
from ipca.nn.registry import set_layer
from ipca.nn.window_layer import WindowLayer

Model = TypeVar("Model", bound=nn.Module)
ELSEWHERE = "write the adapter with ipca.save_adapter, and load it onto the base without offloading."


def adapter_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Every parameter the adapter consists of, once: all factors, then those of fully trained modules.

    These are what an optimizer takes and what :func:`ipca.save_adapter` writes.

    >>> model = ipca.apply_pc(nn.Sequential(nn.Linear(64, 32)), rank=4, progress=False)
    >>> [tuple(parameter.shape) for parameter in ipca.adapter_parameters(model)]
    [(4, 64), (32, 4)]

    Args:
        model: has adapted layers, ``A (rank, in)`` and ``B (out, rank)`` each.

    Raises:
        ValueError: no layer of the model is adapted, or they are PEFT's.
    """
    for layer in require_adapted(model).values():
        yield layer.lora_A
        yield layer.lora_B
    for module in fully_trained_modules(model).values():
        yield from trained_parameters(module)


def merge_adapter(model: Model) -> Model:
    """Fold every layer's factors into its weight: plain speed, no training until :func:`unmerge_adapter`.

    Each merged layer also holds its base weight, so memory grows by the adapted weights; :func:`unload` frees it.

    Args:
        model: has adapted layers; changed in place.

    Returns:
        The same model.

    Raises:
        ValueError: as :func:`adapter_parameters`; accelerate keeps an adapted layer's weights elsewhere; or merging
            would put NaN or Inf into a weight. No layer is merged by this call then.
    """
    layers = require_adapted(model)
    check_not_offloaded(layers)
    with ExitStack() as undo:
        for name, layer in layers.items():
            if not layer.merged:
                undo.callback(layer.unmerge)
                with naming(name):
                    layer.merge()
        undo.pop_all()
    return model


def unmerge_adapter(model: Model) -> Model:
    """Undo :func:`merge_adapter`, to the bit.

    Args:
        model: has adapted layers, merged or not; changed in place.

    Returns:
        The same model.

    Raises:
        ValueError: as :func:`adapter_parameters`.
    """
    for layer in require_adapted(model).values():
        layer.unmerge()
    return model


def unload(model: Model, *, merge: bool = True) -> Model:
    """Put plain layers back, of the original types.

    >>> model = ipca.apply_pc(nn.Sequential(nn.Linear(64, 32)), rank=4, progress=False)
    >>> ipca.unload(model)
    Sequential(
      (0): Linear(in_features=64, out_features=32, bias=True)
    )

    Args:
        model: has adapted layers; changed in place, at each path of a layer that has several.
        merge: with the trained function; else with the pretrained one (``form="residual"``: up to rounding). Fully
            trained modules stay as they are.

    Like the rest of the model the plain layers are frozen; ``model.requires_grad_(True)`` trains everything again.
    A merged layer that was quantized comes back in floats.

    Returns:
        The same model.

    Warns:
        RuntimeWarning: an adapted layer has hooks, or a ``forward`` of its own, which a plain one does not get.

    Raises:
        ValueError: as :func:`adapter_parameters`; the model is sharded over processes or offloaded; or merging would
            put NaN or Inf into a weight.
    """
    layers = require_adapted(model)
    check_not_sharded(model, "save_adapter gathers it: load that onto the plain base and unload there.")
    check_not_offloaded(layers)
    if merge:
        for name, layer in layers.items():
            with naming(name):
                layer.check_mergeable()
    hooked = [name for name, layer in layers.items() if has_other_hooks(layer)]
    if hooked:
        warnings.warn(
            f"{few(hooked)}: the hooks on this adapted layer, or its replaced forward, are gone with it; attach them "
            "to the plain layer.",
            RuntimeWarning,
            stacklevel=2,
        )
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)
    for layer in layers.values():
        with torch.inference_mode(False):  # what is made there could never train
            plain = layer.to_plain(base=not merge).train(layer.training).requires_grad_(False)
        for path in paths[layer][:1] if isinstance(layer, StackPC) else paths[layer]:
            set_layer(model, path, plain)
        move_device_hook(layer, plain)
        return_attributes(layer, plain)
    end_training(model, merged=merge)
    if merge and any(isinstance(layer, QuantizedLinearPC) for layer in layers.values()):
        _forget_quantization(model)
    forget_statistics(model)
    return model


def _forget_quantization(model: nn.Module) -> None:
    """Let transformers save the model in floats: its configuration still calls it quantized when no layer is."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and all(quantization_kind(module) is None for module in model.modules()):
        quantizer.remove_quantization_config(model)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Let every adapted layer compute the pretrained function within the block; fully trained modules stay.

    >>> base = nn.Sequential(nn.Linear(64, 32))
    >>> x, before = torch.ones(1, 64), base(torch.ones(1, 64))
    >>> model = ipca.apply_pc(base, rank=4, progress=False)
    >>> with torch.no_grad():
    ...     _ = model[0].lora_B.mul_(2)  # training
    >>> with ipca.disabled(model):
    ...     torch.equal(model(x), before)
    True

    Args:
        model: has adapted layers.

    Raises:
        ValueError: as :func:`adapter_parameters`.
    """
    with ExitStack() as stack:
        for layer in require_adapted(model).values():
            stack.enter_context(layer.disabled())
        yield


def check_not_sharded(model: nn.Module, instead: str) -> None:
    """Raise ValueError for a model that ``fully_shard`` has spread over processes; ``instead`` is the way out."""
    if is_sharded_model(model):
        raise ValueError(f"this {type(model).__name__} is sharded over processes; {instead}")


def check_not_offloaded(modules: Mapping[str, nn.Module], instead: str = ELSEWHERE) -> None:
    """Raise ValueError for a module whose weights accelerate keeps off the device; ``instead`` is the way out."""
    for name, module in modules.items():
        if any(is_offloaded(inner) for inner in module.modules()):
            raise ValueError(f"{name} is offloaded: accelerate keeps its weights on the CPU or the disk; {instead}")


def require_adapted(model: nn.Module) -> dict[str, WindowLayer]:
    """The adapted layers of ``model`` by path, or a ValueError where there is none."""
    layers = adapted_layers(model)
    if not layers:
        if has_peft_layers(model):
            raise ValueError(
                f"this {type(model).__name__} holds PEFT's layers: use its own save_pretrained, disable_adapter, "
                "merge_adapter and merge_and_unload, and ipca.peft."
            )
        raise ValueError(f"this {type(model).__name__} has no LinearPC layer; call apply_pc or load_adapter first.")
    return layers
