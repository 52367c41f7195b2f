"""A safetensors file written one tensor at a time, byte for byte what ``safetensors.torch.save_file`` writes."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ipca.io.checkpoint import raw_bytes

_NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}  # in its order

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""The dtype, a float, and the shape of each tensor by name."""


def write_tensors(
    path: Path, layout: Layout, tensor_of: Callable[[str], Tensor], *, metadata: Mapping[str, str]
) -> str:
    """Write the tensors of ``layout`` to ``path``, each asked for once, by name, when its turn has come.

    Args:
        tensor_of: gives the tensor of that dtype and shape; only one is in memory at a time.

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
