"""Random vectors that iterations start from, and norm estimates with random vectors.

A counter-based generator keyed on the seed and on the purpose. NumPy's Philox and not PyTorch's generator, whose stream
for a small seed is what many a matrix was drawn from: starting vectors that are rows of the matrix itself would say
nothing about the rest of it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

POWER, DENSITY, KRYLOV, PROBES, NORM = range(5)
"""Purposes of random vectors."""
PROBE_COUNT = 16
_FACTORS = {16: 3.0, 8: 8.0}


def normal(seed: int, purpose: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Independent standard normal numbers on the CPU, float32 or float64; the same for the same arguments."""
    bits = np.random.Philox(key=np.array([seed % 2**64, purpose], dtype=np.uint64))
    kind = np.float32 if dtype == torch.float32 else np.float64
    return torch.from_numpy(np.random.Generator(bits).standard_normal(shape, dtype=kind))


def probes(G: Tensor, seed: int) -> Tensor:
    """Standard normal columns ``(batch, n, 16)`` in float64, their entries representable in the dtype of ``G``."""
    x = normal(seed, PROBES, (G.shape[-1], PROBE_COUNT), torch.float64).to(G.device, G.dtype).double()
    return x.expand(len(G), -1, -1)


def probe_bound(EX: Tensor) -> Tensor:
    """``(batch,)``: a bound on ``‖E‖₂`` from ``E X (batch, m, k)`` for standard normal columns ``X``, 8 or 16 of them.

    The mean of ``‖E x‖²`` is ``‖E‖_F²``; its root is returned times 8 or 3. That eight columns find an eighth of
    ``‖E‖_F`` or less, or sixteen a third, happens less than once in two hundred thousand times where ``E`` has rank 1,
    and more rarely yet elsewhere.
    """
    return _FACTORS[EX.shape[-1]] * EX.square().sum(1).mean(1).sqrt()
