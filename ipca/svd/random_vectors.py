"""The random vectors that iterations start from: a counter generator, keyed on the seed and on what the draw is for.

NumPy's Philox and not PyTorch's generator, whose stream for a small seed is what many a matrix was drawn from: starting
vectors that are rows of the matrix itself would say nothing about the rest of it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

POWER, DENSITY, KRYLOV, PROBES = range(4)
"""What draws are for."""


def normal(seed: int, purpose: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Independent standard normal numbers on the CPU, float32 or float64; the same for the same arguments."""
    bits = np.random.Philox(key=np.array([seed % 2**64, purpose], dtype=np.uint64))
    kind = np.float32 if dtype == torch.float32 else np.float64
    return torch.from_numpy(np.random.Generator(bits).standard_normal(shape, dtype=kind))
