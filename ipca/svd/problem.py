"""A batch of matrices and what all their windows share: Gram matrices, largest singular values, density of states."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from ipca.svd.blocks import Blocks
from ipca.svd.density import CHAINS, STEPS, Density, spectral_density
from ipca.svd.ldlt import LDLT, factorize_shifted
from ipca.svd.random_vectors import KRYLOV, POWER, normal

_POWER_STEPS = 16


class MatrixBatch:
    """Tall matrices ``W (batch, m, n)`` of which windows are wanted; everything is in units of ``W / scale``.

    ``flops`` counts what was computed so far, for one matrix of the batch.
    """

    def __init__(self, W: Tensor, seed: int) -> None:
        self.blocks = Blocks(W)
        self.seed = seed
        self.flops = 0.0

    @property
    def m(self) -> int:
        return self.blocks.W.shape[1]

    @property
    def n(self) -> int:
        return self.blocks.W.shape[2]

    @cached_property
    def gram(self) -> Tensor:
        """``Wᵀ W (batch, n, n)``."""
        self.flops += self.m * self.n**2
        return self.blocks.gram()

    @cached_property
    def gram32(self) -> Tensor:
        """The same to float32: a copy where :attr:`gram` is known, else at half its cost."""
        if "gram" in self.__dict__:
            return self.gram.float()
        self.flops += self.m * self.n**2
        return self.blocks.gram(torch.float32)

    @cached_property
    def sigma1(self) -> Tensor:
        """``(batch,)``; a lower bound of the largest singular value, usually within a few percent."""
        G = self.gram if "gram" in self.__dict__ else self.gram32
        v = normal(self.seed, POWER, (self.n, 1), G.dtype).to(G.device).expand(len(self.blocks), -1, -1)
        for _ in range(_POWER_STEPS):
            v = G @ (v / v.norm(dim=1, keepdim=True).clamp_min(torch.finfo(v.dtype).tiny))
        self.flops += 2 * _POWER_STEPS * self.n**2
        return v.norm(dim=1)[:, 0].double().sqrt() * (1 - 1e-5)  # float32 may round upwards

    @cached_property
    def density(self) -> Density:
        self.flops += 2 * STEPS * CHAINS * self.n**2
        return spectral_density(self.gram32, self.seed)

    def start(self, width: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Random columns ``(batch, n, width)``, for a given seed the same for every matrix."""
        columns = normal(self.seed, KRYLOV, (self.n, width), dtype)
        return columns.to(self.blocks.W.device).expand(len(self.blocks), -1, -1)

    def factorize(self, shift: Tensor) -> LDLT:
        """``G − shift I = L D Lᵀ`` for ``shift (batch,)``."""
        self.__dict__.pop("gram32", None)  # its memory is wanted for the factor
        self.flops += self.n**3 / 3
        return factorize_shifted(self.gram, shift)

    def part(self, rows: list[int]) -> MatrixBatch:
        """The matrices at the places ``rows``, with what is known of them."""
        if len(rows) == len(self.blocks):
            return self
        part = object.__new__(MatrixBatch)
        part.blocks, part.seed, part.flops = self.blocks[rows], self.seed, self.flops
        for name in ("gram", "gram32", "sigma1"):
            if name in self.__dict__:
                part.__dict__[name] = self.__dict__[name][rows]
        return part
