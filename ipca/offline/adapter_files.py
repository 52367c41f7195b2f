"""The output of an offline decomposition, one tensor in memory at a time: the adapter's files and a residual base.

The files are byte for byte those of :func:`ipca.save_adapter`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from ipca._atomic import fsync_folder
from ipca.io.adapter import collect_adapter
from ipca.io.adapter_folder import SIDECAR, sidecar
from ipca.io.checkpoint import StoredTensor, raw_bytes, write_in_place
from ipca.io.export_formats import export
from ipca.io.labels import class_names
from ipca.io.peft_format import (
    PREFIX,
    WEIGHTS,
    double_factor,
    factor_keys,
    formats,
    readable_config,
    to_peft,
    wrappers_around,
    write_config,
)
from ipca.io.serving import warn_servers
from ipca.model.apply import adapted_layers
from ipca.model.vocabulary import vocab_size
from ipca.nn.initialization import frozen_weight
from ipca.nn.layer_kinds import from_matrix
from ipca.offline.decompose import FinishedLayer
from ipca.offline.ranks import Ranks
from ipca.offline.source import CheckpointSource, ModelSource, Source
from ipca.offline.work_folder import WorkFolder

_NAMES = {
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",  # BatchNorm's count of batches
}
"""The names of safetensors, in the order of its dtypes."""

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""The dtype and the shape of each tensor by name."""


def write_adapter(
    source: Source,
    layers: Sequence[FinishedLayer],
    work: WorkFolder,
    folder: Path,
    *,
    base_model: str | None,
    doubled: bool = True,
) -> None:
    """Write the adapter's files into ``folder``.

    Args:
        source: its model has the layers installed, see :func:`install_layers`.
        base_model: for PEFT's ``base_model_name_or_path``.
        doubled: an adapter for the original base, and ``ipca.json``; False: PEFT's two files for a residual base.
    """
    with work.writing():
        folder.mkdir(parents=True, exist_ok=True)
        contents = collect_adapter(source.model)
        digest = _write_weights(source, layers, contents.modules_to_save, work, folder / WEIGHTS, doubled)
        written, whole = formats(contents, doubled=doubled), contents.modules_to_save
        write_config(folder, readable_config(source.model, written, whole, base_model, others=not doubled))
        if doubled:
            saved = {layer.target.name: layer.saved for layer in layers}
            labels = class_names(getattr(source.model, "config", None))
            tokens = vocab_size(source.model)
            initial = {"initial": True} if whole else {}  # of factors their values show it
            record = sidecar(saved, digest, list(whole), labels, tokens, **initial)
            (folder / SIDECAR).write_text(json.dumps(record, indent=2) + "\n")
    warn_servers(folder)


