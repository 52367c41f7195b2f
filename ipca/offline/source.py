"""Where the layers' weights come from, and the residual base goes: a checkpoint on disk, or a model in memory."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ipca._atomic import fsync_folder
from ipca.io.checkpoint import Checkpoint, StoredTensor, write_in_place
from ipca.io.export_formats import export
from ipca.nn.initialization import frozen_weight
from ipca.nn.layer_kinds import from_matrix, layer_kind, read_layer, to_matrix
from ipca.nn.registry import get_layer
from ipca.offline.adapter_files import write_adapter
from ipca.offline.decompose import FinishedLayer
from ipca.offline.ranks import Ranks
from ipca.offline.work_folder import WorkFolder


class CheckpointSource:
    """Weights read from ``checkpoint`` one at a time, for a ``model`` on the meta device.

    Args:
        keys: the checkpoint's tensor for each layer, by the layer's path; stored as the layer's type stores it.

    Raises:
        ValueError: a tensor's shape is not that of the layer.
    """

    def __init__(self, model: nn.Module, checkpoint: Checkpoint, keys: Mapping[str, str]) -> None:
        self.model, self.checkpoint = model, checkpoint
        self._layers = {name: _layer(model, name, key) for name, key in keys.items()}
        for name, layer in self._layers.items():
            shape = checkpoint.tensors[layer.key].shape
            if shape != layer.shape:
                raise ValueError(f"{layer.key} has shape {shape}, but {name} of the model has {layer.shape}.")

    def weight(self, name: str) -> Tensor:
        """The layer's ``(out, in)`` in the dtype the model computes in."""
        layer = self._layers[name]
        stored = self.checkpoint.read(layer.key).to(layer.dtype)
        return to_matrix(layer.kind, stored)

    def write_residual(self, layers: Sequence[FinishedLayer], work: WorkFolder, ranks: Ranks, base_model: str) -> None:
        """Write ``final/base``, the checkpoint with ``W_res`` in place of every ``W``, and ``final/adapter`` for it.

        Each shard is a copy whose adapted tensors are overwritten at their place. The processes of ``ranks`` share the
        shards; finished ones are not written again.
        """
        base = work.final / "base"
        with work.writing():
            base.mkdir(parents=True, exist_ok=True)
            for file in self.checkpoint.files[ranks.rank :: ranks.size]:
                if not (base / file.name).exists():
                    self._write_shard(file, layers, work, base)
        ranks.barrier()
        if ranks.is_main:
            with work.writing():
                if self.checkpoint.index is not None:
                    shutil.copyfile(self.checkpoint.index, base / self.checkpoint.index.name)
                write_adapter(self.model, layers, work, work.final / "adapter", base_model=base_model, doubled=False)

    def _write_shard(self, file: Path, layers: Sequence[FinishedLayer], work: WorkFolder, base: Path) -> None:
        copy = work.folder / f".tmp-{file.name}"
        shutil.copyfile(file, copy)
        for layer in layers:
            stored = self.checkpoint.tensors[self._layers[layer.target.name].key]
            if stored.file == file:
                write_in_place(copy, stored, self._residual(layer, work, stored))
        with copy.open("rb") as handle:
            os.fsync(handle.fileno())
        os.replace(copy, base / file.name)
        fsync_folder(base)

    def _residual(self, layer: FinishedLayer, work: WorkFolder, stored: StoredTensor) -> Tensor:
        """``W_res`` as the checkpoint stores it."""
        factors, scaling = work.read_layer(layer.index)[1], layer.target.alpha / layer.target.window.rank
        weight = self.weight(layer.target.name)
        kept = frozen_weight(weight, factors["A0"], factors["B0"], scaling=scaling, form="residual")
        assert kept.dtype == stored.torch_dtype
        return from_matrix(layer.saved.kind, kept, torch.Size(stored.shape))


class ModelSource:
    """Weights of a ``model`` in memory."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def weight(self, name: str) -> Tensor:
        """The layer's ``(out, in)``, sharing memory with the model."""
        return read_layer(get_layer(self.model, name))[0]

    def write_residual(self, layers: Sequence[FinishedLayer], work: WorkFolder, ranks: Ranks, base_model: str) -> None:
        """Write ``final/base`` and ``final/adapter``, as :func:`ipca.export` does; ``layers`` are installed."""
        if ranks.is_main:
            shutil.rmtree(work.final, ignore_errors=True)  # of an earlier run that did not complete it
            export(self.model, work.final, form="residual", base_model=base_model)


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
