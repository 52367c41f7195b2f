"""Running a model over batches of inputs without changing it: modes, random generators and gradients stay."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ipca.nn.offload import execution_device, is_offloaded
from ipca.nn.quantization import packs_when_evaluated


def as_batches(batches: Iterable[Any]) -> list[Any]:
    """``batches`` as a list; a generator is consumed once.

    Raises:
        TypeError: it is a single batch, or not iterable.
        ValueError: it is empty.
    """
    check_batches(batches)
    found = list(batches)
    if not found:
        raise ValueError("there are no batches; give at least one.")
    return found


def check_batches(batches: Any) -> None:
    """Raise TypeError for a single batch, or for anything that is not iterable."""
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        raise TypeError(
            f"expected an iterable of batches, got a {type(batches).__name__}; put one batch into a list, call a "
            "function that makes them."
        )


def run_batch(model: nn.Module, batch: Any) -> Any:
    """The output of ``model`` for one batch, whose tensors are moved to the device that it starts to compute on.

    Args:
        batch: a tensor, a tuple or list of the model's arguments, or a mapping of them by name, as a BatchEncoding.

    Raises:
        TypeError: it is something else.
    """
    device = _first_device(model)

    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    if isinstance(batch, Mapping):
        return model(**{name: moved(value) for name, value in batch.items()})
    if isinstance(batch, Tensor):
        return model(moved(batch))
    if isinstance(batch, tuple | list):
        return model(*map(moved, batch))
    raise TypeError(
        "a batch must be a tensor, a tuple of the model's arguments or a mapping of them by name, "
        f"got a {type(batch).__name__}."
    )


def inner_model(model: nn.Module) -> nn.Module:
    """The model of transformers in ``model``, which may be a wrapper as PeftModel is; else ``model`` itself."""
    return next((m for m in model.modules() if hasattr(m, "config") and not _passes_on(m)), model)


def _passes_on(module: nn.Module) -> bool:
    """Whether ``forward`` takes ``*args``, as that of a wrapper which calls another module with them."""
    return any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(module.forward).parameters.values())


def names_labels(model: nn.Module) -> bool:
    """Whether the model of transformers in ``model`` takes an argument ``labels``."""
    inner = inner_model(model)
    return hasattr(inner, "config") and "labels" in inspect.signature(inner.forward).parameters


def _first_device(model: nn.Module) -> torch.device:
    """That of the first parameter, or where accelerate moves the weights that it keeps elsewhere."""
    for module in model.modules():
        own = next(module.parameters(recurse=False), None)
        if own is not None:
            return (execution_device(module) if is_offloaded(module) else None) or own.device
    return torch.device("cpu")


def arguments_of(model: nn.Module, batch: Any) -> Mapping[str, Any]:
    """The arguments by name with which :func:`run_batch` calls ``model``, as far as its ``forward`` names them."""
    if isinstance(batch, Mapping):
        return batch
    given = batch if isinstance(batch, tuple | list) else (batch,)
    named = inner_model(model) if _passes_on(model) else model
    return inspect.signature(named.forward).bind_partial(*given).arguments


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluate without gradients within the block; modes and random generators are restored afterward.

    Layers quantized by bitsandbytes keep their weights as they are: some would pack them at the first call.
    """
    modes = {module: module.training for model in models for module in model.modules()}
    parameters = [parameter for model in models for parameter in model.parameters()]
    devices = sorted({p.device.index for p in parameters if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        try:
            for model in models:
                model.eval()
            for module in filter(packs_when_evaluated, modes):
                module.training = True
            yield
        finally:
            for module, training in modes.items():
                module.training = training