def _write_weights(
    source: Source,
    layers: Sequence[FinishedLayer],
    modules_to_save: Mapping[str, nn.Module],
    work: WorkFolder,
    path: Path,
    doubled: bool,
) -> str:
    """Write the file of factors and fully trained modules; returns its SHA-256."""
    adapted = adapted_layers(source.model)
    kinds = {layer.target.name: layer.saved.kind for layer in layers}
    kernels = {name: getattr(adapted[name], "kernel_size", ()) for name in kinds}

    def as_stored(name: str, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        experts = math.prod(A.shape[:-2])
        A, B = to_peft(kinds[name], A, B, kernels[name])
        return (double_factor("A", A, A, experts), double_factor("B", B, B, experts)) if doubled else (A, B)

    @lru_cache(maxsize=1)  # the two factors of a layer follow each other
    def pair(name: str, index: int) -> tuple[Tensor, Tensor]:
        factors = work.read_layer(index)[1]
        return as_stored(name, factors["A0"], factors["B0"])

    layout, owner, wrappers = {}, {}, wrappers_around(kinds)
    for layer in layers:
        name, like = layer.target.name, adapted[layer.target.name]
        empty = as_stored(name, like.lora_A0.to("meta"), like.lora_B0.to("meta"))
        for side, key in enumerate(factor_keys(name, kinds[name], wrappers[name])):
            layout[key], owner[key] = (layer.adapter_dtype, tuple(empty[side].shape)), (name, layer.index, side)

    entries = {}
    for name, module in modules_to_save.items():
        for entry, value in module.state_dict().items():
            key = f"{PREFIX}{name}.{entry}"
            layout[key], entries[key] = (value.dtype, tuple(value.shape)), f"{name}.{entry}"

    def tensor(key: str) -> Tensor:
        if key in entries:
            return source.entry(entries[key]).cpu().contiguous()
        name, index, side = owner[key]
        return pair(name, index)[side].contiguous()

    return write_tensors(path, layout, tensor, metadata={"format": "pt"})


# -- the residual base


def write_residual(
    source: Source,
    layers: Sequence[FinishedLayer],
    work: WorkFolder,
    ranks: Ranks,
    base_model: str,
) -> None:
    """Write ``final/base``, the model with ``W_res`` in place of every ``W``, and ``final/adapter`` for it.

    Each shard of a checkpoint is copied and its adapted tensors are overwritten in place. The processes of ``ranks``
    share the shards; finished ones are not written again. A model in memory is written by :func:`ipca.export`; its
    ``layers`` are installed.
    """
    if isinstance(source, ModelSource):
        if ranks.is_main:
            shutil.rmtree(work.final, ignore_errors=True)  # left by an earlier run that did not complete it
            export(source.model, work.final, format="residual", base_model=base_model)
        return
    checkpoint, base = source.checkpoint, work.final / "base"
    with work.writing():
        base.mkdir(parents=True, exist_ok=True)
        for file in checkpoint.files[ranks.rank :: ranks.size]:
            if not (base / file.name).exists():
                _write_shard(file, source, layers, work, base)
    ranks.barrier()
    if ranks.is_main:
        with work.writing():
            if checkpoint.index is not None:
                shutil.copyfile(checkpoint.index, base / checkpoint.index.name)
            write_adapter(source, layers, work, work.final / "adapter", base_model=base_model, doubled=False)


def _write_shard(
    file: Path, source: CheckpointSource, layers: Sequence[FinishedLayer], work: WorkFolder, base: Path
) -> None:
    copy = work.folder / f".tmp-{file.name}"
    shutil.copyfile(file, copy)
    for layer in layers:
        stored = source.stored(layer.target.name)
        if stored.file == file:
            write_in_place(copy, stored, _residual(layer, source, work, stored))
    with copy.open("rb") as handle:
        os.fsync(handle.fileno())
    os.replace(copy, base / file.name)
    fsync_folder(base)


def _residual(layer: FinishedLayer, source: CheckpointSource, work: WorkFolder, stored: StoredTensor) -> Tensor:
    """``W_res`` as the checkpoint stores it."""
    factors, weight = work.read_layer(layer.index)[1], source.weight(layer.target.name)
    kept = frozen_weight(weight, factors["A0"], factors["B0"], scaling=layer.target.scaling, form="residual")
    assert kept.dtype == stored.torch_dtype
    return from_matrix(layer.saved.kind, kept, torch.Size(stored.shape))


# -- a safetensors file, one tensor at a time


def write_tensors(
    path: Path, layout: Layout, tensor_of: Callable[[str], Tensor], *, metadata: Mapping[str, str]
) -> str:
    """Write the tensors of ``layout`` to ``path``, byte for byte as ``safetensors.torch.save_file`` does.

    Args:
        tensor_of: gives the tensor of a name, of that dtype and shape; it is called once for each, in the file's order.

    Returns:
        The SHA-256 of the file, in hex.

    Raises:
        OSError: the file cannot be written, or the disk is full.
    """
    names = in_file_order(layout)
    header = _header(layout, names, metadata)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for data in (len(header).to_bytes(8, "little"), header):
            file.write(data)
            digest.update(data)
        for name in names:
            tensor = tensor_of(name)
            assert (tensor.dtype, tuple(tensor.shape)) == layout[name], name
            values = raw_bytes(tensor).numpy().data
            file.write(values)
            digest.update(values)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def in_file_order(layout: Layout) -> list[str]:
    """The names in the order of the file: wide dtypes first, so that all are aligned, then by their UTF-8 bytes."""
    width = list(_NAMES)
    return sorted(layout, key=lambda name: (-width.index(layout[name][0]), name.encode()))


def _header(layout: Layout, names: list[str], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    begin = 0
    for name in names:
        dtype, shape = layout[name]
        end = begin + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8)
