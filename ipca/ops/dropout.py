"""Dropout with counter-based random numbers: a mask depends on a seed only, so that kernels need not store it.

Entry ``(m, k)`` of an ``(M, K)`` input is dropped where its 16 random bits are below ``threshold = round(65536 p)``.
On a GPU they come from Philox4x32-7 on row and column (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
2011), as the kernels draw it in registers, see :mod:`ipca.kernels.dropout`: the *noise* that the op takes is a seed,
and backward draws the mask again. On a CPU drawing costs as much as a small product, so the noise is the mask itself,
one byte an entry, drawn once a step by NumPy's SFC64. A seed gives different masks on the two.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_ROUNDS = 7
_KEY = 0x9E3779B97F4A7C15, 0xD1B54A32D192ED03
# One generator, set to its seed in each call: making one takes as long as drawing the mask of a small layer.
_generator = np.random.SFC64(0)
_state: Any = _generator.state
_lock = threading.Lock()


def new_noise(x: Tensor, p: float, *, seed_only: bool) -> Tensor:
    """What the op takes for dropout of ``x (…, K)``: a seed, or on a CPU the mask ``(M, K)``.

    Args:
        seed_only: a seed on a CPU too, for kernels in Triton's interpreter.
    """
    seed = new_seed(x.device)
    return seed if seed_only or x.device.type != "cpu" else cpu_mask(seed, x.numel() // x.shape[-1], x.shape[-1], p)


def new_seed(device: torch.device) -> Tensor:
    """A seed, int64 ``(1,)`` on ``device``, from PyTorch's generator there."""
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)


def apply_dropout(x: Tensor, noise: Tensor, p: float) -> Tensor:
    """``x (M, K)`` with entries dropped with probability ``p`` and the others scaled by :func:`keep_scale`."""
    return torch.where(keep_mask(x, noise, p), x * keep_scale(p), 0.0)


def keep_scale(p: float) -> float:
    """``1 / P(kept)`` for ``p`` in steps of 2⁻¹⁶; 0 where nothing is kept."""
    threshold = round(p * 65536)
    return 65536 / (65536 - threshold) if threshold < 65536 else 0.0


def keep_mask(x: Tensor, noise: Tensor, p: float) -> Tensor:
    """The mask of ``x (M, K)``, True where an entry is kept: ``noise`` itself, or drawn from the seed that it is."""
    if noise.dtype == torch.bool:
        return noise
    return (cpu_mask if noise.device.type == "cpu" else kernel_mask)(noise, x.shape[0], x.shape[1], p)


@torch.library.custom_op("ipca::cpu_mask", mutates_args=())
def cpu_mask_op(seed: Tensor, M: int, K: int, p: float) -> Tensor:
    """:func:`cpu_mask` as an op."""
    return _draw(seed, M, K, p)


@cpu_mask_op.register_fake
def _(seed: Tensor, M: int, K: int, p: float) -> Tensor:
    return seed.new_empty(M, K, dtype=torch.bool)


def cpu_mask(seed: Tensor, M: int, K: int, p: float) -> Tensor:
    """The mask on a CPU; an op while tracing and under dispatch modes, because PyTorch cannot trace NumPy."""
    as_op = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
    return cpu_mask_op(seed, M, K, p) if as_op else _draw(seed, M, K, p)


def _draw(seed: Tensor, M: int, K: int, p: float) -> Tensor:
    with _lock:
        _state["state"]["state"][:] = int(seed), *_KEY, 1
        _generator.state = _state
        _generator.random_raw(12, output=False)  # as SFC64's own seeding, until every word depends on it
        words = _generator.random_raw((M * K + 3) // 4)
    bits = words.astype("<u8", copy=False).view("<u2")[: M * K]
    return torch.from_numpy(bits >= round(p * 65536)).view(M, K)


def kernel_mask(seed: Tensor, M: int, K: int, p: float) -> Tensor:
    """The mask of the kernels, on any device.

    Entry ``(m, k)`` reads half ``k % 2`` of word ``k % 8 // 2`` of Philox4x32-7 at counter ``(k // 8, m, 0, 0)``.
    """
    columns = torch.arange((K + 7) // 8, device=seed.device).expand(M, -1)
    rows = torch.arange(M, device=seed.device).unsqueeze(1).expand_as(columns)
    words = torch.stack(_philox(seed, columns, rows), dim=-1)
    bits = torch.stack((words & 0xFFFF, words >> 16), dim=-1).reshape(M, 8 * columns.shape[1]).narrow(1, 0, K)
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
