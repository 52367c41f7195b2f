"""Dropout with counter-based random numbers: a mask depends on a seed only, and backward draws it again.

Entry ``(m, k)`` of an ``(M, K)`` input is dropped where its 16 random bits are below ``threshold = round(65536 p)``.
They come from Philox, a counter-based generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011):
on a GPU Philox4x32-7 on row and column, as the kernels draw it in registers, see :mod:`ipca.kernels.dropout`; on a CPU
NumPy's Philox4x64-10 in one stream, which is much faster there. A seed gives different masks on the two.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_ROUNDS = 7


def new_seed(device: torch.device) -> Tensor:
    """A seed, int64 ``(1,)`` on ``device``, from PyTorch's generator there."""
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)


def dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """``x (M, K)`` with entries dropped with probability ``p`` and the others scaled by ``1 / P(kept)``."""
    threshold = round(p * 65536)
    if threshold == 65536:
        return torch.zeros_like(x)
    mask = keep_mask(seed, x.shape[0], x.shape[1], p)
    return torch.where(mask, x * (65536 / (65536 - threshold)), 0.0)


def keep_mask(seed: Tensor, M: int, K: int, p: float) -> Tensor:
    """The mask ``(M, K)``, True where an entry is kept."""
    return (cpu_mask if seed.device.type == "cpu" else kernel_mask)(seed, M, K, p)


@torch.library.custom_op("ipca::cpu_mask", mutates_args=())
def cpu_mask(seed: Tensor, M: int, K: int, p: float) -> Tensor:
    """The mask on a CPU; an op, because PyTorch cannot trace NumPy."""
    words = np.random.Philox(key=int(seed)).random_raw((M * K + 3) // 4)
    bits = words.astype("<u8", copy=False).view("<u2")[: M * K]
    return torch.from_numpy(bits >= round(p * 65536)).view(M, K)


@cpu_mask.register_fake
def _(seed: Tensor, M: int, K: int, p: float) -> Tensor:
    return seed.new_empty(M, K, dtype=torch.bool)


def kernel_mask(seed: Tensor, M: int, K: int, p: float) -> Tensor:
    """The mask of the kernels, on any device.

    Entry ``(m, k)`` reads half ``k % 2`` of word ``k % 8 // 2`` of Philox4x32-7 at counter ``(k // 8, m, 0, 0)``.
    """
    columns = torch.arange((K + 7) // 8, device=seed.device).expand(M, -1)
    rows = torch.arange(M, device=seed.device)[:, None].expand_as(columns)
    words = torch.stack(_philox(seed, columns, rows), dim=-1)
    bits = torch.stack((words & 0xFFFF, words >> 16), dim=-1).reshape(M, 8 * columns.shape[1])[:, :K]
    return bits >= round(p * 65536)


def _philox(seed: Tensor, c0: Tensor, c1: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four random words of the counters ``(c0, c1, 0, 0)``: 32 bits each, in int64, whose products wrap."""
    c2 = c3 = torch.zeros_like(c0)
    key0, key1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(_ROUNDS):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32) & _WORD ^ c1 ^ key0, b & _WORD, (a >> 32) & _WORD ^ c3 ^ key1, a & _WORD
        key0, key1 = (key0 + 0x9E3779B9) & _WORD, (key1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3
