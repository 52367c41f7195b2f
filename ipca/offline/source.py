"""Sources of pretrained weights, read layer by layer: a checkpoint on disk, or a model in memory."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ipca.io.checkpoint import Checkpoint, StoredTensor
from ipca.nn.layer_kinds import layer_kind, read_layer, to_matrix
from ipca.nn.registry import get_layer


class CheckpointSource:
    """Weights read from ``checkpoint`` one at a time, for a ``model`` on the meta device.

    Args:
        keys: the checkpoint's tensor for each layer, by the layer's path; stored as the layer's type stores it.
        whole: the same for each entry of the state dict of a module that trains whole.

    Raises:
        ValueError: a tensor's shape is not that of the layer.
    """

    def __init__(
        self,
        model: nn.Module,
        checkpoint: Checkpoint,
        keys: Mapping[str, str],
        whole: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.model, self.checkpoint, self._whole = model, checkpoint, whole
        self._layers = {name: _layer(model, name, key) for name, key in keys.items()}
        for name, layer in self._layers.items():
            shape = checkpoint.tensors[layer.key].shape
            if shape != layer.shape:
                raise ValueError(f"{layer.key} has shape {shape}, but {name} of the model has {layer.shape}.")

    def weight(self, name: str) -> Tensor:
        """The layer's weight ``(out, in)`` in the dtype the model computes in."""
        layer = self._layers[name]
        stored = self.checkpoint.read(layer.key).to(layer.dtype)
        return to_matrix(layer.kind, stored)

    def entry(self, key: str) -> Tensor:
        """An entry of the model's state dict, of a module that trains whole."""
        return self.checkpoint.read(self._whole[key]).to(self.model.state_dict()[key].dtype)

    def stored(self, name: str) -> StoredTensor:
        """Where the checkpoint holds the layer's weight."""
        return self.checkpoint.tensors[self._layers[name].key]


class ModelSource:
    """Weights of a ``model`` in memory."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def weight(self, name: str) -> Tensor:
        """The layer's weight ``(out, in)``, sharing memory with the model."""
        return read_layer(get_layer(self.model, name))[0]

    def entry(self, key: str) -> Tensor:
        """An entry of the model's state dict, of a module that trains whole."""
        found: Tensor = self.model.state_dict()[key]
        return found


Source = CheckpointSource | ModelSource


class _Layer(NamedTuple):
    """A layer as the model and the checkpoint hold it; ``shape`` is that of the stored tensor."""

    key: str
    kind: str
    dtype: torch.dtype
    shape: tuple[int, ...]


def _layer(model: nn.Module, name: str, key: str) -> _Layer:
    plain = get_layer(model, name)
    kind, weight = layer_kind(plain), plain.get_parameter("weight")
    assert kind is not None
    return _Layer(key, kind, weight.dtype, tuple(weight.shape))
