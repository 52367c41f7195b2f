"""The SHA-256 of a tensor's values: how an adapter knows the base weight it belongs to."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_ROWS = 1024


def tensor_sha256(tensor: Tensor) -> str:
    """``"float32-<hex digest>"`` over shape and values in row-major order; alike on every device and memory layout."""
    digest = hashlib.sha256(str(tuple(tensor.shape)).encode())
    for rows in tensor.detach().split(_ROWS):
        digest.update(rows.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return f"{str(tensor.dtype).removeprefix('torch.')}-{digest.hexdigest()}"
