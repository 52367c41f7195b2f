"""Safetensors checkpoints, in one file or in shards: each tensor is read by itself, and no file is memory-mapped."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ipca.io.hub import model_folder

_END = ".weight"
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class StoredTensor:
    """The location of a tensor: ``size`` bytes from ``start`` of ``file``; ``dtype`` as safetensors writes it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """None for a dtype that this reader does not know."""
        return DTYPES.get(self.dtype)


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a model folder by name; ``files`` are its shards, ``index`` their index if there is one."""

    files: tuple[Path, ...]
    index: Path | None
    tensors: dict[str, StoredTensor]

    @classmethod
    def open(cls, folder: Path) -> Checkpoint | None:
        """The checkpoint of a folder that ``save_pretrained`` wrote, its headers read; None without safetensors.

        Raises:
            FileNotFoundError: a shard is missing.
            ValueError: a file is damaged or truncated, or lacks a tensor that the index names.
        """
        if (folder / WHOLE).is_file():
            return cls((folder / WHOLE,), None, read_header(folder / WHOLE))
        if not (folder / INDEX).is_file():
            return None
        places = _read_index(folder / INDEX)
        files = tuple(folder / name for name in sorted(set(places.values())))
        tensors: dict[str, StoredTensor] = {}
        for file in files:
            if not file.is_file():
                raise FileNotFoundError(f"{folder / INDEX} names {file.name}, which is not there; download it again.")
            held = read_header(file)
            tensors.update((key, value) for key, value in held.items() if places.get(key, file.name) == file.name)
        for key, name in places.items():
            if key not in tensors:
                raise ValueError(f"{folder / name} lacks the tensor {key} that {INDEX} names; download it again.")
        return cls(files, folder / INDEX, tensors)

    def read(self, name: str) -> Tensor:
        """The tensor ``name`` on the CPU, in memory of its own.

        Raises:
            OSError: the file cannot be read.
            ValueError: it has become shorter, or the dtype is unknown.
        """
        stored = self.tensors[name]
        dtype = stored.torch_dtype
        if dtype is None:
            raise ValueError(f"{name} has the dtype {stored.dtype}, which cannot be read.")
        data = torch.empty(stored.size, dtype=torch.uint8, device="cpu")
        rest = data.numpy().data
        with stored.file.open("rb") as file:
            file.seek(stored.start)
            while rest:
                count = file.readinto(rest)
                if not count:
                    raise ValueError(f"{stored.file} ends within the tensor {name}; download it again.")
                rest = rest[count:]
        return data.view(dtype).view(stored.shape)


def write_in_place(file: Path, stored: StoredTensor, tensor: Tensor) -> None:
    """Overwrite the bytes of ``stored`` in ``file``, a copy of its shard, by ``tensor`` of the same dtype and shape."""
    assert tensor.dtype == stored.torch_dtype
    assert tuple(tensor.shape) == stored.shape
    with file.open("r+b") as handle:
        handle.seek(stored.start)
        handle.write(raw_bytes(tensor).numpy().data)


def raw_bytes(tensor: Tensor) -> Tensor:
    """The values of ``tensor`` in row-major order as a 1-D uint8 tensor on the CPU; shares memory where it can."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of one safetensors file by name.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged or truncated.
    """
    try:
        with safe_open(path, "pt"):  # checks that the offsets are whole, disjoint and end where the file does
            pass
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or truncated: {error}") from None
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(size))
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        found[name] = StoredTensor(path, entry["dtype"], tuple(entry["shape"]), 8 + size + begin, end - begin)
    return found


def _read_index(path: Path) -> dict[str, str]:
    """The index's map from tensors to files, which must lie beside it."""
    try:
        places = json.loads(path.read_text())["weight_map"]
        if not places or any(not isinstance(name, str) or Path(name).name != name for name in places.values()):
            raise ValueError("its weight_map must name files beside it")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from None
    return dict(places)


class CheckpointWeights(Mapping[str, Tensor]):
    """The tensors ``<layer>.weight`` of a ``checkpoint`` by the layer's path, ``(out, in)`` as linear layers have them.

    A layer ``encoder.query`` has the tensor ``encoder.query.weight``, or else the only one whose name ends with that
    or is an end of it: a model and its checkpoint often differ by the prefix of the base model.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    def __getitem__(self, layer: str) -> Tensor:
        key = self._key(layer)
        if key is None:
            raise KeyError(f"the checkpoint has no tensor, or more than one, for {layer}{_END}")
        return self.checkpoint.read(key)

    def __contains__(self, layer: object) -> bool:
        return isinstance(layer, str) and self._key(layer) is not None

    def __iter__(self) -> Iterator[str]:
        return (key.removesuffix(_END) for key in self.checkpoint.tensors if key.endswith(_END))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _key(self, layer: str) -> str | None:
        own, keys = layer + _END, self.checkpoint.tensors
        if own in keys:
            return own
        alike = [key for key in keys if key.endswith("." + own) or own.endswith("." + key)]
        return alike[0] if len(alike) == 1 else None


def load_unquantized_weights(folder: str | os.PathLike[str]) -> CheckpointWeights:
    """The weights in ``folder`` for ``ipca.apply_pc(…, unquantized_weights=…)``; one is in memory at a time.

    Args:
        folder: holds the model before it was quantized, in safetensors, as ``save_pretrained`` writes it; or its id on
            the Hub.

    Raises:
        FileNotFoundError: there is no such checkpoint, or a shard is missing.
        ValueError: a file is damaged.
    """
    checkpoint = Checkpoint.open(model_folder(folder))
    if checkpoint is None:
        raise FileNotFoundError(f"{folder} holds neither {WHOLE} nor {INDEX}; give the folder of the original model.")
    return CheckpointWeights(checkpoint)
