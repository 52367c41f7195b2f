"""SHA-256 of a tensor's values, by which an adapter identifies its base weight."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_ROWS = 1024


def tensor_sha256(tensor: Tensor) -> str:
    """``"float32-<hex digest>"`` over shape and values in row-major order, the same on every device and layout."""
    digest = hashlib.sha256(str(tuple(tensor.shape)).encode())
    for rows in torch.atleast_1d(tensor.detach()).split(_ROWS):
        values = rows.cpu().flatten()  # a copy where the layout asks for one
        if values.stride(0) != 1:  # of a single value
            values = values.clone(memory_format=torch.contiguous_format)
        digest.update(values.view(torch.uint8).numpy())
    return f"{str(tensor.dtype).removeprefix('torch.')}-{digest.hexdigest()}"
